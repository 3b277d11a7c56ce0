"""A run from its start to its end: everything around the loop that is not a stage of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from opsd.config.run import RunConfig
from opsd.errors import StageError, say
from opsd.evaluation.held_out import accuracy, evaluate
from opsd.hooks import TrainHooks
from opsd.monitor.agreement import agreement_metrics
from opsd.monitor.log import MetricsLog, ProgressBar, progress_bar
from opsd.monitor.ray import RayMetrics
from opsd.monitor.step import StepRecord, step_metrics, token_rows
from opsd.report.build import build_report
from opsd.run_parts import RunParts, start_parts
from opsd.run_state import Figures, Ledger, resume, state_of
from opsd.run_summary import run_summary
from opsd.saver import Saver
from opsd.stopping import StopRequest, stop_signals
from opsd.types import Prompt
from opsd.weight_sync import check_agreement


@contextmanager
def started(cfg: RunConfig, hooks: TrainHooks) -> Iterator[Run]:
    """A run that is ready for its first step, and that has ended where the block is left.

    Raises ConfigError, DataError or StageError; KeyboardInterrupt where a run that is told to stop loses its actors.
    """
    with ExitStack() as starting:
        run = _start(cfg, hooks, starting)
        stack = starting.pop_all()  # nothing failed
    try:
        yield run
    except StageError as error:
        if not run.stop.requested:
            raise
        reason = str(error).splitlines()[0]  # a scheduler that ends a job tells the actors, too
        raise KeyboardInterrupt(f"stopped in step {run.ledger.done + 1}, which could not end ({reason})") from None
    finally:
        run.stop.in_step = False
        stack.close()


def _start(cfg: RunConfig, hooks: TrainHooks, stack: ExitStack) -> Run:
    ledger = Ledger(last_step=cfg.stop_at_step or cfg.num_steps)
    parts = start_parts(cfg, hooks, stack, began=ledger.began)
    resumed = resume(parts, ledger)
    parts.sync(ledger.first_step)
    check_agreement(
        cfg,
        parts.learner,
        parts.rollout_pool,
        parts.setup.train_prompts[0],
        parts.setup.vocabulary,
        parts.sleep_engines,
    )
    folder = parts.folder.path
    log = MetricsLog(folder, cfg.log.wandb, cfg.log.project, folder.name, asdict(cfg), RayMetrics(folder.name))
    stack.callback(log.close)
    start_metrics(parts, ledger, log, resumed=resumed)
    bar = progress_bar(cfg.num_steps, ledger.first_step)
    stack.callback(bar.close)
    ledger.startup_s = time.perf_counter() - ledger.began
    say(f"ready   after {ledger.startup_s:.0f} s; steps {ledger.first_step} to {ledger.last_step}")
    stop = stack.enter_context(stop_signals())
    ledger.timer.start()
    saver = Saver(folder=parts.folder, learner=parts.learner, cfg=cfg.checkpoint)
    return Run(parts=parts, ledger=ledger, log=log, bar=bar, stop=stop, saver=saver)


def start_metrics(parts: RunParts, ledger: Ledger, log: MetricsLog, *, resumed: bool) -> None:
    """What an earlier attempt has logged beyond this run's first step stays in a file of another name."""
    if ledger.first_step < ledger.last_step:
        parts.folder.remove_summary()
    copies = log.truncate_after(ledger.first_step if resumed else -1)
    if copies:
        names = ", ".join(copy.name for copy in copies)
        say(f"resume  the lines after step {ledger.first_step} are written again; the earlier ones stay in {names}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way: its parts, its ledger, and where it shows what it does."""

    parts: RunParts
    ledger: Ledger
    log: MetricsLog
    bar: ProgressBar
    stop: StopRequest
    saver: Saver

    def steps(self) -> Iterator[int]:
        """The steps to do. Where the run is told to stop, they end after a whole one, with a checkpoint of it."""
        for step in range(self.ledger.first_step, self.ledger.last_step):
            self.parts.lock.require()
            self.saver.finish(wait=False)
            self.stop.in_step = True
            yield step
            if self.stop.requested:
                if self.saver.newest_step != self.ledger.done:
                    self.save()
                self.saver.finish(wait=True)
                return
            self.stop.in_step = False

    def evaluate_before(self) -> None:
        """The teacher's and the untrained student's figures; a resumed run has them already."""
        parts, ledger = self.parts, self.ledger
        if ledger.owes_evaluation:
            ledger.owes_evaluation = False
            ledger.measured(self.evaluate(ledger.first_step), ledger.first_step)
        if ledger.before:
            return
        with ledger.timer.phase("evaluate"):
            if parts.grader is not None and parts.cfg.eval.teacher and self._problems():
                answers = parts.teacher_pool.greedy(self._problems(), parts.cfg.rollout.max_response_tokens)
                ledger.teacher_accuracy, _ = accuracy(answers, parts.grader, parts.setup.tokenizer)
        ledger.before = self.evaluate(0)

    def evaluate(self, step: int) -> Figures:
        """The student's figures after `step` steps, logged and returned."""
        parts = self.parts
        with self.ledger.timer.phase("evaluate"):
            figures = evaluate(
                parts.rollout_pool,
                parts.teacher_pool,
                problems=self._problems(),
                kl_prompts=parts.setup.eval_prompts[: parts.cfg.eval.num_kl_prompts],
                grader=parts.grader,
                tokenizer=parts.setup.tokenizer,
            )
        if parts.setup.eval_prompts:
            self.log.log(step, figures.metrics())
        self.bar.set_accuracy(figures.accuracy)
        return vars(figures)

    def _problems(self) -> list[Prompt]:
        return self.parts.setup.eval_prompts[: self.parts.cfg.eval.num_problems]

    def after_step(self, record: StepRecord) -> None:
        """Log the step; evaluate and save where it is time to."""
        cfg, ledger, done = self.parts.cfg, self.ledger, record.batch.step + 1
        is_last = done == ledger.last_step
        values = step_metrics(record, ledger.timer.take(), weight_version=self.parts.rollout_pool.policy_version)
        values |= agreement_metrics(
            record.scored,
            record.selection,
            self.parts.setup.vocabulary,
            whole_draws=cfg.rollout.temperature == 1.0 and cfg.rollout.top_p == 1.0,
        )
        self.log.log(done, values)
        self.bar.update(values)
        if record.batch.step == 0 or done % cfg.log.token_view_every == 0 or is_last:
            self.log.log_tokens(token_rows(record, cfg.log.token_view_rollouts, self.parts.setup.tokenizer))
        ledger.add(record)
        if is_last or (cfg.eval.every and done % cfg.eval.every == 0):
            if self.stop.requested and not is_last:  # it may take minutes
                ledger.owes_evaluation = True
            else:
                ledger.measured(self.evaluate(done), done)
        if is_last or (cfg.checkpoint.every and done % cfg.checkpoint.every == 0):
            self.save()

    def save(self) -> None:
        """A checkpoint of the steps that are done, from which resume=auto continues exactly; see `Saver`."""
        self.saver.begin(self.ledger.done, state_of(self.parts, self.ledger))

    def finish(self) -> dict[str, Any]:
        """Write summary.json, the report and the student, in this order: nothing that fails costs what is known.

        Raises KeyboardInterrupt, after a report without a summary, where the run was told to stop before its last step.
        """
        parts, ledger = self.parts, self.ledger
        self.saver.finish(wait=True)
        if ledger.done < ledger.last_step:
            say(f"report  {build_report(parts.folder.path)}")
            raise KeyboardInterrupt(f"stopped after step {ledger.done} of {parts.cfg.num_steps}")
        if not ledger.after:  # a resumed run may find every step done
            ledger.measured(self.evaluate(ledger.last_step), ledger.last_step)
        summary = run_summary(parts.cfg, parts.setup, ledger)
        parts.folder.write_summary(summary)
        report = build_report(parts.folder.path)
        self.log.log_report(report)
        say(f"report  {report}")
        save_student(parts)
        say(f"student {parts.folder.student}")
        return summary


def save_student(parts: RunParts) -> None:
    """Raises StageError that says where the weights are, should they not have been written."""
    folder = parts.folder
    try:
        parts.learner.save_student(folder.student)
    except StageError as error:
        raise StageError(
            f"{error}; the report and summary.json are written, and {folder.newest_checkpoint()} has the "
            f"weights: python scripts/export.py {folder.path} OUT"
        ) from error
