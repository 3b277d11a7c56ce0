"""Rows of a user's data file: JSONL or parquet, chat data of any kind, verl's rows as they are."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from opsd.errors import DataError

ANSWER_KEYS = ("answer", "reward_model.ground_truth")  # where a reference answer is looked for; the second is verl's


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a file."""

    where: str  # for error messages: "FILE, line 3" (JSONL) or "FILE, row 3" (parquet), from 1
    fields: dict[str, Any]  # plain Python values: a list is a list in either format, never a NumPy array

    @property
    def place(self) -> str:
        """Where in its file: "line 3"."""
        return self.where.rpartition(", ")[2]

    @property
    def names(self) -> str:
        """What fields it has, for error messages."""
        return ", ".join(self.fields) or "nothing"


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a parquet file (by its suffix) or of a JSONL file, whose empty lines are passed over.

    Raises DataError that names the file, and the line where there is one.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    rows = list(_parquet_rows(path) if Path(path).suffix == ".parquet" else _jsonl_rows(path))
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return rows


def lookup(row: Row, key: str) -> Any:
    """The field `key`, or, for "a.b", field b of the object in field a. None where it is absent or null."""
    value: Any = row.fields
    for part in [key] if key in row.fields else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def first_of(row: Row, keys: Sequence[str]) -> Any:
    """The first of these fields that the row has; None: it has none."""
    return next((value for value in (lookup(row, key) for key in keys) if value is not None), None)


def messages(row: Row, key: str) -> list[dict[str, Any]]:
    """The conversation in the field `key`: a string is one message of the user's. Raises DataError."""
    value = lookup(row, key)
    if value is None:
        raise DataError(f"{row.where}: expected an object with {key!r}, got {row.names}")
    conversation = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not _are_messages(conversation):
        raise DataError(f"{row.where}: {key!r} must be a string or a list of role/content objects, got {value!r}")
    # Parquet gives every message the fields of all: a chat template would take a null for a value.
    known = [{name: item for name, item in message.items() if item is not None} for message in conversation]
    return [{**message, "content": _content(row, key, message)} for message in known]


def _content(row: Row, key: str, message: dict[str, Any]) -> str:
    """A message's text; where it is a list of parts, these joined. Raises DataError for a part of another type."""
    content = message.get("content", "")  # a message that calls tools may have none
    if isinstance(content, str):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{row.where}: {key!r} has content of type {kind!r}, expected text only")
    return "".join(part["text"] for part in content)


def reference_answer(row: Row, key: str) -> str | None:
    """The field `key`, or, where it is empty, the first of ANSWER_KEYS. None: there is none. Raises DataError."""
    value = first_of(row, answer_keys(key))
    if isinstance(value, (dict, list)):
        raise DataError(f"{row.where}: the answer must be a string or a number, got {value!r}")
    return None if value is None else str(value)


def answer_keys(key: str) -> tuple[str, ...]:
    """Where an answer is looked for, given the setting."""
    return (key,) if key else ANSWER_KEYS


def _jsonl_rows(path: str | Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: expected an object, got {type(fields).__name__}")
        yield Row(where=where, fields=fields)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark. Raises DataError for another encoding."""
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in content[:4]:
        raise DataError(f"{path}: it is in UTF-16 or UTF-32: save it in UTF-8")
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither JSONL in UTF-8 nor a file named *.parquet ({error})") from error


def _parquet_rows(path: str | Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot read it as parquet: {error}") from error
    for number, fields in enumerate(table.to_pylist(), start=1):
        yield Row(where=f"{path}, row {number}", fields=fields)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and (isinstance(m.get("content"), (str, list)) or (m.get("content") is None and m.get("tool_calls")))
            for m in value
        )
    )
