"""Rows of a user's data file: JSONL or parquet, chat data of any kind, verl's rows as they are."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from opsd.errors import DataError
from opsd.strict_json import JsonError, read_json

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
    require_file(path)
    rows = list(_parquet_rows(path) if is_parquet(path) else _jsonl_rows(path))
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return rows


def count_rows(path: str | Path) -> int:
    """Rows of a JSONL file, empty lines aside, or of a parquet file, whose rows are not read. Raises DataError."""
    require_file(path)
    if is_parquet(path):
        with parquet_file(path) as file:
            return file.metadata.num_rows
    return sum(bool(line.strip()) for line in read_lines(path))


def require_file(path: str | Path) -> None:
    if not os.path.isfile(path):  # not Path.is_file, which raises OSError for a name that is too long
        raise DataError(f"{path}: there is no such file")


def is_parquet(path: str | Path) -> bool:
    return Path(path).suffix == ".parquet"


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
            fields = read_json(line)
        except JsonError as error:
            raise DataError(f"{where}: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: expected an object, got {type(fields).__name__}")
        yield Row(where=where, fields=fields)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark. Raises DataError for another encoding."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in content[:4]:
        raise DataError(f"{path}: it is in UTF-16 or UTF-32: save it in UTF-8")
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither JSONL in UTF-8 nor a file named *.parquet ({error})") from error


def _parquet_rows(path: str | Path) -> Iterator[Row]:
    with parquet_file(path) as file:
        rows = file.read().to_pylist()
    for number, fields in enumerate(rows, start=1):
        yield Row(where=f"{path}, row {number}", fields=fields)


@contextmanager
def parquet_file(path: str | Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """The file, opened. DataError where it cannot be read as far as the block reads it, or names a column twice."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_twice(path, file.schema_arrow)
            yield file
    except DataError:
        raise
    # pyarrow's own, those of its conversions to Python's values (text that is not UTF-8, a date beyond the year 9999),
    # and what a size that was damaged leads to.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: cannot read it as parquet: {error}") from error


def _refuse_twice(path: str | Path, schema: Any, within: str = "") -> None:
    """Of two columns, or two fields of one struct, of the same name the last would win silently."""
    names: set[str] = set()
    for field in schema:
        if field.name in names:
            raise DataError(f"{path}: the column {within + field.name!r} stands twice in it")
        names.add(field.name)
        inner = field.type
        while isinstance(inner, (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType)):
            inner = inner.value_type
        if isinstance(inner, pyarrow.StructType):
            _refuse_twice(path, inner, f"{within}{field.name}.")


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
