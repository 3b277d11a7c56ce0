"""Attention within each sequence of a packed row.

flash-attn does so by itself. Without it transformers calls scaled_dot_product_attention on the whole row with a mask,
and most of that work is between tokens of different answers and comes to nothing. Here, on the CPU, every sequence is a
call of its own: the cost is the sum of the squares of their lengths, not the square of the sum. On CUDA in bfloat16
torch's own variable-length attention does it in one call.

Where the sequences end is found once, in packing, and handed to every layer under transformers' names for it
(`packed_row`): nothing here asks a GPU for a value.
"""
# L tokens of a packed row, A heads, G key and value heads, D width of a head

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from opsd.learner.packing import MicroBatch

PACKED = "packed_sdpa"
VARLEN = "packed_varlen"
MAX_FLASH_WIDTH = 256  # of a head, in torch's flash kernels


def packed_attention_name(device: str, dtype: str) -> str:
    """What a student that gets packed rows is loaded with. CUDA: not run by us."""
    if device == "cpu":
        return PACKED
    if dtype != "bfloat16":
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else VARLEN


def attention_for(causal_lm: PreTrainedModel, device: str, dtype: str) -> str | None:
    """`packed_attention_name` as far as this model takes it; None: what transformers gives it by itself.

    Whether the model then keeps packed sequences apart is measured at start-up, see opsd.learner.verify.
    """
    name = packed_attention_name(device, dtype)
    config = causal_lm.config.get_text_config()
    is_flash = name in ("flash_attention_2", VARLEN)
    if getattr(config, "attn_logit_softcapping", None) is not None and name != "flash_attention_2":
        return "eager"  # neither sdpa nor varlen_attn caps the scores: they would leave it out without a word
    if not causal_lm._can_set_attn_implementation() or not causal_lm._supports_sdpa:
        return None
    # A chunk is a mask by place in the row, and flash kernels take none.
    if is_flash and (not causal_lm._supports_flash_attn or getattr(config, "attention_chunk_size", None)):
        return "sdpa"
    return name


def packed_row(causal_lm: PreTrainedModel, batch: MicroBatch) -> dict[str, Any]:
    """What tells a trunk where the sequences of its row are, as far as its forward method takes it."""
    ends, longest = batch.cu_seq_lens, batch.max_length
    row = {
        "position_ids": batch.position_L[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    taken = inspect.signature(causal_lm.base_model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return row
    return {name: value for name, value in row.items() if name in taken}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention [1, L, A, D] of query [1, A, L, D] within each sequence.

    With a mask (a sliding window's), the whole row at once, as that says. A model that tells its attention neither
    lengths nor positions gets it over the whole row: start-up finds that and runs its sequences one by one.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = sequence_lengths(query.shape[2], cu_seq_lens_q, position_ids)
    if len(lengths) == 1:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], dim=1), None


def sequence_lengths(num_tokens: int, cu_seq_lens: Tensor | None, position_ids: Tensor | None) -> list[int]:
    """On the CPU. One sequence starts at every position 0."""
    if cu_seq_lens is not None:
        return cu_seq_lens.diff().tolist()
    if position_ids is None:
        return [num_tokens]
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As `packed_attention`, in one call of torch's varlen_attn, which needs CUDA and bfloat16: not run on a GPU.

    A window counts as in transformers: a token sees `sliding_window` tokens, itself among them. What the installed
    torch's varlen_attn cannot do (a window before torch 2.11, heads wider than 256) goes through a mask over the row.
    """
    num_tokens, width = query.shape[2], query.shape[3]
    ends = _ends_of(position_ids, num_tokens, query.device) if cu_seq_lens_q is None else cu_seq_lens_q
    longest = num_tokens if cu_seq_lens_q is None or max_length_q is None else max_length_q  # at least that of one
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    takes = inspect.signature(varlen.varlen_attn).parameters
    if attention_mask is not None or width > MAX_FLASH_WIDTH or (window is not None and "window_size" not in takes):
        mask_LL = row_mask(num_tokens, ends, window) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask_LL, scaling=scaling, **kwargs)
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in takes:
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:
        options["is_causal"] = True
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    value_width = value.shape[3]
    value = nn.functional.pad(value, [0, width - value_width])  # multi-head latent attention: narrower values
    query_LAD, key_LAD, value_LAD = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    # A tuple comes with return_aux only.
    output_LAD: Tensor = varlen.varlen_attn(  # type: ignore[assignment]
        query_LAD, key_LAD, value_LAD, ends, ends, longest, longest, **options
    )
    return output_LAD[None, ..., :value_width], None


def row_mask(num_tokens: int, cu_seq_lens: Tensor, window: int | None) -> Tensor:
    """bool [1, 1, L, L], True where a token may look: back within its sequence, at most `window` tokens with itself."""
    place_L = torch.arange(num_tokens, device=cu_seq_lens.device)
    sequence_L = torch.searchsorted(cu_seq_lens, place_L, right=True, out_int32=True)
    back_LL = place_L[:, None] - place_L[None]
    mask_LL = (sequence_L[:, None] == sequence_L[None]) & (back_LL >= 0)
    return (mask_LL if window is None else mask_LL & (back_LL < window))[None, None]


def _ends_of(position_ids: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """cu_seq_lens for a model that hands on positions alone, or nothing. With host syncs, in every layer."""
    lengths = sequence_lengths(num_tokens, None, position_ids)
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def mask_where_needed(*args, local_size: int | None = None, use_vmap: bool = False, **kwargs) -> Tensor | None:
    """None for plain causal attention. A window (`local_size`) or a mask of the model's own (`use_vmap`) is a mask."""
    if local_size is None and not use_vmap:
        return None
    return sdpa_mask(*args, local_size=local_size, use_vmap=use_vmap, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, mask_where_needed)
AttentionInterface.register(VARLEN, varlen_attention)  # no mask of it: transformers then makes none, and asks nothing
