"""What a weight update must hold. vLLM itself takes an incomplete one silently and then answers with garbage."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from opsd.errors import StageError
from opsd.models.weights import tied_names


def complete_weights(model: PreTrainedModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """`named` without the names that the model ties to others. Raises StageError unless it holds just the model's."""
    tied = tied_names(model)
    own = model.state_dict().keys() - tied
    missing, unknown = own - named.keys(), named.keys() - own - tied
    if missing or unknown:
        raise StageError(
            f"weight update: {len(missing)} names of the model are missing {_some(missing)}, "
            f"{len(unknown)} are not the model's {_some(unknown)}"
        )
    return {name: weight for name, weight in named.items() if name in own}


def _some(names: set[str]) -> str:
    return f"({min(names)}, ...)" if names else ""
