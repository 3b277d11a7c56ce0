"""One FSDP2 rank inside a Ray actor: the student, its optimiser, and what it does with its micro-batches."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from opsd.cluster.ray import require_here
from opsd.config.engine import TeacherConfig
from opsd.config.run import LearnerConfig, StudentConfig
from opsd.errors import ConfigError, DataError, StageError
from opsd.files import FileSum, file_sum, unlike
from opsd.learner.checkpoint import load_learner, part_of_checkpoint, require_fit
from opsd.learner.dealing import RankWork
from opsd.learner.finite import require_finite_weights
from opsd.learner.loading import open_student
from opsd.learner.mean import WeightMean
from opsd.learner.model import (
    DistillationModel,
    Divergence,
    all_tensors,
    full_weights,
    shard,
    trained_tensors,
    whole_tensor,
)
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import MicroBatch, micro_batches
from opsd.learner.shards import Shards
from opsd.learner.step import token_stats, train_step
from opsd.learner.teacher_head import load_teacher_head
from opsd.learner.verify import keeps_sequences_apart, require_student_head
from opsd.models.lora import ADAPTER_FOLDER, adapter_facts, save_adapter
from opsd.models.student_folder import save_student
from opsd.models.weights import model_without_weights, names_differ
from opsd.ops.signals import Statistics
from opsd.payload.kept import KeptRows
from opsd.types import StepReport, Vocabulary


class LearnerWorker:
    """Every method is a collective: the group calls it on all ranks at once. CUDA paths: written, not run on a GPU."""

    def rendezvous(self, num_ranks: int) -> tuple[str, int]:
        """Host and port of a store that runs in this actor, of rank 0: the ranks meet there. Not closed in between."""
        host = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def free_address(self) -> tuple[str, int]:
        """Host and a free port of this actor, where vLLM's own group for weights will listen."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def start(
        self,
        *,
        rank: int,
        num_ranks: int,
        address: tuple[str, int],
        device: str,
        student: StudentConfig,
        learner: LearnerConfig,
        num_steps: int,
        divergence: Divergence,
        vocabulary: Vocabulary,
        statistics: Statistics | None = None,
        mean_decay: float | None = None,
        shares_gpu: bool = False,
        teacher: TeacherConfig | None = None,
        seed: int = 0,
    ) -> bool:
        """Whether packed rows are right for this student; else its micro-batches must hold one sequence each.

        `address`: rank 0's `rendezvous`. `mean_decay`: also keep a running mean of the weights; None: do not.
        `shares_gpu`: with engines, in turn. `teacher`: whose hidden states will come with the batches; None: no one's.
        `seed`: of a new adapter. Raises ConfigError for a student that the learner cannot train, DataError for weights
        that are not finite.
        """
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))  # for a user's functions in this process
        require_here("the student", student.path)
        torch.set_num_threads(learner.cpu_threads)
        self.device = torch.device(device)
        self.student = student
        self.shares_gpu = shares_gpu
        self.max_grad_norm = learner.max_grad_norm
        # Offloaded weights and gradients are on the CPU, so a GPU rank needs gloo beside NCCL.
        store = self.store if rank == 0 else dist.TCPStore(*address, num_ranks, is_master=False)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
        causal_lm = open_student(student, rank=rank, device=device, seed=seed)
        self.adapter = adapter_facts(student)
        self.teacher_head = None
        if teacher is not None:
            require_here("the teacher's head", teacher.path)
            self.teacher_head = load_teacher_head(
                teacher.path,
                trust_remote_code=teacher.trust_remote_code,
                device=self.device,
                dtype=teacher.dtype,
            )
        self.model = DistillationModel(causal_lm, divergence, vocabulary, statistics, teacher_head=self.teacher_head)
        self.is_first_step = True
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        shard(
            self.model,
            device=device,
            num_ranks=num_ranks,
            dtype=student.dtype,
            checkpointing=learner.activation_checkpointing,
            cpu_offload=learner.cpu_offload,
            compile_layers=learner.compile,
        )
        require_finite_weights(self.model, f"student.path={student.path}", self.device)
        require_student_head(self.model, student.path, self.device)
        self.optimizer = build_optimizer(self.model.parameters(), learner)
        self.scheduler = build_scheduler(self.optimizer, learner, num_steps)
        self.mean = None if mean_decay is None else WeightMean(self.model, mean_decay)
        return keeps_sequences_apart(self.model, student.dtype, self.device)

    def require_folder(self, folder: Path) -> None:
        require_here("output_dir", folder)

    def train_step(self, batches: list[MicroBatch]) -> StepReport:
        if self.is_first_step and self.teacher_head is not None:
            self.teacher_head.require_scores(batches[0].to(self.device), self.model.vocabulary)
        self.is_first_step = False
        report = train_step(
            self.model,
            self.optimizer,
            self.scheduler,
            batches,
            device=self.device,
            max_grad_norm=self.max_grad_norm,
        )
        if self.mean is not None and not report.skipped:
            self.mean.update(self.model)
        self._leave_gpu()
        return report

    def train_on(self, work: RankWork, *rows: KeptRows) -> StepReport:
        """`train_step`, of the kept rows that this rank has fetched."""
        return self.train_step(micro_batches(work, rows))

    def stats_of(self, work: RankWork, *rows: KeptRows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(index_N, the statistics by name) of this rank's tokens; index_N are their places in the global batch."""
        index_N, stats = token_stats(self.model, micro_batches(work, rows), device=self.device)
        return index_N.numpy(), {name: value_N.numpy() for name, value_N in stats.known().items()}

    def gather_weights(self, dtype: str, mean: bool = False) -> dict[str, Tensor] | None:
        """All weights, or their running mean, and buffers, on the CPU, on rank 0; None elsewhere. See full_weights."""
        shards = dict(all_tensors(self.model))
        if mean:
            assert self.mean is not None, "a running mean that was not asked for"
            shards.update(self.mean.shards)
        found, first = {}, dist.get_rank() == 0
        for name, weight in full_weights(shards.items(), getattr(torch, dtype), self.student.lora.scale):
            if first:
                found[name] = weight.to("cpu")
        self._leave_gpu()
        return found if first else None

    def connect_engines(
        self, address: tuple[str, int], engines: list[ActorHandle], ranks_each: int, dtype: str, backend: str
    ) -> None:
        """Raises ConfigError for a model whose weights would go out, one by one, by names that vLLM does not know."""
        from opsd.learner.nccl_sender import TrainedWeights, ipc_sender, nccl_sender  # imports vLLM

        if names_differ(model_without_weights(self.student.path, trust_remote_code=self.student.trust_remote_code)):
            raise ConfigError(
                f"rollout.weight_transfer={backend}: {self.student.path} holds its weights by other names than "
                "transformers (fused experts, or a part of a multimodal model): set "
                "rollout.weight_transfer=object_store"
            )
        weights, rank = TrainedWeights(self.model, getattr(torch, dtype), self.device), dist.get_rank()
        if backend == "ipc":
            self.sender = ipc_sender(weights, rank=rank, workers=engines)
        else:
            self.sender = nccl_sender(weights, rank=rank, address=address, workers=engines, ranks_each=ranks_each)

    def send_weights(self) -> None:
        self.sender.send_weights()
        self._leave_gpu()

    def _leave_gpu(self) -> None:
        """What activations or gathered weights took goes back, where it is the turn of engines on the same GPU."""
        if self.shares_gpu:
            torch.cuda.empty_cache()

    def save(self, folder: Path, copy: bool) -> None:
        """Begins to write this rank's part of a checkpoint; `saved` ends it. `copy`: training goes on meanwhile."""
        state = self.model, self.optimizer, self.scheduler, self.mean
        part = part_of_checkpoint(*state, copy=copy, adapter=self.adapter)

        def write() -> tuple[str, FileSum]:
            path = part.write(folder)
            return path.name, file_sum(path)

        self.saving = self.writer.submit(write)

    def saved(self, wait: bool) -> tuple[str, FileSum] | None:
        """The name of this rank's file, and what is in it; None where it is not written yet. Raises DataError."""
        return self.saving.result() if wait or self.saving.done() else None

    def require_loadable(self, folder: Path, sums: dict[str, FileSum]) -> None:
        """Raises DataError unless this rank's share of the files is as it was written, and all fit this learner."""
        for name, wanted in sorted(sums.items())[dist.get_rank() :: dist.get_world_size()]:
            wrong = unlike(folder / name, wanted)
            if wrong:
                raise DataError(f"{folder}: {wrong}")
        with Shards(folder) as stored:
            require_fit(stored, self.model, self.mean)

    def load(self, folder: Path) -> None:
        load_learner(folder, self.model, self.optimizer, self.scheduler, self.mean)
        require_finite_weights(self.model, str(folder), self.device)

    def save_student(self, folder: Path) -> None:
        """The student as a Hugging Face folder; where an adapter trains, merged, and the adapter in a folder below."""
        weights, lora, path = self.gather_weights("float32"), self.student.lora, self.student.path
        own = trained_tensors(self.model) if lora.rank else ()
        adapter = {name.removeprefix("causal_lm."): whole_tensor(shard) for name, shard in own}
        if weights is not None:
            try:
                save_student(folder, weights, path, trust_remote_code=self.student.trust_remote_code)
                if lora.rank:
                    save_adapter(folder / ADAPTER_FOLDER, adapter, lora, path)
            except Exception as error:  # whatever it is, a run's end says it in one line
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise StageError(f"export: the student could not be written to {folder}: {reason}") from error
        dist.barrier()
