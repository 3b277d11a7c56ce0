"""The state of a run that is saved with every checkpoint, beside the learner's, and how a run goes on from it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from opsd.errors import say
from opsd.learner.optim import learning_rate_factor
from opsd.run_folder import read_state

if TYPE_CHECKING:
    from opsd.run import Run


def state_of(run: Run) -> dict[str, Any]:
    """What the driver must know to go on after the run's newest step, as JSON."""
    return {
        "step": run.done,
        "prompt_position": run.prompt_source.position,
        "counts": dict(run.counts),
        "hooks": run.hooks.state_dict(),
        "before": run.before,
        "teacher_accuracy": run.teacher_accuracy,
        "owes_evaluation": run.owes_evaluation,
        "support": run.setup.support,  # for who exports this checkpoint
        "wall_s": run.wall_s,
        "phase_s": run.phase_s,
    }


def resume(run: Run) -> bool:
    """With resume=auto, go on from the newest checkpoint where there is one; says what it does, and whether it did."""
    if run.cfg.resume != "auto":
        return False
    checkpoint = run.folder.newest_checkpoint()
    if checkpoint is None:
        say(f"resume  there is no checkpoint in {run.folder.path}: from step 0")
        return False
    state = read_state(checkpoint)
    run.learner.load(checkpoint / "learner")
    run.first_step = run.done = state["step"]
    run.prompt_source.position = state["prompt_position"]
    run.counts.update(state["counts"])
    run.hooks.load_state_dict(state["hooks"])
    run.before, run.teacher_accuracy = state["before"], state["teacher_accuracy"]
    run.owes_evaluation = state.get("owes_evaluation", False)  # older checkpoints have no such key
    run.earlier_wall_s, run.earlier_phase_s = state["wall_s"], Counter(state["phase_s"])
    say(f"resume  {checkpoint}")
    for name, (before, now) in run.changed.items():
        say(f"resume  {name}={now}, it was {before}{_consequence(run, name, before)}")
    return True


def _consequence(run: Run, name: str, before: Any) -> str:
    """What a longer run means for the steps to come."""
    if name != "num_steps":
        return ""
    cfg = run.cfg.learner
    shape = partial(
        learning_rate_factor, schedule=cfg.schedule, warmup_steps=cfg.warmup_steps, min_ratio=cfg.min_lr_ratio
    )
    was, now = (
        cfg.learning_rate * shape(run.first_step, num_steps=num_steps) for num_steps in (before, run.cfg.num_steps)
    )
    return f": the learning rate follows the longer run's {cfg.schedule}, at the next step {now:.3g} and not {was:.3g}"
