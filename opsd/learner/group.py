"""The learner as the loop sees it: all ranks behind one object."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from opsd.batch import StepBatch
from opsd.cluster.placement import Placement
from opsd.cluster.ray import gather, start_actor
from opsd.config.engine import TeacherConfig
from opsd.config.run import LearnerConfig, StudentConfig
from opsd.files import FileSum
from opsd.learner.dealing import Share, deal, kept_in, require_draws, rows_for
from opsd.learner.model import Divergence
from opsd.learner.worker import LearnerWorker
from opsd.ops.losses.objective import Objective
from opsd.ops.signals import Statistics
from opsd.payload.kept import Wanted
from opsd.types import Selection, StepReport, TokenStats, Vocabulary


class LearnerGroup:
    """FSDP2 ranks on Ray actors."""

    def __init__(
        self,
        student: StudentConfig,
        learner: LearnerConfig,
        *,
        divergence: Divergence,
        support: str,
        vocabulary: Vocabulary,
        num_steps: int,
        device: str,
        statistics: Statistics | None = None,
        mean_decay: float | None = None,
        placement: Placement | None = None,
        teacher: TeacherConfig | None = None,
        seed: int = 0,
    ) -> None:
        """`statistics`: what `token_stats` also gives. `mean_decay`: also keep a running mean of the weights, see
        `mean_weights`. `placement`: as in EnginePool. `seed`: of a new adapter, see student.lora.
        """
        self.support = support
        self.takes_hidden = teacher is not None
        self.loss_inputs = Objective.of(divergence).inputs
        self.student_path = student.path
        self.micro_batch_tokens = learner.micro_batch_tokens
        shares_gpu = placement is not None and placement.shares_gpus
        environment = {"OMP_NUM_THREADS": str(learner.cpu_threads), "HF_HUB_OFFLINE": "1"}
        environment |= allocator_settings(device, shares_gpu)
        if device == "cpu":
            environment["TORCH_COMPILE_DISABLE"] = str(int(not learner.compile))  # as the engines have it
        num_gpus = int(device == "cuda")
        seats = placement.seats("learner", learner.num_workers, num_gpus) if placement else [None] * learner.num_workers
        self.workers = [
            start_actor(LearnerWorker, f"learner-{rank}", num_gpus=num_gpus, environment=environment, seat=seat)
            for rank, seat in enumerate(seats)
        ]
        address = self.workers[0].rendezvous.remote(learner.num_workers)
        self._starting = [
            worker.start.remote(
                rank=rank,
                num_ranks=learner.num_workers,
                address=address,
                device=device,
                student=replace(student, path=os.path.abspath(student.path)),
                learner=learner,
                num_steps=num_steps,
                divergence=divergence,
                statistics=statistics,
                vocabulary=vocabulary,
                mean_decay=mean_decay,
                shares_gpu=shares_gpu,
                seed=seed,
                teacher=None if teacher is None else replace(teacher, path=os.path.abspath(teacher.path)),
            )
            for rank, worker in enumerate(self.workers)
        ]

    def wait_ready(self) -> None:
        """Raises ConfigError for a student that the learner cannot train."""
        if not all(gather("learner start", self._starting)):
            print(
                f"learner {self.student_path}: its layers do not keep packed sequences apart, so each runs alone",
                file=sys.stderr,
                flush=True,
            )
            self.micro_batch_tokens = 0  # of a micro-batch: one sequence

    def require_folder(self, folder: Path) -> None:
        """Raises ConfigError unless every rank sees this folder: each writes its part of a checkpoint into it."""
        gather("start", [worker.require_folder.remote(folder.absolute()) for worker in self.workers])

    def train_step(self, batch: StepBatch, selection: Selection) -> StepReport:
        """One optimiser step on the selected tokens of the global batch. Its payload is not kept beyond it."""
        shares = self._deal(batch, selection)
        rows = rows_for(shares, batch.payloads, self._wanted(batch, with_hidden=self.takes_hidden))
        refs = [w.train_on.remote(s.work, *own) for w, s, own in zip(self.workers, shares, rows, strict=True)]
        asked = [payload.close(kept_in(shares, number)) for number, payload in enumerate(batch.payloads)]
        report = gather("learn", refs)[0]
        agreement: Counter[str] = Counter()
        for sums in asked:
            agreement.update(sums())
        return replace(report, agreement=dict(agreement))

    def token_stats(self, batch: StepBatch) -> TokenStats:
        """A pass of the current student over all rollouts: the statistics of their tokens, one after another.

        Exact is the entropy only: the divergences are on the buckets that the loss has, as far as `named_mass_T` says.
        What needs the rollouts' candidates or the teacher comes from the engines. Source:
        docs/selection.md, Statistics of a token.
        """
        everything = Selection(index_N=torch.arange(batch.num_tokens), weight_N=torch.ones(batch.num_tokens))
        shares = self._deal(batch, everything)
        rows = rows_for(shares, batch.payloads, self._wanted(batch))
        refs = [w.stats_of.remote(s.work, *own) for w, s, own in zip(self.workers, shares, rows, strict=True)]
        index, parts = zip(*gather("stats", refs), strict=True)
        order_T = torch.from_numpy(np.concatenate(index).argsort())
        found = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        names = ("compatibility_T", "teacher_entropy_T", "attention_T")
        return replace(TokenStats.of(found).take(order_T), **{name: getattr(batch.tokens, name) for name in names})

    def _deal(self, batch: StepBatch, selection: Selection) -> list[Share]:
        """What each rank works on."""
        require_draws(batch.rollouts, self.loss_inputs)
        return deal(
            batch.rollouts,
            selection,
            payload_R=batch.payload_R,
            first_R=batch.first_R,
            num_ranks=len(self.workers),
            max_tokens=self.micro_batch_tokens,
        )

    def _wanted(self, batch: StepBatch, *, with_hidden: bool = False) -> Wanted:
        """`with_hidden`: then the loss needs no support."""
        return Wanted(
            support="sampled" if with_hidden else self.support,
            num_candidates=batch.num_candidates,
            asked=frozenset(self.loss_inputs),
            with_hidden=with_hidden,
        )

    def weights(self, dtype: str) -> ray.ObjectRef:
        """A reference to the current weights on the CPU; they go from the learner to the engines without the driver."""
        return [worker.gather_weights.remote(dtype) for worker in self.workers][0]

    def connect_engines(self, engines: list[ActorHandle], ranks_each: int, dtype: str, *, backend: str) -> None:
        """Once, before `send_weights`: `engines` with `ranks_each` GPUs each take this learner's weights.

        `backend`: nccl, or ipc for engines on the learner's own GPUs.
        """
        address = self.workers[0].free_address.remote()
        gather("sync", [w.connect_engines.remote(address, engines, ranks_each, dtype, backend) for w in self.workers])

    def send_weights(self) -> None:
        """The current weights straight into the connected engines, without a copy on the CPU."""
        gather("sync", [worker.send_weights.remote() for worker in self.workers])

    def mean_weights(self, dtype: str) -> ray.ObjectRef:
        """As `weights`, of the running mean; only for a group that keeps one."""
        return [worker.gather_weights.remote(dtype, mean=True) for worker in self.workers][0]

    def save(self, folder: Path, *, in_background: bool) -> None:
        """Each rank begins to write its file; `saved` ends it. `in_background`: steps may go on meanwhile."""
        refs = [worker.save.remote(folder.absolute(), in_background) for worker in self.workers]
        gather("checkpoint", refs)

    def saved(self, *, wait: bool) -> dict[str, FileSum] | None:
        """What the ranks have written since `save`, by file name; None where one is not done yet.

        Raises DataError where a file could not be written.
        """
        written = gather("checkpoint", [worker.saved.remote(wait) for worker in self.workers])
        return None if None in written else dict(written)

    def require_loadable(self, folder: Path, sums: dict[str, FileSum]) -> None:
        """Raises DataError, with nothing loaded, for a damaged checkpoint or another learner's.

        `sums`: of its files, by name.
        """
        gather("resume", [worker.require_loadable.remote(folder.absolute(), sums) for worker in self.workers])

    def load(self, folder: Path) -> None:
        gather("resume", [worker.load.remote(folder.absolute()) for worker in self.workers])

    def save_student(self, folder: Path) -> None:
        gather("export", [worker.save_student.remote(folder.absolute()) for worker in self.workers])


def allocator_settings(device: str, shares_gpu: bool) -> dict[str, str]:
    """Environment of the ranks: rows of every length would fragment a GPU's memory. What the user set stays.

    Not on a GPU shared with engines, which may be handed the weights' memory by CUDA IPC: segments that grow cannot be
    shared so on every driver. torch reads PYTORCH_ALLOC_CONF since 2.9, and the older name first.
    """
    is_set = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if device != "cuda" or shares_gpu or is_set:
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
