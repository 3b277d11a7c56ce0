"""The ledger of a run: what it has done and found. It is saved with every checkpoint, and a run resumes from it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from opsd.checkpoints import LEARNER, learner_sums, read_state, require_whole
from opsd.config.run import RunConfig
from opsd.errors import DataError, say
from opsd.learner.optim import learning_rate_factor
from opsd.monitor.log import PhaseTimer
from opsd.monitor.step import StepRecord
from opsd.run_parts import RunParts

Figures = dict[str, float | None]  # of an evaluation, by name
COUNTED = ("tokens_generated", "tokens_scored", "tokens_trained", "rollouts_dropped", "skipped_steps")


@dataclass(kw_only=True)
class Ledger:
    """Counts, figures and times of a run; those of an earlier run that it resumes are included."""

    last_step: int  # after which the run ends
    first_step: int = 0  # from which it goes on
    done: int = 0  # steps that are behind it, those that were skipped included
    skipped_in_row: int = 0  # of the newest of them
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    before: Figures = field(default_factory=dict)  # the evaluation at step 0; empty: not made yet
    after: Figures = field(default_factory=dict)  # the newest evaluation
    after_step: int | None = None  # at which it was made
    teacher_accuracy: float | None = None
    owes_evaluation: bool = False  # one that was due, and that the run was stopped before
    startup_s: float = 0.0
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    began: float = field(default_factory=time.perf_counter)
    earlier_wall_s: float = 0.0
    earlier_phase_s: Counter[str] = field(default_factory=Counter)

    def add(self, record: StepRecord) -> None:
        """A step is done."""
        self.done = record.batch.step + 1
        self.counts["tokens_generated"] += record.scored.num_generated
        self.counts["tokens_scored"] += record.scored.num_scored
        self.counts["tokens_trained"] += 0 if record.report.skipped else record.report.num_kept
        self.counts["skipped_steps"] += bool(record.report.skipped)
        self.skipped_in_row = self.skipped_in_row + 1 if record.report.skipped else 0
        self.counts["rollouts_dropped"] += record.scored.dropped.total()
        self.counts.update(record.graded)

    def measured(self, figures: Figures, step: int) -> None:
        self.after, self.after_step = figures, step

    @property
    def score(self) -> float | None:
        """What checkpoint.keep_best goes by, more is better; None where nothing was measured at this step."""
        if self.after_step != self.done:
            return None
        accuracy, reverse_kl = self.after.get("accuracy"), self.after.get("reverse_kl")
        return accuracy if accuracy is not None else None if reverse_kl is None else -reverse_kl

    @property
    def wall_s(self) -> float:
        return self.earlier_wall_s + time.perf_counter() - self.began

    @property
    def phase_s(self) -> dict[str, float]:
        return {name: s + self.earlier_phase_s[name] for name, s in self.timer.totals().items()}


def state_of(parts: RunParts, ledger: Ledger, *, prompt_position: int) -> dict[str, Any]:
    """What the driver must know to continue after the run's newest step, as JSON.

    `prompt_position`: where the prompts of the step after it begin.
    """
    return {
        "step": ledger.done,
        "prompt_position": prompt_position,
        "counts": dict(ledger.counts),
        "skipped_in_row": ledger.skipped_in_row,
        "hooks": parts.hooks.state_dict(),
        "before": ledger.before,
        "after": ledger.after,
        "after_step": ledger.after_step,
        "eval": asdict(parts.cfg.eval),  # how these were measured
        "score": ledger.score,
        "teacher_accuracy": ledger.teacher_accuracy,
        "owes_evaluation": ledger.owes_evaluation,
        "support": parts.setup.support,  # for who exports this checkpoint
        "wall_s": ledger.wall_s,
        "phase_s": ledger.phase_s,
    }


def resume(parts: RunParts, ledger: Ledger) -> bool:
    """With resume=auto, continue from the newest whole checkpoint, if there is one; says what it does, and whether it
    did. Raises DataError where there are checkpoints and none can be used."""
    if parts.cfg.resume != "auto":
        return False
    checkpoint = newest_whole(parts)
    if checkpoint is None:
        say(f"resume  there is no checkpoint in {parts.folder.path}: from step 0")
        return False
    state = read_state(checkpoint)
    parts.learner.load(checkpoint / LEARNER)
    parts.prompt_source.position = state["prompt_position"]
    parts.hooks.load_state_dict(state["hooks"])
    ledger.first_step = ledger.done = state["step"]
    ledger.counts.update(state["counts"])
    ledger.skipped_in_row = state["skipped_in_row"]
    ledger.before, ledger.teacher_accuracy = state["before"], state["teacher_accuracy"]
    ledger.owes_evaluation = state["owes_evaluation"]
    if state["after_step"] == state["step"] and state["eval"] == asdict(parts.cfg.eval):
        ledger.measured(state["after"], state["step"])
    ledger.earlier_wall_s, ledger.earlier_phase_s = state["wall_s"], Counter(state["phase_s"])
    say(f"resume  {checkpoint}")
    if parts.cfg.schedule.max_staleness:
        say("resume  answers that were made ahead are made anew, by the newest weights")
    for name, (before, now) in parts.changed.items():
        consequence = _learning_rate_change(parts.cfg, state["step"], before) if name == "num_steps" else ""
        say(f"resume  {name}={now}, it was {before}{consequence}")
    return True


def newest_whole(parts: RunParts) -> Path | None:
    """The newest checkpoint that is as it was written and this learner's; later ones are named and set aside.

    None where there is none at all. Raises DataError where there are some and none can be used: nothing is touched.
    """
    checkpoints, refused = parts.folder.checkpoints, {}
    for checkpoint in reversed(checkpoints.finished()):
        try:
            require_whole(checkpoint, contents=False)
            parts.learner.require_loadable(checkpoint / LEARNER, learner_sums(checkpoint))
        except DataError as error:
            refused[checkpoint] = error
            continue
        for damaged, reason in refused.items():
            aside = checkpoints.set_aside(damaged)
            say(f"resume  {reason}; it is set aside as {aside.name}, and the one before it used")
        return checkpoint
    if refused:
        raise DataError(
            f"{'; '.join(map(str, refused.values()))}: no checkpoint is left to resume from; overwrite=true begins anew"
        )
    return None


def _learning_rate_change(cfg: RunConfig, step: int, num_steps_before: int) -> str:
    """What a longer run means for the steps to come."""
    shape = partial(
        learning_rate_factor,
        schedule=cfg.learner.schedule,
        warmup_steps=cfg.learner.warmup_steps,
        min_ratio=cfg.learner.min_lr_ratio,
    )
    was, now = (
        cfg.learner.learning_rate * shape(step, num_steps=num_steps) for num_steps in (num_steps_before, cfg.num_steps)
    )
    return (
        f": the learning rate follows the longer run's {cfg.learner.schedule}, at the next step {now:.3g} and not "
        f"{was:.3g}"
    )
