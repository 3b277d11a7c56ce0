"""One optimiser step of one rank, and a rank's statistics. Loads no Ray: a check on a bare box steps without it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opsd.learner.finite import require_finite_update, what_is_not_finite
from opsd.learner.model import DistillationModel
from opsd.learner.packing import MicroBatch
from opsd.types import StepReport, TokenStats


def train_step(
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    micro_batches: list[MicroBatch],
    *,
    device: torch.device,
    max_grad_norm: float,
) -> StepReport:
    """Sum the weighted losses and gradients over micro-batches and ranks, clip, step. Called by every rank.

    Where the loss or the gradient norm is not finite, weights, optimiser and scheduler stay as they are, on every rank,
    and the report says why. Raises StageError where the step itself makes a weight that is not finite.
    """
    totals = torch.zeros(3, device=device, dtype=torch.float64)  # loss, kept tokens, trunk tokens
    for batch in micro_batches:
        batch = batch.to(device)
        loss, _ = model(batch)
        loss.backward()
        totals += torch.stack(
            [
                loss.detach().double(),
                *(torch.tensor(float(len(x)), device=device) for x in (batch.row_N, batch.token_ids_L)),
            ]
        )
    dist.all_reduce(totals)
    # In two calls: to scale by a norm that is not finite would make every gradient so.
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    grad_norm = _full_norm(norm).item()
    learning_rate = float(scheduler.get_last_lr()[0])
    loss_sum, num_kept, num_trunk_tokens = totals.tolist()
    skipped = what_is_not_finite(loss_sum, grad_norm, model, device)
    if not skipped:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
        optimizer.step()
        scheduler.step()
        require_finite_update(model, learning_rate, device)
    optimizer.zero_grad(set_to_none=True)
    return StepReport(
        loss=loss_sum,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_kept=int(num_kept),
        num_trunk_tokens=int(num_trunk_tokens),
        skipped=skipped,
    )


@torch.no_grad()
def token_stats(
    model: DistillationModel, micro_batches: list[MicroBatch], *, device: torch.device
) -> tuple[Tensor, TokenStats]:
    """(index_N, statistics) of this rank's tokens on the CPU; index_N are their places in the global batch.

    Called by every rank, also by one whose micro-batches are empty.
    """
    parts = [model.token_stats(batch.to(device)) for batch in micro_batches]
    model.reshard()  # the root keeps its weights gathered for a backward pass, and none follows
    return torch.cat([batch.index_N for batch in micro_batches]), TokenStats.concatenate(parts).to("cpu")


def _full_norm(norm: Tensor) -> Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
