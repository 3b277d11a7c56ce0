"""Attention within each sequence of a packed row.

flash-attn does so by itself. Without it transformers calls scaled_dot_product_attention on the whole row with a mask,
and most of that work is between tokens of different answers and comes to nothing. Here, on the CPU, every sequence is a
call of its own: the cost is the sum of the squares of their lengths, not the square of the sum.
"""
# L tokens of a packed row, A heads, D width of a head

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opsd.errors import ConfigError

PACKED = "packed_sdpa"


def packed_attention_name(device: str, dtype: str) -> str:
    """What a student that gets packed rows is loaded with. CUDA: not run by us."""
    if device == "cpu":
        return PACKED
    return "flash_attention_2" if dtype == "bfloat16" else "sdpa"


def packed_attention(
    module: nn.Module,
    query_1ALD: Tensor,
    key_1ALD: Tensor,
    value_1ALD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention [1, L, A, D] within each sequence; one starts at every position 0.

    With a mask (a sliding window's), the whole row at once, as that says. Raises ConfigError where the model does not
    tell its attention the positions.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(module, query_1ALD, key_1ALD, value_1ALD, attention_mask, **kwargs)
    if position_ids is None:
        name = type(module).__name__
        raise ConfigError(f"student.path: its {name} gets no position_ids, so it cannot tell packed answers apart")
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True)]
    parts = zip(*(x.split(lengths, dim=2) for x in (query_1ALD, key_1ALD, value_1ALD)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], dim=1), None


def mask_where_needed(*args, local_size: int | None = None, use_vmap: bool = False, **kwargs) -> Tensor | None:
    """None for plain causal attention. A window (`local_size`) or a mask of the model's own (`use_vmap`) is a mask."""
    if local_size is None and not use_vmap:
        return None
    return sdpa_mask(*args, local_size=local_size, use_vmap=use_vmap, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, mask_where_needed)
