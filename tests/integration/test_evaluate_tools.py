"""`python -m opsd.evaluate` with tools: real engines on Ray, and the trajectories are those of a training's work."""

import json

import numpy as np
import pytest

from opsd.config.tools import ToolsConfig
from opsd.data.math_process import Judgement
from opsd.engines.pool import request_seed
from opsd.evaluation.compare import compare, mean_scores
from opsd.evaluation.results import read_results
from tests.command_line import command_line
from tests.opsd.agents.agent_models import BUILD, make_agent_model
from tests.opsd.agents.in_process import trajectories_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
SAMPLES, SEED, MAX_TOKENS = 4, 3, 160
TOOLS = {"build": BUILD, "max_turns": 3, "max_answer_chars": 40}
COUNTS = ("tools/trajectories", "tools/calls", "tools/failed")


def graded(response, answer):
    """Some of the answers of a model with random weights are right, and each has a score."""
    return Judgement(right=len(response) % 2 == 0, value=None, gave_up=False, score=min(1.0, len(response) / 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    make_agent_model(root / "first", seed=2)
    make_agent_model(root / "second", seed=1)
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "answer": str(n), "start": n} for n in range(5)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def evaluation(folder):
    settings = [
        f"output_dir={folder}/out", f"+models.first={folder}/first", f"+models.second={folder}/second",
        f"data.paths=[{folder}/sums.jsonl]", f"data.grader={__name__}:graded", f"samples_per_problem={SAMPLES}",
        f"max_response_tokens={MAX_TOKENS}", "latency_problems=1", f"seed={SEED}", "engine.backend=transformers",
        "dashboard=false", *(f"tools.{name}={value}" for name, value in TOOLS.items()),
    ]  # fmt: skip
    process = command_line("opsd.evaluate", settings)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((folder / "out" / "summary.json").read_text()), process.stdout


def test_an_evaluations_trajectories_are_those_of_a_training_and_can_be_read(folder, evaluation):
    results = read_results(folder / "out" / "first.jsonl")
    assert [result.prompt for result in results][0].endswith("[u:0?<end>[a:") and len(results) == 5
    requests = [
        ({"start": result.row}, result.prompt, request_seed(SEED, result.row, sample))
        for result in results
        for sample in range(SAMPLES)
    ]
    tokenizer, expected = trajectories_of(folder / "first", requests, tools=ToolsConfig(**TOOLS), max_tokens=MAX_TOKENS)
    answers = [answer for result in results for answer in result.answers]
    assert len({len(answer.tool_use.turns) for answer in answers}) == 3
    for answer, rollout in zip(answers, expected, strict=True):
        used = answer.tool_use
        read = "".join(turn.wrote + turn.read for turn in used.turns)
        assert read == tokenizer.decode(rollout.trajectory.read_ids) and used.turns[-1].read == ""
        assert all(turn.read.startswith("[T:") and turn.read.endswith("[a:") for turn in used.turns[:-1])
        assert (answer.tokens, used.num_read) == (len(rollout), len(rollout.trajectory.read_ids))
        assert (used.end, used.num_calls, used.failures) == (
            rollout.trajectory.end, rollout.trajectory.num_calls, rollout.trajectory.failures,
        )  # fmt: skip
        last = rollout.response_ids[rollout.trajectory.turn_starts[-1] :]
        assert answer.text == tokenizer.decode(last, skip_special_tokens=True)
        assert answer.score == graded(answer.text, "").score and answer.correct == graded(answer.text, "").right


def test_scores_and_tools_are_in_the_summary_and_the_tables(folder, evaluation):
    summary, stdout = evaluation
    for name, model in summary["models"].items():
        results, figures = read_results(folder / "out" / f"{name}.jsonl"), model["figures"]["sums"]
        scores = np.array([result.scores for result in results])
        assert figures["avg@4"] == pytest.approx(scores.mean())
        assert figures["best@4"] == pytest.approx(scores.max(1).mean()) and figures["best@4"] > figures["avg@4"]
        used = [answer.tool_use for result in results for answer in result.answers]
        tokens = sum(answer.tokens for result in results for answer in result.answers)
        assert [figures[each] for each in COUNTS] == [
            20, sum(each.num_calls for each in used), sum(sum(each.failures.values()) for each in used),
        ]  # fmt: skip
        assert figures["tools/turns"] == pytest.approx(np.mean([len(each.turns) for each in used]))
        assert 0 < figures["tools/token_share"] == pytest.approx(1 - tokens / sum(each.num_read for each in used))
        assert sum(value for key, value in figures.items() if key.startswith("tools/ended/")) == 20
        assert figures["tools/failed/raised"] == sum(each.failures.get("raised", 0) for each in used) > 0
        assert f"| {name} | sums | 5 |" in stdout
    assert "| tools | first, sums | second, sums |" in stdout and "| trajectories | 20 | 20 |" in stdout


def test_two_models_with_tools_are_compared(folder, evaluation):
    files = [folder / "out" / f"{name}.jsonl" for name in ("first", "second")]
    first, second = (mean_scores(read_results(file)).mean() for file in files)
    *_, row = compare([str(file) for file in files], 100, 0).splitlines()
    assert first != second and row.startswith(f"| sums | 5 | second | {second:.3f} | first | {first:.3f} | ")
