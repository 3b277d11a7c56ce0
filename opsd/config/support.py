"""Which tokens have a bucket of their own in the loss: one rule for a run, its plan and a teacher's server."""

from __future__ import annotations

from opsd.config.engine import EngineConfig, TeacherConfig
from opsd.errors import ConfigError


def scores_candidates(config: EngineConfig, device: str) -> bool:
    """Whether an engine with these settings returns log-probabilities at the student's candidates.

    A transformers engine does anywhere. A vLLM teacher does on CUDA, through the V2 model runner, vLLM's default there;
    an engine that finds another one refuses to start. `vllm serve` (openai) does not. Of a server (http) this is what
    the client asks for: the server answers the same question of its own settings and device. Raises ConfigError.
    """
    if not isinstance(config, TeacherConfig):
        return config.backend == "transformers"
    wanted = config.score_candidates
    able = {"transformers": True, "http": True, "openai": False, "vllm": device == "cuda"}[config.backend]
    if wanted and not able:
        raise ConfigError(
            f"{config.section}.score_candidates=true is not possible with {config.section}.backend={config.backend} on "
            f"{device}: a transformers teacher scores them, and a vLLM teacher on a GPU"
        )
    return able if wanted is None else wanted


def decide_support(wanted: str, scored: dict[str, bool]) -> str:
    """teacher | student | union: loss.support with auto decided.

    `scored`: whether candidates are scored, by the teacher's section. Raises ConfigError for a support that lacks them.
    """
    without = [section for section, scores in scored.items() if not scores]
    if wanted == "auto":
        return "teacher" if without else "union"
    if wanted != "teacher" and without:
        raise ConfigError(
            f"loss.support={wanted} needs the teacher's scores at the student's candidates, which {without[0]} does "
            "not give: take a teacher with backend=transformers or on a GPU, in this run or in its server, or set "
            "loss.support=teacher"
        )
    return wanted
