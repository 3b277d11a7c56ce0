"""What is measured of a student before its first step, because no list of architectures is ever complete.

Its logits must be what the sparse loss makes of its last hidden states, or the loss is another model's. And two
sequences packed into one row must give what each gives alone: a short convolution, linear attention or a state-space
layer carries state over their border, and some attention does not learn where it is. Such a student runs one sequence
at a time.
"""
# L tokens of a row, N rows that are compared, D width

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from opsd.learner.model import DistillationModel
from opsd.learner.packing import MicroBatch
from opsd.models.head import HeadDifference, head_difference, require_head

NUM_BEFORE, NUM_COMPARED = 12, 8  # tokens of the first sequence of a row, and of the second
# Of a hidden state, relative to its length. Alone: other shapes, so other rounding, in every layer. After another
# sequence of the same length: the same shapes, and only routing to experts may round otherwise.
ALONE_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
AFTER_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


@torch.no_grad()
def require_student_head(model: DistillationModel, path: str, device: torch.device) -> None:
    """Raises ConfigError, on every rank or on none, where the student's logits are not of the form that is trained."""
    found = model.measure(partial(head_difference, form=model.head_form))
    model.reshard()
    found = HeadDifference(largest=highest(found.largest, device), tolerance=found.tolerance)
    require_head("student.path", path, model.causal_lm, model.head_form, found)


@torch.no_grad()
def keeps_sequences_apart(model: DistillationModel, dtype: str, device: torch.device) -> bool:
    """Whether packed rows are right for this student: the same answer on every rank. `dtype`: of its forward pass."""
    if has_chunks(model.causal_lm):
        return False
    first_L, other_L, second_L = probe_tokens(model.vocabulary.size)
    alone_ND, packed_ND, swapped_ND = (
        model.hidden(probe_row(parts).to(device)).float()
        for parts in ([second_L], [first_L, second_L], [other_L, second_L])
    )
    model.reshard()
    alone = highest(relative_difference(packed_ND, alone_ND), device)
    after = highest(relative_difference(packed_ND, swapped_ND), device)
    return alone <= ALONE_TOLERANCE[dtype] and after <= AFTER_TOLERANCE[dtype]


def has_chunks(causal_lm: PreTrainedModel) -> bool:
    """Attention in chunks (Llama 4): transformers cuts them by place in the row, too far apart for a short probe."""
    return getattr(causal_lm.config.get_text_config(), "attention_chunk_size", None) is not None


def probe_tokens(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two different beginnings of one length, and what follows them. int64."""
    ids = torch.arange(2 * NUM_BEFORE + NUM_COMPARED) * 7919 % vocab_size
    first_L, other_L, second_L = ids.split([NUM_BEFORE, NUM_BEFORE, NUM_COMPARED])
    return first_L, other_L, second_L


def probe_row(parts: list[Tensor]) -> MicroBatch:
    """The parts packed into one row; the last one's rows are kept."""
    lengths = [len(part) for part in parts]
    num_rows = lengths[-1]
    return MicroBatch(
        token_ids_L=torch.cat(parts),
        position_L=torch.cat([torch.arange(length) for length in lengths]),
        cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_length=max(lengths),
        row_N=torch.arange(sum(lengths) - num_rows, sum(lengths)),
        support_NU=torch.zeros(num_rows, 0, dtype=torch.int64),
        teacher_logprobs_NB=torch.zeros(num_rows, 1),
        weight_N=torch.zeros(num_rows),
        index_N=torch.arange(num_rows),
    )


def relative_difference(one_ND: Tensor, other_ND: Tensor) -> float:
    """The largest over rows; inf where one is not finite."""
    found = ((one_ND - other_ND).norm(dim=1) / other_ND.norm(dim=1).clamp_min(1e-30)).max().item()
    return found if found == found else float("inf")


def highest(value: float, device: torch.device) -> float:
    """Over ranks, so that all of them decide alike; nan counts as inf."""
    found = torch.tensor(value, dtype=torch.float64, device=device).nan_to_num(nan=torch.inf, posinf=torch.inf)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()
