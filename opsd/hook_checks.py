"""What a run's functions return, tried on a made-up batch before anything starts, and looked at at every call of a run.

A function that returns something else would often train all the same: a divergence that returns its mean, say, weighs
every token by the whole chunk. So each refusal is one line: which function, what was expected, what came. Before the
start it is a ConfigError, in a running step a StageError.
"""
# T response tokens of a batch, N kept tokens, B buckets, U = B - 1 named tokens

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opsd.config.checks import require_function
from opsd.data.grading import check_grader
from opsd.errors import ConfigError, StageError
from opsd.hooks import RolloutSource, TrainHooks
from opsd.ops.head.exact import sums_over_tokens
from opsd.ops.losses.objective import PACKED_INPUTS, RESIDUAL_INPUTS, ROLLOUT_LOGPROB, Objective
from opsd.ops.row_function import name_of
from opsd.ops.signals import Statistics, statistics_of
from opsd.types import BatchStats, Rollout, Selection, TokenStats

if TYPE_CHECKING:
    from opsd.config.run import RunConfig

LENGTHS = (2, 2, 2, 2)  # of the made-up rollouts: two prompts with two answers each
NUM_BUCKETS = 5
TAKES = {  # hook -> what it is called with
    "select": "batch",
    "after_step": "report",
    "rollouts": "rollout_pool, teacher_pool",
    "state_dict": "",
    "load_state_dict": "state",
}
FIELDS_IN_UNIT_RANGE = ("entropy_T", "reverse_kl_T", "forward_kl_T", "compatibility_T", "teacher_entropy_T")


class HookError(ValueError):
    """A function of a method gave something else than it must, or refuses an option; names the function or setting."""


def check_hooks(hooks: TrainHooks, cfg: RunConfig) -> None:
    """Tries statistics, selection, objective and grader on eight made-up tokens, and asks for the answers' source.

    Raises ConfigError that names the function or the setting at fault. So an option out of range is found here too.
    Draws nothing from the global generator that a run would notice.
    """
    check_functions(hooks, cfg.hooks)
    objective = Objective.of(hooks.divergence)
    if cfg.loss.payload == "hidden":
        with refused():
            sums_over_tokens(objective)
    if cfg.schedule.max_staleness:
        require_no_own_draws(objective, cfg.schedule.max_staleness)
    with torch.random.fork_rng(devices=[]), refused():
        batch = made_up_batch(cfg, hooks.statistics)
        try:
            selection = selected(hooks.select, batch)
        except StageError:  # a threshold of the user's own may leave none of the made-up tokens
            place_T = torch.arange(len(batch.tokens))
            selection = Selection(index_N=place_T, weight_N=torch.ones(len(place_T)))
            parts = tuple(part for part in objective.parts if PACKED_INPUTS.issuperset(part[1].inputs))
            objective = Objective(parts=parts)
        check_objective(objective, selection)
    check_grader(cfg.data.grader)
    no_engines: Any = NoEngines()
    try:
        source = hooks.rollouts(no_engines, no_engines)
    except AttributeError:  # one that reads more of its pools at once is looked at when there are pools
        return
    checked_source(source, name_of(hooks.rollouts))


def require_no_own_draws(objective: Objective, max_staleness: int) -> None:
    """Raises ConfigError for a loss that older weights' answers would give a wrong gradient."""
    for _, loss in objective.parts:
        if loss.needs_own_draws:
            raise ConfigError(
                f"{loss.setting} learns from the sampled tokens alone, and with schedule.max_staleness={max_staleness} "
                "older weights sample them: set loss.importance_cap=2, which weighs them by how likely they are to the "
                "newest, or schedule.max_staleness=0"
            )


def check_functions(hooks: Any, setting: str) -> None:
    """What `setting` (hooks) returned is TrainHooks of functions, whose state a checkpoint can hold. ConfigError."""
    if not isinstance(hooks, TrainHooks):
        raise ConfigError(f"hooks={setting} must return TrainHooks, got {type(hooks).__name__}")
    for name, takes in TAKES.items():
        require_function(f"hooks={setting}: {name}", getattr(hooks, name), takes)
    if not callable(hooks.divergence):
        raise ConfigError(f"hooks={setting}: divergence must be a function, got {type(hooks.divergence).__name__}")
    if not isinstance(hooks.statistics, Mapping) or not all(callable(each) for each in hooks.statistics.values()):
        raise ConfigError(f"hooks={setting}: statistics must map names to functions, got {hooks.statistics!r}")
    state = hooks.state_dict()
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"hooks={setting}: state_dict must return what JSON can hold: {error}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"hooks={setting}: state_dict must return a dictionary, got {type(state).__name__}")


