"""What happens to the tokens after they are selected: other weights, a temperature, inputs for the objective.

    ADJUSTMENTS[name](batch, selection, **options) -> Selection

`READS` says which statistics of the tokens each is made of, as that of tip.scores.
`adjust={paced: {}, kdrl: {}}` applies these in this order. A token whose weight comes to 0 is dropped.
"""
# T response tokens of the global batch, N kept tokens, R rollouts

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opsd.errors import ConfigError
from opsd.types import BatchStats, Selection
from tip.adaptive import inverse_difficulty_temperature
from tip.per_rollout import known_of_rollouts, mean_per_rollout, rewards
from tip.rewards import group_advantage, paced_weight, reward_weight
from tip.scaling import scale_axis
from tip.scores import known, sampled_logprobs

MIN_ENTROPY = 1e-6  # as a share of log V: below it, all tokens of a batch are certain


def reward(batch: BatchStats, selection: Selection, *, beta: float = 1.0) -> Selection:
    """Weight of a rollout: softmax(reward / beta) among the answers to its prompt.

    Source: docs/losses.md, Objectives with rewards.
    """
    weight_R = reward_weight(rewards(batch, "adjust.reward"), known_of_rollouts(batch, "prompt_R"), beta=beta)
    return weigh_rollouts(batch, selection, weight_R)


def paced(batch: BatchStats, selection: Selection, *, a: float = 1.0, b: float = 1.0) -> Selection:
    """Weight of a prompt: p^a (1 - p)^b with the pass rate p of its answers. PACED, arXiv 2603.11178.

    The loss is divided by the weights as they were before, so these are no shares of a step: one prompt on the edge
    among many that teach nothing moves the student as little as its share of the tokens, and a step without any has
    loss 0 (one token stays, as every step must have one).
    """
    weight_R = paced_weight(rewards(batch, "adjust.paced"), known_of_rollouts(batch, "prompt_R"), a=a, b=b)
    weighed = weigh_rollouts(batch, selection, weight_R)
    if not weighed.weight_N.any():
        return replace(selection.take(torch.zeros(1, dtype=torch.int64)), denominator=math.inf)
    return replace(weighed, denominator=float(selection.weight_N.sum()))


def forward_then_reverse(batch: BatchStats, selection: Selection, *, switch_at: float = 0.5) -> Selection:
    """`reverse_share_N`: 0 until that share of the steps is done, then 1. PACED's schedule, arXiv 2603.11178."""
    if not 0.0 <= switch_at <= 1.0:
        raise ValueError(f"switch_at must be in [0, 1], got {switch_at}")
    share = float(batch.progress >= switch_at)
    return with_input(selection, "reverse_share_N", torch.full((len(selection),), share))


def fire(batch: BatchStats, selection: Selection, *, alpha: float = 1.0, beta: float = 1.0) -> Selection:
    """Weight of a token: (1 + alpha (1 - H_q / max H_q)) (1 + beta H_p / max H_p).

    H_q is the teacher's entropy, H_p the student's: high where the teacher is sure and the student is not. The maxima
    are over all tokens of the batch, those left out included; the learner makes the mean 1. Top-k: the teacher's
    entropy is extrapolated from the tokens that it named.
    Source: FiRe, arXiv 2606.02684, YuYingLi0/FiRe-OPD, verl/workers/actor/dp_actor.py; docs/selection.md, Answers.
    """
    if not (alpha >= 0.0 and beta >= 0.0):
        raise ValueError(f"alpha and beta must be at least 0, got {alpha} and {beta}")
    teacher_T, student_T = known(batch.tokens, "teacher_entropy_T"), batch.tokens.entropy_T
    confidence_T = 1.0 - teacher_T / teacher_T.max().clamp_min(MIN_ENTROPY)
    weight_T = (1.0 + alpha * confidence_T) * (1.0 + beta * student_T / student_T.max().clamp_min(MIN_ENTROPY))
    return weigh_tokens(selection, weight_T)


