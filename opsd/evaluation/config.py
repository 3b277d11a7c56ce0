"""Every setting of `python -m opsd.evaluate`, with its default."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from opsd.config.checks import at_least, check_values, one_of, share_above_0
from opsd.config.engine import EngineConfig
from opsd.config.run import PromptConfig
from opsd.config.tools import ToolsConfig
from opsd.errors import ConfigError


@dataclass
class EvaluationData(PromptConfig):
    paths: list[str] = MISSING  # JSONL or parquet files; a row's data_source, else its file's name, is its group
    num_problems: int = 0  # the first N of each file; 0: all
    grader: str = "math"  # as in a training

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.num_problems", self.num_problems, 0)


@dataclass
class EvaluateConfig:
    output_dir: str = MISSING  # folder for summary.json and every model's answers
    models: dict[str, str] = field(default_factory=dict)  # name -> folder of a model, or of a run: then its student
    run: str = ""  # a run's folder: adds its teacher, its student before and its student after by these names
    samples_per_problem: int = 4  # k
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # answers are drawn from the likeliest tokens that have this probability together
    top_k: int = 0  # 0: every token
    max_response_tokens: int = 512  # a longer answer is cut, and counted as truncated; with tools: of all turns
    latency_problems: int = 8  # problems answered one at a time to measure the latency; 0: it is not measured
    seed: int = 0  # of the answers
    device: str = "auto"  # auto | cpu | cuda
    trust_remote_code: bool = False  # run Python code that lies in the models' folders
    dashboard: bool = True  # Ray dashboard
    overwrite: bool = False  # replace an earlier evaluation in output_dir
    plan_only: bool = False  # print what would be done and load nothing
    data: EvaluationData = field(default_factory=EvaluationData)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)

    def __post_init__(self) -> None:
        check_values(self)
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        share_above_0("top_p", self.top_p)
        for name, low in (
            ("samples_per_problem", 1), ("temperature", 0), ("top_k", 0), ("max_response_tokens", 1),
            ("latency_problems", 0), ("seed", 0),
        ):  # fmt: skip
            at_least(name, getattr(self, name), low)
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise ConfigError(
                f"temperature=0 gives one answer {self.samples_per_problem} times: set samples_per_problem=1"
            )
        if not self.models and not self.run:
            raise ConfigError("there is nothing to evaluate: set +models.NAME=FOLDER, once a model, or run=FOLDER")
        for name in self.models:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(f"models: a name is letters, digits, '.', '_' and '-', got {name!r}")
