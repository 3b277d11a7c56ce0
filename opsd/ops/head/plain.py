"""Whether a model's logits are its last hidden states times `lm_head.weight`, and nothing else.

The sparse loss and the scores on named tokens compute logits in that way. A bias of the head, a multiplier before it, a
scale or a soft cap after it would be left out silently, and a list of their names always misses one: it is
measured on the model itself.
"""
# L tokens, D width, V rows of the head

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from opsd.errors import ConfigError

PROBE_LOGIT = 50.0  # the largest logit of the comparison: a random model's own are too small to reach a soft cap
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the largest logit; both sides are the same products
NUM_PROBE_TOKENS = 4
HINTS = ("logit", "lm_head", "softcap", "soft_cap", "dim_model_base")  # in the names of the fields that say so
NO_TRANSFORM = (None, False, 0, 1)


@dataclass(frozen=True, kw_only=True)
class HeadDifference:
    """Between a model's own logits and head(hidden), scaled alike so that the largest is PROBE_LOGIT."""

    largest: float  # of the absolute differences; nan where one of the two is not a number
    tolerance: float
    has_bias: bool  # one that is not zero: in bfloat16 it may be too small for the comparison

    @property
    def is_plain(self) -> bool:
        return self.largest <= self.tolerance and not self.has_bias


@torch.no_grad()
def head_difference(causal_lm: PreTrainedModel, *, allow_bias: bool = False) -> HeadDifference:
    """A few tokens through the whole model, and through its trunk and then `lm_head.weight` alone.

    `allow_bias`: through the whole lm_head, for who computes logits so. Under FSDP2 a collective, called inside a
    forward method of the root module, so that the head is whole. Raises ConfigError where the two cannot be told apart.
    """
    head = causal_lm.get_output_embeddings()
    if head is None or causal_lm.base_model is causal_lm:
        raise ConfigError(f"{type(causal_lm).__name__} does not show its trunk and its lm_head apart: not supported")
    inputs = {"input_ids": torch.arange(NUM_PROBE_TOKENS, device=head.weight.device)[None], "use_cache": False}
    hidden_1LD = causal_lm.base_model(**inputs).last_hidden_state
    bias = getattr(head, "bias", None)
    plain_1LV = nn.functional.linear(hidden_1LD.to(head.weight.dtype), head.weight, bias if allow_bias else None)
    factor = PROBE_LOGIT / plain_1LV.abs().max().clamp_min(1e-30)

    def enlarged(_module: nn.Module, _inputs: tuple, logits_1LV: Tensor) -> Tensor:
        return logits_1LV * factor

    hook = head.register_forward_hook(enlarged)
    try:
        own_1LV = causal_lm(**inputs).logits
    finally:
        hook.remove()
    return HeadDifference(
        largest=(own_1LV.float() - (plain_1LV * factor).float()).abs().max().item(),
        tolerance=TOLERANCE[head.weight.dtype] * PROBE_LOGIT,
        has_bias=not allow_bias and bias is not None and bool(bias.any()),
    )


def require_plain_head(setting: str, path: str, causal_lm: PreTrainedModel, found: HeadDifference) -> None:
    """`setting`: as in "student.path". Raises ConfigError that names the cause where the model gives it away."""
    if found.is_plain:
        return
    if found.largest != found.largest:
        raise ConfigError(f"{setting}={path}: {type(causal_lm).__name__} has logits that are no numbers (NaN)")
    causes = ["a bias of lm_head"] * found.has_bias + logit_fields(causal_lm.config)
    because = f" ({', '.join(causes)})" if causes else ""
    raise ConfigError(
        f"{setting}={path}: {type(causal_lm).__name__} changes its logits beyond lm_head.weight{because}, which is not "
        f"supported: they differ by up to {found.largest:.3g} where the largest is {PROBE_LOGIT:g}"
    )


def logit_fields(config: PreTrainedConfig) -> list[str]:
    """The config's fields whose names speak of logits and whose values do something, as "name=value"."""
    fields = config.get_text_config().to_dict()
    named = {name: value for name, value in fields.items() if any(hint in name for hint in HINTS)}
    return [
        f"{name}={value}"
        for name, value in named.items()
        if "router" not in name and "attn" not in name and "keep" not in name and value not in NO_TRANSFORM
    ]
