"""The calls in the text of a turn, malformed ones among them."""

import pytest

from opsd.agents.calls import PARSERS, Malformed
from opsd.agents.tools import ToolCall

hermes = PARSERS["hermes"]


def test_calls_come_in_the_order_of_the_text():
    text = (
        'I look both up.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>\n'
        '<tool_call>{"name":"now","arguments":{}}</tool_call>'
    )
    assert hermes(text) == (ToolCall("add", {"a": 1, "b": [2]}), ToolCall("now", {}))


def test_a_turn_without_calls_is_an_answer():
    assert hermes("The answer is 4. #### 4") == ()


def test_a_call_without_arguments_has_none():
    assert hermes('<tool_call>{"name": "now"}</tool_call>') == (ToolCall("now", {}),)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ('{"name": "add", "arguments": {"a": 1}', "not valid JSON"),
        ('{"name": "add", "name": "sub"}', "twice"),
        ("[1, 2]", "JSON object"),
        ('{"arguments": {}}', "'name'"),
        ('{"name": 3}', "'name'"),
        ('{"name": "add", "arguments": "a=1"}', "arguments of add"),
        ("", "not valid JSON"),
    ],
)
def test_a_malformed_call_says_what_is_wrong_and_hides_no_other(block, said):
    good = '<tool_call>{"name": "now"}</tool_call>'
    first, second, third = hermes(f"{good}<tool_call>{block}</tool_call>{good}")
    assert isinstance(second, Malformed) and said in second.said
    assert first == third == ToolCall("now", {})


def test_a_call_that_is_not_closed_ends_where_the_next_one_begins():
    text = '<tool_call>{"name": "now"}<tool_call>{"name": "now"}</tool_call>'
    assert hermes(text) == (Malformed("the call is not closed by </tool_call>"), ToolCall("now", {}))


def test_a_thought_calls_nothing():
    call = '<tool_call>{"name": "now"}</tool_call>'
    assert hermes(f"<think>maybe {call}</think>No.") == ()
    assert hermes(f"<think>maybe {call}") == ()
    assert hermes(f"<think>yes</think>{call}") == (ToolCall("now", {}),)
