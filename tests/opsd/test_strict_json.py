"""JSON that json.loads takes silently or fails of with a traceback is refused in a few words."""

import json

import pytest

from opsd.strict_json import MAX_DEPTH, JsonError, read_json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "1"', "not JSON (Expecting ',' delimiter: line 1 column 15 (char 14))"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object"),
        ('[{"x": {"inner": 1, "inner": 1}}]', "the key 'inner' stands twice in one object"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 100 deep"),
        ('{"a":' * 400 + "1" + "}" * 400, "nested more than 100 deep"),
        ('{"answer": ' + "7" * 5000 + "}", "it holds an integer of more than 4,300 digits"),
        (r'{"prompt": "\ud800"}', r"it holds '\ud800', half of a surrogate pair, which is no character"),
        (r'{"\uDFFF": 1}', r"it holds '\udfff', half of a surrogate pair, which is no character"),
    ],
)
def test_what_is_no_plain_json_is_refused(text, said):
    with pytest.raises(JsonError) as refused:
        read_json(text)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": {"a": 2}, "c": [{"a": 3}, {"a": 4}]},  # the same name in another object
        [[]] * (MAX_DEPTH + 50),  # many lists, but none deep
        json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH),
        "\N{GRINNING FACE} \\ud800 written out",  # dumps escapes it as a whole pair, and the backslash
        int("7" * 4000),
    ],
)
def test_what_is_plain_json_comes_as_it_is(value):
    assert read_json(json.dumps(value)) == value
