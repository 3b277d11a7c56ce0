"""Prompts as token ids: the special tokens that belong there, once each, and no more of them than the models take."""
# P prompt tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd.data.chat import Conversation
from opsd.errors import DataError

NUM_NAMED = 5  # of the rows that are refused


def encode(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[np.ndarray]:
    """int32 [P] of each text, with the special tokens that the tokenizer puts before a text where `special`.

    One that the text holds already is not put before it again, and none is put behind it, where the answer goes on.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    around = tokenizer("", add_special_tokens=True)["input_ids"] if special else []
    bos, ends = tokenizer.bos_token_id, {tokenizer.eos_token_id, tokenizer.sep_token_id}
    opens = bos is not None and around[:1] == [bos]
    closes = len(around) > opens and around[-1] in ends
    return [
        np.asarray(ids[opens and text.startswith(tokenizer.bos_token) : len(ids) - closes], dtype=np.int32)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def encode_conversations(tokenizer: Any, conversations: list[Conversation], texts: list[str]) -> list[np.ndarray]:
    """int32 [P] of each; a chat template has written the special tokens itself."""
    encoded: dict[int, np.ndarray] = {}
    for is_templated in (False, True):
        places = [place for place, own in enumerate(conversations) if own.is_templated == is_templated]
        ids = encode(tokenizer, [texts[place] for place in places], special=not is_templated)
        encoded.update(zip(places, ids, strict=True))
    return [encoded[place] for place in range(len(texts))]


def fitted(
    encoded: list[np.ndarray],
    conversations: list[Conversation],
    what: str,
    max_tokens: int,
    overlong: str,
    bos: int | None,
) -> list[np.ndarray | None]:
    """The prompts with at most `max_tokens`; None: dropped. `overlong` is data.overlong, `what` names the prompt.

    Cut on the left, a prompt keeps its beginning-of-sequence token. Raises DataError where they are to be refused, and
    for a prompt without tokens.
    """
    for ids, own in zip(encoded, conversations, strict=True):
        if len(ids) == 0:
            raise DataError(f"{own.row.where}: the {what} has no tokens")
    long = [place for place, ids in enumerate(encoded) if len(ids) > max_tokens]
    if long and overlong == "refuse":
        raise DataError(_refusal(long, encoded, conversations, what, max_tokens))
    fitting: list[np.ndarray | None] = list(encoded)
    for place in long:
        ids, start = encoded[place], encoded[place][:1] if encoded[place][0] == bos else encoded[place][:0]
        kept = max_tokens - len(start)
        fitting[place] = None if overlong == "drop" else np.concatenate([start, ids[len(ids) - kept :]])
    return fitting


def _refusal(
    long: list[int], encoded: list[np.ndarray], conversations: list[Conversation], what: str, max_tokens: int
) -> str:
    first, *others = long[:NUM_NAMED]
    named = "".join(f", {conversations[place].row.place} ({len(encoded[place])})" for place in others)
    more = f" and {len(long) - NUM_NAMED:,} more" if len(long) > NUM_NAMED else ""
    return (
        f"{conversations[first].row.where}: the {what} has {len(encoded[first])} tokens, the limit is {max_tokens} "
        "(data.max_prompt_tokens, or the models' context less rollout.max_response_tokens); that are too many in "
        f"{len(long):,} of {len(encoded):,} rows{' (also' + named[1:] + more + ')' if named else ''}: "
        "data.overlong=drop leaves them out, truncate_left cuts their beginnings off"
    )