def iw(batch: BatchStats, selection: Selection, *, gamma: float = 0.5) -> Selection:
    """Weight of a token: 1 + gamma (1 - the share of its answer's |log q - log p| that lies before it).

    p and q are of the sampled tokens, all of the answer's, those left out included. So it falls from 1 + gamma to 1 as
    the answer leaves what the teacher would say. Source: IW-OPD, arXiv 2606.22600.
    """
    if not gamma >= 0.0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    student_T, teacher_T = sampled_logprobs(batch.tokens)
    weight_T = torch.cat([_share_to_come(each) for each in (teacher_T - student_T).abs().split(list(batch.lengths))])
    return weigh_tokens(selection, 1.0 + gamma * weight_T)


def _share_to_come(gaps_T: Tensor) -> Tensor:
    """1 - (sum of those before) / (sum of all), float64 [T]; 1 where all are 0."""
    sum_T = gaps_T.double().cumsum(0)
    total = sum_T[-1:].where(sum_T[-1:] > 0.0, 1.0)
    return 1.0 - (sum_T - gaps_T) / total


def sure(batch: BatchStats, selection: Selection, *, alpha: float = 1.0) -> Selection:
    """Weight of a token: 1 + alpha (1 - p), p the student's probability of it, detached. SuRe, arXiv 2608.25643."""
    if not alpha >= 0.0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    return weigh_tokens(selection, 1.0 + alpha * -torch.expm1(known(batch.tokens, "student_logprob_T")))


def select_kd(batch: BatchStats, selection: Selection, *, top: int = 5, low: float = 0.01) -> Selection:
    """Weight 1 where the student's likeliest token is among the teacher's `top`, else `low`.

    Of the named tokens: see `opsd.ops.signals.teacher_rank`. Source: SelecTKD, arXiv 2510.24021.
    """
    if top < 1 or not 0.0 <= low <= 1.0:
        raise ValueError(f"need top >= 1 and low in [0, 1], got {top} and {low}")
    return weigh_tokens(selection, torch.where(known(batch.tokens, "teacher_rank_T") < top, 1.0, low))


def opsa(batch: BatchStats, selection: Selection) -> Selection:
    """`advantage_N` of the kept tokens: -1/2 at the lowest of their entropies, -1 at the highest. Knows of no teacher.

    Evenly between the two, and -1/2 where all are equal: with selector.score=surprisal and loss.divergence=
    policy_gradient, what the student seldom says becomes rarer. A control. Source: arXiv 2608.31046.
    """
    entropy_N = batch.tokens.entropy_T[selection.index_N].float()
    return with_input(selection, "advantage_N", -0.5 - scale_axis(entropy_N, "minmax") / 2.0)


def temperature(batch: BatchStats, selection: Selection, *, base: float = 1.0, strength: float = 0.5) -> Selection:
    """Hard tokens (by Hellinger distance, against the kept tokens' median) get a low temperature. IDTS of AdaKD."""
    difficulty_N = known(batch.tokens, "hellinger_T")[selection.index_N]
    temperature_N = inverse_difficulty_temperature(difficulty_N, base=base, strength=strength)
    return replace(selection, temperature_N=temperature_N.float())


def advantage(batch: BatchStats, selection: Selection, *, unbiased: bool = False) -> Selection:
    """`advantage_N` (GRPO: the reward against those of the same prompt) and `wrong_N` for KDRL, arXiv 2506.02208.

    `unbiased`: over the deviation that verl and TRL divide by, see `group_advantage`.
    """
    reward_R = rewards(batch, "adjust.advantage")
    rollout_N = batch.rollout_T[selection.index_N]
    advantage_R = group_advantage(reward_R, known_of_rollouts(batch, "prompt_R"), unbiased=unbiased)
    selection = with_input(selection, "advantage_N", advantage_R[rollout_N].float())
    return with_input(selection, "wrong_N", reward_R[rollout_N] == 0)


