"""The parts of a run, each started once: prompts, engines, teacher and learner, and what connects them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from opsd.batch import PendingScores, StepBatch
from opsd.cluster.placement import Placement
from opsd.cluster.ray import ray_cluster
from opsd.cluster.reach import reachable_lines
from opsd.cluster.warm import warm_start
from opsd.config.auto import resolve_device
from opsd.config.run import RunConfig
from opsd.data.grading import ready_to_judge
from opsd.data.grading_ahead import GradingAhead
from opsd.data.prompts import PromptSource
from opsd.engines.vllm import engine_environment
from opsd.errors import say
from opsd.hook_checks import checked_source
from opsd.hooks import RolloutSource, TrainHooks
from opsd.learner.group import LearnerGroup
from opsd.models.weights import model_without_weights, names_differ
from opsd.monitor.ray import metrics_url
from opsd.ops.row_function import name_of
from opsd.plan.sharing import require_shared_room
from opsd.preflight import Setup, check
from opsd.rollout import RolloutPool
from opsd.run_folder import RunFolder
from opsd.run_inputs import fingerprints, require_outside
from opsd.run_lock import RunLock, locked
from opsd.teacher.pool import TeacherPool
from opsd.teacher.router import Teacher, start_teachers
from opsd.teacher.sources import section_of, teachers_by_source
from opsd.types import Rollout, TokenStats
from opsd.weight_sync import weight_sync, weight_transfer


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run works with from its start to its end; what it has done so far is in its ledger."""

    cfg: RunConfig
    hooks: TrainHooks
    setup: Setup
    folder: RunFolder
    lock: RunLock  # on the folder, while the run lives
    changed: dict[str, tuple[Any, Any]]  # settings in which a resumed run differs from its beginning
    prompt_source: PromptSource
    rollout_pool: RolloutPool
    teacher_pool: Teacher
    learner: LearnerGroup
    sample: RolloutSource  # the hooks', checked at every call
    token_stats: Callable[[StepBatch], TokenStats]  # from the source that `stats` names
    push_weights: Callable[[int], None]  # see opsd.weight_sync
    grading: GradingAhead | None  # None: the run has no grader

    @property
    def grader(self) -> str | None:
        return None if self.cfg.data.grader == "none" else self.cfg.data.grader

    def begin(self, groups: Iterable[dict[int, Rollout]]) -> list[PendingScores]:
        """Hands each group of rollouts to teacher and grader as it comes."""
        return self.teacher_pool.begin(groups if self.grading is None else self.grading.passing(groups))

    def rewards(self, scored: StepBatch) -> tuple[Tensor | None, dict[str, int]]:
        """(float32 [R]: the grader's score, or 1 for an answer that it accepts, else 0; what to count of the grading).

        Without a grader None, and nothing to count.
        """
        if self.grading is None:
            return None, {}
        judged = self.grading.judgements(scored.rollouts)
        reward_R = torch.tensor([answer.reward for answer in judged])
        return reward_R, {"grader_timeouts": sum(answer.gave_up for answer in judged)}

    def sleep_engines(self) -> None:
        """The learner's turn, where it shares its GPUs with the engines."""
        if self.cfg.placement.mode == "colocated":
            self.rollout_pool.sleep()
            self.teacher_pool.sleep()

    def sync(self, policy_version: int) -> None:
        """The learner's weights into the rollout engines, and their running mean into a teacher that follows it."""
        self.push_weights(policy_version)
        if self.cfg.teacher.follow_decay is not None:
            assert isinstance(self.teacher_pool, TeacherPool), "teacher.follow_decay has one teacher"
            self.teacher_pool.update_weights(self.learner.mean_weights(self.cfg.teacher.dtype))


