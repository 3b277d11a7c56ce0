"""The user's prompt file: read, checked and tokenised once; then batches in a seeded order that can be resumed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opsd.config import DataConfig
from opsd.errors import DataError
from opsd.types import Prompt


def load_prompts(path: str, data: DataConfig, tokenizer: Any, max_prompt_tokens: int) -> list[Prompt]:
    """The prompts of a JSONL file. Raises DataError that names the file and the line.

    A line is an object with `data.prompt_key`, a string or a list of {role, content}, and the other fields that `data`
    names. The limit holds for the teacher's version of a prompt too.
    """
    rows = [_parse_row(path, number, line, data) for number, line in _lines(path)]
    if not rows:
        raise DataError(f"{path}: no prompts in it (the file is empty)")
    texts = [_render(row.messages, data, tokenizer) for row in rows]
    encode = partial(_encode, tokenizer, special=not data.chat_template)
    encoded = encode(texts)
    _check_lengths(path, rows, encoded, "prompt", max_prompt_tokens)
    teacher_encoded: list[np.ndarray | None] = [None] * len(rows)
    if data.teacher_template:
        teacher_encoded = encode([_render(_teacher_messages(row, data), data, tokenizer) for row in rows])
        _check_lengths(path, rows, teacher_encoded, "teacher's prompt", max_prompt_tokens)
    responses: list[np.ndarray | None] = [None] * len(rows)
    if data.response_key:
        whole = _encode(tokenizer, [row.response for row in rows], special=False)
        responses = [np.append(ids, np.int32(tokenizer.eos_token_id)) for ids in whole]
    return [
        Prompt(
            index=index,
            token_ids=ids,
            text=text,
            answer=row.answer,
            source=str(path),
            data_source=row.data_source,
            teacher_token_ids=teacher_ids,
            response_ids=response_ids,
        )
        for index, (row, text, ids, teacher_ids, response_ids) in enumerate(
            zip(rows, texts, encoded, teacher_encoded, responses, strict=True)
        )
    ]


class PromptSource:
    """Endless batches: a fresh seeded permutation of the prompts each epoch. `position` is all of its state."""

    def __init__(self, prompts: list[Prompt], batch_size: int, *, seed: int, shuffle: bool, position: int = 0) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.position = position  # prompts handed out so far
        self._order_epoch = -1
        self._order = np.arange(len(prompts))

    def next_batch(self) -> list[Prompt]:
        batch = [self._prompt_at(self.position + i) for i in range(self.batch_size)]
        self.position += self.batch_size
        return batch

    def _prompt_at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        if self.shuffle and epoch != self._order_epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            self._order_epoch = epoch
        return self.prompts[self._order[offset]]


def _lines(path: str) -> list[tuple[int, str]]:
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    with open(path, encoding="utf-8") as file:
        return [(number, line) for number, line in enumerate(file, start=1) if line.strip()]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A line of the file."""

    number: int  # of the line, from 1
    messages: list[dict[str, str]]
    answer: str | None
    solution: str
    response: str
    data_source: str


def _parse_row(path: str, number: int, line: str, data: DataConfig) -> _Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(row, dict) or data.prompt_key not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{path}, line {number}: expected an object with {data.prompt_key!r}, got {found or 'nothing'}")
    if data.grader != "none" and row.get(data.answer_key) is None:
        raise DataError(
            f"{path}, line {number}: data.grader={data.grader} needs {data.answer_key!r}, got {', '.join(row)}"
        )
    needed = [data.solution_key] if "{solution}" in data.teacher_template else []
    for key in [*needed, *filter(None, [data.response_key])]:
        if row.get(key) is None:
            raise DataError(f"{path}, line {number}: expected the field {key!r}, got {', '.join(row)}")
    prompt = row[data.prompt_key]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not _are_messages(messages):
        raise DataError(
            f"{path}, line {number}: {data.prompt_key!r} must be a string or a list of role/content objects, "
            f"got {prompt!r}"
        )
    answer = row.get(data.answer_key)
    return _Row(
        number=number,
        messages=messages,
        answer=None if answer is None else str(answer),
        solution=str(row.get(data.solution_key)),
        response=str(row.get(data.response_key)),
        data_source=str(row.get("data_source", "")),
    )


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _teacher_messages(row: _Row, data: DataConfig) -> list[dict[str, str]]:
    """The last message is what the template makes of it; what stands in for one brace is not searched for the other."""
    last = row.messages[-1]
    text = "".join(
        row.solution if part == "{solution}" else part.replace("{prompt}", last["content"])
        for part in re.split(r"(\{solution\})", data.teacher_template)
    )
    return [*row.messages[:-1], {**last, "content": text}]


def _encode(tokenizer: Any, texts: list[str], *, special: bool) -> list[np.ndarray]:
    return [np.asarray(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=special)["input_ids"]]


def _check_lengths(path: str, rows: list[_Row], encoded: list[np.ndarray], what: str, max_tokens: int) -> None:
    for row, ids in zip(rows, encoded, strict=True):
        if len(ids) == 0:
            raise DataError(f"{path}, line {row.number}: the {what} has no tokens")
        if len(ids) > max_tokens:
            raise DataError(
                f"{path}, line {row.number}: the {what} has {len(ids)} tokens, the limit is {max_tokens} "
                "(data.max_prompt_tokens, or the models' context less rollout.max_response_tokens)"
            )


def _render(messages: list[dict[str, str]], data: DataConfig, tokenizer: Any) -> str:
    if data.instruction:
        last = {**messages[-1], "content": f"{messages[-1]['content']}\n{data.instruction}"}
        messages = [*messages[:-1], last]
    if data.chat_template:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **data.template_options
        )
    return "\n".join(message["content"] for message in messages)
