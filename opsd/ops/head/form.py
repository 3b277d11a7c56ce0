"""What a model makes of its head's products: logits = cap(scale * (hidden @ weight.T + bias)).

With cap(z) = c tanh(z / c). Phi has the bias, Gemma 2 the cap; Cohere multiplies and Granite divides by a number. All
that is the model's own: stop ids are merged, and a temperature divides, after it.
"""
# N rows of a chunk, D width, V rows of the weight, C columns of a block, M blocks, E stop ids, U support size

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from opsd.ops.head.events import Events


class HeadForm(NamedTuple):
    """What becomes of a head's products with their bias: cap(scale * product)."""

    scale: float = 1.0
    soft_cap: float | None = None  # c > 0; None: no cap

    def apply_(self, product_NC: Tensor) -> Tensor:
        """The logits [N, C], in the place of the products."""
        if self.scale != 1.0:
            product_NC.mul_(self.scale)
        if self.soft_cap is not None:
            product_NC.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return product_NC

    def slope_(self, logits_NC: Tensor) -> Tensor:
        """d cap(z) / dz = 1 - (cap(z) / c)^2 in [0, 1], in the place of the logits; 0 at a logit of -inf."""
        assert self.soft_cap is not None, "the slope of no cap"
        # Rounding may take a logit beyond the cap. The clamp lets what is not a number through.
        return logits_NC.div_(self.soft_cap).clamp_(-1.0, 1.0).square_().neg_().add_(1.0)

    def scaled(self, gradient: Tensor) -> Tensor:
        """The gradient in the products, from the gradient in scale * product; as it is where the scale is 1."""
        return gradient if self.scale == 1.0 else gradient * self.scale


PLAIN = HeadForm()


class OutputHead(NamedTuple):
    """All that makes logits of hidden states."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    form: HeadForm = PLAIN

    def logits_(self, product_NC: Tensor, columns: slice | list[int]) -> Tensor:
        """The logits of these columns, in the place of hidden @ weight[columns].T."""
        if self.bias_V is not None:
            product_NC.add_(self.bias_V[columns])
        return self.form.apply_(product_NC)


class CapSlopes(NamedTuple):
    """The derivative of a soft cap at each logit of a chunk, by which its gradient is multiplied.

    A chunk keeps shares of blocks, not logits: share = exp(logit / temperature - logsumexp of the block) gives an
    unnamed token's logit back; a share that underflowed has no gradient. Those of named tokens and stop ids are kept.
    The merged stop event is no output of the cap, its parts are: so its own slope is 1.
    """

    form: HeadForm
    logsumexp_NM: Tensor  # of each block's unnamed tokens; -inf where it has none
    temperature_N1: Tensor | None
    named_NU: Tensor
    stop_NE: Tensor | None  # None: nothing is merged
    event_id: int | None  # the merged stop event's column; None: nothing is merged

    def of_shares(self, share_NC: Tensor, columns: slice, block: int) -> Tensor:
        """Of the unnamed tokens of these columns, which are the block numbered so, or a part of it."""
        logits_NC = share_NC.log().add_(self.logsumexp_NM[:, block, None])
        if self.temperature_N1 is not None:
            logits_NC.mul_(self.temperature_N1)
        slope_NC = self.form.slope_(logits_NC)
        if self.event_id is not None and columns.start <= self.event_id < columns.stop:
            slope_NC[:, self.event_id - columns.start].fill_(1.0)
        return slope_NC


def cap_slopes(
    form: HeadForm, events: Events, named_NU: Tensor, stop_NE: Tensor | None, logsumexp_NM: Tensor
) -> CapSlopes | None:
    """None where the head has no cap. `named_NU`: logits at their temperature; `stop_NE`: before it, and not merged."""
    if form.soft_cap is None:
        return None
    temperature_N1 = None if events.temperature_N is None else events.temperature_N[:, None].to(named_NU.dtype)
    named_NU = named_NU.clone() if temperature_N1 is None else named_NU * temperature_N1
    event_id = None if stop_NE is None else events.stop_ids[0]
    slope_NU = form.slope_(named_NU)
    if event_id is not None:
        slope_NU.masked_fill_(events.support_NU == event_id, 1.0)
    return CapSlopes(
        form=form,
        logsumexp_NM=logsumexp_NM.to(named_NU.dtype),
        temperature_N1=temperature_N1,
        named_NU=slope_NU,
        stop_NE=None if stop_NE is None else form.slope_(stop_NE.clone()),
        event_id=event_id,
    )


def require_form(form: HeadForm) -> None:
    """Raises ValueError for a scale or a cap that makes no logits."""
    if not (math.isfinite(form.scale) and form.scale != 0.0):
        raise ValueError(f"form.scale must be a number other than 0, got {form.scale}")
    if form.soft_cap is not None and not 0.0 < form.soft_cap < math.inf:
        raise ValueError(f"form.soft_cap must be above 0, or None for no cap, got {form.soft_cap}")
