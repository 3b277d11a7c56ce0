"""`python -m opsd.train`: on-policy distillation, one statement per stage, in the order in which the data flows."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from opsd.batch import batch_stats, scored_batch
from opsd.config.auto import resolve_device, with_dtypes
from opsd.config.payload import with_payload
from opsd.config.run import RunConfig, compose_config
from opsd.config.setting_names import refuse_misspelt
from opsd.data.epochs import with_epochs_as_steps
from opsd.errors import WorkerLost, reported, say
from opsd.hook_checks import check_hooks, checked_select
from opsd.hooks import TrainHooks, load_build_hooks
from opsd.monitor.step import StepRecord, queue_lengths
from opsd.ops.losses.objective import Objective
from opsd.run import Run, started
from opsd.stopping import says_what_is_left


def loop(run: Run) -> None:
    """The training steps from the run's position to its end."""
    parts, cfg, hooks, phase = run.parts, run.parts.cfg, run.parts.hooks, run.ledger.timer.phase
    run.evaluate_before()
    for step in run.steps():
        with phase("rollout"):
            pending = run.rollouts.take(step)  # made ahead, or now; each is scored as soon as it is finished
            queue = queue_lengths(pending)
        with phase("score"):
            scored = scored_batch(pending)
            parts.sleep_engines()
        with phase("select"):
            reward_R, graded = parts.rewards(scored)
            batch = batch_stats(step, scored, parts.token_stats(scored), reward_R, num_steps=cfg.num_steps)
            selection = checked_select(hooks.select, batch)
        with phase("learn"):
            report = parts.learner.train_step(scored, selection)
        with phase("sync"):
            parts.sync(step + 1)
        if not report.skipped:  # a method's state follows the steps that were taken
            hooks.after_step(report)
        made = StepRecord(batch=batch, scored=scored, selection=selection, report=report, queue=queue, graded=graded)
        run.after_step(made)


def distil(cfg: RunConfig, build_hooks: Callable[[RunConfig], TrainHooks]) -> dict[str, Any]:
    """A whole run. Returns what summary.json holds.

    Where a worker is lost it starts again from its newest checkpoint, `max_restarts` times at most.
    Raises ConfigError, DataError or StageError, and KeyboardInterrupt where it is told to stop.
    """
    cfg = with_dtypes(with_epochs_as_steps(cfg), resolve_device(cfg.device))
    for attempt in itertools.count(1):
        hooks = build_hooks(cfg)
        cfg = with_payload(cfg, by_token=Objective.of(hooks.divergence).by_token)
        check_hooks(hooks, cfg)
        try:
            with started(cfg, hooks) as run:
                loop(run)
                return run.finish()
        except WorkerLost as error:
            if attempt > cfg.max_restarts:
                raise
            say(f"restart {attempt} of {cfg.max_restarts}: {error}")
            cfg = replace(cfg, resume="auto", overwrite=False)
    raise AssertionError("the attempts never end by themselves")


def launch(config_class: type[RunConfig], conf_module: str, config_name: str) -> None:
    """The command line: Hydra composes `config_name`."""
    ConfigStore.instance().store(name="schema", node=config_class)

    @hydra.main(version_base=None, config_path=f"pkg://{conf_module}", config_name=config_name)
    def main(hydra_cfg: DictConfig) -> None:
        with reported():
            cfg = compose_config(hydra_cfg, config_class)
            with says_what_is_left(cfg.output_dir):
                distil(cfg, load_build_hooks(cfg.hooks))

    sys.path.insert(0, os.getcwd())  # a user's hooks module lies where the command is started
    with reported():
        refuse_misspelt(sys.argv[1:], config_class, conf_module)
    main()


def main() -> None:
    launch(RunConfig, "opsd.conf", "run")


if __name__ == "__main__":
    main()
