"""What a user reads of an error is one line of a bounded length."""

import pickle

import pytest

from opsd.errors import LONGEST_MESSAGE, ConfigError, DataError


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_a_message_that_quotes_the_users_values_stays_one_line(kind):
    assert str(kind("expected a, got b\nc\r\nd\u2028e")) == "expected a, got b c d e"
    assert str(kind("half \ud800 of a pair")) == "half \\ud800 of a pair"  # else it cannot be printed
    long = str(kind(f"data.jsonl, line 3: {'x' * 10_000_000}: the end"))
    assert long.startswith("data.jsonl, line 3: xxx") and long.endswith("xxx: the end")
    assert len(long) == LONGEST_MESSAGE + 3


def test_a_message_travels_between_processes_unchanged():
    error = ConfigError("a" * 600 + "b" * 600)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
