"""What an evaluation would need, before anything is loaded; a model that opsd/conf/model keeps needs no folder."""

from __future__ import annotations

from opsd.data.grading import check_grader
from opsd.data.rows import count_rows
from opsd.errors import ConfigError
from opsd.evaluation.config import EvaluateConfig
from opsd.evaluation.models import named_paths
from opsd.evaluation.table import markdown_table
from opsd.models.tensor_parallel import check_tensor_parallel
from opsd.plan.models import BYTES, ModelSizes, read_model

HEADER = [
    "model", "folder", "parameters", "weights, GiB", "KV cache of one full answer, MiB", "problems", "answers",
    "tokens at most",
]  # fmt: skip


def plan(cfg: EvaluateConfig) -> str:
    """A table, one line a model. Without data the problems are not counted. Raises ConfigError or DataError."""
    check_grader(cfg.data.grader)
    counts = [count_rows(path) for path in cfg.data.paths]
    num_problems = sum(min(count, cfg.data.num_problems or count) for count in counts)
    rows = []
    for name, path in named_paths(cfg).items():
        sizes = read_model(f"models.{name}", path, trust_remote_code=cfg.trust_remote_code)
        if sizes.max_position_embeddings <= cfg.max_response_tokens:
            raise ConfigError(
                f"max_response_tokens={cfg.max_response_tokens} leaves no room for a prompt in models.{name}'s context "
                f"of {sizes.max_position_embeddings} tokens"
            )
        heads = (sizes.num_attention_heads, sizes.num_key_value_heads)
        check_tensor_parallel("engine", cfg.engine.tensor_parallel_size, path, *heads)
        rows.append([name, path, *_needs(sizes, cfg), *_work(num_problems, cfg)])
    return markdown_table(HEADER, rows)


def _needs(sizes: ModelSizes, cfg: EvaluateConfig) -> list[str]:
    tokens = min(sizes.max_position_embeddings, cfg.data.max_prompt_tokens + cfg.max_response_tokens)
    dtype = cfg.engine.dtype
    return [
        f"{sizes.num_parameters / 1e6:,.1f} M",
        f"{sizes.num_parameters * BYTES[dtype] / 2**30:,.2f}",
        f"{sizes.cache_bytes_a_token(dtype) * tokens / 2**20:,.1f}",
    ]


def _work(num_problems: int, cfg: EvaluateConfig) -> list[str]:
    if num_problems == 0:
        return ["–"] * 3
    answers = num_problems * cfg.samples_per_problem
    return [f"{number:,}" for number in (num_problems, answers, answers * cfg.max_response_tokens)]
