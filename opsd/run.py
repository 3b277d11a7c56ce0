"""A run's parts and its bookkeeping: everything around the loop that is not a stage of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from opsd.batch import drop_unusable, rollout_stats
from opsd.cluster.placement import Placement
from opsd.cluster.ray import ray_cluster
from opsd.cluster.reach import reachable_lines
from opsd.config.run import RunConfig
from opsd.data.grading import judge_rollouts, ready_to_judge
from opsd.data.prompts import PromptSource
from opsd.errors import StageError, say
from opsd.evaluation.held_out import Evaluation, accuracy, evaluate
from opsd.hook_checks import checked_source
from opsd.hooks import TrainHooks
from opsd.learner.group import LearnerGroup
from opsd.models.weights import model_without_weights, names_differ
from opsd.monitor.log import MetricsLog, PhaseTimer, progress_bar
from opsd.monitor.ray import RayMetrics, metrics_url
from opsd.monitor.step import step_metrics, token_rows
from opsd.ops.losses.objective import name_of
from opsd.plan.sharing import require_shared_room
from opsd.preflight import check
from opsd.report.build import build_report
from opsd.rollout import RolloutPool
from opsd.run_folder import RunFolder
from opsd.run_state import resume, state_of
from opsd.run_summary import loaded_models, run_summary
from opsd.stopping import stop_signals
from opsd.teacher.pool import Answered, TeacherPool
from opsd.teacher.router import start_teachers
from opsd.types import BatchStats, NoScores, ScoredRollout, Selection, StepReport, TokenStats
from opsd.weight_sync import check_agreement, weight_sync, weight_transfer


class Run:
    """A context: entering it checks the configuration, starts the actors and resumes; leaving it ends them."""

    def __init__(self, cfg: RunConfig, hooks: TrainHooks) -> None:
        self.cfg = cfg
        self.hooks = hooks
        self.grader = None if cfg.data.grader == "none" else cfg.data.grader
        self.graded: dict[str, int] = {}  # of the newest step's answers, for the log
        self.timer = PhaseTimer()
        self.first_step = 0
        self.last_step = cfg.stop_at_step or cfg.num_steps
        self.counts = Counter(tokens_generated=0, tokens_scored=0, tokens_trained=0, rollouts_dropped=0)
        self.done = 0  # steps that are behind the run, those of an earlier one included
        self.before: dict[str, float | None] = {}  # the evaluation at step 0
        self.after: dict[str, float | None] = {}  # the newest evaluation
        self.changed: dict[str, tuple[Any, Any]] = {}  # settings in which a resumed run differs from its beginning
        self.saved_step: int | None = None  # of the newest checkpoint that this run has written
        self.owes_evaluation = False  # one that was due, and that the run was stopped before
        self.teacher_accuracy: float | None = None
        self.earlier_wall_s = 0.0  # of the runs that this one resumes
        self.earlier_phase_s: Counter[str] = Counter()
        self._began = time.perf_counter()
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()  # nothing failed: it all ends in __exit__
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.in_step = False
        told_to_stop = self.stop.requested
        self._stack.close()
        if told_to_stop and isinstance(error, StageError):  # a scheduler that ends a job tells the actors, too
            raise KeyboardInterrupt(
                f"stopped in step {self.done + 1}, which could not end ({str(error).splitlines()[0]})"
            ) from None

    def _start(self) -> None:
        cfg = self.cfg
        setup = check(cfg)
        require_shared_room(cfg)
        self.setup, self.tokenizer, self.vocabulary = setup, setup.tokenizer, setup.vocabulary
        for line in setup.prompt_lines:
            say(line)
        self.folder = RunFolder(cfg.output_dir)
        self.changed = self.folder.claim(cfg)
        self.prompt_source = PromptSource(
            setup.train_prompts, cfg.data.prompts_per_step, seed=cfg.seed, shuffle=cfg.data.shuffle
        )
        self._stack.enter_context(ready_to_judge(cfg.data.grader))
        dashboard = self._stack.enter_context(ray_cluster(dashboard=cfg.log.dashboard))
        say(f"run     {self.folder.path.resolve()}")
        say(f"data    {len(setup.train_prompts):,} prompts to train on, {len(setup.eval_prompts):,} held out")
        for line in reachable_lines(dashboard, metrics_url()):
            say(line)
        self._start_actors()
        self.resumed = resume(self)
        self.sync(self.first_step)
        prompt = setup.train_prompts[0]
        check_agreement(cfg, self.learner, self.rollout_pool, prompt, self.vocabulary, self.sleep_engines)
        name = self.folder.path.name
        self.log = MetricsLog(self.folder.path, cfg.log.wandb, cfg.log.project, name, asdict(cfg), RayMetrics(name))
        self._stack.callback(self.log.close)
        self._start_metrics()
        self.bar = progress_bar(cfg.num_steps, self.first_step)
        self._stack.callback(self.bar.close)
        self.startup_s = time.perf_counter() - self._began
        say(f"ready   after {self.startup_s:.0f} s; steps {self.first_step} to {self.last_step}")
        self.stop = self._stack.enter_context(stop_signals())
        self.timer.start()

    def _start_metrics(self) -> None:
        """What an earlier attempt has logged beyond this run's first step stays in a file of another name."""
        if self.first_step < self.last_step:
            self.folder.remove_summary()
        copies = self.log.truncate_after(self.first_step if self.resumed else -1)
        if copies:
            names = ", ".join(copy.name for copy in copies)
            say(f"resume  the lines after step {self.first_step} are written again; the earlier ones stay in {names}")

    def _start_actors(self) -> None:
        cfg, setup = self.cfg, self.setup
        for name, model in loaded_models(cfg).items():
            say(f"load    {name}: {model}")
        placement = Placement(cfg, setup.device)
        renamed = setup.device == "cuda" and names_differ(
            model_without_weights(cfg.student.path, trust_remote_code=cfg.student.trust_remote_code)
        )
        rollout = replace(cfg.rollout, weight_transfer=weight_transfer(cfg, setup.device, renamed=renamed))
        student = replace(setup.student, config=rollout)
        self.rollout_pool = RolloutPool(student, seed=cfg.seed, placement=placement)
        placement.settle(self.rollout_pool)
        self.teacher_pool = start_teachers(setup.teachers, placement)
        placement.settle(self.teacher_pool)
        self.learner = LearnerGroup(
            cfg.student,
            cfg.learner,
            divergence=self.hooks.divergence,
            support=setup.support,
            num_steps=cfg.num_steps,
            mean_decay=cfg.teacher.follow_decay,
            vocabulary=setup.vocabulary,
            device=setup.device,
            placement=placement,
        )
        sources: dict[str, Callable[[list[ScoredRollout]], TokenStats]] = {
            "rollout": partial(rollout_stats, vocabulary=setup.vocabulary),
            "learner": self.learner.token_stats,
        }
        self.token_stats = sources[cfg.stats]
        source = self.hooks.rollouts(self.rollout_pool, self.teacher_pool)
        self.sample = checked_source(source, name_of(self.hooks.rollouts))
        parts = {"rollout": self.rollout_pool, "teacher": self.teacher_pool, "learner": self.learner}
        for name, part in parts.items():
            part.wait_ready()
            say(f"loaded  {name}, after {time.perf_counter() - self._began:.0f} s")
        self.learner.require_folder(self.folder.path)
        self.push_weights = weight_sync(rollout, self.learner, self.rollout_pool)

    def steps(self) -> Iterator[int]:
        """The steps to do. Where the run is told to stop, they end after a whole one, with a checkpoint of it."""
        for step in range(self.first_step, self.last_step):
            self.stop.in_step = True
            yield step
            if self.stop.requested:
                if self.saved_step != self.done:
                    self.save(self.done)
                return
            self.stop.in_step = False

    def sync(self, policy_version: int) -> None:
        """The learner's weights into the rollout engines, and their running mean into a teacher that follows it."""
        self.push_weights(policy_version)
        if self.cfg.teacher.follow_decay is not None:
            assert isinstance(self.teacher_pool, TeacherPool), "teacher.follow_decay has one teacher"
            self.teacher_pool.update_weights(self.learner.mean_weights(self.cfg.teacher.dtype))

    def sleep_engines(self) -> None:
        """The learner's turn, where it shares its GPUs with the engines."""
        if self.cfg.placement.mode == "colocated":
            self.rollout_pool.sleep()
            self.teacher_pool.sleep()

    def rewards(self, scored: list[ScoredRollout]) -> Tensor | None:
        """float32 [R]: 1 for an answer that the grader accepts, else 0. None without a grader."""
        if self.grader is None:
            return None
        judged = judge_rollouts([item.rollout for item in scored], self.grader, self.tokenizer)
        self.graded = {"grader_timeouts": sum(answer.gave_up for answer in judged)}
        self.counts.update(self.graded)
        return torch.tensor([float(answer.right) for answer in judged])

    def usable(self, answered: Answered) -> tuple[list[ScoredRollout], Counter[str]]:
        """The rollouts with scores to learn from; what is dropped is counted by reason."""
        self.counts["tokens_generated"] += sum(len(rollout) for rollout, _ in answered)
        self.counts["tokens_scored"] += sum(
            len(rollout) for rollout, scores in answered if not isinstance(scores, NoScores)
        )
        return drop_unusable(answered)

    def evaluate_before(self) -> None:
        """The teacher's and the untrained student's figures; a resumed run has them already."""
        if self.owes_evaluation:
            self.owes_evaluation, self.after = False, self.evaluate(self.first_step)
        if self.before:
            return
        with self.timer.phase("evaluate"):
            if self.grader is not None and self.cfg.eval.teacher and self._problems():
                answers = self.teacher_pool.greedy(self._problems(), self.cfg.rollout.max_response_tokens)
                self.teacher_accuracy, _ = accuracy(answers, self.grader, self.tokenizer)
        self.before = self.evaluate(0)

    def evaluate(self, step: int) -> dict[str, float | None]:
        """The student's figures after `step` steps, logged and returned."""
        with self.timer.phase("evaluate"):
            found: Evaluation = evaluate(
                self.rollout_pool,
                self.teacher_pool,
                problems=self._problems(),
                kl_prompts=self.setup.eval_prompts[: self.cfg.eval.num_kl_prompts],
                grader=self.grader,
                tokenizer=self.tokenizer,
            )
        if self.setup.eval_prompts:
            self.log.log(step, found.metrics())
        self.bar.set_accuracy(found.accuracy)
        return vars(found)

    def _problems(self) -> list:
        return self.setup.eval_prompts[: self.cfg.eval.num_problems]

    def after_step(
        self,
        batch: BatchStats,
        scored: list[ScoredRollout],
        selection: Selection,
        report: StepReport,
        dropped: Counter[str],
        queue: dict[str, int],
    ) -> None:
        """Log the step; evaluate and save where it is time to."""
        cfg, done = self.cfg, batch.step + 1
        version = self.rollout_pool.policy_version
        values = step_metrics(batch, scored, selection, report, dropped, self.timer.take(), weight_version=version)
        self.log.log(done, {**values, **queue, **self.graded})
        self.bar.update(values)
        self.counts["tokens_trained"] += report.num_kept
        self.counts["rollouts_dropped"] += sum(dropped.values())
        if batch.step == 0 or done % cfg.log.token_view_every == 0 or done == self.last_step:
            rows = token_rows(batch, scored, selection, cfg.log.token_view_rollouts, self.tokenizer)
            self.log.log_tokens(rows)
        self.done = done
        if done == self.last_step or (cfg.eval.every and done % cfg.eval.every == 0):
            if self.stop.requested and done < self.last_step:  # it may take minutes
                self.owes_evaluation = True
            else:
                self.after = self.evaluate(done)
        if done == self.last_step or (cfg.checkpoint.every and done % cfg.checkpoint.every == 0):
            self.save(done)

    def save(self, step: int) -> None:
        """A checkpoint from which resume=auto goes on exactly."""
        unfinished = self.folder.begin_checkpoint(step)
        self.learner.save(unfinished / "learner")
        self.folder.finish_checkpoint(unfinished, state_of(self), self.cfg.checkpoint.keep)
        self.saved_step = step

    @property
    def wall_s(self) -> float:
        return self.earlier_wall_s + time.perf_counter() - self._began

    @property
    def phase_s(self) -> dict[str, float]:
        return {name: s + self.earlier_phase_s[name] for name, s in self.timer.totals().items()}

    def finish(self) -> dict[str, Any]:
        """Write summary.json, the report and the student, in this order: nothing that fails costs what is known.

        Raises KeyboardInterrupt, after a report without a summary, where the run was told to stop before its last step.
        """
        if self.done < self.last_step:
            say(f"report  {build_report(self.folder.path)}")
            raise KeyboardInterrupt(f"stopped after step {self.done} of {self.cfg.num_steps}")
        after = self.after or self.evaluate(self.last_step)  # a resumed run may find every step done
        summary = run_summary(self, after)
        self.folder.write_summary(summary)
        report = build_report(self.folder.path)
        self.log.log_report(report)
        say(f"report  {report}")
        self._save_student()
        say(f"student {self.folder.student}")
        return summary

    def _save_student(self) -> None:
        try:
            self.learner.save_student(self.folder.student)
        except StageError as error:
            raise StageError(
                f"{error}; the report and summary.json are written, and {self.folder.newest_checkpoint()} has the "
                f"weights: python scripts/export.py {self.folder.path} OUT"
            ) from error
