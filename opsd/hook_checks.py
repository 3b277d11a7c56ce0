"""What the hooks' functions return, checked on a made-up batch before anything starts, and at every call of a run.

A function that returns something else would often train all the same: a divergence that returns its mean, say, weighs
every token by the whole chunk. So each refusal is one line: which function, what was expected, what came.
"""
# T response tokens of a batch, N kept tokens, B buckets, U = B - 1 named tokens

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opsd.errors import ConfigError, StageError
from opsd.ops.losses.objective import Objective, name_of
from opsd.types import BatchStats, Rollout, Selection, TokenStats

if TYPE_CHECKING:
    from opsd.config.run import RunConfig
    from opsd.hooks import RolloutSource, TrainHooks

LENGTHS = (2, 2, 2, 2)  # of the made-up rollouts: two prompts with two answers each
NUM_BUCKETS = 5
FIELDS_IN_UNIT_RANGE = (
    "entropy_T",
    "reverse_kl_T",
    "forward_kl_T",
    "hellinger_T",
    "grad_norm_T",
    "compatibility_T",
    "teacher_entropy_T",
)


def check_hooks(hooks: TrainHooks, cfg: RunConfig) -> None:
    """Runs selection and objective on eight made-up tokens, and asks for the source of the answers.

    Raises ConfigError that names the function at fault. So an option out of range is found here too. Draws nothing from
    the global generator that a run would notice.
    """
    objective, batch = Objective.of(hooks.divergence), made_up_batch(cfg)
    with torch.random.fork_rng(devices=[]):
        try:
            selection = checked_select(hooks.select, batch)
        except StageError:  # a threshold of the user's own may leave none of the made-up tokens
            place_T = torch.arange(len(batch.tokens))
            selection = Selection(index_N=place_T, weight_N=torch.ones(len(place_T)))
            objective = Objective(parts=tuple(p for p in objective.parts if not Objective.of(p[1]).required_inputs()))
        check_objective(objective, selection)
    no_engines: Any = NoEngines()
    try:
        source = hooks.rollouts(no_engines, no_engines)
    except AttributeError:  # one that reads more of its pools at once is looked at when there are pools
        return
    checked_source(source, name_of(hooks.rollouts))


class NoEngines:
    """Stands for a pool before there is one: with no answers."""

    def sample(self, *_: Any, **__: Any) -> Iterator[dict[int, Rollout]]:
        return iter(())


def checked_select(select: Callable[[BatchStats], Selection], batch: BatchStats) -> Selection:
    """What `select` keeps of the batch. Raises ConfigError where that is no selection of this batch's tokens."""
    try:
        selection = select(batch)
    except (ConfigError, StageError):
        raise
    except ValueError as error:
        raise ConfigError(f"select: {name_of(select)}: {error}") from error
    check_selection(f"select: {name_of(select)}", selection, len(batch.tokens))
    if not (selection.weight_N > 0).any():
        raise StageError(f"select: {name_of(select)} gives no token of step {batch.step} a weight above 0")
    return selection


def check_selection(where: str, selection: Any, num_tokens: int) -> None:
    """What a Selection cannot know by itself: that it is one, and of how many tokens it chooses."""
    if not isinstance(selection, Selection):
        raise ConfigError(f"{where} must return a Selection, got {type(selection).__name__}")
    if len(selection) and int(selection.index_N[-1]) >= num_tokens:
        raise ConfigError(
            f"{where} must keep tokens by their places 0..{num_tokens - 1}, got place {int(selection.index_N[-1])}"
        )


def check_tokens(where: str, values: Any, num_tokens: int, *, dtype: torch.dtype | None = None) -> None:
    """One value a token: a tensor [T], real, of `dtype` where one is given. Raises ConfigError."""
    wanted = f"{where} must return a tensor of shape ({num_tokens},), one value a token"
    if not isinstance(values, Tensor):
        raise ConfigError(f"{wanted}, got {type(values).__name__}")
    if tuple(values.shape) != (num_tokens,):
        raise ConfigError(f"{wanted}, got shape {tuple(values.shape)}")
    if values.is_complex() or (dtype is not None and values.dtype != dtype):
        raise ConfigError(f"{where} must return {dtype or 'real numbers'}, got {values.dtype}")


