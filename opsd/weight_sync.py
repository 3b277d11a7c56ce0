"""How the learner's weights reach the rollout engines."""

from __future__ import annotations

from collections.abc import Callable

from opsd.config import RunConfig
from opsd.engine_config import RolloutConfig
from opsd.learner.group import LearnerGroup
from opsd.rollout.pool import RolloutPool


def weight_transfer(cfg: RunConfig, device: str) -> str:
    """object_store | nccl | ipc: rollout.weight_transfer with auto decided, for a run on `device` (cpu or cuda)."""
    if cfg.rollout.weight_transfer != "auto":
        return cfg.rollout.weight_transfer
    if device == "cpu" or cfg.rollout.backend != "vllm":
        return "object_store"
    if cfg.placement.mode == "separate":
        return "nccl"
    # Each engine takes the weights from the rank that has the same GPU.
    return "ipc" if cfg.rollout.num_workers <= cfg.learner.num_workers else "object_store"


def weight_sync(cfg: RolloutConfig, learner: LearnerGroup, rollout_pool: RolloutPool) -> Callable[[int], None]:
    """Connects the two. What comes back, called with a policy version, puts the newest weights into every engine.

    `cfg.weight_transfer` is decided, see `weight_transfer`. Over nccl and ipc: not run on a GPU.
    """

    def through_object_store(policy_version: int) -> None:
        rollout_pool.update_weights(learner.weights(cfg.dtype), policy_version=policy_version)

    def directly(policy_version: int) -> None:
        rollout_pool.expect_weights()  # engines that share the learner's GPU make room for weights, not yet for a cache
        learner.send_weights()
        rollout_pool.received_weights(policy_version)

    if cfg.weight_transfer == "object_store":
        return through_object_store
    learner.connect_engines(
        rollout_pool.engines.workers, cfg.tensor_parallel_size, cfg.dtype, backend=cfg.weight_transfer
    )
    return directly
