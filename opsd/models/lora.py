"""LoRA, a low-rank adapter beside the frozen linear layers of a student, in peft's form and under its names.

    layer(x) = W x + bias + scale * B (A x)        A [rank, in], B [out, rank], scale = alpha / rank

Only A and B train. Whoever takes the student's weights gets W + scale * B A by the name of W: no engine and no reader
of an exported student has to know what an adapter is. B begins with zeros, so the first student is its base.
"""
# O a layer's outputs, I its inputs, R rank

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.config.lora import LoraConfig
from opsd.config.run import StudentConfig
from opsd.errors import ConfigError
from opsd.models.facts import weights_fingerprint
from opsd.models.weights import model_without_weights

ADAPTER_FOLDER = "adapter"  # below that of the merged student: transformers would load both where they lie together
BASE, DOWN, UP = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"  # in peft's names of parameters
FILE_PREFIX = "base_model.model."  # of the names in peft's files, which do not have the adapter's own, `default`


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """How much of a student trains."""

    num_layers: int  # that have an adapter
    num_trained: int  # parameters
    num_parameters: int  # of the student without it; a tied head is counted once

    def __str__(self) -> str:
        share = self.num_trained / self.num_parameters
        return (
            f"{self.num_trained:,} parameters beside {self.num_layers} linear layers train ({share:.1%} of the "
            f"student's {self.num_parameters:,})"
        )


def adapted_layers(causal_lm: PreTrainedModel, targets: list[str]) -> dict[str, nn.Linear]:
    """By name, the linear layers whose names are or end in one of `targets`; none given: all of the decoder, which has
    no part in a head or a vision tower.

    Raises ConfigError for a target that names no layer, the head, or a layer of another kind.
    """
    head = causal_lm.get_output_embeddings()
    modules = {name: module for name, module in causal_lm.named_modules() if name}
    if not targets:
        linear = {module for module in causal_lm.get_decoder().modules() if isinstance(module, nn.Linear)}
        found = {name: module for name, module in modules.items() if module in linear and module is not head}
        if not found:
            raise ConfigError(f"student.lora: the decoder of {type(causal_lm).__name__} has no linear layers")
        return found
    layers: dict[str, nn.Linear] = {}
    for target in targets:
        named = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        if not named:
            some = ", ".join(sorted({name.rpartition(".")[2] for name in adapted_layers(causal_lm, [])}))
            raise ConfigError(
                f"student.lora.targets: {type(causal_lm).__name__} has no layer {target!r}; its linear layers: {some}"
            )
        for name, module in named.items():
            if module is head or not isinstance(module, nn.Linear):
                kind = "the head" if module is head else f"of the kind {type(module).__name__}"
                raise ConfigError(f"student.lora.targets: {target!r} names {name}, {kind}: only linear layers can be")
            layers[name] = module
    return layers


def adapter_of(student: StudentConfig) -> AdapterSize | None:
    """Of the model in this folder; None where the student itself trains. Raises as `add_adapter`."""
    if not student.lora.rank:
        return None
    model = model_without_weights(student.path, trust_remote_code=student.trust_remote_code)
    return add_adapter(model, student.lora)


def add_adapter(causal_lm: PreTrainedModel, lora: LoraConfig, seed: int = 0) -> AdapterSize:
    """Freezes the model and adds a float32 adapter, in place; on the meta device where the model is there.

    Equal seeds give equal adapters, and the process's own generator stays where it is. Raises ConfigError where a layer
    cannot have one.
    """
    from peft import LoraConfig as PeftConfig  # takes seconds to import
    from peft import inject_adapter_in_model

    layers = adapted_layers(causal_lm, lora.targets)
    num_parameters = sum(parameter.numel() for parameter in causal_lm.parameters())
    config = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=[*layers], lora_dropout=0.0, bias="none")
    kind, way_out = type(causal_lm).__name__, "name other layers by student.lora.targets, those of the attention say"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, causal_lm, low_cpu_mem_usage=causal_lm.device.type == "meta")
        except ValueError as error:  # layers that a fused kernel reads past the adapter, as Mamba's
            raise ConfigError(f"student.lora: {kind}: {' '.join(str(error).split())}: {way_out}") from error
    trained = {name: parameter for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}
    # peft takes some names for those of a mixture's experts, which are no linear layers, and adapts these instead.
    others = trained.keys() - {f"{layer}{factor}" for layer in layers for factor in (DOWN, UP)}
    if others or len(trained) != 2 * len(layers):
        raise ConfigError(
            f"student.lora: {kind}: peft adapts {len(trained)} weights in place of the two factors of each of "
            f"{len(layers)} linear layers, as the experts have names in common with them: {way_out}"
        )
    for parameter in trained.values():
        parameter.data = parameter.data.float()  # peft gives it the dtype of the layer
    causal_lm.eval()
    return AdapterSize(
        num_layers=len(layers),
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        num_parameters=num_parameters,
    )


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's parameter."""
    return name.endswith((DOWN, UP))


def base_name(name: str) -> str:
    """What the base model calls its parameter `name` of the model with an adapter."""
    return name.replace(f"{BASE}.", ".")


def factors_of(name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A [R, I] and B [O, R] beside the weight of this name, as the base model or as peft has it; None: it has none."""
    layer = base_name(name).removesuffix(".weight")
    return (tensors[layer + DOWN], tensors[layer + UP]) if layer + DOWN in tensors else None


def merged(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """W + scale * B A, in float32."""
    return torch.addmm(weight_OI.float(), up_OR.float(), down_RI.float(), alpha=scale)


def merge_adapter(base: dict[str, Tensor], adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the student whose base model has `base`, by the same names."""
    found = {}
    for name, weight in base.items():
        factors = factors_of(name, adapter)
        found[name] = weight if factors is None else merged(weight, *factors, scale)
    return found


def adapter_facts(student: StudentConfig) -> dict[str, Any] | None:
    """What must be known of an adapter to use its tensors, as JSON; None where the student itself trains.

    `dtype`: of the frozen weights; `base`: tells these from others.
    """
    lora = student.lora
    if not lora.rank:
        return None
    own = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    return {**own, "dtype": student.dtype, "base": weights_fingerprint(student.path)}


def save_adapter(folder: Path, adapter: dict[str, Tensor], lora: LoraConfig, base: str) -> None:
    """A folder that peft loads on the base model. `adapter`: whole tensors, by their names in memory.

    `base`: the model's folder, of which the config has the name: where it lay is nobody's business.
    """
    from peft import LoraConfig as PeftConfig

    names = sorted({name.removesuffix(DOWN).rpartition(".")[2] for name in adapter if name.endswith(DOWN)})
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets or names,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=Path(base).name,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {
        f"{FILE_PREFIX}{name.replace('.default.', '.')}": tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in adapter.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