def check_objective(objective: Objective, selection: Selection) -> None:
    """Every part of the loss on made-up buckets: one finite value a row, with a finite gradient in the student."""
    missing = objective.required_inputs() - {"support_NU", *selection.inputs}
    if missing:
        raise ConfigError(f"the loss needs {', '.join(sorted(missing))}, which the selection does not give")
    student_NB, teacher_NB, support_NU = made_up_buckets(len(selection))
    has_token_NB = ~teacher_NB.isneginf()
    available = {"support_NU": support_NU, **selection.inputs}
    for _, function in objective.parts:
        part = Objective.of(function)
        try:
            value_N = part(student_NB, teacher_NB, **part.wanted(available))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"the loss: {name_of(function)}: {error}") from error
        if not value_N.requires_grad:
            raise ConfigError(f"the loss: {name_of(function)} must depend on the student's log-probabilities")
        (grad_NB,) = torch.autograd.grad(value_N.sum(), student_NB)
        for what, numbers in (("value", value_N), ("gradient", grad_NB[has_token_NB])):
            if not numbers.isfinite().all():
                raise ConfigError(
                    f"the loss: {name_of(function)} must have a finite {what} also where a slot holds no token "
                    f"(-inf for both models), got {numbers[~numbers.isfinite()][0].item()}"
                )


def checked_source(source: RolloutSource, where: str) -> RolloutSource:
    """`source` with each of its groups looked at: rollouts by their places in the batch, every place once."""
    if not callable(source):
        raise ConfigError(f"{where} must return a function of prompts, got {type(source).__name__}")

    def checked(prompts: list, *, samples_per_prompt: int, step: int) -> Iterator[dict[int, Rollout]]:
        seen: set[int] = set()
        for group in source(prompts, samples_per_prompt=samples_per_prompt, step=step):
            if not isinstance(group, dict) or not all(isinstance(rollout, Rollout) for rollout in group.values()):
                got = f"{type(group).__name__} in step {step}"
                raise ConfigError(f"{where} must give groups {{place: Rollout}}, got {got}")
            twice = seen & group.keys()
            if twice:
                raise ConfigError(f"{where} must give every place once, got place {min(twice)} twice in step {step}")
            seen |= group.keys()
            yield group

    return checked


def made_up_batch(cfg: RunConfig) -> BatchStats:
    """Statistics of four rollouts, with all that a run of this config has; half off-policy where it may have such."""
    values = torch.linspace(0.1, 0.9, sum(LENGTHS))
    known = {name: values.roll(shift) for shift, name in enumerate(FIELDS_IN_UNIT_RANGE)}
    known.update(student_logprob_T=-values, teacher_logprob_T=-values.flip(0), named_mass_T=torch.ones(len(values)))
    if cfg.teacher.attention:
        known["attention_T"] = values
    off_policy = cfg.stats == "learner"
    return BatchStats(
        step=0,
        num_steps=cfg.num_steps,
        lengths=LENGTHS,
        tokens=TokenStats(**known),
        prompt_R=torch.tensor([0, 0, 1, 1]),
        sample_R=torch.tensor([0, 0 if off_policy else 1] * 2),  # else the two answers to a prompt are a pair
        on_policy_R=torch.tensor([not off_policy, True] * 2),
        reward_R=None if cfg.data.grader == "none" else torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )


def made_up_buckets(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, B] of student (float64) and teacher (float32), and the ids [N, U]; one slot is empty."""
    place_NB = torch.arange(float(num_rows * NUM_BUCKETS), dtype=torch.float64).view(num_rows, NUM_BUCKETS)
    logits = [place_NB.sin(), (2.0 * place_NB).cos()]
    support_NU = torch.arange(NUM_BUCKETS - 1).repeat(num_rows, 1)
    for own_NB in logits:
        own_NB[:1, NUM_BUCKETS - 2] = -torch.inf
    support_NU[:1, NUM_BUCKETS - 2] = -1
    student_NB, teacher_NB = (own_NB.log_softmax(1) for own_NB in logits)
    return student_NB.requires_grad_(), teacher_NB.float(), support_NU
