"""From dL/dlogits of a chunk to the gradients of the head's inputs: two products, without columns that do not count.

    grad_hidden = G @ W        grad_W += G.T @ H        with G = dL/dlogits

Both go through the vocabulary in blocks of columns: a block's gradient is multiplied while the cache still has it, and
a copy (in the weight's dtype, of the columns that count) is a block's size. The filter is cut-cross-entropy's idea
(arXiv 2411.09009) with another criterion: a column of G is left out of a chunk where in every row |G_nv| <= threshold *
|G_n|_1. Probability alone would not do: where the student is certain and the teacher is not, forward KL puts the whole
gradient on tokens that the student finds unlikely.
"""
# N rows of a chunk, D width, V vocabulary, C columns of a block, K columns kept of them

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A block of logits and what is made of it stays in a core's cache; a GPU has few, large kernels to start.
BLOCK_COLUMNS = {"cpu": 4096, "cuda": 16384}
ONEDNN_FROM = 2**26  # multiplications, about a millisecond
# Gathering columns costs far less than multiplying by them: it pays until most are kept.
COMPACT_BELOW = 0.75
FIRST_LOOK = 8  # rows: where the student is unsure, they alone need nearly all columns


class HeadGradients:
    """The gradients of `hidden` and `weight` where they are needed, filled chunk by chunk.

    That of the weight is one buffer in the softmax's dtype: bfloat16 would lose the later chunks of a sum. The products
    are made in the weight's dtype, as plain PyTorch makes them, so that bfloat16 is fast where the hardware has it.
    """

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, needs_grad: tuple[bool, bool], filter_threshold: float = 0.0
    ) -> None:
        self.inputs = hidden_ND, weight_VD
        self.filter_threshold = filter_threshold
        self.hidden_ND = torch.zeros_like(hidden_ND) if needs_grad[0] else None
        dtype = softmax_dtype(weight_VD)
        self.sum_VD = weight_VD.new_empty(weight_VD.shape, dtype=dtype) if needs_grad[1] else None
        self.buffer = weight_VD.new_empty(0, dtype=dtype)
        self.begun: set[int] = set()  # first columns of the blocks that hold a sum; the others not even zeros
        self.end = 0  # of the columns of all blocks

    def room(self, size: int) -> Tensor:
        """Where the `size` shares of a chunk can wait, block after block, until `add` has taken what is made of them.

        The first chunk's wait at the end of the weight's gradient, which holds nothing yet: the gradient of a block is
        written from the front, and however large the blocks, it ends before the next block's shares begin. The other
        chunks have one buffer, as fresh pages cost time.
        """
        if self.sum_VD is not None and not self.begun and size <= self.sum_VD.numel():
            return self.sum_VD.view(-1)[self.sum_VD.numel() - size :]
        if self.buffer.numel() < size:
            self.buffer = self.buffer.new_empty(size)
        return self.buffer[:size]

    def add(self, rows: slice, grad_blocks: Iterable[tuple[slice, Tensor]], row_sum_N1: Tensor | None = None) -> None:
        """Adds what dL/dlogits of these rows, given in blocks [N, C] of columns, means.

        `row_sum_N1`: sum_v |dL/dz_v|, which the filter measures by.
        """
        hidden_ND = self.inputs[0][rows]
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=softmax_dtype(hidden_ND))
        for columns, grad_NC in grad_blocks:
            kept_K = None
            if self.filter_threshold > 0.0:
                kept_K = kept_columns(grad_NC, row_sum_N1, self.filter_threshold)
            if kept_K is not None:
                grad_NC = grad_NC.index_select(1, kept_K)
            self._add_block(columns, kept_K, grad_NC.to(hidden_ND.dtype), hidden_ND, grad_hidden_ND)
            self.end = max(self.end, columns.stop)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = grad_hidden_ND

    def _add_block(
        self, columns: slice, kept_K: Tensor | None, grad_NK: Tensor, hidden_ND: Tensor, grad_hidden_ND: Tensor
    ) -> None:
        if self.hidden_ND is not None:
            weight_KD = self.inputs[1][columns]
            weight_KD = weight_KD if kept_K is None else weight_KD.index_select(0, kept_K)
            grad_hidden_ND.add_(linear(grad_NK, weight_KD.T))
        if self.sum_VD is not None:
            sum_CD = self.sum_VD[columns]
            empty = columns.start not in self.begun
            self.begun.add(columns.start)
            if kept_K is None and sum_CD.dtype == grad_NK.dtype:
                sum_CD.addmm_(grad_NK.T, hidden_ND, beta=0.0 if empty else 1.0)
                return
            # A product of bfloat16 matrices is rounded once before it is added to the float32 sum.
            product_KD = (grad_NK.T @ hidden_ND).to(sum_CD.dtype)
            if empty:
                sum_CD.zero_()
            if kept_K is None:
                sum_CD.add_(product_KD)
            else:
                sum_CD.index_add_(0, kept_K, product_KD)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden and weight, in their dtypes; None where not needed."""
        if self.sum_VD is None:
            return self.hidden_ND, None
        self.sum_VD[self.end :].zero_()  # padding, or everything where there was no chunk
        return self.hidden_ND, self.sum_VD.to(self.inputs[1].dtype)


def kept_columns(grad_NC: Tensor, row_sum_N1: Tensor, threshold: float) -> Tensor | None:
    """The columns [K] in which some row exceeds `threshold` of its `row_sum_N1`; None: nearly all, so take the block.

    A column that is not a number is kept: a diverged step must be seen. Waits for the device on CUDA.
    """
    scale_N1 = row_sum_N1.clamp_min(torch.finfo(grad_NC.dtype).tiny).reciprocal_()
    for rows in (slice(FIRST_LOOK), slice(None)):
        largest_C = (grad_NC[rows] * scale_N1[rows]).abs_().amax(0)
        kept_C = ~(largest_C <= threshold)
        if kept_C.sum() >= COMPACT_BELOW * len(kept_C):
            return None
    return kept_C.nonzero()[:, 0]


def column_blocks(num_columns: int, device: torch.device) -> list[slice]:
    size = BLOCK_COLUMNS[device.type]
    return [slice(first, min(first + size, num_columns)) for first in range(0, num_columns, size)]


def linear(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """left @ right.T. Large float32 products on the CPU go to oneDNN, which takes a fifth less time than MKL.

    A small one would wait for the kernel that oneDNN compiles for each new shape.
    """
    on_cpu = left_MK.device.type == "cpu" and left_MK.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not on_cpu or left_MK.numel() * len(right_NK) < ONEDNN_FROM:
        return left_MK @ right_NK.T
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
