"""From a model's logits to events, exactly, and the draw of a token: what the transformers engine computes in torch.

Padded and foreign ids have no probability; all stop ids are one event.
"""
# R rows, B sequences of a batch, V shared vocabulary, H rows of the head (V and its padding), D width, K kept events

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsd.engines.sampling import Sampling
from opsd.ops.head.gradients import product_by_blocks
from opsd.types import Vocabulary


def float32_logits(head: nn.Linear, hidden_RD: Tensor) -> Tensor:
    """[R, V] of the plain head; from bfloat16, whose own logits near 20 are off by 0.06, the sums in float32."""
    if head.weight.dtype == torch.float32:
        return head(hidden_RD)
    logits_RV = product_by_blocks(hidden_RD, head.weight)
    return logits_RV if head.bias is None else logits_RV.add_(head.bias)


def shared_logits(logits_RH: Tensor, vocabulary: Vocabulary) -> Tensor:
    """float32 [R, V] of a head's [R, H]: without the padding, and -inf at ids that the models do not share."""
    logits_RV = logits_RH[:, : vocabulary.size].float()
    if vocabulary.foreign_ids:
        logits_RV = logits_RV.index_fill(1, torch.tensor(vocabulary.foreign_ids, device=logits_RV.device), -torch.inf)
    return logits_RV


def event_logprobs(logits_RV: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Log-probabilities of all events, float32 [R, V], from logits of V shared ids; all stop mass is at stop_event."""
    logprobs_RV = logits_RV.log_softmax(-1)
    stop_ids = list(vocabulary.stop_ids)
    merged_R = logprobs_RV[:, stop_ids].logsumexp(-1)
    logprobs_RV[:, stop_ids] = -torch.inf
    logprobs_RV[:, vocabulary.stop_event] = merged_R
    return logprobs_RV


def top_events(events_RV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """(ids int32 [R, num_kept], log-probabilities float32), likeliest first; -1 and -inf where no event is left."""
    top_logprobs, top_ids = events_RV.topk(min(num_kept, events_RV.shape[1]), dim=-1)
    missing = (0, num_kept - top_ids.shape[1])
    top_ids = top_ids.masked_fill(top_logprobs == -torch.inf, -1).int()
    pad = torch.nn.functional.pad
    return pad(top_ids, missing, value=-1), pad(top_logprobs, missing, value=-torch.inf)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """int64 [B]: each row's cumulative distribution inverted at its own uniform, so that no row depends on another."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if sampling.top_k:
        kept_BK = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]), dim=-1).values
        logits_BV = logits_BV.masked_fill(logits_BV < kept_BK[:, -1:], -torch.inf)
    probs_BV = (logits_BV.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p  # the likeliest token is never outside
        probs_BV = probs_BV.scatter(1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    cumulative_BV = probs_BV.cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def uniforms(seed: int, num_draws: int) -> Tensor:
    """float64 [num_draws] in [0, 1), drawn on the CPU: the same on every device."""
    return torch.rand(num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
