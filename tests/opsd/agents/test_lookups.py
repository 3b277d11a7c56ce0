"""The small world's tool: its schema, its answers, and what a wrong row or key is told."""

import pytest

from opsd.agents.lookups import build_tools


def test_a_value_of_the_rows_own_table():
    tools = build_tools()
    sessions = [tools.open({"table": {"b": value}}) for value in (7, 12)]
    assert [session.call("get", {"key": "b"}) for session in sessions] == ["7", "12"]
    assert [schema["function"]["name"] for schema in tools.schemas] == ["get"]


def test_an_unknown_key_says_so():
    with pytest.raises(KeyError, match="the table has no x"):
        build_tools().open({"table": {"b": 7}}).call("get", {"key": "x"})


def test_a_row_without_a_table_is_refused():
    with pytest.raises(ValueError, match="expected a field 'table' with an object of keys and values, got None"):
        build_tools().open({"prompt": "b?"})
