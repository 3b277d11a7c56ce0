"""`python -m opsd.train`: on-policy distillation, one statement a stage, in the order in which the data flows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from opsd.batch import batch_stats
from opsd.config.auto import resolve_device, with_dtypes
from opsd.config.run import RunConfig, compose_config
from opsd.config.setting_names import refuse_misspelt
from opsd.data.epochs import with_epochs_as_steps
from opsd.errors import reported
from opsd.hook_checks import check_hooks, checked_select
from opsd.hooks import TrainHooks, load_build_hooks
from opsd.monitor.step import queue_lengths
from opsd.run import Run
from opsd.stopping import says_what_is_left


def loop(cfg: RunConfig, hooks: TrainHooks, run: Run) -> None:
    """The training steps from the run's position to its end."""
    run.evaluate_before()
    for step in run.steps():
        prompts = run.prompt_source.next_batch()
        with run.timer.phase("rollout"):
            rollouts = run.sample(prompts, samples_per_prompt=cfg.data.samples_per_prompt, step=step)
            pending = run.teacher_pool.begin(rollouts)  # each is scored as soon as it is finished
            queue = queue_lengths(pending)
        with run.timer.phase("score"):
            scored, dropped = run.usable(run.teacher_pool.finish(pending))
            run.sleep_engines()
        with run.timer.phase("select"):
            batch = batch_stats(step, scored, run.token_stats(scored), run.rewards(scored), num_steps=cfg.num_steps)
            selection = checked_select(hooks.select, batch)
        with run.timer.phase("learn"):
            report = run.learner.train_step(scored, selection)
        with run.timer.phase("sync"):
            run.sync(step + 1)
        hooks.after_step(report)
        run.after_step(batch, scored, selection, report, dropped, queue)


def distil(cfg: RunConfig, build_hooks: Callable[[RunConfig], TrainHooks]) -> dict[str, Any]:
    """A whole run. Returns what summary.json holds.

    Raises ConfigError, DataError or StageError, and KeyboardInterrupt where it is told to stop.
    """
    cfg = with_dtypes(with_epochs_as_steps(cfg), resolve_device(cfg.device))
    hooks = build_hooks(cfg)
    check_hooks(hooks, cfg)
    with Run(cfg, hooks) as run:
        loop(cfg, hooks, run)
        return run.finish()


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
