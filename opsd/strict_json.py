"""JSON of a user's files, read strictly: what json.loads takes silently, or fails of with a traceback, is refused."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

MAX_DEPTH = 100  # of lists and objects within each other; Python's own functions give up at about 1,000
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """The reason why a text is refused; the caller says of which file and line."""


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises JsonError where it is not JSON, names a key twice in one object (the last would win silently), holds half of
    a surrogate pair or an integer with more digits than Python converts, or is nested more than MAX_DEPTH deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise JsonError(f"nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise JsonError(f"it holds an integer of more than {sys.get_int_max_str_digits():,} digits") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise JsonError(f"nested more than {MAX_DEPTH} deep")
    if SURROGATE.search(text):
        _refuse_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise JsonError(f"the key {twice!r} stands twice in one object")
    return found


def _depth(value: Any) -> int:
    """How many lists and objects lie within each other, counted no further than one beyond MAX_DEPTH."""
    level, depth = [value], 0
    while depth <= MAX_DEPTH:
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            break
        level, depth = [item for container in level for item in _items(container)], depth + 1
    return depth


def _items(value: dict | list) -> list:
    return list(value.values()) if isinstance(value, dict) else value


def _refuse_surrogates(value: Any) -> None:
    """A pair has become one character; what is left is half of one, which no tokenizer and no file takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise JsonError(f"it holds {half!r}, half of a surrogate pair, which is no character") from error
