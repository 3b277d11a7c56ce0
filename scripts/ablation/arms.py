"""What an ablation compares: its arms and its tasks, as settings of tip.train."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

RATIOS = (0.5, 0.2, 0.1)

# Which tokens, at each of RATIOS.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "random": ("selector=random",),
    "prefix": ("selector=prefix",),
    "bottom": ("selector=bottom",),
    "entropy": ("selector=entropy",),
    "entropy_sampled": ("selector=sampled", "selector.score=entropy"),
    "divergence": ("selector=divergence",),
    "q3": ("selector=q3",),
    "soft_or": ("selector=soft_or",),
    "soft_or_quantile": ("selector=soft_or", "selector.scaling=quantile"),
    "teachability": ("selector=teachability",),
    "dial": ("selector=dial",),
    "ier": ("selector=ier",),
    "sampled_rkl": ("selector=sampled_rkl",),
}

# Every token, with another weight, temperature or loss; LATF and AdaKD choose their share themselves.
WHOLE: dict[str, tuple[str, ...]] = {
    "all": ("selector=all",),
    "soft": ("selector=soft",),
    "todi": ("method=todi",),
    "latf": ("method=latf",),
    "idts": ("method=idts",),
    "adakd": ("method=adakd",),
    "akl": ("method=akl",),
    "forward_kl": ("method=forward_kl",),
    "jsd": ("method=jsd",),
    "iw": ("method=iw",),
    "fire": ("method=fire",),
    "sure": ("method=sure",),
}

BASELINE = "all"
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str  # such as soft_or@0.2
    ratio: float | None  # share of the tokens; None: all, or its own choice
    settings: tuple[str, ...]

    @property
    def random(self) -> str | None:
        """The arm of random tokens at the same ratio; None: there is none, or this is it."""
        if self.ratio is None or self.name.startswith(f"{RANDOM}@"):
            return None
        return f"{RANDOM}@{self.ratio:g}"


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in [
        *(Arm(name=name, ratio=None, settings=settings) for name, settings in WHOLE.items()),
        *(
            Arm(name=f"{name}@{ratio:g}", ratio=ratio, settings=(*settings, f"selector.ratio={ratio:g}"))
            for name, settings in SELECTIONS.items()
            for ratio in RATIOS
        ),
    ]
}


@dataclass(frozen=True, kw_only=True)
class Task:
    what: str  # in a few words
    make: tuple[str, ...]  # arguments of scripts/make_pair.py, before the folder
    settings: tuple[str, ...]
    num_steps: int
    eval_every: int


def _settings(max_prompt_tokens: int, max_response_tokens: int) -> tuple[str, ...]:
    return (
        "teacher.top_k=8",
        "data.grader=final_hash",
        f"data.max_prompt_tokens={max_prompt_tokens}",
        "data.prompts_per_step=64",
        f"rollout.max_response_tokens={max_response_tokens}",
        "rollout.num_candidates=8",
        "rollout.max_num_seqs=2048",
        "learner.learning_rate=1e-3",  # at the quick start's 2e-3 a fifth of the tokens at random unlearns
        "learner.warmup_steps=10",
        "learner.micro_batch_tokens=4096",
    )


TASKS: dict[str, Task] = {
    "sums": Task(
        what="Running totals of 3 to 6 one-digit numbers, the quick start's pair",
        make=("sums",),
        settings=_settings(72, 48),
        num_steps=100,
        eval_every=25,
    ),
    "sorting": Task(
        what="Sorting 3 to 5 numbers by insertion (number_sorting of reasoning-gym)",
        make=("sorting",),
        settings=_settings(24, 48),
        num_steps=100,
        eval_every=25,
    ),
    "stories": Task(
        what="Word problems of two to four steps, from templates",
        make=("stories",),
        settings=_settings(72, 48),
        num_steps=100,
        eval_every=25,
    ),
}

# Recipes of a cluster with which `recipes/ablation_gpu.sh` runs the same arms.
CLUSTER: dict[str, str] = {
    "qwen3_8b_to_4b": "Qwen3-8B teaches Qwen3-4B, with the settings of recipes/qwen3_8b_to_4b.sh",
    "qwen2_5_14b_to_1_5b": "Qwen2.5-14B teaches Qwen2.5-1.5B, with the settings of recipes/qwen2_5_14b_to_1_5b.sh",
    "llama3_70b_to_8b": "Llama-3.3-70B teaches Llama-3.1-8B, with the settings of recipes/llama3_70b_to_8b.sh",
}


def chosen_arms(patterns: list[str]) -> list[Arm]:
    """Those that match one of the patterns (`*@0.2`), in the order of ARMS; no pattern: all. Raises ValueError."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ARMS):
            raise ValueError(f"--arms {pattern}: there is no such arm; there are {', '.join(ARMS)}")
    chosen = patterns or ["*"]
    return [arm for arm in ARMS.values() if any(fnmatchcase(arm.name, pattern) for pattern in chosen)]
