"""The student onto the ranks, a unit of FSDP2 at a time: rank 0 reads the folder, the others begin without memory.

No rank ever holds more on its GPU than its shards and one unit whole, and only rank 0 has the model in its host memory,
of which it gives away a unit at a time. Every kind of folder that transformers reads is read, since rank 0 reads it
through `from_pretrained`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opsd.config.run import StudentConfig
from opsd.errors import ConfigError, StageError
from opsd.learner.attention import attention_for
from opsd.models.lora import add_adapter

Shapes = dict[str, "TensorShape"]


@dataclass(frozen=True, kw_only=True)
class TensorShape:
    """What a parameter or buffer looks like on rank 0."""

    shape: torch.Size
    dtype: torch.dtype
    same_as: str  # the first name of the same tensor: its own, or what it is tied to


def open_student(student: StudentConfig, *, rank: int, device: str, seed: int = 0) -> PreTrainedModel:
    """The student with its weights on the CPU on rank 0, on the meta device elsewhere: `shard` brings them there.

    The weights that train are float32; those beside an adapter never change, so they are kept as they compute, in
    `student.dtype`. `seed`: of a new adapter.
    """
    path, trusted, has_adapter = student.path, student.trust_remote_code, student.lora.rank > 0
    attention = attention_for(empty_student(path, attention=None, trust_remote_code=trusted), device, student.dtype)
    load = load_student if rank == 0 else empty_student
    dtype = getattr(torch, student.dtype) if has_adapter else torch.float32
    causal_lm = load(path, attention=attention, trust_remote_code=trusted, dtype=dtype)
    if has_adapter:
        add_adapter(causal_lm, student.lora, seed)
    return causal_lm


def load_student(
    path: str, *, attention: str | None, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The student with its weights, dropout off (rollouts are made without it)."""
    causal_lm = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
    )
    return causal_lm.eval()


def empty_student(
    path: str, *, attention: str | None, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The same model without weights, on the meta device."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return causal_lm.eval()


def agree_on_tensors(model: nn.Module) -> Shapes:
    """What rank 0 has, on every rank. Raises StageError on all of them where another rank has other names or shapes."""
    everyone: list[Shapes] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, describe(model))
    first = {name: tensor.shape for name, tensor in everyone[0].items()}
    for rank, found in enumerate(everyone):
        other = {name: tensor.shape for name, tensor in found.items()}
        wrong = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if wrong:
            name = wrong[0]
            raise StageError(
                f"learner start: rank {rank} builds another student than rank 0 loaded: {len(wrong)} tensors differ, "
                f"the first is {name}: {first.get(name)} on rank 0, {other.get(name)} on rank {rank}"
            )
    return everyone[0]


def describe(model: nn.Module) -> Shapes:
    found: Shapes = {}
    names: dict[Tensor, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        same_as = names.setdefault(tensor, name)
        found[name] = TensorShape(shape=tensor.shape, dtype=tensor.dtype, same_as=same_as)
    return found


def require_own_weights(layers: list[nn.Module]) -> None:
    """Raises ConfigError where two layers share a weight: each would be sharded, and trained, as its own."""
    owner: dict[nn.Parameter, int] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if owner.setdefault(parameter, index) != index:
                raise ConfigError(
                    f"student.path: layers {owner[parameter]} and {index} of this {type(layer).__name__} model share "
                    f"the weight {name}, which the learner does not support"
                )


@torch.no_grad()
def bring(unit: nn.Module, path: str, missing: Shapes, device: torch.device) -> None:
    """Puts rank 0's tensors of this unit on the device of every rank, in place. A collective.

    `path`: the unit's name in the whole model. `missing`: what has not been brought yet; the unit's names leave it.
    """
    is_first, is_alone = dist.get_rank() == 0, dist.get_world_size() == 1
    made: dict[str, Tensor] = {}
    for name, owner, key, tensor in tensors_of(unit, path):
        kind = missing.pop(name, None)
        if kind is None:
            continue
        if kind.same_as not in made:
            whole = tensor.data.to(device) if is_first else torch.empty(kind.shape, dtype=kind.dtype, device=device)
            whole = whole.contiguous()
            if not is_alone and whole.numel():
                dist.broadcast(whole.view(-1).view(torch.uint8), src=0)  # bytes: gloo does not take every dtype
            is_parameter = isinstance(tensor, nn.Parameter)
            made[kind.same_as] = nn.Parameter(whole, requires_grad=tensor.requires_grad) if is_parameter else whole
        setattr(owner, key, made[kind.same_as])


def tensors_of(unit: nn.Module, path: str) -> list[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, its attribute, tensor) of each parameter and buffer, a tied one under each of its names."""
    return [
        (f"{module_path}.{key}".removeprefix("."), module, key, tensor)
        for module_path, module in unit.named_modules(prefix=path, remove_duplicate=False)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
