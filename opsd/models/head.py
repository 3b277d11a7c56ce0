"""How a model makes logits of its last hidden states: as its config says, and as is then measured on the model itself.

The sparse loss and the scores on named tokens compute logits from hidden states, `lm_head` and a `HeadForm`. A config
names its scale and its soft cap as it likes, so a list of such names always misses one, whose effect would be left out
silently. So the logits are compared with the model's own before anything is learnt from them.
"""
# L tokens, D width, V rows of the head

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from opsd.errors import ConfigError
from opsd.ops.head.form import HeadForm

PROBE_LOGIT = 50.0  # the largest logit of the comparison: a random model's own are too small to reach a soft cap
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the largest logit; both sides are the same products
NUM_PROBE_TOKENS = 4
HINTS = ("logit", "lm_head", "softcap", "soft_cap", "dim_model_base", "output_multiplier")  # in names of such fields
OTHERS = ("router", "attn", "keep")  # in names of fields that only look so
NO_TRANSFORM = (None, False, 0, 1)


def multiplied(form: HeadForm, number: float) -> HeadForm:
    return form._replace(scale=form.scale * number)


def divided(form: HeadForm, number: float) -> HeadForm:
    return form._replace(scale=form.scale / number)


def capped(form: HeadForm, number: float) -> HeadForm:
    return form._replace(soft_cap=number)


# What a field of a config does to the logits. A model may divide its hidden states instead: that is the same.
FIELDS: dict[str, Callable[[HeadForm, float], HeadForm]] = {
    "logit_scale": multiplied,  # Cohere
    "lm_head_multiplier": multiplied,  # Falcon-H1
    "output_multiplier": multiplied,
    "logits_scaling": divided,  # Granite, MiniCPM 3
    "logits_mup_width_multiplier": divided,
    "final_logit_softcapping": capped,  # Gemma 2
    "logits_soft_cap": capped,  # RecurrentGemma
    "output_logit_soft_cap": capped,  # xLSTM
}
# By the model's type, where the same name means another thing.
EXCEPTIONS = {("hyperclovax", "logits_scaling"): multiplied}


def head_form(config: PreTrainedConfig) -> HeadForm:
    """What the config says; a field that is absent, empty or not above 0 says nothing."""
    text, form = config.get_text_config(), HeadForm()
    for name, change in FIELDS.items():
        number = getattr(text, name, None)
        if isinstance(number, int | float) and number > 0:
            form = EXCEPTIONS.get((text.model_type, name), change)(form, float(number))
    if getattr(text, "dim_model_base", None) and not hasattr(text, "logits_scaling"):  # MiniCPM's own code
        form = multiplied(form, text.dim_model_base / text.hidden_size)
    return form


@dataclass(frozen=True, kw_only=True)
class HeadDifference:
    """Between a model's own logits and ours, scaled alike so that the largest, without its cap, is PROBE_LOGIT."""

    largest: float  # of the absolute differences; nan where one of the two is not a number
    tolerance: float

    @property
    def is_none(self) -> bool:
        return self.largest <= self.tolerance


@torch.no_grad()
def head_difference(causal_lm: PreTrainedModel, form: HeadForm) -> HeadDifference:
    """A few tokens through the whole model, and through its trunk, then `lm_head` with its bias, then `form`.

    Under FSDP2 a collective, called inside a forward method of the root module, so that the head is whole. Raises
    ConfigError where trunk and head cannot be told apart.
    """
    head = causal_lm.get_output_embeddings()
    if head is None or causal_lm.base_model is causal_lm:
        raise ConfigError(f"{type(causal_lm).__name__} does not show its trunk and its lm_head apart: not supported")
    inputs = {"input_ids": torch.arange(NUM_PROBE_TOKENS, device=head.weight.device)[None], "use_cache": False}
    hidden_1LD = causal_lm.base_model(**inputs).last_hidden_state
    product_1LV = nn.functional.linear(hidden_1LD.to(head.weight.dtype), head.weight, getattr(head, "bias", None))
    factor = PROBE_LOGIT / (product_1LV.abs().max() * abs(form.scale)).clamp_min(1e-30)

    def enlarged(_module: nn.Module, _inputs: tuple, output_1LV: Tensor) -> Tensor:
        return output_1LV * factor

    hook = head.register_forward_hook(enlarged)
    try:
        own_1LV = causal_lm(**inputs).logits
    finally:
        hook.remove()
    ours_1LV = form.apply_(product_1LV * factor)
    return HeadDifference(
        largest=(own_1LV.float() - ours_1LV.float()).abs().max().item(),
        tolerance=TOLERANCE[head.weight.dtype] * PROBE_LOGIT,
    )


def require_head(setting: str, path: str, causal_lm: PreTrainedModel, form: HeadForm, found: HeadDifference) -> None:
    """`setting`: as in "student.path". Raises ConfigError that names the config's fields that may be the cause."""
    if found.is_none:
        return
    name = type(causal_lm).__name__
    if found.largest != found.largest:
        weight = next((each for each, p in causal_lm.named_parameters() if not p.isfinite().all()), None)
        why = (
            f"its weight {weight} holds NaN or infinity" if weight else "its weights are finite, but its sums overflow"
        )
        raise ConfigError(f"{setting}={path}: {name} has logits that are no numbers (NaN): {why}")
    fields = ", ".join(logit_fields(causal_lm.config))
    cap = "no soft cap" if form.soft_cap is None else f"a soft cap of {form.soft_cap:g}"
    raise ConfigError(
        f"{setting}={path}: {name} makes logits of another form than lm_head times {form.scale:g} with {cap}, as read "
        f"from its config ({fields or 'which names none'}), which is not supported: they differ by up to "
        f"{found.largest:.3g} where the largest is {PROBE_LOGIT:g}"
    )


def logit_fields(config: PreTrainedConfig) -> list[str]:
    """The config's fields whose names speak of logits and whose values do something, as "name=value"."""
    fields = config.get_text_config().to_dict()
    named = {name: value for name, value in fields.items() if any(hint in name for hint in HINTS)}
    return [
        f"{name}={value}"
        for name, value in named.items()
        if not any(other in name for other in OTHERS) and value not in NO_TRANSFORM
    ]