def start_parts(cfg: RunConfig, hooks: TrainHooks, stack: ExitStack, *, began: float) -> RunParts:
    """Checks the configuration and starts everything; what must end with the run goes on the stack.

    `began`: time.perf_counter() at the start of the run. Raises ConfigError, DataError or StageError.
    """
    if resolve_device(cfg.device) == "cpu":
        roles = (cfg.rollout.backend, cfg.teacher.backend, "learner")
        stack.enter_context(warm_start(roles, engine_environment(cfg.rollout, "cpu")))
    setup = check(cfg)
    require_shared_room(cfg)
    for line in setup.prompt_lines:
        say(line)
    folder = RunFolder(cfg.output_dir)
    folder.require_ours(cfg)
    require_outside(folder.path, cfg)
    lock = stack.enter_context(locked(folder.path))
    changed = folder.claim(cfg, fingerprints(cfg))
    prompt_source = PromptSource(
        setup.train_prompts, cfg.data.prompts_per_step, seed=cfg.seed, shuffle=cfg.data.shuffle
    )
    stack.enter_context(ready_to_judge(cfg.data.grader))
    grading = None if cfg.data.grader == "none" else GradingAhead(cfg.data.grader, setup.tokenizer)
    if grading is not None:
        stack.callback(grading.close)
    dashboard = stack.enter_context(ray_cluster(dashboard=cfg.log.dashboard, answer_s=cfg.placement.answer_s))
    say(f"run     {folder.path.resolve()}")
    say(f"data    {len(setup.train_prompts):,} prompts to train on, {len(setup.eval_prompts):,} held out")
    for line in reachable_lines(dashboard, metrics_url()):
        say(line)
    if setup.adapter is not None:
        say(f"lora    rank {cfg.student.lora.rank}: {setup.adapter}")
    for name, model in loaded_models(cfg).items():
        say(f"load    {name}: {model}")
    rollout_pool, teacher_pool, learner = _start_actors(cfg, hooks, setup)
    sources: dict[str, Callable[[StepBatch], TokenStats]] = {
        "rollout": attrgetter("tokens"),
        "learner": learner.token_stats,
    }
    source = hooks.rollouts(rollout_pool, teacher_pool)
    sample = checked_source(source, name_of(hooks.rollouts), with_tools=setup.agents is not None)
    for name, part in {"rollout": rollout_pool, "teacher": teacher_pool, "learner": learner}.items():
        part.wait_ready()
        say(f"loaded  {name}, after {time.perf_counter() - began:.0f} s")
    learner.require_folder(folder.path)
    return RunParts(
        cfg=cfg,
        hooks=hooks,
        setup=setup,
        folder=folder,
        lock=lock,
        changed=changed,
        prompt_source=prompt_source,
        rollout_pool=rollout_pool,
        teacher_pool=teacher_pool,
        learner=learner,
        sample=sample,
        token_stats=sources[cfg.stats],
        push_weights=weight_sync(rollout_pool.cfg, learner, rollout_pool, max_restarts=cfg.max_restarts),
        grading=grading,
    )


def _start_actors(cfg: RunConfig, hooks: TrainHooks, setup: Setup) -> tuple[RolloutPool, Teacher, LearnerGroup]:
    """Rollout engines, teacher and learner, on their way up; those that need GPUs of their own have them first."""
    placement = Placement(cfg, setup.device)
    renamed = setup.device == "cuda" and names_differ(
        model_without_weights(cfg.student.path, trust_remote_code=cfg.student.trust_remote_code)
    )
    rollout = replace(cfg.rollout, weight_transfer=weight_transfer(cfg, setup.device, renamed=renamed))
    rollout_pool = RolloutPool(
        replace(setup.student, config=rollout),
        seed=cfg.seed,
        placement=placement,
        max_staleness=cfg.schedule.max_staleness,
        agents=setup.agents,
    )
    placement.settle(rollout_pool)
    told = hooks.statistics if cfg.stats == "rollout" else None
    teacher_pool = start_teachers(setup.teachers, placement, told, max_restarts=cfg.max_restarts, agents=setup.agents)
    placement.settle(teacher_pool)
    learner = LearnerGroup(
        cfg.student,
        cfg.learner,
        divergence=hooks.divergence,
        statistics=hooks.statistics,
        support=setup.support,
        num_steps=cfg.num_steps,
        mean_decay=cfg.teacher.follow_decay,
        seed=cfg.seed,
        vocabulary=setup.vocabulary,
        device=setup.device,
        placement=placement,
        teacher=cfg.teacher if cfg.loss.payload == "hidden" else None,
    )
    return rollout_pool, teacher_pool, learner


def loaded_models(cfg: RunConfig) -> dict[str, str]:
    """What starts before the first step, by role, in a few words: it can take minutes."""
    teachers = {section_of(source): teacher for source, teacher in teachers_by_source(cfg.teacher).items()}
    words = {"rollout": _engines(cfg.rollout.num_workers, cfg.rollout.backend, cfg.student.path, cfg.rollout.dtype)}
    for section, each in teachers.items():
        servers = f"served at {', '.join(each.urls)}"
        words[section] = servers if each.remote else _engines(each.num_workers, each.backend, each.path, each.dtype)
    ranks = cfg.learner.num_workers
    words["learner"] = f"{ranks} rank{'s' * (ranks > 1)} with {cfg.student.path}, computing in {cfg.student.dtype}"
    return words


def _engines(number: int, backend: str, path: str, dtype: str) -> str:
    return f"{number} {backend} engine{'s' * (number > 1)} with {path} in {dtype}"
