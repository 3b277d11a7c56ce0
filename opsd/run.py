"""A run from its start to its end: everything around the loop that is not a stage of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from opsd.ahead import RolloutsAhead
from opsd.config.run import RunConfig
from opsd.errors import StageError, WorkerLost, say
from opsd.evaluation.held_out import accuracy, evaluate
from opsd.hooks import TrainHooks
from opsd.monitor.agreement import agreement_metrics
from opsd.monitor.collapse import StepWatch
from opsd.monitor.idle import IdleTimer
from opsd.monitor.log import MetricsLog, ProgressBar, progress_bar
from opsd.monitor.ray import RayMetrics
from opsd.monitor.step import StepRecord, step_metrics, token_rows
from opsd.monitor.warned import Warned
from opsd.report.build import build_report
from opsd.run_parts import RunParts, start_parts
from opsd.run_state import Figures, Ledger, resume, state_of
from opsd.run_summary import run_summary
from opsd.saver import Saver
from opsd.stopping import StopRequest, stop_signals, what_is_left
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
    warned = Warned()
    gauges = RayMetrics(folder.name, warned)
    log = MetricsLog(folder, cfg.log.wandb, cfg.log.project, folder.name, asdict(cfg), gauges, warned)
    stack.callback(log.close)
    start_metrics(parts, ledger, log, resumed=resumed)
    bar = progress_bar(cfg.num_steps, ledger.first_step)
    stack.callback(bar.close)
    ledger.startup_s = time.perf_counter() - ledger.began
    say(f"ready   after {ledger.startup_s:.0f} s; steps {ledger.first_step} to {ledger.last_step}")
    stop = stack.enter_context(stop_signals())
    ledger.timer.start()
    saver = Saver(folder=parts.folder, learner=parts.learner, cfg=cfg.checkpoint)
    rollouts = RolloutsAhead(
        parts.prompt_source,
        parts.sample,
        parts.begin,
        samples_per_prompt=cfg.data.samples_per_prompt,
        first_step=ledger.first_step,
        last_step=ledger.last_step,
        max_staleness=cfg.schedule.max_staleness,
    )
    stack.callback(rollouts.close, parts.rollout_pool.close)
    return Run(
        parts=parts,
        ledger=ledger,
        log=log,
        bar=bar,
        stop=stop,
        saver=saver,
        warned=warned,
        watch=StepWatch(warned),
        rollouts=rollouts,
        idle=IdleTimer(),
    )


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
    warned: Warned
    watch: StepWatch
    rollouts: RolloutsAhead
    idle: IdleTimer

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
            ledger.owes_evaluation, step = False, ledger.first_step
            # An attempt that resumed here before this one may have made it.
            ledger.measured(self.log.evaluation_at(step) or self.evaluate(step), step)
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
        self.watch.look_at(step, figures.metrics())
        self.bar.set_accuracy(figures.accuracy)
        return figures.figures()

    def _problems(self) -> list[Prompt]:
        return self.parts.setup.eval_prompts[: self.parts.cfg.eval.num_problems]

    def after_step(self, record: StepRecord) -> None:
        """Log the step; evaluate and save where it is time to. Raises StageError after too many skipped steps."""
        cfg, ledger, done = self.parts.cfg, self.ledger, record.batch.step + 1
        is_last = done == ledger.last_step
        ledger.add(record)
        phase_s, pools = ledger.timer.take(), (self.parts.rollout_pool, self.parts.teacher_pool)
        values = step_metrics(record, phase_s, weight_version=self.parts.rollout_pool.policy_version)
        learner_s = phase_s["learn"] + (phase_s["select"] if cfg.stats == "learner" else 0.0)  # whose pass that is
        values |= self.idle.take({role: s for pool in pools for role, s in pool.busy_s.items()}, learner_s)
        whole_draws = cfg.rollout.temperature == 1.0 and cfg.rollout.top_p == 1.0
        values |= agreement_metrics(record.report.agreement, whole_draws=whole_draws)
        values["skipped_steps"] = ledger.counts["skipped_steps"]
        values["engine_restarts"] = sum(pool.num_restarts for pool in pools)
        self.log.log(done, values)
        self.bar.update(values)
        self.watch.look_at(done, values)
        if record.report.skipped:
            self._skipped(record.report.skipped)
        if record.batch.step == 0 or done % cfg.log.token_view_every == 0 or is_last:
            self.log.log_tokens(token_rows(record, cfg.log.token_view_rollouts, self.parts.setup.tokenizer))
        if is_last or (cfg.eval.every and done % cfg.eval.every == 0):
            if self.stop.requested and not is_last:  # it may take minutes
                ledger.owes_evaluation = True
            else:
                ledger.measured(self.evaluate(done), done)
        if is_last or (cfg.checkpoint.every and done % cfg.checkpoint.every == 0):
            self.save()

    def _skipped(self, reason: str) -> None:
        """Says that the newest step was skipped. Raises StageError where too many in a row were."""
        step, row, most = self.ledger.done, self.ledger.skipped_in_row, self.parts.cfg.learner.max_skipped_steps
        if row > most:
            raise StageError(
                f"learn: step {step}: {reason}: {row} in a row, and at most learner.max_skipped_steps={most} are "
                f"skipped; {what_is_left(self.parts.folder)}"
            )
        say(f"skipped step {step}: {reason}; weights and optimiser are as before it ({row} of {most} in a row)")

    def save(self) -> None:
        """A checkpoint of the steps that are done, from which resume=auto continues exactly; see `Saver`."""
        done = self.ledger.done
        state = state_of(self.parts, self.ledger, prompt_position=self.rollouts.position_before(done))
        self.saver.begin(done, state)

    def finish(self) -> dict[str, Any]:
        """Write summary.json, the report and the student, each also where another one could not be written.

        Raises KeyboardInterrupt, after a report without a summary, where the run was told to stop before its last step;
        StageError that says where the weights are, where summary.json or the student is missing.
        """
        parts, ledger = self.parts, self.ledger
        self.saver.finish(wait=True)
        if ledger.done < ledger.last_step:
            ahead = self.rollouts.num_begun()
            if ahead:
                say(f"stop    the answers of {ahead} steps to come are dropped; resume=auto makes new ones")
            self._report()
            raise KeyboardInterrupt(f"stopped after step {ledger.done} of {parts.cfg.num_steps}")
        if not ledger.after:  # a resumed run may find every step done
            ledger.measured(self.evaluate(ledger.last_step), ledger.last_step)
        summary = {**run_summary(parts.cfg, parts.setup, ledger), "warnings": dict(self.warned.counts)}
        failed: list[str] = []
        with noted(failed):
            parts.folder.write_summary(summary)
        self._report()
        with noted(failed):
            parts.learner.save_student(parts.folder.student)
            say(f"student {parts.folder.student}")
        if failed:
            checkpoint = parts.folder.newest_checkpoint()
            export = f"{checkpoint} has the weights: python scripts/export.py {parts.folder.path} OUT"
            raise StageError(f"{'; '.join(failed)}; {export if checkpoint else 'there is no checkpoint either'}")
        return summary

    def _report(self) -> None:
        with self.warned.optional("the report"):
            report = build_report(self.parts.folder.path)
            self.log.log_report(report)
            say(f"report  {report}")


@contextmanager
def noted(failed: list[str]) -> Iterator[None]:
    """What could not be written inside is told later, in `failed`."""
    try:
        yield
    except WorkerLost:
        raise  # the run starts again, and writes all of it
    except (OSError, StageError) as error:
        failed.append(str(error))
