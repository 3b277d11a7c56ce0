"""The student under FSDP2: trunk, head and sparse loss as one module."""
# L tokens of a packed micro-batch, N kept tokens, V vocabulary, D width

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opsd.learner.attention import packed_row
from opsd.learner.loading import agree_on_tensors, bring, require_own_weights
from opsd.learner.packing import MicroBatch
from opsd.learner.teacher_head import TeacherHead
from opsd.models.head import head_form
from opsd.models.lora import base_name, factors_of, is_adapter, merged
from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.losses.divergences import forward_kl, reverse_kl
from opsd.ops.losses.objective import Objective
from opsd.ops.mixing import mixed_embeddings
from opsd.ops.signals import Statistics, statistics_of
from opsd.types import TokenStats, Vocabulary

Divergence = Callable[..., Tensor] | Objective
Result = TypeVar("Result")


class DistillationModel(nn.Module):
    """Packed tokens and teacher scores in; out come the summed loss, or the statistics of each token.

    The head runs inside a forward method of this module, so that FSDP2 gathers the head's weight and bias once (also
    where the weight is tied to the embedding) and reduces their gradients once.
    """

    reshard: Callable[[], None]  # FSDP2's, from `shard` on

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        divergence: Divergence,
        vocabulary: Vocabulary,
        statistics: Statistics | None = None,
        *,
        teacher_head: TeacherHead | None = None,
    ) -> None:
        """`statistics`: functions of the buckets, which `token_stats` also gives; see opsd.ops.signals.

        `teacher_head`: makes the teacher's distribution of hidden states where batches have these.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.head_form = head_form(causal_lm.config)
        self.objective = Objective.of(divergence)
        self.vocabulary = vocabulary
        self.statistics = statistics or {}
        self.teacher_head = teacher_head  # no part of the student: nothing shards, trains or saves it

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(loss: sum of weight x objective, a scalar; per_token_N: the objective, detached).

        A row's temperature divides both models' logits, and its loss is multiplied by the square (Hinton et al.,
        arXiv 1503.02531), so that gradients keep their size.
        """
        weight_N = batch.weight_N
        if batch.temperature_N is not None:
            weight_N = weight_N * batch.temperature_N**2
        hidden_ND, (weight_VD, bias_V) = self._hidden(batch), self._head()
        known: dict[str, Any] = {
            "temperature_N": batch.temperature_N,
            "vocab_size": self.vocabulary.size,
            "stop_ids": self.vocabulary.stop_ids,
            "foreign_ids": self.vocabulary.foreign_ids,
            "bias_V": bias_V,
            "form": self.head_form,
            "row_inputs": self.objective.takes({"support_NU": batch.support_NU, **batch.inputs}),
        }
        if batch.teacher_hidden_NE is None:
            buckets = batch.support_NU, batch.teacher_logprobs_NB
            return sparse_head_loss(hidden_ND, weight_VD, *buckets, weight_N, self.objective, **known)
        assert self.teacher_head is not None, "hidden states without the head that they are meant for"
        teacher = batch.teacher_hidden_NE, self.teacher_head.weight_VE
        known.update(teacher_bias_W=self.teacher_head.bias_V, teacher_form=self.teacher_head.form)
        return exact_head_loss(hidden_ND, weight_VD, *teacher, weight_N, self.objective, **known)

    def token_stats(self, batch: MicroBatch) -> TokenStats:
        """The statistics of the batch's N rows: the exact entropy, and what compares the two models on their buckets.

        So the latter is no more exact than the buckets: see `named_mass_T`. Without the compatibility and the teacher's
        entropy: neither the student's candidates nor the teacher's order are part of a batch. docs/selection.md,
        Statistics of a token.
        """
        head_VD, bias_V = self._head()
        student_NB, entropy_N = bucket_logprobs(
            self._hidden(batch),
            head_VD,
            batch.support_NU,
            vocab_size=self.vocabulary.size,
            stop_ids=self.vocabulary.stop_ids,
            foreign_ids=self.vocabulary.foreign_ids,
            bias_V=bias_V,
            form=self.head_form,
        )
        # The teacher's rows are float32 and sum to 1 only nearly, so near zero a divergence can come out below it.
        teacher_NB = batch.teacher_logprobs_NB
        return TokenStats(
            entropy_T=(entropy_N / math.log(self.vocabulary.size)).clamp(0.0, 1.0),
            reverse_kl_T=reverse_kl(student_NB, teacher_NB).clamp_min(0.0),
            forward_kl_T=forward_kl(student_NB, teacher_NB).clamp_min(0.0),
            student_logprob_T=student_NB[:, 0],  # the sampled event is first in every support
            teacher_logprob_T=teacher_NB[:, 0],
            named_mass_T=1.0 - student_NB[:, -1].exp(),
            extra=statistics_of(self.statistics, student_NB, teacher_NB, batch.support_NU),
        )

    def measure(self, function: Callable[[PreTrainedModel], Result]) -> Result:
        """`function` of the student, called where FSDP2 has gathered the root's weights. Called by every rank."""
        return function(self.causal_lm)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """The trunk's last hidden states [N, D] at the rows that the batch names."""
        return self._hidden(batch)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight [V, D] and bias [V], None where it has none; whole inside a forward method alone."""
        head = self.causal_lm.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """The trunk's last hidden states [N, D] at the rows that the batch names."""
        inputs = {"input_ids": batch.token_ids_L[None]}
        if batch.other_ids_L is not None:
            assert batch.own_share_L is not None, "mixed embeddings without their shares"
            embed = self.causal_lm.get_input_embeddings()
            mixed_LD = mixed_embeddings(embed, batch.token_ids_L, batch.other_ids_L, batch.own_share_L)
            inputs = {"inputs_embeds": mixed_LD[None]}
        row = packed_row(self.causal_lm, batch)
        output = self.causal_lm.base_model(**inputs, **row, attention_mask=None, use_cache=False)
        return output.last_hidden_state[0, batch.row_N]


