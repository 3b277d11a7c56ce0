"""How the output head goes through rows and vocabulary on a kind of device: decided once a call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadPlan(NamedTuple):
    """The sizes of the parts, and whether the host may look at a value on the way."""

    # Of the shares of a chunk in float32. Every chunk reads the whole head and updates its whole gradient.
    chunk_bytes: int
    block_columns: int | None  # of the vocabulary at one time; None: all of it
    # Looking at a value waits for a device that computes beside the host. Without it, the ids of the support are not
    # checked, and no column is left out of the gradients unless a threshold is given.
    may_look: bool


PLANS = {
    # 207 rows of a 152k vocabulary: half as many cost a tenth more time. A block of logits and what is made of it stays
    # in a core's cache.
    "cpu": HeadPlan(chunk_bytes=120 << 20, block_columns=4096, may_look=True),
    # 4,417 rows of a 152k vocabulary, in few, large kernels. Chosen by arithmetic (at width 4,096 the traffic of the
    # head and its gradient is a twentieth of the products' time), not run on a GPU.
    "cuda": HeadPlan(chunk_bytes=5 << 29, block_columns=None, may_look=False),
}


def plan_for(tensor: Tensor) -> HeadPlan:
    return PLANS[tensor.device.type]
