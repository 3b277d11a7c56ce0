"""Prompts as token ids: the special tokens that belong there, once each, and no more of them than the models take.

A text that is beyond all measure is cut before it is tokenised, see `within_measure`.
"""
# P prompt tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd.data.chat import Conversation
from opsd.errors import DataError

NUM_NAMED = 5  # of the rows that are refused
BEYOND = 2  # times the limit: a text that is cut before it is tokenised still has so many tokens


def encode(tokenizer: Any, texts: Sequence[str], wheres: Sequence[str], *, special: bool) -> list[np.ndarray]:
    """int32 [P] of each text, with the special tokens that the tokenizer puts before a text where `special`.

    One that the text holds already is not put before it again, and none is put behind it, where the answer goes on.
    `wheres` says where each text stands: DataError for one that the tokenizer cannot write.
    """
    if not texts:
        return []
    try:
        encoded = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    except Exception as error:  # the Rust code raises bare ones
        raise DataError(_unwritable(tokenizer, texts, wheres, error)) from error
    around = tokenizer("", add_special_tokens=True)["input_ids"] if special else []
    bos, ends = tokenizer.bos_token_id, {tokenizer.eos_token_id, tokenizer.sep_token_id}
    opens = bos is not None and around[:1] == [bos]
    closes = len(around) > opens and around[-1] in ends
    return [
        np.asarray(ids[opens and text.startswith(tokenizer.bos_token) : len(ids) - closes], dtype=np.int32)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _unwritable(tokenizer: Any, texts: Sequence[str], wheres: Sequence[str], error: Exception) -> str:
    """Which text it was, and which of its characters, as far as it is a single one."""

    def fails(text: str) -> bool:
        try:
            tokenizer(text, add_special_tokens=False)
        except Exception:
            return True
        return False

    name = tokenizer.name_or_path
    for text, where in zip(texts, wheres, strict=True):
        if fails(text):
            what = next((repr(each) for each in dict.fromkeys(text) if fails(each)), "a text")
            return f"{where}: {name}: its tokenizer has no token for {what}, and none for what is unknown: {error}"
    return f"{wheres[0]}: {name}: its tokenizer fails: {error}"


def encode_conversations(
    tokenizer: Any, conversations: list[Conversation], texts: list[str], max_tokens: int
) -> list[np.ndarray]:
    """int32 [P] of each; a chat template has written the special tokens itself.

    A text with far more than `max_tokens` comes with its end only, which is still too long for `fitted`.
    """
    short = within_measure(tokenizer, texts, max_tokens)
    encoded: dict[int, np.ndarray] = {}
    for is_templated in (False, True):
        places = [place for place, own in enumerate(conversations) if own.is_templated == is_templated]
        wheres = [conversations[place].row.where for place in places]
        ids = encode(tokenizer, [short[place] for place in places], wheres, special=not is_templated)
        encoded.update(zip(places, ids, strict=True))
    return [encoded[place] for place in range(len(texts))]


def within_measure(tokenizer: Any, texts: list[str], max_tokens: int) -> list[str]:
    """The texts, of those beyond all measure only the end: tokenising 10 MB takes most of a minute, to be refused.

    The rule: a token stands for at most as many characters as the longest of the vocabulary has, so BEYOND *
    max_tokens * that number of characters have at least BEYOND * max_tokens tokens. (A tokenizer that leaves characters
    out, or has one token for a whole unknown word, might have fewer for such a text; it is taken as too long all the
    same.) A beginning-of-sequence token that opens the text stays.
    """
    most = BEYOND * max_tokens * max(map(len, tokenizer.get_vocab()))
    bos = tokenizer.bos_token or ""
    return [
        text if len(text) <= most else (bos if text.startswith(bos) else "") + text[len(text) - most :]
        for text in texts
    ]


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
    # Of a text that was cut before it was tokenised no more is known.
    counts = [f"at least {n}" if n >= BEYOND * max_tokens else f"{n}" for n in map(len, encoded)]
    first, *others = long[:NUM_NAMED]
    named = "".join(f", {conversations[place].row.place} ({counts[place]})" for place in others)
    more = f" and {len(long) - NUM_NAMED:,} more" if len(long) > NUM_NAMED else ""
    return (
        f"{conversations[first].row.where}: the {what} has {counts[first]} tokens, the limit is {max_tokens} "
        "(data.max_prompt_tokens, or the models' context less rollout.max_response_tokens); that are too many in "
        f"{len(long):,} of {len(encoded):,} rows{' (also' + named[1:] + more + ')' if named else ''}: "
        "data.overlong=drop leaves them out, truncate_left cuts their beginnings off"
    )
