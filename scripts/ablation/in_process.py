"""A run of tip.train in one process, without Ray: its engines, learner, selection and packing, called in turn.

    with started(config(["method=todi", "student.path=...", ...])) as run:
        for step in range(run.cfg.num_steps):
            print(run.step(step).report.loss)

An ablation starts hundreds of runs, and what takes longest in a tiny run is the start of its actors. The functions are
those of a run, on the same seeds, so the losses are equal; a test compares them. One rank, transformers engines, on the
CPU, synchronous.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from torch import Tensor

from opsd.batch import batch_stats
from opsd.config.auto import with_dtypes
from opsd.config.run import compose_config
from opsd.data.prompts import PromptSource
from opsd.engines.groups import in_order
from opsd.engines.pool import request_seed, sample_seed
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.errors import ConfigError, StageError
from opsd.hook_checks import check_hooks, checked_select
from opsd.hooks import TrainHooks
from opsd.learner.model import whole_tensor
from opsd.learner.packing import MicroBatch, pack
from opsd.learner.worker import LearnerWorker
from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.losses.objective import Objective
from opsd.payload.scored import ScoredBatch, rollout_stats
from opsd.preflight import Setup, check
from opsd.types import BatchStats, Prompt, Rollout, ScoredRollout, Selection, StepReport
from tip.config import TipRunConfig
from tip.plugin import build_hooks


def config(overrides: Sequence[str]) -> TipRunConfig:
    """What `python -m tip.train` would run with, on transformers engines and the CPU. Raises ConfigError."""
    ConfigStore.instance().store(name="schema", node=TipRunConfig)
    own = ["rollout.backend=transformers", "teacher.backend=transformers", "loss.payload=logprobs", "output_dir=unused"]
    with initialize_config_module("tip.conf", version_base=None):
        cfg = with_dtypes(compose_config(compose("tip", overrides=[*own, *overrides]), TipRunConfig), "cpu")
    refused = {
        "answers=student": cfg.answers != "student",
        "stats=rollout": cfg.stats != "rollout",
        "loss.payload=logprobs": cfg.loss.payload != "logprobs",
        "learner.num_workers=1": cfg.learner.num_workers != 1,
        "schedule.max_staleness=0": cfg.schedule.max_staleness != 0,
        "data.samples_per_prompt=1": cfg.data.samples_per_prompt != 1,
    }
    for setting in (name for name, is_other in refused.items() if is_other):
        raise ConfigError(f"an ablation's run needs {setting}: for others, start python -m tip.train")
    return cfg


REVERSE_KL = Objective.of(reverse_kl)


@dataclass(frozen=True, kw_only=True)
class OneProcess:
    """The parts of a run, all in this process."""

    cfg: TipRunConfig
    hooks: TrainHooks
    setup: Setup
    student: TransformersEngine  # which samples; it gets the learner's weights after every step
    teacher: TransformersEngine
    learner: LearnerWorker
    prompts: PromptSource
    micro_batch_tokens: int

    def step(self, step: int, *, measure: bool = False) -> Step:
        """One optimiser step. Raises StageError for one that is skipped.

        `measure`: also the peak of memory, and how far its gradient points where that of plain distillation does.
        """
        cfg = self.cfg
        prompts = self.prompts.next_batch()
        seeds = [sample_seed(cfg.seed, step, prompt, 0, 0) for prompt in prompts]
        scored = self.scored(self.sample(prompts, seeds, version=step))
        tokens = rollout_stats(scored, self.setup.vocabulary, self.hooks.statistics)
        batch = batch_stats(step, scored, tokens, None, num_steps=cfg.num_steps)
        selection = checked_select(self.hooks.select, batch)
        cosine = self.cosine(scored, selection) if measure else None
        with measured_step(memory=measure) as cost:
            report = self.learner.train_step(self.packed(scored, selection))
        if report.skipped:
            raise StageError(f"step {step + 1} was skipped: {report.skipped}")
        self.student.update_weights(self.learner.gather_weights(cfg.rollout.dtype) or {}, step + 1)
        self.hooks.after_step(report)
        return Step(
            batch=batch,
            scored=scored,
            selection=selection,
            report=report,
            learner_s=cost["seconds"],
            learner_peak_mib=cost["peak_mib"],
            cosine=cosine,
        )

    def cosine(self, scored: ScoredBatch, selection: Selection) -> float:
        """Of the gradient of the run's loss on the selection with that of the reverse KL on every token, in [-1, 1].

        Both at the current weights, before clipping and before the optimiser.
        """
        everything = Selection(index_N=torch.arange(scored.num_tokens), weight_N=torch.ones(scored.num_tokens))
        own, plain = self.gradient(scored, selection), self.gradient(scored, everything, REVERSE_KL)
        return float(torch.nn.functional.cosine_similarity(own, plain, dim=0))

    def gradient(self, scored: ScoredBatch, selection: Selection, objective: Objective | None = None) -> Tensor:
        """Of the loss, all parameters in a row, float64; `objective` in place of the run's own. Changes nothing."""
        model = self.learner.model
        own, model.objective = model.objective, objective or model.objective
        try:
            for batch in self.packed(scored, selection):
                model(batch)[0].backward()
            return torch.cat(
                [whole_tensor(p.grad).flatten().double() for p in model.parameters() if p.grad is not None]
            )
        finally:
            model.objective = own
            model.zero_grad(set_to_none=True)

    def sample(self, prompts: list[Prompt], seeds: list[int], *, version: int, greedy: bool = False) -> list[Rollout]:
        """An answer for each prompt and seed, at the run's temperature."""
        cfg = self.cfg.rollout
        sampling = Sampling(
            temperature=0.0 if greedy else cfg.temperature,
            top_p=1.0 if greedy else cfg.top_p,
            max_tokens=cfg.max_response_tokens,
            num_candidates=cfg.num_candidates,
        )
        requests = [(prompt, 0, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return in_order(self.student.generate(requests, sampling, version))

    def scored(self, rollouts: list[Rollout]) -> ScoredBatch:
        scores = self.teacher.score(rollouts, self.cfg.teacher.top_k)
        pairs = zip(rollouts, scores, strict=True)
        return ScoredBatch(items=tuple(ScoredRollout(rollout=rollout, scores=own) for rollout, own in pairs))

    def packed(self, scored: ScoredBatch, selection: Selection) -> list[MicroBatch]:
        [batches] = pack(
            scored,
            selection,
            self.setup.support,
            self.setup.vocabulary,
            num_ranks=1,
            max_tokens=self.micro_batch_tokens,
            asked=self.learner.model.objective.inputs,
        )
        return batches

    def held_out_seeds(self, prompts: list[Prompt], samples: int) -> list[int]:
        """Of `samples` answers to each prompt, side by side: the same at every call and for every method."""
        return [request_seed(self.cfg.seed, 0, prompt.index, sample) for prompt in prompts for sample in range(samples)]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step saw and did."""

    batch: BatchStats
    scored: ScoredBatch
    selection: Selection
    report: StepReport
    learner_s: float  # of a core: packing, forward, backward and optimiser
    learner_peak_mib: float | None  # by which resident memory rose above its start in that time; None: not measured
    cosine: float | None  # with the gradient of plain distillation; None: not asked for


@contextmanager
def started(cfg: TipRunConfig) -> Iterator[OneProcess]:
    """Raises ConfigError or DataError, as the start of a run does."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setup = check(replace(cfg, output_dir=str(Path(folder) / "run")))
    hooks = build_hooks(cfg)
    check_hooks(hooks, cfg)
    [teacher] = setup.teachers.values()
    learner = LearnerWorker()
    learner.store = dist.HashStore()
    try:
        keeps_apart = learner.start(
            rank=0,
            num_ranks=1,
            address=("", 0),
            device="cpu",
            student=cfg.student,
            learner=cfg.learner,
            num_steps=cfg.num_steps,
            divergence=hooks.divergence,
            vocabulary=setup.vocabulary,
            statistics=hooks.statistics,
            seed=cfg.seed,
        )
        yield OneProcess(
            cfg=cfg,
            hooks=hooks,
            setup=setup,
            student=TransformersEngine(setup.student),
            teacher=TransformersEngine(teacher),
            learner=learner,
            prompts=PromptSource(
                setup.train_prompts, cfg.data.prompts_per_step, seed=cfg.seed, shuffle=cfg.data.shuffle
            ),
            micro_batch_tokens=cfg.learner.micro_batch_tokens if keeps_apart else 0,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def measured_step(*, memory: bool) -> Iterator[dict[str, float | None]]:
    """Seconds of a core; with `memory`, MiB by which resident memory rose above its start (None where not on Linux).

    What the allocator holds free is given back first, or a step would find its memory there: that costs some time.
    """
    cost: dict[str, float | None] = {"seconds": 0.0, "peak_mib": None}
    start_kib = _reset_peak() if memory else None
    began = time.process_time()  # runs side by side on few cores wait for each other
    yield cost
    cost["seconds"] = time.process_time() - began
    if start_kib is not None:
        cost["peak_mib"] = max(0.0, _status_kib("VmHWM") - start_kib) / 1024


def _reset_peak() -> float | None:
    """Sets this process's peak of resident memory to what it holds now, KiB; None where that cannot be."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status_kib("VmRSS")


def _status_kib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
