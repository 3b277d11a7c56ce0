"""Hooks of a run in which a process is killed at a moment of its fourth step, once.

`build_hooks` reads the moment from hook_options.fault, puts the killing around the stage where it belongs, in the
driver's process alone, and leaves a file in the run's folder that says that it has happened.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

import opsd.run
import opsd.train
import tip.plugin
from opsd.checkpoints import Checkpoints
from opsd.learner.group import LearnerGroup
from opsd.rollout import RolloutPool
from opsd.teacher.pool import TeacherPool

STEP = 3  # from 0; a checkpoint is due after step 2, 4 and 6
SOON_S = 0.02  # after a call that the killed process is at work on
# Moment -> the function that is called then, as (its owner, its name); the selection is known besides.
STAGES: dict[str, tuple[Any, str]] = {
    "rollout": (RolloutPool, "sample"),
    "scoring": (TeacherPool, "begin"),
    "learning": (LearnerGroup, "train_step"),
    "weight sync": (RolloutPool, "update_weights"),
    "evaluation": (opsd.run, "evaluate"),
    "checkpoint": (LearnerGroup, "save"),
    "checkpoint's end": (Checkpoints, "finish"),
}
# Fault -> (process, moment). The driver is this process.
FAULTS: dict[str, tuple[str, str]] = {
    "driver, rollout": ("driver", "rollout"),
    "driver, scoring": ("driver", "scoring"),
    "driver, selection": ("driver", "selection"),
    "driver, backward and optimiser": ("driver", "learning"),
    "driver, weight sync": ("driver", "weight sync"),
    "driver, evaluation": ("driver", "evaluation"),
    "driver, checkpoint writing": ("driver", "checkpoint"),
    "driver, checkpoint naming": ("driver", "checkpoint's end"),
    "rollout actor, rollout": ("rollout-0", "rollout"),
    "rollout actor, weight sync": ("rollout-0", "weight sync"),
    "teacher actor, scoring": ("teacher-0", "scoring"),
    "learner rank, backward and optimiser": ("learner-0", "learning"),
    "second learner rank, backward and optimiser": ("learner-1", "learning"),
    "learner rank, checkpoint writing": ("learner-0", "checkpoint"),
}


def build_hooks(cfg: Any) -> Any:
    process, moment = FAULTS[cfg.hook_options["fault"]]
    done = Path(cfg.output_dir) / "killed"
    if not done.exists():
        _arm(process, moment, done)
    return tip.plugin.build_hooks(cfg)


def _arm(process: str, moment: str, done: Path) -> None:
    selected = {"step": -1}  # the newest step whose tokens have been chosen

    def kill_soon() -> None:
        # What comes before the selection of a step belongs to the step after the last one that was selected.
        step = selected["step"] + (moment in ("rollout", "scoring"))
        if step == STEP and not done.exists():
            done.touch()
            pid = os.getpid() if process == "driver" else _pid(process)
            threading.Timer(SOON_S, os.kill, (pid, signal.SIGKILL)).start()

    def noted(original: Callable[..., Any], function: Any, batch: Any) -> Any:
        selected["step"] = batch.step
        if moment == "selection":
            kill_soon()
        return original(function, batch)

    def watched(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kill_soon()
        return original(*args, **kwargs)

    _around(opsd.train, "checked_select", noted)
    if moment != "selection":
        _around(*STAGES[moment], watched)


def _around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, called)


def _pid(name: str) -> int:
    return ray.get(ray.get_actor(name).__ray_call__.remote(lambda _: os.getpid()))
