"""From a row's conversation to the text that a model reads: through the tokenizer's chat template, or joined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd.config.run import DataConfig, PromptConfig
from opsd.data.rows import Row, answer_keys, first_of, lookup, messages
from opsd.errors import DataError
from opsd.strict_json import JsonError, read_json


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a row asks, and how it is to be put to a model."""

    row: Row
    messages: list[dict[str, Any]]  # role, content (a string) and whatever else the template reads
    is_templated: bool  # through the chat template, which then writes the special tokens too
    response: str | None  # the file's own answer: its last turn, where data.response_key asks for that


def read_conversation(row: Row, data: PromptConfig, tokenizer: Any, response_key: str = "") -> Conversation:
    """The conversation of a row, which ends with what the model answers. Raises DataError that names the row."""
    turns = messages(row, data.prompt_key)
    response = None
    if turns[-1]["role"] == "assistant":
        if response_key != data.prompt_key or len(turns) == 1:
            raise DataError(
                f"{row.where}: {data.prompt_key!r} ends with a turn of the assistant, so there is nothing to answer: "
                f"take it off, or, where it is the file's own answer, set data.response_key={data.prompt_key}"
            )
        *turns, last = turns
        response = last["content"]
    elif response_key == data.prompt_key:
        raise DataError(
            f"{row.where}: data.response_key={response_key} asks for a last turn of the assistant, the last turn of "
            f"{data.prompt_key!r} is of {turns[-1]['role']!r}"
        )
    return Conversation(row=row, messages=turns, is_templated=_is_templated(row, data, tokenizer), response=response)


def _is_templated(row: Row, data: PromptConfig, tokenizer: Any) -> bool:
    if data.chat_template == "auto" and isinstance(lookup(row, data.prompt_key), str):
        return False
    if data.chat_template == "auto" and tokenizer.chat_template is None:
        raise DataError(
            f"{row.where}: {data.prompt_key!r} is a list of messages, and {tokenizer.name_or_path}: its tokenizer has "
            "no chat template to tell the roles: take a model with one, or set data.chat_template=false to train on "
            "the contents alone, joined by newlines"
        )
    return data.chat_template != "false"


def render(conversation: Conversation, data: PromptConfig, tokenizer: Any, tools: Sequence[dict] = ()) -> str:
    """The text of a conversation, data.instruction at its end. Raises DataError where the template refuses it.

    `tools`: the run's, which the template shows to a model where the row has none of its own.
    """
    *earlier, last = conversation.messages
    if data.instruction:
        last = {**last, "content": f"{last['content']}\n{data.instruction}"}
    if not conversation.is_templated:
        if tools:
            raise DataError(
                f"{conversation.row.where}: tools.build needs a chat template to show tools to the student, and this "
                "prompt is plain text: make it a list of messages, or set data.chat_template=true"
            )
        return "\n".join(message["content"] for message in [*earlier, last])
    options = {**shown_tools(conversation.row, tokenizer, tools), **data.template_options}
    where, name = conversation.row.where, tokenizer.name_or_path
    try:
        text = tokenizer.apply_chat_template([*earlier, last], tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # a template is a program of the model's folder, and fails as programs do
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise DataError(f"{where}: the chat template of {name} refuses the roles {roles}: {error}") from error
    if not isinstance(text, str):
        raise DataError(f"{where}: the chat template of {name} made no text with data.template_options={options}")
    return text


def for_teacher(conversation: Conversation, data: DataConfig) -> Conversation:
    """The last message is what data.teacher_template makes of it."""
    *earlier, last = conversation.messages
    keys = (data.solution_key,) if data.solution_key else answer_keys(data.answer_key)
    # What stands in for one brace is not searched for the other.
    text = "".join(
        needed(conversation.row, *keys) if part == "{solution}" else part.replace("{prompt}", last["content"])
        for part in re.split(r"(\{solution\})", data.teacher_template)
    )
    return Conversation(
        row=conversation.row,
        messages=[*earlier, {**last, "content": text}],
        is_templated=conversation.is_templated,
        response=conversation.response,
    )


def needed(row: Row, *keys: str) -> str:
    """The first of these fields that the row has."""
    value = first_of(row, keys)
    if value is None:
        raise DataError(f"{row.where}: expected the field {' or '.join(map(repr, keys))}, got {row.names}")
    if isinstance(value, (dict, list)):
        raise DataError(
            f"{row.where}: the field {' or '.join(map(repr, keys))} must be a string or a number, got {value!r}"
        )
    return str(value)


def shown_tools(row: Row, tokenizer: Any, others: Sequence[dict] = ()) -> dict[str, Any]:
    """The row's own tools as the template takes them: a list, or, as parquet files have it, JSON of one.

    `others`: those of a row that has none.
    """
    tools = lookup(row, "tools")
    if isinstance(tools, str):
        try:
            tools = read_json(tools) if tools else None
        except JsonError as error:
            raise DataError(f"{row.where}: 'tools' is a string, but {error}") from error
    tools = tools or list(others)
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.where}: 'tools' must be a list of objects, got {tools!r}")
    if "tools" not in str(tokenizer.chat_template):
        raise DataError(
            f"{row.where}: it has 'tools', which the chat template of {tokenizer.name_or_path} does not show to a model"
        )
    return {"tools": _without_nulls(tools)}


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the fields of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