def preference(batch: BatchStats, selection: Selection, *, beta: float = 0.1) -> Selection:
    """`advantage_N` for DPKD: its gradient, at the current student, as a weight on log student(y). arXiv 2406.19774.

    The loss of a prompt is -log sigmoid(u), u = beta (m_t - m_s) with the mean over tokens m of log student(y) -
    log teacher(y) on the teacher's answer and on the student's own. Needs answers=teacher_pairs. An answer whose other
    half was dropped (a score was missing) teaches nothing.
    """
    if not beta > 0.0:
        raise ValueError(f"beta must be > 0, got {beta}")
    log_ratio_T = known(batch.tokens, "student_logprob_T") - known(batch.tokens, "teacher_logprob_T")
    mean_R = mean_per_rollout(batch, log_ratio_T)
    sign_R = torch.where(known_of_rollouts(batch, "on_policy_R"), -1.0, 1.0).double()
    # A prompt that is in the batch several times has as many pairs.
    pair_R2 = torch.stack([known_of_rollouts(batch, name) for name in ("prompt_R", "sample_R")], dim=1)
    pairs, group_R, count_G = pair_R2.unique(dim=0, return_inverse=True, return_counts=True)
    balance_G = torch.zeros(len(pairs), dtype=torch.float64).index_add(0, group_R, sign_R)
    is_pair_G = count_G == 2
    if (count_G > 2).any() or balance_G[is_pair_G].any() or not is_pair_G.any():
        raise ConfigError(
            "adjust.preference needs one answer of the teacher and one of the student per prompt: set "
            "answers=teacher_pairs and data.samples_per_prompt=1"
        )
    margin_G = beta * torch.zeros(len(pairs), dtype=torch.float64).index_add(0, group_R, sign_R * mean_R)
    push_R = (is_pair_G * torch.sigmoid(-margin_G))[group_R] * beta * sign_R / torch.tensor(batch.lengths)
    # The learner averages over all kept tokens; this is to be a mean over pairs.
    scale = len(selection) / int(is_pair_G.sum())
    return with_input(selection, "advantage_N", (scale * push_R)[batch.rollout_T[selection.index_N]].float())


ADJUSTMENTS: dict[str, Callable[..., Selection]] = {
    "reward": reward,
    "paced": paced,
    "forward_then_reverse": forward_then_reverse,
    "fire": fire,
    "iw": iw,
    "sure": sure,
    "select_kd": select_kd,
    "opsa": opsa,
    "temperature": temperature,
    "advantage": advantage,
    "preference": preference,
}

READS: dict[str, tuple[str, ...]] = {
    "reward": (),
    "paced": (),
    "forward_then_reverse": (),
    "fire": ("entropy_T", "teacher_entropy_T"),
    "iw": ("student_logprob_T", "teacher_logprob_T"),
    "sure": ("student_logprob_T",),
    "select_kd": ("teacher_rank_T",),
    "opsa": ("entropy_T",),
    "temperature": ("hellinger_T",),
    "advantage": (),
    "preference": ("student_logprob_T", "teacher_logprob_T"),
}


def weigh_tokens(selection: Selection, weight_T: Tensor) -> Selection:
    """The kept tokens' weights times those of the batch's tokens at their places."""
    return replace(selection, weight_N=selection.weight_N * weight_T[selection.index_N].float())


def weigh_rollouts(batch: BatchStats, selection: Selection, weight_R: Tensor) -> Selection:
    """The tokens' weights times those of their rollouts."""
    weight_N = selection.weight_N * weight_R[batch.rollout_T[selection.index_N]].float()
    return replace(selection, weight_N=weight_N)


def with_input(selection: Selection, name: str, values_N: Tensor) -> Selection:
    return replace(selection, inputs={**selection.inputs, name: values_N})
