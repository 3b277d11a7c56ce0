"""What a chat template puts between two turns of the student's: tools' answers, and the beginning of its next turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from opsd.errors import ConfigError

ASSISTANT, TOOL = "QZASSISTANTQZ", "QZTOOL{}QZ"  # texts that no template has of its own


class TurnTemplate:
    """Token ids of tools' answers, as the template of a tokenizer shows them.

    The conversation before them is never tokenised again: a template writes a made-up one, and of that the text behind
    the token that ends the assistant's turn is taken.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int], options: dict[str, Any]) -> None:
        """`options`: data.template_options. Raises ConfigError for a template with which this does not work."""
        self.tokenizer, self.options = tokenizer, options
        self._stops = [text for index in stop_ids if (text := tokenizer.decode([index]).strip())]
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        marks = [TOOL.format(number) for number in range(2)]
        text = self._after_turn(marks)
        if not -1 < text.find(marks[0]) < text.find(marks[1]):
            raise ConfigError(f"{self._where} does not show the answers of two tools, each by itself, in their order")

    def between(self, answers: Sequence[str]) -> np.ndarray:
        """int32: what follows the token that ended the student's turn, up to the first of its next turn's.

        Special tokens that an answer names are taken apart by a space, so that no tool ends a turn or begins one.
        """
        text = self._after_turn([self._harmless(answer) for answer in answers])
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _after_turn(self, answers: Sequence[str]) -> str:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ASSISTANT}]
        turns += [{"role": "tool", "content": answer} for answer in answers]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **self.options)
        except Exception as error:  # a template is a program of the model's folder, and fails as programs do
            raise ConfigError(f"{self._where} refuses a message of the role tool: {error}") from error
        _, found, after = text.partition(ASSISTANT)
        end = min((after.find(stop) + len(stop) for stop in self._stops if stop in after), default=0)
        if not found or after[:end].strip() not in self._stops:
            raise ConfigError(
                f"{self._where} does not end a turn of the assistant with a token that ends answers "
                f"({', '.join(map(repr, self._stops))}): it goes on with {after[:40]!r}"
            )
        return after[end:]

    def _harmless(self, answer: str) -> str:
        for token in self._special:
            if token:
                answer = answer.replace(token, f"{token[0]} {token[1:]}")
        return answer

    @property
    def _where(self) -> str:
        return f"tools.build: the chat template of {self.tokenizer.name_or_path}"
