"""What a weight update must hold. vLLM itself takes an incomplete one without a word and then answers with garbage."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opsd.errors import StageError


def complete_weights(model: PreTrainedModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """`named` without the names that the model ties to others. Raises StageError unless it holds just the model's."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    own = model.state_dict().keys() - tied
    missing, unknown = own - named.keys(), named.keys() - own - tied
    if missing or unknown:
        raise StageError(
            f"weight update: {len(missing)} names of the model are missing {_some(missing)}, "
            f"{len(unknown)} are not the model's {_some(unknown)}"
        )
    return {name: weight for name, weight in named.items() if name in own}


def model_without_weights(path: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder on the meta device: its names and shapes, no memory."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _some(names: set[str]) -> str:
    return f"({min(names)}, ...)" if names else ""
