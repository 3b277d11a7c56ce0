"""How the learner's weights reach the rollout engines, and whether they compute the same with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from opsd.batch import held_here
from opsd.config.backends import ENGINES
from opsd.config.engine import RolloutConfig
from opsd.config.run import RunConfig
from opsd.engines.events import has_foreign_ids
from opsd.errors import ConfigError
from opsd.learner.group import LearnerGroup
from opsd.rollout import RolloutPool
from opsd.types import Prompt, Rollout, ScoredRollout, TeacherScores, Vocabulary

# Prompt and answer together are shorter than a block of vLLM's cache (16 tokens), of which only full ones are kept.
NUM_PROMPT_TOKENS, NUM_ANSWER_TOKENS = 4, 8
# Mean over the tokens, in nats. Rounding is far below; a scale, a soft cap or a bias that one of the two leaves out is
# far above. In bfloat16 a single logit of 20 is off by up to 0.06.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
OTHER_NUMBERS = {"quantization", "kv_cache_dtype"}  # engine_args by which the engines are to compute another model


def weight_transfer(cfg: RunConfig, device: str, *, renamed: bool) -> str:
    """object_store | nccl | ipc: rollout.weight_transfer with auto decided, for a run on `device` (cpu or cuda).

    `renamed`: the student's files have other names than the model in memory (see `opsd.models.weights.names_differ`).
    Only the object store carries all weights at once, which it takes to name them as vLLM knows them, merges an
    adapter, and lets an engine take them when it likes (schedule.partial_rollouts).
    """
    if cfg.rollout.weight_transfer != "auto":
        return cfg.rollout.weight_transfer
    direct = "nccl" if cfg.placement.mode == "separate" else "ipc"
    merges = cfg.student.lora.rank > 0
    whole = renamed or merges or cfg.schedule.partial_rollouts
    if device == "cpu" or direct not in cfg.rollout.can.weight_transfers or whole:
        return "object_store"
    # Over ipc each engine takes the weights from the rank that has the same GPU.
    if direct == "ipc" and cfg.rollout.num_workers > cfg.learner.num_workers:
        return "object_store"
    return direct


def weight_sync(
    cfg: RolloutConfig, learner: LearnerGroup, rollout_pool: RolloutPool, *, max_restarts: int = 0
) -> Callable[[int], None]:
    """Connects the two. What comes back, called with a policy version, puts the newest weights into every engine.

    `cfg.weight_transfer` is decided, see `weight_transfer`. Over nccl and ipc: not run on a GPU. An engine that is lost
    is started again, `max_restarts` times at most, where the learner has the weights that it needs: not with
    schedule.max_staleness, as the learner has newer ones, nor over nccl and ipc, whose group has lost a member.
    """

    def through_object_store(policy_version: int) -> None:
        rollout_pool.update_weights(learner.weights(cfg.dtype), policy_version=policy_version)

    def directly(policy_version: int) -> None:
        rollout_pool.expect_weights()  # engines that share the learner's GPU make room for weights, not yet for a cache
        learner.send_weights()
        rollout_pool.received_weights(policy_version)

    if cfg.weight_transfer == "object_store":
        if not rollout_pool.max_staleness:
            rollout_pool.engines.actors.restart_lost(max_restarts, partial(learner.weights, cfg.dtype))
        return through_object_store
    learner.connect_engines(
        rollout_pool.engines.workers, cfg.tensor_parallel_size, cfg.dtype, backend=cfg.weight_transfer
    )
    return directly


def check_agreement(
    cfg: RunConfig,
    learner: LearnerGroup,
    rollout_pool: RolloutPool,
    prompt: Prompt,
    vocabulary: Vocabulary,
    sleep_engines: Callable[[], None],
) -> None:
    """Raises ConfigError where the rollout engines, on the learner's weights, compute another model than it does.

    A short answer of every engine to the beginning of `prompt`, and the learner's log-probabilities of it; nothing of
    it remains. Not asked of engines that are to compute in other numbers. `sleep_engines`: called between the two,
    where they share their GPUs.
    """
    if not OTHER_NUMBERS.isdisjoint(cfg.rollout.engine_args):
        return
    short = replace(prompt, token_ids=prompt.token_ids[:NUM_PROMPT_TOKENS], teacher_token_ids=None, response_ids=None)
    answers = rollout_pool.short_answers(short, min(NUM_ANSWER_TOKENS, cfg.rollout.max_response_tokens))
    sleep_engines()
    known = [answer for answer in answers if not has_foreign_ids(answer.response_ids, vocabulary)]
    if not known:
        return
    theirs_T = np.concatenate([answer.sampled_logprobs for answer in known])
    unscored = held_here([_unscored(answer, vocabulary) for answer in known], vocabulary)
    own_T = learner.token_stats(unscored).student_logprob_T
    assert own_T is not None, "the learner fills it"
    difference = float(np.abs(theirs_T - own_T.numpy()).mean())
    dtype = "bfloat16" if "bfloat16" in (cfg.rollout.dtype, cfg.student.dtype) else "float32"
    if not difference <= TOLERANCE[dtype]:
        raise ConfigError(
            f"student.path={cfg.student.path}: the rollout engines (rollout.backend={cfg.rollout.backend}) do not "
            f"compute it as the learner does: on the same weights their log-probabilities of the same answer differ by "
            f"{difference:.3g} nats on average, at most {TOLERANCE[dtype]:g} is rounding: set rollout.backend="
            f"{' or '.join(name for name in ENGINES if name != cfg.rollout.backend)}, or take another student"
        )


def _unscored(rollout: Rollout, vocabulary: Vocabulary) -> ScoredRollout:
    """With a teacher that names the sampled token and nothing else: only the student's side of it is asked for."""
    stops = np.isin(rollout.response_ids, vocabulary.stop_ids)
    events_T = np.where(stops, vocabulary.stop_event, rollout.response_ids).astype(np.int32)
    scores = TeacherScores(
        top_ids=events_T[:, None],
        top_logprobs=rollout.sampled_logprobs[:, None],
        sampled_logprobs=rollout.sampled_logprobs,
        candidate_logprobs=rollout.candidate_logprobs,
    )
    return ScoredRollout(rollout=rollout, scores=scores)
