"""The Ray actor around an engine: the same for rollouts and for the teacher, whose payload it keeps."""
# N kept tokens

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from opsd.cluster.ray import require_here
from opsd.config.engine import EngineSpec
from opsd.engines.candidates import Candidates, Written, put_back, taken_out
from opsd.engines.installed import require_vllm
from opsd.engines.protocols import Engine
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import VllmEngine
from opsd.engines.work import Work
from opsd.ops.signals import Statistics
from opsd.payload.keeper import KeptHere, ScoredPart, in_one, looked_through
from opsd.payload.kept import KeptRows, Wanted
from opsd.payload.scored import ScoredBatch
from opsd.payload.whole import own_scores, wholes
from opsd.types import Rollout


def transformers_engine(spec: EngineSpec) -> Engine:
    from opsd.engines.transformers import TransformersEngine  # a vLLM engine's process does without it

    return TransformersEngine(spec)


MADE_BY: dict[str, Callable[[EngineSpec], Engine]] = {"vllm": VllmEngine, "transformers": transformers_engine}


PAYLOAD_CALLS = "payload"  # their concurrency group: one thread


class EngineWorker:
    """Owns one engine; its process holds nothing else. What it answers with comes with the seconds it was at work.

    The calls from `told` to `drop` are made in another thread (see PAYLOAD_CALLS), so that they do not wait for what
    the engine has still to do.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0  # at answers and scores, since it was started
        self._looking = ThreadPoolExecutor(1, "payload")
        self._found: dict[int, Future[tuple[ScoredPart, ScoredBatch | None]]] = {}  # what nobody has asked for yet
        self._kept: dict[int, KeptHere] = {}

    def start(self, spec: EngineSpec) -> None:
        section, backend = spec.config.section, spec.config.backend
        require_here(f"the {section} engines' model", spec.path)
        require_vllm({section: backend})  # this node may lack what the driver's has
        self.name = spec.path  # of its model, for messages
        self.engine: Engine = MADE_BY[backend](spec)

    def generate(
        self, work: Work, sampling: Sampling, policy_version: int, group_size: int | None, apart: bool
    ) -> Iterator[tuple[dict[int, Rollout] | dict[int, Written], float] | list[Candidates]]:
        """Groups of rollouts. `apart`: without their candidates, which follow each group as an object of their own."""
        began, waited_s = time.perf_counter(), work.waited_s
        for group in work.made_by(self.engine, sampling, policy_version, group_size):
            self.busy_s += time.perf_counter() - began - (work.waited_s - waited_s)
            began, waited_s = time.perf_counter(), work.waited_s
            if apart:
                written, candidates = taken_out(group)
                yield written, self.busy_s
                yield candidates
            else:
                yield group, self.busy_s

    def score(
        self,
        key: int,
        rollouts: list[Rollout],
        top_k: int,
        statistics: Statistics | None,
        *candidates: list[Candidates],
    ) -> float:
        """The scores stay here, and are looked through while the engine goes on. `candidates`: those that the rollouts
        name by number."""
        began = time.perf_counter()
        rollouts = put_back(rollouts, candidates)
        scores = own_scores(rollouts, self.engine.score(wholes(rollouts), top_k))
        vocabulary = self.engine.vocabulary
        self._found[key] = self._looking.submit(looked_through, self.name, rollouts, scores, vocabulary, statistics)
        self.busy_s += time.perf_counter() - began
        return self.busy_s

    def told(self, keys: list[int]) -> ScoredPart:
        """What the driver is told of these scores; what can be learnt from is kept by the first key until `drop`."""
        part, scored = in_one([self._found.pop(key).result() for key in keys])
        if scored is not None:
            self._kept[keys[0]] = KeptHere(scored, self.engine.vocabulary)
        return part

    def rows(self, key: int, places: Sequence[np.ndarray], wanted: Wanted) -> list[KeptRows] | KeptRows:
        """As Ray wants them: an object for each of the places, and one by itself is no list."""
        found = self._kept[key].rows(places, wanted)
        return found if len(found) > 1 else found[0]

    def close(self, key: int, index_N: np.ndarray) -> dict[str, float]:
        return self._kept.pop(key).close(index_N)()

    def whole(self, key: int) -> ScoredBatch:
        return self._kept[key].whole()

    def drop(self, key: int) -> None:
        self._kept.pop(key, None)

    def num_kept(self) -> int:
        """Parts whose payload is here."""
        return len(self._found) + len(self._kept)

    def update_weights(self, weights: dict[str, Tensor], policy_version: int) -> None:
        self.engine.update_weights(weights, policy_version)

    def weight_transfer(self, call: str, *request: dict) -> None:
        """One of the calls with which vLLM's sender drives an engine, see opsd.learner.nccl_sender."""
        getattr(self._vllm.llm, call)(*request)

    def expect_weights(self) -> None:
        self._vllm.expect_weights()

    def received_weights(self, policy_version: int) -> None:
        self._vllm.received_weights(policy_version)

    def sleep(self) -> None:
        self._vllm.sleep()

    @property
    def _vllm(self) -> VllmEngine:
        """The engine, where something is asked of it that only vLLM's can do: opsd.preflight refuses the other."""
        assert isinstance(self.engine, VllmEngine), f"expected a vLLM engine, got {type(self.engine).__name__}"
        return self.engine
