"""The figures of an evaluation as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PART = "part/"  # a figure that begins so is of what a score is made of
TOOLS = "tools/"  # and so, of how tools were used


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def accuracy_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """`figures`: model -> data source -> figure; one line a model and source. Without what other tables show."""
    every = [of_source for by_source in figures.values() for of_source in by_source.values()]
    names = dict.fromkeys(name for one in every for name in one if not name.startswith((PART, TOOLS)))
    rows = [
        [model, source, *(_figure(name, of_source.get(name)) for name in names)]
        for model, by_source in figures.items()
        for source, of_source in by_source.items()
    ]
    return markdown_table(["model", "data", *(name.replace("_", " ") for name in names)], rows)


def parts_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """What scores are made of; "": no model has such."""
    return _table_of(PART, "part of the score", figures)


def tools_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """How tools were used; "": there were none."""
    return _table_of(TOOLS, "tools", figures)


def _table_of(prefix: str, title: str, figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line per figure that begins so, a column per model and data source that has such."""
    columns = {
        f"{model}, {source}": {name.removeprefix(prefix): of[name] for name in of if name.startswith(prefix)}
        for model, by_source in figures.items()
        for source, of in by_source.items()
    }
    columns = {name: parts for name, parts in columns.items() if parts}
    names = dict.fromkeys(name for parts in columns.values() for name in parts)
    rows = [[name, *(_number(parts.get(name)) for parts in columns.values())] for name in names]
    return markdown_table([title, *columns], rows) if rows else ""


def _number(value: float | None) -> str:
    """Counts are whole numbers."""
    return _optional(value, "{:,}" if isinstance(value, int) else "{:.3f}")


def deployment_table(models: dict[str, dict[str, Any]]) -> str:
    """What it costs to run each model: size, latency and throughput."""
    header = [
        "model", "parameters", "weights on disk", "s/answer alone", "tokens/s alone", "tokens/s together", "s in all",
    ]  # fmt: skip
    rows = [
        [
            name,
            f"{model['parameters'] / 1e6:,.1f} M",
            f"{model['weight_bytes'] / 2**20:,.1f} MiB",
            _optional(model["speed"]["answer_s"], "{:.2f}"),
            _optional(model["speed"]["answer_tokens_per_s"], "{:,.1f}"),
            f"{model['speed']['tokens_per_s']:,.1f}",
            f"{model['speed']['total_s']:,.1f}",
        ]
        for name, model in models.items()
    ]
    return markdown_table(header, rows)


def _figure(name: str, value: float | None) -> str:
    return _optional(value, {"problems": "{:.0f}", "mean_tokens": "{:.1f}"}.get(name, "{:.3f}"))


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
