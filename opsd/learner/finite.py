"""Whether weights and gradients are finite, and the name of the first that is not: the same answer on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opsd.errors import DataError, StageError
from opsd.learner.model import DistillationModel, all_tensors, trained_tensors


def require_finite_weights(model: DistillationModel, source: str, device: torch.device) -> None:
    """Raises DataError, on every rank or on none, where a weight that came from `source` is not finite."""
    name = first_not_finite(all_tensors(model), device)
    if name is not None:
        raise DataError(f"{source}: the weight {name} holds NaN or infinity: no token has a probability with it")


def require_finite_update(model: DistillationModel, learning_rate: float, device: torch.device) -> None:
    """Raises StageError, on every rank or on none, where an optimiser's step left a weight that is not finite."""
    name = first_not_finite(trained_tensors(model), device)
    if name is not None:
        raise StageError(
            f"learn: the optimiser's step, at a learning rate of {learning_rate:g}, made the weight {name} NaN or "
            "infinite: these weights are not saved"
        )


def what_is_not_finite(loss: float, grad_norm: float, model: DistillationModel, device: torch.device) -> str:
    """Of a step's loss and gradient norm, which every rank knows; with the first weight at fault. Empty: both are."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return ""
    found = [f"the loss is {loss}"] if not math.isfinite(loss) else []
    if not math.isfinite(grad_norm):
        gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        name = first_not_finite(gradients, device)
        found.append(f"the gradient norm is {grad_norm}" + (f" (the first such weight: {name})" if name else ""))
    return " and ".join(found)


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> str | None:
    """The Hugging Face name of the first tensor with NaN or infinity in any rank's part; None: all are finite.

    One pass and a few bytes between ranks: a sum is finite where all of its parts are, short of an overflow. A
    collective: every rank brings the same names.
    """
    names, wrong = [], []
    for name, tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        names.append(name.removeprefix("causal_lm."))
        wrong.append(~own.sum().isfinite().to(device))
    found = torch.stack(wrong).int()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    places = found.nonzero()
    return names[int(places[0])] if len(places) else None
