"""How the learner's weights reach the rollout engines."""

from __future__ import annotations

from collections.abc import Callable

from opsd.engine_config import RolloutConfig
from opsd.learner.group import LearnerGroup
from opsd.rollout.pool import RolloutPool


def weight_sync(cfg: RolloutConfig, learner: LearnerGroup, rollout_pool: RolloutPool) -> Callable[[int], None]:
    """Connects the two. What comes back, called with a policy version, puts the newest weights into every engine."""

    def through_object_store(policy_version: int) -> None:
        rollout_pool.update_weights(learner.weights(cfg.dtype), policy_version=policy_version)

    def through_nccl(policy_version: int) -> None:
        learner.send_weights()
        rollout_pool.received_weights(policy_version)

    if cfg.weight_transfer == "object_store":
        return through_object_store
    learner.connect_engines(rollout_pool.engines.workers, cfg.tensor_parallel_size, cfg.dtype)
    return through_nccl
