"""Tools of a real MCP server over stdio, as trajectories call them."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from opsd.agents.runner import ToolRunner
from opsd.agents.tools import ToolCall
from opsd.errors import ConfigError

pytest.importorskip("mcp")
pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes
BUILD = "opsd.agents.mcp:build_tools"
COMMAND = [sys.executable, str(Path(__file__).parent / "mcp_server.py")]


def started(monkeypatch, **options):
    monkeypatch.setenv("OF_THE_RUN", "a secret")
    monkeypatch.setenv("OF_THE_SERVER", "given")
    own = {"command": COMMAND, "env": ["OF_THE_SERVER"], **options}
    return ToolRunner(build=BUILD, options=own, call_timeout_s=60.0)


@pytest.fixture(scope="module")
def runner():
    """A server per trajectory."""
    with pytest.MonkeyPatch.context() as patch:
        made = started(patch, timeout_s=2.0)
    yield made
    made.close()


def one(runner, key, name, **arguments):
    [answered] = runner.submit(key, {}, [ToolCall(name, arguments)]).result(timeout=60)
    return answered


def wait_for_end(pids):
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_servers_tools_are_the_students(runner):
    names = [schema["function"]["name"] for schema in runner.schemas]
    assert names == ["add", "look", "draw", "refuse", "wait", "die", "told_of_the_run"]
    function = runner.schemas[0]["function"]
    assert function["description"] == "Adds a number to what was added before."
    assert function["parameters"]["required"] == ["n"]
    assert function["parameters"]["properties"]["n"]["type"] == "integer"


def test_each_trajectory_has_a_server_of_its_own_that_ends_with_it(runner):
    first = one(runner, "a", "add", n=40).text
    assert first.startswith("total 40 of ") and one(runner, "a", "add", n=2).text == first.replace("40", "42", 1)
    second = one(runner, "b", "add", n=1).text
    pids = [int(text.split()[-1]) for text in (first, second)]
    assert second.startswith("total 1 of ") and len(set(pids)) == 2
    assert {one(runner, key, "told_of_the_run").text for key in "ab"} == {"None given"}
    for key in "ab":
        runner.close_trajectory(key)
    wait_for_end(pids)


def test_what_a_server_answers_is_text(runner):
    assert one(runner, "e", "look", number=3).text == '{\n  "number": 3,\n  "where": "ä"\n}'
    assert one(runner, "e", "draw").text == "two of them:\n[image: not text, left out]"


def test_what_goes_wrong_is_an_answer(runner):
    refused = one(runner, "d", "refuse")
    assert (refused.kind, refused.text) == ("raised", "error: refuse raised ServerError: no such place")
    assert one(runner, "d", "add", n="one").kind == "bad_arguments"
    late = one(runner, "d", "wait", seconds=3600.0)  # timeout_s: then its thread is free again
    assert late.kind == "raised" and "timed out" in late.text
    assert one(runner, "d", "add", n=1).text.startswith("total 1 ")
    assert one(runner, "e", "add", n=5).text.startswith("total 5 ")
    dead = one(runner, "d", "die")
    assert dead.kind == "raised" and "Connection closed" in dead.text
    assert one(runner, "d", "add", n=1).kind == "raised"
    assert one(runner, "e", "add", n=1).text.startswith("total 6 ")  # another trajectory's server


def test_a_shared_server_is_one_for_all_and_started_again_where_it_has_ended(monkeypatch):
    runner = started(monkeypatch, shared=True)
    try:
        texts = [one(runner, key, "add", n=1).text for key in "abc"]
        assert [text.split(" of ")[0] for text in texts] == ["total 1", "total 2", "total 3"]
        assert one(runner, "a", "die").kind == "raised"
        pid = int(one(runner, "d", "add", n=1).text.removeprefix("total 1 of "))
    finally:
        runner.close()
    wait_for_end([pid])  # with the process of the tools


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"command": ["/no/such/program"]}, "raised FileNotFoundError: .*/no/such/program"),
        ({"command": [sys.executable, "-c", ""]}, "raised MCPError: Connection closed"),
        (
            {"command": "python server.py"},
            "command must be a list of a program and its arguments, got 'python s",
        ),
        ({"command": COMMAND, "env": ["OF_NOBODY"]}, "tools.options.env: OF_NOBODY is not set"),
        ({"commands": []}, "must be a function of .commands=.: "),
    ],
)
def test_a_server_that_cannot_be_started_is_one_line(options, said):
    with pytest.raises(ConfigError, match=f"tools.build={BUILD}.*{said}") as caught:
        ToolRunner(build=BUILD, options=options)
    assert "\n" not in str(caught.value)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    from opsd.agents.mcp import build_tools

    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"needs the package mcp: pip install '\.\[mcp\]'"):
        build_tools(command=COMMAND)