def shard(
    model: DistillationModel,
    *,
    device: str,
    num_ranks: int,
    dtype: str,
    checkpointing: bool = False,
    cpu_offload: bool = False,
    compile_layers: bool = False,
) -> None:
    """Wrap every decoder layer and then the whole in FSDP2, in place; gradients are summed over ranks, not averaged.

    The weights are those of rank 0; other ranks' may be on the meta device. A layer comes to the device, is sharded and
    leaves its whole form there before the next one comes.

    The weights in the loss are already divided by the global batch's sum, so a sum is the gradient of the mean.
    Gradients are reduced after every micro-batch: to do it once a step would save half of a step's traffic and cost
    every rank a whole float32 gradient, which is what FSDP is there to avoid.
    """
    mesh = init_device_mesh(device, (num_ranks,))
    precision, offload = MixedPrecisionPolicy(), OffloadPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device == "cuda")
    if checkpointing:
        checkpoint_layers(model.causal_lm)
    layers = decoder_layers(model.causal_lm)
    require_own_weights(layers)
    names, missing = {module: name for name, module in model.named_modules()}, agree_on_tensors(model)
    for layer in layers:
        bring(layer, names[layer], missing, torch.device(device))
        if compile_layers:
            layer.compile(dynamic=True)  # rows differ in length
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
    bring(model, "", missing, torch.device(device))
    # FSDP2 would look into the batch and round the teacher's log-probabilities, weights and temperatures to bfloat16.
    as_given = replace(precision, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=as_given, offload_policy=offload)
    for name in ("token_stats", "measure", "hidden"):
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def checkpoint_layers(causal_lm: PreTrainedModel) -> None:
    """Keep each decoder layer's input only, and run the layer again in the backward pass.

    transformers does so for a layer in training mode only. The layers' own parts stay in evaluation mode: a model whose
    config has attention_dropout would else train with it.
    """
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(causal_lm):
        layer.training = True


def decoder_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers says must stay whole: one FSDP unit each, the outer one where two are nested."""
    names = set(causal_lm._no_split_modules or ())
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in causal_lm.modules():  # a parent comes before its parts
        if type(module).__name__ in names and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    return layers


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, a tied head once, and the buffers that a model's files hold, such as e_score_correction_bias."""
    yield from model.named_parameters()
    yield from stored_buffers(model)


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is the run's own: an adapter's parameters where there is one, else all tensors."""
    adapter = [(name, parameter) for name, parameter in model.named_parameters() if is_adapter(name)]
    yield from adapter or all_tensors(model)


def stored_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{path}.{key}".removeprefix("."), buffer


@torch.no_grad()
def full_weights(
    shards: Iterable[tuple[str, Tensor]], dtype: torch.dtype, lora_scale: float = 0.0
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, whole, under its Hugging Face name, from `all_tensors`; a parameter in `dtype`.

    An adapter is merged into the weights that it stands beside, in float32; `lora_scale`: its own. A buffer, which is
    whole on every rank, keeps its dtype: files hold it in float32 beside weights in bfloat16. One at a time, so that a
    rank never holds more than it keeps. A collective: every rank iterates to the end.
    """
    tensors = dict(shards)
    for name, shard in tensors.items():
        if is_adapter(name):
            continue
        whole, factors = whole_tensor(shard), factors_of(name, tensors)
        if factors is not None:
            down, up = factors
            whole = merged(whole, whole_tensor(down), whole_tensor(up), lora_scale)
        yield base_name(name).removeprefix("causal_lm."), whole.to(dtype) if isinstance(shard, DTensor) else whole


def whole_tensor(shard: Tensor) -> Tensor:
    """A collective where ranks share it."""
    return shard.full_tensor().detach() if isinstance(shard, DTensor) else shard
