"""Ways to compute a distillation loss and its gradients from hidden rows and the output head, for `bench_head.py`."""
# N rows, D width, E the teacher's, V vocabulary, K the teacher's top tokens

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from head_rows import Rows
from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES

Gradients = tuple[Tensor, Tensor]  # of hidden [N, D] and weight [V, D]
Method = Callable[[], Gradients]
DENSE_CHUNK, TOP_K_CHUNK = 256, 128  # rows; the upstream repository's default, and one for little memory


def dense_method(
    rows: Rows, *, teacher_width: int | None = None, teacher_logits_given: bool = False, compiled: bool = False
) -> Method:
    """Reverse KL on logits of every row and token, kept by autograd; the softmax goes through chunks of rows.

    The teacher's full logits are made by its own head, of the student's width or `teacher_width`, without autograd:
    whoever distils on dense logits runs it beside the student's. `teacher_logits_given`: they are an input instead.
    `compiled`: by torch.compile, which gets all rows at once, to choose its own chunks.
    """
    reverse_kl = torch.compile(summed_reverse_kl) if compiled else summed_reverse_kl
    chunk_rows = len(rows.hidden_ND) if compiled else DENSE_CHUNK
    num_rows, vocab = len(rows.hidden_ND), len(rows.weight_VD)
    given_NV = random_like(rows, (num_rows, vocab))[0] if teacher_logits_given else None
    teacher_NE, head_VE = (None, None) if teacher_logits_given else teacher_of(rows, teacher_width)

    def run() -> Gradients:
        hidden_ND, weight_VD = leaves(rows)
        teacher_NV = teacher_NE @ head_VE.T if given_NV is None else given_NV
        student_NV = hidden_ND @ weight_VD.T
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        chunks = zip(student_NV.split(chunk_rows), teacher_NV.split(chunk_rows), strict=True)
        for student_CV, teacher_CV in chunks:
            loss = loss + reverse_kl(student_CV, teacher_CV)
        return gradients_of(loss / len(student_NV), hidden_ND, weight_VD)

    return run


def summed_reverse_kl(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """Of logits, in nats."""
    log_p_CV, log_q_CV = student_CV.float().log_softmax(1), teacher_CV.float().log_softmax(1)
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum()


def checkpointed_top_k_method(rows: Rows) -> Method:
    """Our equivalent of TRL's asynchronous trainer: chunks of rows, log-softmax, the teacher's top K, checkpointed.

    Written anew from its description, not TRL's code: reverse KL truncated to the top K, with no rest bucket.
    """

    def chunk_loss(hidden_CD: Tensor, weight_VD: Tensor, support_CK: Tensor, teacher_CK: Tensor) -> Tensor:
        student_CK = (hidden_CD @ weight_VD.T).float().log_softmax(1).gather(1, support_CK)
        return (student_CK.exp() * (student_CK - teacher_CK)).sum()

    def run() -> Gradients:
        hidden_ND, weight_VD = leaves(rows)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        for first in range(0, len(hidden_ND), TOP_K_CHUNK):
            chunk = slice(first, first + TOP_K_CHUNK)
            teacher_CK = rows.teacher_logprobs_NB[chunk, :-1]
            arguments = (hidden_ND[chunk], weight_VD, rows.support_NK[chunk], teacher_CK)
            loss = loss + checkpoint(chunk_loss, *arguments, use_reentrant=False)
        return gradients_of(loss / len(hidden_ND), hidden_ND, weight_VD)

    return run


def sparse_method(rows: Rows, *, divergence: str = "reverse_kl", filter_threshold: float | None = None) -> Method:
    """This repository's."""

    def run() -> Gradients:
        hidden_ND, weight_VD = leaves(rows)
        weight_N = hidden_ND.new_full((len(hidden_ND),), 1.0 / len(hidden_ND), dtype=torch.float32)
        loss, _ = sparse_head_loss(
            hidden_ND,
            weight_VD,
            rows.support_NK,
            rows.teacher_logprobs_NB,
            weight_N,
            DIVERGENCES[divergence],
            filter_threshold=filter_threshold,
        )
        return gradients_of(loss, hidden_ND, weight_VD)

    return run


def exact_method(
    rows: Rows,
    *,
    teacher_width: int | None = None,
    divergence: str = "reverse_kl",
    filter_threshold: float | None = None,
) -> Method:
    """This repository's, over the whole vocabulary: what `dense_method` computes, of the same teacher."""
    teacher_NE, head_VE = teacher_of(rows, teacher_width)

    def run() -> Gradients:
        hidden_ND, weight_VD = leaves(rows)
        weight_N = hidden_ND.new_full((len(hidden_ND),), 1.0 / len(hidden_ND), dtype=torch.float32)
        arguments = (hidden_ND, weight_VD, teacher_NE, head_VE, weight_N, DIVERGENCES[divergence])
        loss, _ = exact_head_loss(*arguments, filter_threshold=filter_threshold)
        return gradients_of(loss, hidden_ND, weight_VD)

    return run


def teacher_of(rows: Rows, width: int | None) -> tuple[Tensor, Tensor]:
    """A random teacher's hidden rows and head, of the student's width unless another is given: always the same.

    Its logits have a deviation of sqrt(width), so it is sure of one token or two, and the student of none.
    """
    width = rows.hidden_ND.shape[1] if width is None else width
    return random_like(rows, (len(rows.hidden_ND), width), (len(rows.weight_VD), width))


def random_like(rows: Rows, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    device = rows.hidden_ND.device
    generator = torch.Generator(device).manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, device=device).to(rows.hidden_ND.dtype) for shape in shapes)


METHODS: dict[str, Callable[..., Method]] = {
    "dense": dense_method,
    "dense, teacher's logits given": functools.partial(dense_method, teacher_logits_given=True),
    "dense, compiled": functools.partial(dense_method, teacher_logits_given=True, compiled=True),
    "checkpointed top-K (TRL's way)": checkpointed_top_k_method,
    "sparse": sparse_method,
    "sparse, filter off": functools.partial(sparse_method, filter_threshold=0.0),
    "exact": exact_method,
    "exact, filter off": functools.partial(exact_method, filter_threshold=0.0),
}
OWN_TEACHER = ("dense", "exact", "exact, filter off")  # those with a teacher's head, whose width may be chosen


def method_of(name: str, rows: Rows, teacher_width: int | None) -> Method:
    """`teacher_width` None: the student's."""
    return METHODS[name](rows, teacher_width=teacher_width) if name in OWN_TEACHER else METHODS[name](rows)


def leaves(rows: Rows) -> tuple[Tensor, Tensor]:
    """Hidden and weight of this run, without a gradient yet; no copies."""
    return rows.hidden_ND.detach().requires_grad_(), rows.weight_VD.detach().requires_grad_()


def gradients_of(loss: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> Gradients:
    loss.backward()
    return hidden_ND.grad, weight_VD.grad