@contextmanager
def refused() -> Iterator[None]:
    """What is wrong before a run starts is a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, StageError) as error:
        raise ConfigError(str(error)) from error


class NoEngines:
    """Stands for a pool before there is one: with no answers."""

    def sample(self, *_: Any, **__: Any) -> Iterator[dict[int, Rollout]]:
        return iter(())


def checked_select(select: Callable[[BatchStats], Selection], batch: BatchStats) -> Selection:
    """What `select` keeps of a running step's batch. Raises StageError where that is no selection of its tokens."""
    try:
        return selected(select, batch)
    except ValueError as error:
        raise StageError(f"step {batch.step + 1}: {error}") from error


def selected(select: Callable[[BatchStats], Selection], batch: BatchStats) -> Selection:
    """As `checked_select`, with HookError or ConfigError for all but a selection of nothing."""
    where = f"select: {name_of(select)}"
    try:
        selection = select(batch)
    except (ConfigError, HookError):
        raise
    except ValueError as error:
        raise HookError(f"{where}: {error}") from error
    check_selection(where, selection, len(batch.tokens))
    if not (selection.weight_N > 0).any():
        raise StageError(f"{where} gives no token of step {batch.step} a weight above 0")
    return selection


def check_selection(where: str, selection: Any, num_tokens: int) -> None:
    """What a Selection cannot know by itself: that it is one, and of how many tokens. Raises HookError."""
    if not isinstance(selection, Selection):
        raise HookError(f"{where} must return a Selection, got {type(selection).__name__}")
    if len(selection) and int(selection.index_N[-1]) >= num_tokens:
        raise HookError(
            f"{where} must keep tokens by their places 0..{num_tokens - 1}, got place {int(selection.index_N[-1])}"
        )


def check_tokens(where: str, values: Any, num_tokens: int, *, dtype: torch.dtype | None = None) -> None:
    """One value per token: a tensor [T], real, of `dtype` where one is given. Raises HookError."""
    wanted = f"{where} must return a tensor of shape ({num_tokens},), one value per token"
    if not isinstance(values, Tensor):
        raise HookError(f"{wanted}, got {type(values).__name__}")
    if tuple(values.shape) != (num_tokens,):
        raise HookError(f"{wanted}, got shape {tuple(values.shape)}")
    if values.is_complex() or (dtype is not None and values.dtype != dtype):
        raise HookError(f"{where} must return {dtype or 'real numbers'}, got {values.dtype}")


def check_objective(objective: Objective, selection: Selection) -> None:
    """Every part of the loss on made-up buckets: one finite value per row, with a finite gradient in the student."""
    missing = objective.inputs - PACKED_INPUTS - selection.inputs.keys()
    if missing:
        raise HookError(f"the loss needs {', '.join(sorted(missing))}, which the selection does not give")
    of_draws = {"loss.residual=true": RESIDUAL_INPUTS, "loss.importance_cap": {ROLLOUT_LOGPROB}}
    for setting in (name for name, inputs in of_draws.items() if objective.inputs & inputs):
        if selection.temperature_N is not None:
            raise HookError(
                f"{setting} needs tokens at temperature 1, at which the answers are drawn, and the selection gives "
                "each a temperature of its own"
            )
    student_NB, teacher_NB, support_NU = made_up_buckets(len(selection))
    student_NB.requires_grad_()
    has_token_NB = ~teacher_NB.isneginf()
    available = {**made_up_inputs(teacher_NB, support_NU), **selection.inputs}
    for _, loss in objective.parts:
        part, where = Objective.of(loss), f"{loss.setting}: {name_of(loss)}"
        try:
            value_N = part(student_NB, teacher_NB, **part.takes(available))
        except ValueError as error:
            raise HookError(f"{where}: {error}") from error
        if not value_N.requires_grad:
            raise HookError(f"{where} must depend on the student's log-probabilities")
        (grad_NB,) = torch.autograd.grad(value_N.sum(), student_NB)
        for what, numbers in (("value", value_N), ("gradient", grad_NB[has_token_NB])):
            if not numbers.isfinite().all():
                raise HookError(
                    f"{where} must have a finite {what} also where a slot holds no token (-inf for both models), got "
                    f"{numbers[~numbers.isfinite()][0].item()}"
                )


