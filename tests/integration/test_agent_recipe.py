"""Two real steps of recipes/agent_quickstart.sh, on models that have only just learnt to call."""

import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from make_pair import tiny_settings, write_record, write_rows
from pairs.lookups import LOOKUPS
from pairs.task import distinct
from pairs.training import build_model, texts_of, train
from tests.integration.runs import training_lines
from tests.recipes.recipe import start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the recipe runs in, with the pair that it would otherwise train for minutes."""
    root = tmp_path_factory.mktemp("agent")
    pair, tokenizer = root / "outputs" / "agent-pair", LOOKUPS.tokenizer()
    pair.mkdir(parents=True)
    for number, plan in enumerate((LOOKUPS.teacher, LOOKUPS.student)):
        torch.manual_seed(number)
        plan = replace(plan, num_steps=100, batch_texts=32, stop_at=None)
        model = build_model(plan, len(tokenizer))
        train(model, plan, texts_of(LOOKUPS, plan, 0), tokenizer, lambda *_: 0.0)
        model.save_pretrained(pair / plan.name)
        tokenizer.save_pretrained(pair / plan.name)
    rows = [LOOKUPS.row(problem) for problem in distinct(islice(LOOKUPS.draw("rows"), 64), 16)]
    for name in ("train", "eval"):
        write_rows(pair / f"{name}.jsonl", rows)
    write_record(pair, tiny_settings("lookups", 0))
    return root


def test_the_student_calls_the_tool_and_learns_from_its_own_tokens(folder):
    smaller = ["num_steps=2", "data.prompts_per_step=8", "eval.num_problems=8", "log.wandb=off", "log.dashboard=false"]
    engines = ["rollout.backend=transformers", "teacher.backend=transformers"]
    process = start("agent_quickstart.sh", *smaller, *engines, cwd=folder, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = training_lines(folder / "outputs" / "agent_quickstart")
    assert len(lines) == 2
    for line in lines:
        assert math.isfinite(line["loss"]) and line["tools/trajectories"] == 8
        assert line["tools/turns"] > 1 and line["tools/calls"] > line["tools/failed"]  # the table has answered
    assert (folder / "outputs" / "agent_quickstart" / "report.html").is_file()
    summary = json.loads((folder / "outputs" / "agent_quickstart" / "summary.json").read_text())
    assert 0 <= summary["teacher_accuracy"] <= 1  # over trajectories of its own
