"""Runs with tools, from the first turn to the report: the tiny models' vocabulary has whole calls as tokens."""

import json

import numpy as np
import pytest

from opsd.config.tools import ToolsConfig
from opsd.data.thoughts import response_text
from tests.integration.runs import TRANSFORMERS, finished, losses, training_lines
from tests.opsd.agents.agent_models import BUILD, make_agent_model
from tests.opsd.agents.in_process import trajectories_of
from tests.opsd.agents.some_tools import NAMES
from tests.teacher_servers import TOKEN, client_token, teacher_server

pytestmark = pytest.mark.usefixtures("joined")


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    root = tmp_path_factory.mktemp("agents")
    make_agent_model(root / "student", seed=2)
    make_agent_model(root / "teacher", seed=1, tied=False)
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "answer": str(n), "start": n} for n in range(12)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


SETTINGS = (
    *TRANSFORMERS,
    f"tools.build={BUILD}",
    "tools.max_turns=3",
    "tools.max_answer_chars=40",
    "rollout.max_response_tokens=160",
    "learner.micro_batch_tokens=256",
    "num_steps=2",
    "log.token_view_rollouts=12",
)


EVERY_EVENT = ("teacher.top_k=128", "loss.support=union", "teacher.score_candidates=true")


def is_even(response, answer):
    """Whether the last turn of a trajectory has so many characters."""
    return len(response) % 2 == 0


@pytest.mark.slow
def test_a_run_learns_from_the_students_tokens_and_counts_the_tools(agents, tmp_path):
    asked = ("eval.num_problems=12", f"data.grader={__name__}:is_even")
    folder = finished(agents, tmp_path / "run", *SETTINGS, *asked)
    lines = training_lines(folder)
    assert len(lines) == 2
    for line in lines:
        assert np.isfinite(line["loss"]) and line["loss"] > 0
        assert line["tools/trajectories"] == 12 and 1 < line["tools/turns"] < line["tools/turns_max"] <= 3
        assert 0 < line["tools/token_share"] < 1 and 0 < line["tools/failed"] < line["tools/calls"]
        assert line["tools/failed"] == sum(value for name, value in line.items() if name.startswith("tools/failed/"))
        assert sum(value for name, value in line.items() if name.startswith("tools/ended/")) == 12
        assert 0 < line["num_kept"] < line["num_tokens"]  # of the student's, half of which tip drops
    failed = {name for line in lines for name in line if name.startswith("tools/failed/")}
    assert {"tools/failed/malformed", "tools/failed/raised", "tools/failed/unknown_tool"} <= failed
    report = (folder / "report.html").read_text()
    assert 'class="tool">[T:' in report and "calls of tools" in report
    shown = "".join(f"({name})" for name in NAMES)
    requests = [({"start": n}, f"{shown}[u:{n}?<end>[a:", 0) for n in range(12)]
    tools = ToolsConfig(build=BUILD, max_turns=3, max_answer_chars=40)
    tokenizer, answers = trajectories_of(agents / "teacher", requests, tools=tools, max_tokens=160, temperature=0.0)
    assert len({answer.trajectory.num_turns for answer in answers}) > 1
    right = [is_even(response_text(answer, tokenizer), "") for answer in answers]
    assert json.loads((folder / "summary.json").read_text())["teacher_accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.long
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(agents, tmp_path):
    settings = (*SETTINGS, "checkpoint.every=1", "num_steps=3")
    expected = losses(finished(agents, tmp_path / "whole", *settings))
    finished(agents, tmp_path / "parts", *settings, "stop_at_step=2")
    again = losses(finished(agents, tmp_path / "parts", *settings, "resume=auto"))
    assert again == pytest.approx(expected, abs=1e-6) and len(set(expected)) == 3


@pytest.mark.long
def test_trajectories_that_are_made_ahead_are_the_same_each_time(agents, tmp_path):
    settings = (*SETTINGS, "schedule.max_staleness=1", "num_steps=3")
    first, second = (losses(finished(agents, tmp_path / name, *settings)) for name in ("first", "second"))
    assert first == pytest.approx(second, abs=1e-6) and len(set(first)) == 3


@pytest.mark.long
def test_trajectories_go_on_under_new_weights(agents, tmp_path):
    """Turns that begin under new weights, and turns that these interrupt."""
    ahead = ("schedule.max_staleness=1", "schedule.partial_rollouts=true", "rollout.max_num_seqs=2", "num_steps=4")
    lines = training_lines(finished(agents, tmp_path, *SETTINGS, *ahead))
    assert len(lines) == 4 and any(line["mixed_versions"] > 0 for line in lines)
    assert all(0 <= line["staleness"] <= line["staleness_max"] <= 1 for line in lines)


@pytest.fixture(scope="module")
def plain(agents, tmp_path_factory):
    """The losses with one engine, one rank, the teacher in the run; every event has a bucket of its own."""
    return losses(finished(agents, tmp_path_factory.mktemp("plain") / "run", *SETTINGS, *EVERY_EVENT))


# Each of these has a sibling without a run in tests/opsd/agents/test_trajectories_elsewhere.py.
@pytest.mark.long
def test_two_engines_and_two_ranks_give_the_losses_of_one(agents, plain, tmp_path):
    more = ("rollout.num_workers=2", "rollout.max_num_seqs=2", "teacher.num_workers=2", "learner.num_workers=2")
    assert losses(finished(agents, tmp_path / "run", *SETTINGS, *EVERY_EVENT, *more)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.long
def test_the_loss_of_hidden_states_is_the_dense_one(agents, plain, tmp_path):
    folder = finished(agents, tmp_path / "run", *SETTINGS, *EVERY_EVENT, "loss.payload=hidden")
    assert losses(folder) == pytest.approx(plain, abs=1e-4)


@pytest.mark.long
def test_a_teacher_behind_a_server_gives_the_losses_of_the_one_in_the_run(agents, plain, tmp_path):
    with client_token(), teacher_server(agents / "teacher", "teacher.top_k=128", token=TOKEN) as server:
        served = ("teacher.backend=http", "teacher.path=''", f"teacher.urls=[{server.url}]")
        folder = finished(agents, tmp_path / "run", *SETTINGS, *EVERY_EVENT, *served)
    assert losses(folder) == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_a_run_with_vllm_engines(agents, tmp_path):
    """With one stop token: of several, vLLM's likeliest events hold only some, and here all are as likely."""
    for name, seed in (("student", 2), ("teacher", 1)):
        make_agent_model(tmp_path / name, seed=seed, tied=name == "student", stops="")
    (tmp_path / "prompts.jsonl").write_text((agents / "prompts.jsonl").read_text())
    engines = ("rollout.backend=vllm", "teacher.backend=vllm", "rollout.max_num_seqs=4")
    room = ("rollout.max_response_tokens=300", "learner.micro_batch_tokens=512")
    lines = training_lines(finished(tmp_path, tmp_path / "run", *SETTINGS, *engines, *room))
    assert all(line["tools/trajectories"] == 12 and line["tools/turns"] > 1 for line in lines)
