"""From a model's logits to events, exactly, and the draw of a token: what the transformers engine computes in torch.

Padded and foreign ids have no probability; all stop ids are one event.
"""
# R rows, B sequences of a batch, V shared vocabulary, H rows of the head (V and its padding), D width, K kept events

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsd.engines.sampling import Sampling
from opsd.ops.head.form import HeadForm
from opsd.ops.head.gradients import product_by_blocks
from opsd.types import Vocabulary

TOP_GROUP = 64  # columns whose maximum stands for them in the search for the likeliest


def float32_logits(head: nn.Linear, form: HeadForm, hidden_RD: Tensor) -> Tensor:
    """[R, H] as the model makes them; from bfloat16, whose own logits near 20 are off by 0.06, the sums in float32."""
    if head.weight.dtype == torch.float32:
        return form.apply_(head(hidden_RD))
    product_RH = product_by_blocks(hidden_RD, head.weight)
    return form.apply_(product_RH if head.bias is None else product_RH.add_(head.bias))


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
    num_found = min(num_kept, events_RV.shape[1])
    place_RC = _columns_of_the_largest(events_RV, num_found)
    if place_RC is None:
        top_logprobs, top_ids = events_RV.topk(num_found, dim=-1)
    else:
        top_logprobs, slot_RK = events_RV.gather(1, place_RC).topk(num_found, dim=-1)
        top_ids = place_RC.gather(1, slot_RK)
    missing = (0, num_kept - num_found)
    top_ids = top_ids.masked_fill(top_logprobs == -torch.inf, -1).int()
    pad = torch.nn.functional.pad
    return pad(top_ids, missing, value=-1), pad(top_logprobs, missing, value=-torch.inf)


def _columns_of_the_largest(values_RV: Tensor, num_kept: int) -> Tensor | None:
    """int64 [R, columns]: enough of them to hold each row's `num_kept` largest; None: no fewer than all.

    The largest lie in the TOP_GROUP-column groups with the largest maxima, so the sort goes over these alone.
    """
    num_groups = values_RV.shape[1] // TOP_GROUP
    if num_groups <= 4 * num_kept:
        return None
    in_groups_RGC = values_RV[:, : num_groups * TOP_GROUP].unflatten(1, (num_groups, TOP_GROUP))
    group_RK = in_groups_RGC.amax(2).topk(num_kept, dim=-1, sorted=False).indices
    within_C = torch.arange(TOP_GROUP, device=values_RV.device)
    place_RC = (group_RK[:, :, None] * TOP_GROUP + within_C).flatten(1)
    after_C = torch.arange(num_groups * TOP_GROUP, values_RV.shape[1], device=values_RV.device)
    return torch.cat([place_RC, after_C.expand(len(values_RV), -1)], dim=1)


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
