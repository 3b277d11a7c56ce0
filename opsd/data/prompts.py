"""The user's prompt file: read, checked and tokenised once; then batches in a seeded order that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsd.config.run import DataConfig, PromptConfig
from opsd.data.chat import Conversation, for_teacher, needed, read_conversation, render, shown_tools
from opsd.data.grading import GRADERS, REFERENCES, grader_of
from opsd.data.rows import Row, answer_keys, lookup, read_rows, reference_answer
from opsd.data.tokens import encode, encode_conversations, fitted
from opsd.errors import ConfigError, DataError
from opsd.types import Prompt

SHOWN = 160  # characters of a prompt at start-up


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """The prompts of a file, and what was done to get them."""

    path: str
    prompts: list[Prompt]  # at least one
    num_templated: int  # of them went through the chat template
    num_dropped: int  # rows that are not among the prompts, as they are too long for a model
    num_cut: int  # prompts whose beginning was cut off, of the student or of the teacher

    def described(self, tokenizer: Any) -> list[str]:
        """Lines that say what was done, and how the first prompt looks to student and teacher."""
        facts = [f"{len(self.prompts):,} prompts", f"{self.num_templated or 'none'} through the chat template"]
        if self.num_templated == len(self.prompts):
            facts[1] = "all through the chat template"
        if self.num_dropped:
            facts.append(f"{self.num_dropped:,} rows dropped as too long")
        if self.num_cut:
            facts.append(f"{self.num_cut:,} cut on the left")
        first = self.prompts[0]
        lines = [f"prompts {self.path}: {', '.join(facts)}", f"        the first: {_shown(first.token_ids, tokenizer)}"]
        if first.teacher_token_ids is not None:
            lines.append(f"        as the teacher sees it: {_shown(first.teacher_token_ids, tokenizer)}")
        return lines


def load_prompts(
    path: str, data: DataConfig, tokenizer: Any, max_prompt_tokens: int, tools: Sequence[dict] = ()
) -> PromptFile:
    """The prompts of a JSONL or parquet file, with the teacher's view and the file's own answers where `data` asks.

    `tools`: schemas of the run's tools; the prompts then keep their rows.
    Raises DataError that names the file and the row. The limit holds for the teacher's version of a prompt too.
    """
    rows = read_rows(path)
    conversations, prompts = _read(path, rows, data, tokenizer, max_prompt_tokens, data.response_key, tools)
    teachers = None
    if data.teacher_template:
        shown = [for_teacher(conversation, data) for conversation in conversations]
        texts = [render(conversation, data, tokenizer, tools) for conversation in shown]
        teachers = encode_conversations(tokenizer, shown, texts, max_prompt_tokens)
    if data.response_key:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"data.response_key: {tokenizer.name_or_path}: its tokenizer has no token to end answers")
        texts = [needed(own.row, data.response_key) if own.response is None else own.response for own in conversations]
        encoded = encode(tokenizer, texts, [own.row.where for own in conversations], special=False)
        whole = [np.append(ids, np.int32(tokenizer.eos_token_id)) for ids in encoded]
        prompts = [replace(prompt, response_ids=ids) for prompt, ids in zip(prompts, whole, strict=True)]
    return _fitting(path, conversations, prompts, teachers, data, tokenizer, max_prompt_tokens)


def student_prompts(
    path: str,
    rows: list[Row],
    data: PromptConfig,
    tokenizer: Any,
    max_prompt_tokens: int,
    tools: Sequence[dict] = (),
) -> PromptFile:
    """The rows of the file at `path` as the student sees them. Raises DataError that names the row.

    `tools`: as in `load_prompts`.
    """
    conversations, prompts = _read(path, rows, data, tokenizer, max_prompt_tokens, tools=tools)
    return _fitting(path, conversations, prompts, None, data, tokenizer, max_prompt_tokens)


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


def _read(
    path: str,
    rows: list[Row],
    data: PromptConfig,
    tokenizer: Any,
    max_prompt_tokens: int,
    response_key: str = "",
    tools: Sequence[dict] = (),
) -> tuple[list[Conversation], list[Prompt]]:
    if data.chat_template == "true" and tokenizer.chat_template is None:
        raise ConfigError(f"data.chat_template=true, but {tokenizer.name_or_path}: its tokenizer has no chat template")
    answers = [_answer(row, data) for row in rows]
    conversations = [read_conversation(row, data, tokenizer, response_key) for row in rows]
    texts = [render(conversation, data, tokenizer, tools) for conversation in conversations]
    encoded = encode_conversations(tokenizer, conversations, texts, max_prompt_tokens)
    prompts = [
        Prompt(
            index=index,
            token_ids=ids,
            text=text,
            answer=answer,
            source=str(path),
            data_source=str(lookup(row, "data_source") or ""),
            row={**row.fields, **shown_tools(row, tokenizer)} if tools else None,
        )
        for index, (row, text, answer, ids) in enumerate(zip(rows, texts, answers, encoded, strict=True))
    ]
    return conversations, prompts


def _fitting(
    path: str,
    conversations: list[Conversation],
    prompts: list[Prompt],
    teachers: list[np.ndarray] | None,
    data: PromptConfig,
    tokenizer: Any,
    max_tokens: int,
) -> PromptFile:
    """The prompts that both models can read, or an error: data.overlong."""
    limits = (max_tokens, data.overlong, tokenizer.bos_token_id)
    own = fitted([prompt.token_ids for prompt in prompts], conversations, "prompt", *limits)
    shown = [None] * len(prompts) if teachers is None else fitted(teachers, conversations, "teacher's prompt", *limits)
    kept, num_templated, num_cut = [], 0, 0
    for place, (prompt, ids, teacher_ids) in enumerate(zip(prompts, own, shown, strict=True)):
        if ids is None or (teachers is not None and teacher_ids is None):
            continue
        kept.append(replace(prompt, token_ids=ids, teacher_token_ids=teacher_ids))
        num_templated += conversations[place].is_templated
        num_cut += ids is not prompt.token_ids or (teachers is not None and teacher_ids is not teachers[place])
    if not kept:
        raise DataError(f"{path}: each of its {len(prompts):,} prompts has more than {max_tokens} tokens")
    return PromptFile(
        path=str(path),
        prompts=kept,
        num_templated=num_templated,
        num_dropped=len(prompts) - len(kept),
        num_cut=num_cut,
    )


def _answer(row: Row, data: PromptConfig) -> str | None:
    answer = reference_answer(row, data.answer_key)
    grader = grader_of(data.grader, source := str(lookup(row, "data_source") or ""))
    if grader is None:
        raise DataError(
            f"{row.where}: data.grader=auto knows no grader for data_source {source!r}: set data.grader to one of "
            f"{', '.join([*GRADERS, 'none'])}"
        )
    if answer is None and data.grader != "none":
        wanted = " or ".join(map(repr, answer_keys(data.answer_key)))
        raise DataError(f"{row.where}: data.grader={data.grader} needs {wanted}, got {row.names}")
    if answer is not None and grader in REFERENCES:
        try:
            REFERENCES[grader](answer)
        except ValueError as error:
            raise DataError(f"{row.where}: data.grader={data.grader}: {error}") from error
    return answer


def _shown(token_ids: np.ndarray, tokenizer: Any) -> str:
    text = tokenizer.decode(token_ids)
    half = SHOWN // 2
    return repr(text if len(text) <= SHOWN else f"{text[:half]} … {text[-half:]}")
