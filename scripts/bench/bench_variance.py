"""The noise of the reverse KL's gradient over draws of the sampled token, as a ratio to the sampled-token estimator's.

    python scripts/bench/bench_variance.py outputs/smollm2-pair train.jsonl --prompt-key question --chat-template

The student answers some prompts; at every row both models' dense distributions are known, so the covariance of the
hidden state's gradient over all tokens that may be drawn there is a sum and no sample. Float64, transformers models.
`--student` takes a trained student in place of the pair's. Source: docs/methods.md, Gradient variance.
"""
# T response tokens of a rollout, V events, D width

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench_setup import load_setup, parse_args, print_table
from gradient_variance import ESTIMATORS, Noise, Row, noise_of
from opsd.config.engine import RolloutConfig
from opsd.types import ScoredRollout, Vocabulary
from support_truth import Dense, dense_truth, events, make_scored


def main() -> None:
    args = parse_args(
        __doc__,
        ("--num-rollouts", {"type": int, "default": 4}),
        ("--top-k", {"type": int, "default": 64, "help": "of the teacher, and candidates of the student"}),
    )
    rollout = RolloutConfig(backend="transformers", max_response_tokens=args.max_tokens, num_candidates=args.top_k)
    cfg, setup = load_setup(args, rollout, teacher_top_k=args.top_k)
    scored = make_scored(cfg, setup, args.num_rollouts)
    dense = dense_truth(cfg, [item.rollout for item in scored], setup.vocabulary, setup.device)
    rows = []
    for support in ("teacher", "union"):
        noises = [noise_of(row) for row in rows_of(scored, support, dense, setup.vocabulary)]
        rows += [[support, *figures(name, noises)] for name in ESTIMATORS]
    header = ["support", "gradient", "trace of its covariance, of the sampled token's", "bias, of the exact norm"]
    print_table(
        f"{len(dense.hidden_TD)} tokens, K {args.top_k}, V {setup.vocabulary.size}, dense reverse KL "
        f"{dense.stats.reverse_kl_T.mean():.4f} nats",
        header,
        rows,
    )


def rows_of(scored: list[ScoredRollout], support: str, dense: Dense, vocabulary: Vocabulary) -> Iterator[Row]:
    """One for each response token, as the sparse loss with this support would have it."""
    lengths = [len(item.rollout) for item in scored]
    weight_VD = dense.weight_VD[: vocabulary.size].double()
    stop_ids = torch.tensor(vocabulary.stop_ids, device=weight_VD.device)
    for item, hidden_TD, teacher_TV in zip(scored, dense.hidden_TD.split(lengths), dense.teacher_logprobs, strict=True):
        logits_TV = hidden_TD.double() @ weight_VD.T
        student_TV, named_TV = events(logits_TV, vocabulary), named_by(item, support, vocabulary, weight_VD.device)
        share_TS = logits_TV[:, stop_ids].softmax(1)
        for place in range(len(hidden_TD)):
            yield Row(
                student_V=student_TV[place],
                teacher_V=teacher_TV[place].double(),
                in_support_V=named_TV[place],
                columns_VD=weight_VD,
                stop_ids=vocabulary.stop_ids,
                stop_shares=share_TS[place],
            )


def named_by(item: ScoredRollout, support: str, vocabulary: Vocabulary, device: torch.device) -> Tensor:
    """bool [T, V]: the events that the lists of `support` hold."""
    lists = [item.scores.top_ids, *([item.rollout.candidate_ids] if support == "union" else [])]
    named_TV = torch.zeros(len(item.rollout), vocabulary.size + 1, dtype=torch.bool)
    for ids in lists:
        slots_TU = torch.from_numpy(ids).long()
        named_TV.scatter_(1, slots_TU.where(slots_TU >= 0, vocabulary.size), True)
    return named_TV[:, :-1].to(device)


def figures(name: str, noises: list[dict[str, Noise]]) -> list[str]:
    """Over all rows: their draws do not depend on each other, so traces add."""
    trace, sampled = (sum(noise[each].trace for noise in noises) for each in (name, "sampled"))
    found, exact = (torch.stack([noise[each].mean_D for noise in noises]) for each in (name, "exact"))
    return [name, f"{max(trace, 0.0) / sampled:.4f}", f"{(found - exact).norm() / exact.norm():.2%}"]


if __name__ == "__main__":
    main()