def checked_source(source: RolloutSource, where: str, *, with_tools: bool = False) -> RolloutSource:
    """`source` with each of its groups looked at: rollouts by their places in the batch, every place once.

    `with_tools`: these must be trajectories. Raises ConfigError where it is no source, and in a running step
    StageError.
    """
    if not callable(source):
        raise ConfigError(f"{where} must return a function of prompts, got {type(source).__name__}")

    def checked(prompts: list, *, samples_per_prompt: int, step: int) -> Iterator[dict[int, Rollout]]:
        try:
            groups = source(prompts, samples_per_prompt=samples_per_prompt, step=step)
        except ConfigError as error:
            raise StageError(f"rollout: step {step + 1}: {error}") from error
        return checked_groups(groups, step)

    def checked_groups(groups: Iterable[dict[int, Rollout]], step: int) -> Iterator[dict[int, Rollout]]:
        seen: set[int] = set()
        try:
            for group in groups:
                if not isinstance(group, dict) or not all(isinstance(rollout, Rollout) for rollout in group.values()):
                    raise HookError(f"{where} must give groups {{place: Rollout}}, got {type(group).__name__}")
                twice = seen & group.keys()
                if twice:
                    raise HookError(f"{where} must give every place once, got place {min(twice)} twice")
                if with_tools and any(rollout.trajectory is None for rollout in group.values()):
                    raise HookError(f"{where} gives answers that no tools were asked for: set tools.build=''")
                seen |= group.keys()
                yield group
        except (ConfigError, HookError) as error:
            raise StageError(f"rollout: step {step + 1}: {error}") from error

    return checked


def made_up_batch(cfg: RunConfig, statistics: Statistics | None = None) -> BatchStats:
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
        tokens=TokenStats(**known, extra=made_up_statistics(statistics or {}, len(values))),
        prompt_R=torch.tensor([0, 0, 1, 1]),
        sample_R=torch.tensor([0, 0 if off_policy else 1] * 2),  # else the two answers to a prompt are a pair
        on_policy_R=torch.tensor([not off_policy, True] * 2),
        reward_R=None if cfg.data.grader == "none" else torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )


def made_up_statistics(statistics: Statistics, num_tokens: int) -> dict[str, Tensor]:
    """Those of made-up buckets. Raises ValueError for one that is not a finite number per row, or fails on no rows."""
    statistics_of(statistics, *made_up_buckets(0))  # as a learner's rank may have
    found = statistics_of(statistics, *made_up_buckets(num_tokens))
    for name, value_T in found.items():
        if not value_T.isfinite().all():
            raise HookError(
                f"the statistic {name}: {name_of(statistics[name])} must be finite also where a slot holds no token "
                "(-inf for both models)"
            )
    return {name: value_T.float() for name, value_T in found.items()}


def made_up_inputs(teacher_NB: Tensor, support_NU: Tensor) -> dict[str, Tensor]:
    """What the packing would give of these buckets, PACKED_INPUTS; every second row's first token is outside."""
    outside_N = torch.arange(len(teacher_NB)) % 2 == 1
    first_N, rest_N = teacher_NB[:, 0], teacher_NB[:, -1]
    tail_N = torch.where(outside_N, torch.logaddexp(first_N, rest_N), rest_N)
    return {
        "support_NU": support_NU,
        "outside_N": outside_N,
        "teacher_tail_N": tail_N,
        ROLLOUT_LOGPROB: torch.full((len(teacher_NB),), -1.0),
    }


def made_up_buckets(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, B] of student (float64) and teacher (float32), and the ids [N, U]; one slot is empty."""
    place_NB = torch.arange(float(num_rows * NUM_BUCKETS), dtype=torch.float64).view(num_rows, NUM_BUCKETS)
    logits = [place_NB.sin(), (2.0 * place_NB).cos()]
    support_NU = torch.arange(NUM_BUCKETS - 1).repeat(num_rows, 1)
    for own_NB in logits:
        own_NB[:1, NUM_BUCKETS - 2] = -torch.inf
    support_NU[:1, NUM_BUCKETS - 2] = -1
    student_NB, teacher_NB = (own_NB.log_softmax(1) for own_NB in logits)
    return student_NB, teacher_NB.float(), support_NU
