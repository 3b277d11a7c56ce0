"""The user's prompt file: read, checked and tokenised once; then batches in a seeded order that can be resumed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from opsd.config import DataConfig, PromptConfig
from opsd.data.rows import Row, answer_keys, first_of, lookup, messages, read_rows, reference_answer
from opsd.errors import ConfigError, DataError
from opsd.types import Prompt


def load_prompts(path: str, data: DataConfig, tokenizer: Any, max_prompt_tokens: int) -> list[Prompt]:
    """The prompts of a JSONL or parquet file, with the teacher's view and the file's own answers where `data` asks.

    Raises DataError that names the file and the row. The limit holds for the teacher's version of a prompt too.
    """
    rows = read_rows(path)
    prompts = student_prompts(path, rows, data, tokenizer, max_prompt_tokens)
    if data.teacher_template:
        texts = [_render(_teacher_messages(row, data), data, tokenizer) for row in rows]
        encoded = _encode(tokenizer, texts, special=not data.chat_template)
        _check_lengths(rows, encoded, "teacher's prompt", max_prompt_tokens)
        prompts = [replace(prompt, teacher_token_ids=ids) for prompt, ids in zip(prompts, encoded, strict=True)]
    if data.response_key:
        texts = [_needed(row, data.response_key) for row in rows]
        whole = [np.append(ids, np.int32(tokenizer.eos_token_id)) for ids in _encode(tokenizer, texts, special=False)]
        prompts = [replace(prompt, response_ids=ids) for prompt, ids in zip(prompts, whole, strict=True)]
    return prompts


def student_prompts(
    path: str, rows: list[Row], data: PromptConfig, tokenizer: Any, max_prompt_tokens: int
) -> list[Prompt]:
    """The rows of the file at `path` as the student sees them. Raises DataError that names the row."""
    if data.chat_template and tokenizer.chat_template is None:
        raise ConfigError(f"data.chat_template=true, but {tokenizer.name_or_path}: its tokenizer has no chat template")
    answers = [_answer(row, data) for row in rows]
    texts = [_render(messages(row, data.prompt_key), data, tokenizer) for row in rows]
    encoded = _encode(tokenizer, texts, special=not data.chat_template)
    _check_lengths(rows, encoded, "prompt", max_prompt_tokens)
    return [
        Prompt(
            index=index,
            token_ids=ids,
            text=text,
            answer=answer,
            source=str(path),
            data_source=str(lookup(row, "data_source") or ""),
        )
        for index, (row, text, answer, ids) in enumerate(zip(rows, texts, answers, encoded, strict=True))
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


def _answer(row: Row, data: PromptConfig) -> str | None:
    answer = reference_answer(row, data.answer_key)
    if answer is None and data.grader != "none":
        wanted = " or ".join(map(repr, answer_keys(data.answer_key)))
        raise DataError(f"{row.where}: data.grader={data.grader} needs {wanted}, got {row.names}")
    return answer


def _needed(row: Row, *keys: str) -> str:
    """The first of these fields that the row has."""
    value = first_of(row, keys)
    if value is None:
        raise DataError(f"{row.where}: expected the field {' or '.join(map(repr, keys))}, got {row.names}")
    return str(value)


def _teacher_messages(row: Row, data: DataConfig) -> list[dict[str, Any]]:
    """The last message is what the template makes of it; what stands in for one brace is not searched for the other."""
    *earlier, last = messages(row, data.prompt_key)
    keys = (data.solution_key,) if data.solution_key else answer_keys(data.answer_key)
    text = "".join(
        _needed(row, *keys) if part == "{solution}" else part.replace("{prompt}", last["content"])
        for part in re.split(r"(\{solution\})", data.teacher_template)
    )
    return [*earlier, {**last, "content": text}]


def _encode(tokenizer: Any, texts: list[str], *, special: bool) -> list[np.ndarray]:
    return [np.asarray(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=special)["input_ids"]]


def _check_lengths(rows: list[Row], encoded: list[np.ndarray], what: str, max_tokens: int) -> None:
    for row, ids in zip(rows, encoded, strict=True):
        if len(ids) == 0:
            raise DataError(f"{row.where}: the {what} has no tokens")
        if len(ids) > max_tokens:
            raise DataError(
                f"{row.where}: the {what} has {len(ids)} tokens, the limit is {max_tokens} "
                "(data.max_prompt_tokens, or the models' context less rollout.max_response_tokens)"
            )


def _render(conversation: list[dict[str, Any]], data: PromptConfig, tokenizer: Any) -> str:
    *earlier, last = conversation
    if data.instruction:
        last = {**last, "content": f"{last['content']}\n{data.instruction}"}
    if data.chat_template:
        return tokenizer.apply_chat_template(
            [*earlier, last], tokenize=False, add_generation_prompt=True, **data.template_options
        )
    return "\n".join(message["content"] for message in [*earlier, last])
