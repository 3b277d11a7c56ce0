"""The figures of an evaluation as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PART = "part/"  # a figure that begins so is of what a score is made of


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def accuracy_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """`figures`: model -> data source -> figure; one line a model and source. Parts of a score are left out."""
    every = [of_source for by_source in figures.values() for of_source in by_source.values()]
    names = [name for name in dict.fromkeys(name for one in every for name in one) if not name.startswith(PART)]
    rows = [
        [model, source, *(_figure(name, of_source.get(name)) for name in names)]
        for model, by_source in figures.items()
        for source, of_source in by_source.items()
    ]
    return markdown_table(["model", "data", *(name.replace("_", " ") for name in names)], rows)


def parts_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """What scores are made of: a line per part, a column per model and data source that has such; "": none has."""
    columns = {
        f"{model}, {source}": {name.removeprefix(PART): of[name] for name in of if name.startswith(PART)}
        for model, by_source in figures.items()
        for source, of in by_source.items()
    }
    columns = {name: parts for name, parts in columns.items() if parts}
    names = dict.fromkeys(name for parts in columns.values() for name in parts)
    rows = [[name, *(_optional(parts.get(name), "{:.3f}") for parts in columns.values())] for name in names]
    return markdown_table(["part of the score", *columns], rows) if rows else ""


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
