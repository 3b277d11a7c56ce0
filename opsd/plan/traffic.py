"""What a step moves between the stages, at most: every answer as long as it may be."""

from __future__ import annotations

from dataclasses import dataclass

from opsd.config.engine import scores_candidates
from opsd.config.run import RunConfig
from opsd.plan.models import BYTES, ModelSizes
from opsd.teacher.sources import section_of, teachers_by_source

TOLD_BYTES = 40  # statistics of a token, at most


def candidates_scored(cfg: RunConfig) -> dict[str, bool]:
    """By the teacher's section, whether it scores the student's candidates; of a server, which alone knows, whether it
    will be asked to. Raises ConfigError where one is told to and cannot."""
    teachers = teachers_by_source(cfg.teacher).items()
    return {section_of(source): scores_candidates(teacher) for source, teacher in teachers}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Counts and bytes of one training step."""

    rollouts: int
    rollouts_an_engine: int  # of a step or of an evaluation, whichever is more
    longest_sequence: int  # prompt and response tokens
    response_tokens: int
    trunk_tokens: int  # prompt and response tokens that the teacher scores and the learner may run
    rollout_bytes: int  # ids, candidates and their log-probabilities: from the rollout engines
    score_bytes: int  # that the teacher makes
    batch_bytes: int  # micro-batches of the learner, every token kept
    told_bytes: int  # to the driver: ids, their log-probabilities and statistics
    weight_bytes: int  # into each rollout engine


def step_traffic(cfg: RunConfig, student: ModelSizes, teacher: ModelSizes | None) -> Traffic:
    """The bytes of arrays as opsd.types has them: int32 ids, float32 log-probabilities, int64 supports.

    `teacher`: None where it is a server's, whose hidden states are taken to be as wide as the student's.
    """
    rollouts = cfg.data.prompts_per_step * cfg.data.samples_per_prompt
    at_once = max(rollouts, cfg.eval.num_kl_prompts, cfg.eval.num_problems if cfg.data.grader != "none" else 0)
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    tokens = rollouts * cfg.rollout.max_response_tokens
    num_candidates, top_k = cfg.rollout.num_candidates, cfg.teacher.top_k
    all_scored = all(candidates_scored(cfg).values())
    scored = 4 * num_candidates * all_scored
    support = cfg.loss.support if cfg.loss.support != "auto" else "union" if all_scored else "teacher"
    hidden = 0
    if cfg.loss.payload == "hidden":
        support, hidden = "sampled", BYTES[cfg.teacher.dtype] * (teacher or student).hidden_size
    beside = {"sampled": 0, "teacher": top_k, "student": num_candidates, "union": top_k + num_candidates}
    num_named = 1 + beside[support]
    return Traffic(
        rollouts=rollouts,
        rollouts_an_engine=-(-at_once // cfg.rollout.num_workers),
        longest_sequence=longest,
        response_tokens=tokens,
        trunk_tokens=rollouts * longest,
        rollout_bytes=tokens * (4 + 4 + 8 * num_candidates),
        score_bytes=tokens * (8 + 8 * top_k + scored + hidden),
        batch_bytes=rollouts * longest * 16 + tokens * (8 * num_named + 4 * (num_named + 1) + 20 + hidden),
        told_bytes=tokens * (8 + TOLD_BYTES),
        weight_bytes=BYTES[cfg.rollout.dtype] * student.num_parameters,
    )
