"""Tools for the tests: three that work, and some that do what tools should not."""

import asyncio
import os
import time

from opsd.agents.tools import ToolAnswer

ONE_NUMBER = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
NAMES = ("add", "later", "submit", "fail", "hang", "long", "bytes", "half", "die", "spin", "sleep")


class Counter:
    """A session: what is added stays in it."""

    def __init__(self, row):
        if row.get("unopenable"):
            raise RuntimeError("no such world")
        self.total = row.get("start", 0)

    def call(self, name, arguments):
        return getattr(self, name)(**arguments)

    def add(self, n):
        self.total += n
        return f"total {self.total}"

    async def later(self, n):
        await asyncio.sleep(0.01 * n)
        return f"later {n}"

    def submit(self, n):
        return ToolAnswer("done", ends=True)

    def fail(self, n):
        raise ValueError("two\nlines")

    def hang(self, n):
        time.sleep(3600)

    def sleep(self, n):
        time.sleep(n / 1000)
        return f"slept {n}"

    def long(self, n):
        return "x" * n

    def bytes(self, n):
        return b"\xff\xfe"

    def half(self, n):
        return "a\ud800b"

    def die(self, n):
        os._exit(n)

    def spin(self, n):
        """Holds Python's lock, as a regular expression or a C library may."""
        import re

        re.match(r"(a+)+$", "a" * n + "b")

    def close(self):
        log = os.environ.get("SOME_TOOLS_LOG")
        if log:
            with open(log, "a") as file:
                file.write(f"closed at {self.total}\n")


class SomeTools:
    def __init__(self, names):
        self.schemas = [
            {"type": "function", "function": {"name": name, "description": name, "parameters": ONE_NUMBER}}
            for name in names
        ]

    def open(self, row):
        return Counter(row)


def build_tools(names=NAMES):
    return SomeTools(names)


def build_nothing():
    raise RuntimeError("the service is down")
