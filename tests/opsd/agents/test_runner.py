"""Calls of many trajectories in other processes: what goes wrong with one is an answer, and holds up no other."""

import time

import pytest

from opsd.agents.calls import Malformed
from opsd.agents.runner import ToolRunner
from opsd.agents.tools import Answered, ToolCall
from opsd.errors import ConfigError

BUILD = "tests.opsd.agents.some_tools:build_tools"


@pytest.fixture(scope="module")
def runner():
    made = ToolRunner(build=BUILD, options={}, processes=1, call_timeout_s=1.0, max_answer_chars=100)
    yield made
    made.close()


def one(runner, key, name, n=1, row=None, **more):
    [answered] = runner.submit(key, row or {}, [ToolCall(name, {"n": n, **more})]).result(timeout=20)
    return answered


def test_a_session_keeps_its_state_and_knows_its_row(runner):
    assert one(runner, "a", "add", 2, {"start": 40}) == Answered("add", "total 42")
    assert one(runner, "b", "add", 2).text == "total 2"
    assert one(runner, "a", "add", 1).text == "total 43"


def test_calls_of_a_turn_are_made_in_order_and_none_after_one_that_ends_it(runner):
    calls = [ToolCall("add", {"n": 1}), Malformed("no"), ToolCall("submit", {"n": 1}), ToolCall("add", {"n": 1})]
    answers = runner.submit("c", {}, calls).result(timeout=20)
    assert [(a.text, a.ends, a.kind) for a in answers] == [
        ("total 1", False, ""),
        ("error: no", False, "malformed"),
        ("done", True, ""),
    ]


@pytest.mark.parametrize(
    ("name", "n", "kind", "said"),
    [
        ("nothing", 1, "unknown_tool", "there is no tool 'nothing', the tools are: add"),
        ("add", "one", "bad_arguments", "arguments['n'] of add: 'one' is not of type 'integer'"),
        ("fail", 1, "raised", "fail raised ValueError: two lines"),
        ("bytes", 1, "not_text", "bytes returned bytes"),
        ("half", 1, "not_text", "a?b\n"),
        ("long", 1_000_000, "too_long", "the first 100 of 1000000 characters"),
    ],
)
def test_what_goes_wrong_is_told_and_counted(runner, name, n, kind, said):
    answered = one(runner, ("wrong", name, n), name, n)
    assert answered.kind == kind and said in answered.text and len(answered.text) < 300
    assert one(runner, ("wrong", name, n), "add").text == "total 1"


def test_too_many_arguments_are_refused(runner):
    assert one(runner, "d", "add", 1, more=2).kind == "bad_arguments"


def test_the_rows_own_tools_are_the_only_ones(runner):
    own = [{"type": "function", "function": {"name": "add", "parameters": {"required": ["m"]}}}]
    assert one(runner, "e", "add", 1, {"tools": own}).kind == "bad_arguments"
    assert one(runner, "e", "later", 1, {"tools": own}).kind == "unknown_tool"


def test_a_hung_call_holds_up_no_other_trajectory(runner):
    began = time.monotonic()
    hung = runner.submit("f", {}, [ToolCall("hang", {"n": 1}), ToolCall("add", {"n": 1})])
    while not hung.done():
        assert one(runner, "g", "add").kind == ""
    first, second = hung.result()
    assert first.kind == second.kind == "timed_out" and "within 1 s" in first.text and "earlier call" in second.text
    assert time.monotonic() - began < 4
    runner.close_trajectory("f")


def test_a_call_that_was_too_late_and_has_returned_is_forgotten(runner):
    assert one(runner, "h", "sleep", 1300).kind == "timed_out"
    assert one(runner, "h", "add").kind == "timed_out"
    time.sleep(0.6)
    assert one(runner, "h", "add").text == "total 1"


def test_trajectories_do_not_wait_for_each_other(runner):
    began = time.monotonic()
    futures = [runner.submit(("many", i), {}, [ToolCall("sleep", {"n": 250})]) for i in range(16)]
    assert {future.result()[0].text for future in futures} == {"slept 250"}
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["die", "spin"])
def test_a_process_that_ends_or_is_stuck_loses_its_trajectories_and_is_replaced(monkeypatch, name):
    monkeypatch.setattr("opsd.agents.runner.STUCK_S", 0.3)
    runner = ToolRunner(build=BUILD, options={}, processes=1, call_timeout_s=0.5)
    try:
        assert one(runner, "a", "add").text == "total 1"
        answered = one(runner, "b", name, 40)
        assert answered.kind == ("lost" if name == "die" else "timed_out")
        deadline = time.monotonic() + 20
        while one(runner, "a", "add").kind != "lost":  # its state was there
            assert time.monotonic() < deadline
        assert one(runner, "c", "add").text == "total 1"
    finally:
        runner.close()


def test_a_closed_trajectory_closes_its_session(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOOLS_LOG", str(tmp_path / "log"))
    runner = ToolRunner(build=BUILD, options={"names": ["add"]}, call_timeout_s=5.0)
    one(runner, "a", "add", 7)
    runner.close_trajectory("a")
    runner.close_trajectory("never opened")
    deadline = time.monotonic() + 5
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
    assert (tmp_path / "log").read_text() == "closed at 7\n"
    assert runner.open({}) == "" and "RuntimeError: no such world" in runner.open({"unopenable": True})
    assert [each["function"]["name"] for each in runner.schemas] == ["add"]
    runner.close()


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        ("tests.opsd.agents.some_tools:build_nothing", {}, "RuntimeError: the service is down"),
        ("tests.opsd.agents.some_tools:none", {}, "has no none"),
        ("tests.opsd.agents.no_tools:build", {}, "cannot import"),
        (BUILD, {"name": 1}, "names=/name=|unexpected keyword"),
        (BUILD, {"names": []}, "schemas, at least one"),
        (BUILD, {"names": ["add", "add"]}, "two tools have the name 'add'"),
        ("os:_exit", {"status": 7}, "exit code 7"),
    ],
)
def test_tools_that_cannot_be_built_are_refused_in_a_line(build, options, said):
    with pytest.raises(ConfigError) as raised:
        ToolRunner(build=build, options=options)
    assert any(part in str(raised.value) for part in said.split("|")) and "\n" not in str(raised.value)
