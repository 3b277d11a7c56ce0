"""What a reasoning model says after it has thought; a thought is no answer, and nothing follows one that is unfinished.

The marks are text here, whatever a tokenizer makes of them, and the first of them may be the prompt's last word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # it loads torch, which those who only read answers do without
    from opsd.types import Rollout

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))  # begin, end


def after_thought(response: str) -> str | None:
    """What stands behind the end of the last thought; all of it where there is none; None: a thought is unfinished."""
    for begin, end in MARKS:
        response = response.rpartition(end)[2]
        if begin in response:
            return None
    return response


def last_turn_ids(rollout: Rollout) -> np.ndarray:
    """int32: the tokens that are the answer: of a trajectory those of its last turn, else all."""
    return rollout.response_ids[0 if rollout.trajectory is None else rollout.trajectory.turn_starts[-1] :]


def response_text(rollout: Rollout, tokenizer: Any) -> str:
    """The response without special tokens, but with the marks, and with the one that the prompt has given already.

    Of a trajectory the last turn.
    """
    response_ids = last_turn_ids(rollout)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {tokenizer.convert_tokens_to_ids(mark) for pair in MARKS for mark in pair} & special
    if kept:
        ids = [index for index in response_ids.tolist() if index in kept or index not in special]
        text = tokenizer.decode(ids)
    else:
        text = tokenizer.decode(response_ids, skip_special_tokens=True)
    prompt = rollout.prompt.text.rstrip()
    return next((begin for begin, _ in MARKS if prompt.endswith(begin)), "") + text
