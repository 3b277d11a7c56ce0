"""Batches made by hand."""

import torch

from opsd.types import BatchStats, Selection, TokenStats


def make_batch(lengths, *, seed=0, **fields):
    """Random statistics for rollouts of these lengths; `fields` are those of BatchStats."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    entropy, reverse, forward, hellinger, norm, mass, paid = torch.rand(7, num_tokens, generator=generator)
    student, teacher = torch.randn(2, num_tokens, generator=generator) - 3.0
    teacher_entropy = torch.rand(num_tokens, generator=generator)
    worth = torch.rand(num_tokens, generator=generator)
    rank = torch.randint(9, (num_tokens,), generator=generator).float()
    tokens = TokenStats(
        entropy_T=entropy,
        reverse_kl_T=reverse,
        forward_kl_T=forward,
        compatibility_T=mass,
        attention_T=paid,
        student_logprob_T=student,
        teacher_logprob_T=teacher,
        teacher_entropy_T=teacher_entropy,
        named_mass_T=torch.ones(num_tokens),
        extra={"hellinger_T": hellinger, "grad_norm_T": norm, "ier_T": worth, "teacher_rank_T": rank},
    )
    return BatchStats(**{"step": 0, "lengths": tuple(lengths), "tokens": tokens, **fields})


def keep_all(batch):
    return Selection(index_N=torch.arange(len(batch.tokens)), weight_N=torch.ones(len(batch.tokens)))


def keep(batch, index):
    return Selection(index_N=torch.tensor(index), weight_N=torch.ones(len(index)))
