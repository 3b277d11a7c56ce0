"""A small world to try agents in: a table that only a tool can read, and a question about a few of its values.

    tools.build=opsd.agents.lookups:build_tools

A row brings its own table:
{"prompt": [{"role": "user", "content": "b+d?"}], "answer": "12", "table": {"b": 7, "d": 5}}.
`recipes/agent_quickstart.sh` trains a student on it that a CPU can learn.
"""

from __future__ import annotations

from typing import Any

GET = "get"
SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": GET,
            "description": "The value of a key of the table.",
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "string"}},
                "required": ["key"],
                "additionalProperties": False,
            },
        },
    }
]


class Table:
    """The session of one row."""

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        key = arguments["key"]
        if key not in self.values:
            raise KeyError(f"the table has no {key}")
        return str(self.values[key])

    def close(self) -> None:
        pass


class Lookups:
    schemas = SCHEMAS

    def open(self, row: dict[str, Any]) -> Table:
        """Raises ValueError for a row without a table."""
        table = row.get("table")
        if not isinstance(table, dict):
            raise ValueError(f"expected a field 'table' with an object of keys and values, got {table!r}")
        return Table(table)


def build_tools() -> Lookups:
    return Lookups()
