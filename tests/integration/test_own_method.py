"""A statistic, a score, a loss with a row input and a grader in one module of the user's own, through a real run."""

import json

import pytest

from tests.integration.runs import ROOT, train_as_a_user, training_lines

MODULE = """
import json
import os

from opsd.ops.losses.objective import Loss
from opsd.ops.losses.table import LOSSES
from opsd.ops.row_function import RowFunction
from opsd.ops.signals import STATISTICS
from tip.adjustments import ADJUSTMENTS, with_input
from tip.plugin import build_hooks
from tip.scores import SCORES


def teacher_best(student_logprobs_NB, teacher_logprobs_NB):
    return teacher_logprobs_NB[:, :-1].amax(1)


def best_id(student_logprobs_NB, teacher_logprobs_NB, *, support_NU):
    best_N1 = teacher_logprobs_NB[:, :-1].argmax(1, keepdim=True)
    return support_NU.gather(1, best_N1)[:, 0].to(student_logprobs_NB.dtype)


def doubt(stats, options):
    seen = {"best": stats.extra["best_T"], "id": stats.extra["id_T"], "sampled": stats.teacher_logprob_T}
    with open(os.environ["SEEN"], "a") as lines:
        lines.write(json.dumps({name: value_T.tolist() for name, value_T in seen.items()}) + "\\n")
    return -stats.extra["best_T"]


def share(batch, selection):
    return with_input(selection, "share_N", batch.progress + 0 * selection.weight_N)


def shared_kl(student_logprobs_NB, teacher_logprobs_NB, *, share_N):
    return (1 + share_N) * (student_logprobs_NB[:, 0] - teacher_logprobs_NB[:, 0]).square()


def is_short(response, answer):
    return len(response) < 8


STATISTICS["best_T"] = teacher_best
STATISTICS["id_T"] = RowFunction(best_id, inputs=("support_NU",))
SCORES["doubt"] = doubt
ADJUSTMENTS["share"] = share
LOSSES["shared_kl"] = Loss(shared_kl, inputs=("share_N",))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["rollout", pytest.param("learner", marks=pytest.mark.long)])
def test_a_users_module_needs_no_edit_here(pair, tmp_path, monkeypatch, stats):
    (tmp_path / "my_run.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    run = train_as_a_user(  # whose process finds the module, and forgets what it adds to the project's dicts
        pair, tmp_path / "run", "hooks=my_run:build_hooks", "selector.score=doubt", "loss.divergence=shared_kl",
        "+adjust.share={}", "data.grader=my_run:is_short", f"stats={stats}", "num_steps=2", "data.prompts_per_step=4",
        "data.eval_path=", "rollout.backend=transformers", "teacher.backend=transformers",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    lines = training_lines(tmp_path / "run")
    assert [0 <= line["accuracy_train"] <= 1 for line in lines] == [True, True]
    assert all(line["loss"] > 0 for line in lines)
    _, *steps = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]  # the first: made up
    assert [len(step["best"]) for step in steps] == [line["num_tokens"] for line in lines]
    for step in steps:
        # The sampled event is one of the buckets, so the teacher's best is at least as likely.
        assert all(best >= sampled - 1e-4 for best, sampled in zip(step["best"], step["sampled"], strict=True))
        assert all(token >= 0 and token == int(token) for token in step["id"])
