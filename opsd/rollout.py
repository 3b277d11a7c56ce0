"""The student's answers: engines that always run on the newest weights."""

from __future__ import annotations

from collections.abc import Iterator

from ray import ObjectRef

from opsd.agents.toolbox import AgentSpec
from opsd.agents.trajectories import trajectories_of
from opsd.cluster.placement import Placement
from opsd.config.engine import EngineSpec, RolloutConfig
from opsd.engines.groups import in_order
from opsd.engines.pool import EnginePool, occurrences, request_seed, sample_seed
from opsd.engines.sampling import Sampling
from opsd.errors import StageError
from opsd.types import Prompt, Rollout


class RolloutPool:
    """Samples answers of the current student."""

    def __init__(
        self,
        spec: EngineSpec[RolloutConfig],
        *,
        seed: int,
        placement: Placement | None = None,
        max_staleness: int = 0,
        agents: AgentSpec | None = None,
    ) -> None:
        """`spec.path` is the student's folder; the engines answer once they have had weights.

        `max_staleness`: of the answers that are asked for, in steps. Above 0 the engines take new weights without being
        waited for. `agents`: answers are trajectories, with tools' answers between the student's turns.
        """
        self.wrap = trajectories_of(agents)
        self.cfg = spec.config
        self.seed = seed
        self.max_staleness = max_staleness
        self.policy_version = 0  # of `spec.path`, until the first weight sync; of what is asked for from now on
        self.engines = EnginePool("rollout", spec, placement)

    def wait_ready(self) -> None:
        self.engines.wait_ready()

    def sleep(self) -> None:
        """The GPUs are the learner's until the next call; see placement.mode=colocated."""
        self.engines.sleep()

    @property
    def busy_s(self) -> dict[str, list[float]]:
        """By role: seconds that each engine was at work, as far as it has told."""
        return {self.engines.role: self.engines.busy_s}

    @property
    def num_restarts(self) -> int:
        """Engines that were lost and are there again."""
        return self.engines.actors.num_restarts

    def close(self) -> None:
        """Ends the engines, whatever they are at."""
        self.engines.close()

    def sample(self, prompts: list[Prompt], *, samples_per_prompt: int, step: int) -> Iterator[dict[int, Rollout]]:
        """`samples_per_prompt` answers per prompt, in groups as they finish. `step` seeds them (-1: evaluation).

        The key is the rollout's place: prompts in the order given, a prompt's answers side by side. A prompt that is
        there several times gets other answers each time, numbered on. The engines begin at this call. The candidates
        are not in this process, see opsd.engines.candidates. Raises StageError where the engines' weights are not those
        that this step trains, or are more than `max_staleness` steps older.
        """
        if step >= 0 and not 0 <= step - self.policy_version <= self.max_staleness:
            raise StageError(
                f"rollout: step {step + 1} trains the weights of policy version {step}, and the engines hold "
                f"version {self.policy_version}: their answers would be another policy's"
            )
        requests = [
            (prompt, number * samples_per_prompt + sample, sample_seed(self.seed, step, prompt, sample, number))
            for prompt, number in zip(prompts, occurrences(prompts), strict=True)
            for sample in range(samples_per_prompt)
        ]
        sampling = Sampling(
            temperature=self.cfg.temperature,
            top_p=self.cfg.top_p,
            max_tokens=self.cfg.max_response_tokens,
            num_candidates=self.cfg.num_candidates,
        )
        return self.engines.generate(
            requests, sampling, self.policy_version, self.cfg.group_size, apart=True, wrap=self.wrap
        )

    def short_answers(self, prompt: Prompt, max_tokens: int) -> list[Rollout]:
        """One of every engine, each of other tokens, without tools."""
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
        requests = [(prompt, sample, request_seed(self.seed, sample)) for sample in range(self.cfg.num_workers)]
        return in_order(self.engines.generate(requests, sampling, self.policy_version))

    def greedy(self, prompts: list[Prompt]) -> list[Rollout]:
        sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=self.cfg.max_response_tokens, num_candidates=1)
        requests = [(prompt, 0, 0) for prompt in prompts]
        return in_order(self.engines.generate(requests, sampling, self.policy_version, wrap=self.wrap))

    def update_weights(self, weights: ObjectRef, *, policy_version: int) -> None:
        """New weights (a reference to a state dict) into every running engine, after what it was asked for before, or,
        where it takes them in mid-answer, after its next step."""
        self.engines.update_weights(weights, policy_version, pending=self.max_staleness)
        self.policy_version = policy_version

    def expect_weights(self) -> None:
        """The learner is about to send weights without this pool; `received_weights` follows."""
        self.engines.expect_weights()

    def received_weights(self, policy_version: int) -> None:
        """The engines have taken weights from the learner without this pool."""
        self.engines.received_weights(policy_version)
        self.policy_version = policy_version
