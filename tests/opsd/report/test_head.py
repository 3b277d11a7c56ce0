"""What the head of a report says of the loss."""

import json

import pytest

from opsd.report.page import render_page
from opsd.report.read import read_run
from tests.opsd.report.test_report import Page, summary, write_run


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"payload": "hidden"}, "support every token (hidden states)"),
        ({"residual": True}, "support union, with the residual"),
    ],
)
def test_the_head_says_what_the_loss_saw_of_the_teacher(tmp_path, loss, said):
    config = {"student": {"path": "models/pupil"}, "loss": {"divergence": "reverse_kl", **loss}}
    run_dir = write_run(tmp_path)
    (run_dir / "summary.json").write_text(json.dumps({**summary(), "config": config, "support": "union"}))
    assert said in Page(render_page(read_run(run_dir))).text
