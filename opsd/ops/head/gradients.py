"""From dL/dlogits of a chunk to the gradients of the head's inputs: two products, without columns that do not count.

    grad_hidden = G @ W        grad_W += G.T @ H        grad_bias += sum_n G_n        with G = dL/dlogits

The logits are those before a scale or a soft cap, hidden @ weight.T + bias.

Both go through the vocabulary in blocks of columns: a block's gradient is multiplied while the cache still has it, and
a copy (of the columns that count) is a block's size. On CUDA the block is the whole vocabulary, see
`opsd.ops.head.plan`. Every product is summed and returned in float32, also that of bfloat16 factors: a logit near 20 is
off by 0.06 in bfloat16. The CPU makes float32 copies of the factors, block by block, for it has no such product; CUDA
takes the gradient in bfloat16 to it. The filter is cut-cross-entropy's idea
(arXiv 2411.09009) with another criterion: a column of G is left out of a chunk where in every row |G_nv| <= threshold *
|G_n|_1. Probability alone would not do: where the student is certain and the teacher is not, forward KL puts the whole
gradient on tokens that the student finds unlikely.
"""
# N rows of a chunk, D width, V vocabulary, C columns of a block, K columns kept of them

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from opsd.ops.head.buffer import HeadBuffer
from opsd.ops.head.plan import HeadPlan, plan_for

ONEDNN_FROM = 2**26  # multiplications, about a millisecond
# Gathering columns costs far less than multiplying by them: it pays until most are kept.
COMPACT_BELOW = 0.75
FIRST_LOOK = 8  # rows: where the student is unsure, they alone need nearly all columns


class HeadGradients:
    """The gradients of `hidden` and `weight` where they are needed, filled chunk by chunk.

    That of the weight, in `buffer`, is a sum in the softmax's dtype: bfloat16 would lose its later chunks.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        needs_grad: tuple[bool, bool],
        plan: HeadPlan,
        *,
        vocab_size: int,
        filter_threshold: float = 0.0,
        bias_V: Tensor | None = None,
    ) -> None:
        """`bias_V`: the head's, where its gradient is needed too."""
        self.inputs = hidden_ND, weight_VD
        in_blocks = plan.block_columns is not None
        self.factor_dtype = softmax_dtype(hidden_ND) if in_blocks else hidden_ND.dtype
        self.filter_threshold = filter_threshold
        self.hidden_ND = torch.zeros_like(hidden_ND) if needs_grad[0] else None
        self.bias = bias_V
        self.bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=softmax_dtype(bias_V))
        self.buffer = HeadBuffer(
            weight_VD,
            vocab_size=vocab_size,
            dtype=softmax_dtype(weight_VD),
            needs_gradient=needs_grad[1],
            in_blocks=in_blocks,
        )

    def add(self, rows: slice, grad_blocks: Iterable[tuple[slice, Tensor]], row_sum_N1: Tensor | None = None) -> None:
        """Adds what dL/dlogits of these rows, given in blocks [N, C] of columns, means. They are the buffer's chunk.

        `row_sum_N1`: sum_v |dL/dz_v|, or a bound of it, which the filter measures by; None where there is no filter.
        """
        hidden_ND = self.inputs[0][rows].to(self.factor_dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=softmax_dtype(hidden_ND))
        for columns, grad_NC in grad_blocks:
            if self.bias_V is not None:
                self.bias_V[columns] += grad_NC.sum(0, dtype=self.bias_V.dtype)
            kept_K = None
            if self.filter_threshold > 0.0:
                assert row_sum_N1 is not None, "the filter measures by the rows' sums"
                kept_K = kept_columns(grad_NC, row_sum_N1, self.filter_threshold)
            if kept_K is not None:
                grad_NC = grad_NC.index_select(1, kept_K)
            self._add_block(columns, kept_K, grad_NC.to(self.factor_dtype), hidden_ND, grad_hidden_ND)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = grad_hidden_ND

    def _add_block(
        self, columns: slice, kept_K: Tensor | None, grad_NK: Tensor, hidden_ND: Tensor, grad_hidden_ND: Tensor
    ) -> None:
        if self.hidden_ND is not None:
            weight_KD = self.inputs[1][columns]
            weight_KD = weight_KD if kept_K is None else weight_KD.index_select(0, kept_K)
            grad_hidden_ND.add_(linear(grad_NK, weight_KD.to(self.factor_dtype).T))
        sum_CD = self.buffer.gradient_of(columns)
        if sum_CD is None:
            return
        if kept_K is None:
            add_product_(sum_CD, grad_NK.T, hidden_ND, empty=self.buffer.is_first_chunk)
            return
        if self.buffer.is_first_chunk:
            sum_CD.zero_()
        sum_CD.index_add_(0, kept_K, product(grad_NK.T, hidden_ND))

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden and weight, in their dtypes; None where not needed."""
        sum_VD = self.buffer.result()
        return self.hidden_ND, None if sum_VD is None else sum_VD.to(self.inputs[1].dtype)

    def bias_result(self) -> Tensor | None:
        return None if self.bias is None or self.bias_V is None else self.bias_V.to(self.bias.dtype)


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


def column_blocks(num_columns: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, num_columns)) for first in range(0, num_columns, size)]


def linear(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """left @ right.T. Large float32 products on the CPU go to oneDNN, which takes a fifth less time than MKL.

    A small one would wait for the kernel that oneDNN compiles for each new shape.
    """
    on_cpu = left_MK.device.type == "cpu" and left_MK.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not on_cpu or left_MK.numel() * len(right_NK) < ONEDNN_FROM:
        return product(left_MK, right_NK.T)
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


def product(left_MK: Tensor, right_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, summed and returned in float32 also where both are 16 bits wide (float64 for float64)."""
    dtype = softmax_dtype(left_MK)
    if left_MK.dtype != dtype and left_MK.device.type == "cuda":
        return torch.mm(left_MK, right_KN, out_dtype=dtype, out=out)
    return torch.mm(left_MK.to(dtype), right_KN.to(dtype), out=out)


def product_by_blocks(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T [N, V] as `product` makes it; the CPU copies a block of the weight to float32 at a time."""
    block_columns = plan_for(weight_VD).block_columns or len(weight_VD)
    return torch.cat([product(hidden_ND, block_CD.T) for block_CD in weight_VD.split(block_columns)], dim=1)


def add_product_(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor, *, empty: bool) -> None:
    """sum += left @ right, as `product` makes it. `empty`: the sum holds nothing yet, not even zeros."""
    if left_MK.dtype == sum_MN.dtype or left_MK.device.type != "cuda":
        sum_MN.addmm_(left_MK.to(sum_MN.dtype), right_KN.to(sum_MN.dtype), beta=0.0 if empty else 1.0)
    elif empty:
        product(left_MK, right_KN, out=sum_MN)
    else:
        torch.addmm(sum_MN, left_MK, right_KN, out_dtype=sum_MN.dtype, out=sum_MN)


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
