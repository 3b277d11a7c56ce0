"""The curves of a run, each by one drawing function, rendered as a PNG and as an SVG that takes the page's colours."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opsd.monitor.log import PHASES
from opsd.report.read import RunData, series

# Okabe and Ito's palette, told apart with any colour vision. In an SVG each value becomes the CSS variable of its name.
COLOURS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "vermillion": "#d55e00",
    "sky": "#56b4e9",
    "purple": "#cc79a7",
    "yellow": "#f0e442",
    "grey": "#a3adb8",
    "ink": "#1f2933",
    "muted": "#667784",
    "grid": "#e3e7ec",
}
QUADRANT_COLOURS = {1: "orange", 2: "sky", 3: "purple", 4: "grey"}
PHASE_COLOURS = dict(zip(PHASES, ("blue", "orange", "purple", "green", "yellow", "vermillion"), strict=True))
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 22,
    "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}
MAX_BARS = 60
SMOOTHING = 25  # a curve's running mean spans this part of the run


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    note: str  # how to read it, under the chart
    draw: Callable[[Axes, RunData], None]
    wide: bool = False


def write_png(chart: Chart, run: RunData, path: Path) -> None:
    with rc_context(STYLE):
        figure = _figure(chart, run)
        figure.axes[0].set_title(chart.title)
        figure.savefig(path, dpi=160, facecolor="white")


def render_svg(chart: Chart, run: RunData, name: str) -> str:
    """An inline <svg> whose colours are CSS variables; `name` keeps its ids apart from those of other charts."""
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        _figure(chart, run).savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    opening = rf'<svg class="chart" role="img" aria-label="{chart.title}" \1>'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', opening, svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg


def _figure(chart: Chart, run: RunData) -> Figure:
    figure = Figure(figsize=(6.4, 3.0) if chart.wide else (4.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    chart.draw(axes, run)
    if not axes.has_data():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", color=COLOURS["muted"])
        return figure
    first, last = axes.get_xlim()
    if last - first < 2:  # a run of one step
        axes.set_xlim((first + last) / 2 - 1, (first + last) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("step", color=COLOURS["muted"])
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(labels), borderpad=0,
            borderaxespad=0.3, handlelength=1.3, columnspacing=1.2, handletextpad=0.5, labelcolor=COLOURS["muted"],
        )  # fmt: skip
    return figure


def _curve(axes: Axes, run: RunData, metric: str, colour: str, label: str | None = None) -> None:
    """A training metric: every step faintly, its running mean on top."""
    steps, values = series(run.train, metric)
    window = max(1, len(steps) // SMOOTHING)
    if window > 1:
        axes.plot(steps, values, color=COLOURS[colour], alpha=0.25, linewidth=0.8)
    axes.plot(steps, _running_mean(values, window), color=COLOURS[colour], label=label, marker=_marker(steps))


def _points(axes: Axes, run: RunData, metric: str, colour: str, label: str | None = None) -> None:
    """A metric of the evaluations: few and exact, so each has its mark."""
    steps, values = series(run.evals, metric)
    if steps:
        axes.plot(steps, values, color=COLOURS[colour], label=label, marker="o", markersize=4)


def _stack(axes: Axes, run: RunData, columns: dict[str, tuple[str, str]]) -> None:
    """Stacked bars of training metrics, {metric: (label, colour)}; neighbouring steps share a bar in a long run."""
    width = math.ceil(len(run.train) / MAX_BARS)
    groups = [run.train[start : start + width] for start in range(0, len(run.train), width)] if run.train else []
    left = [group[0]["step"] - 0.5 for group in groups]
    bottom = [0.0] * len(groups)
    for metric, (label, colour) in columns.items():
        heights = [sum(series(group, metric)[1]) / len(group) for group in groups]
        if any(heights):
            fill = COLOURS[colour]
            axes.bar(left, heights, width, bottom, align="edge", color=fill, edgecolor=fill, linewidth=0.4, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (of fewer at the beginning)."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _marker(steps: list[int]) -> str | None:
    """A line of one or two points cannot be seen without marks."""
    return "o" if len(steps) < 3 else None


def _as_percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))


def _from_zero(axes: Axes) -> None:
    if axes.has_data():
        axes.set_ylim(bottom=0)


def draw_accuracy(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "accuracy_train", "grey", "training prompts")
    _points(axes, run, "eval/accuracy", "blue", "held-out problems")
    teacher = run.summary.get("teacher_accuracy")
    if teacher is not None and axes.has_data():
        axes.axhline(teacher, color=COLOURS["vermillion"], linestyle=(0, (4, 3)), linewidth=1.4, label="teacher")
    _as_percent(axes)
    _from_zero(axes)


def draw_kl(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "reverse_kl", "grey", "training answers, all tokens")
    _points(axes, run, "eval/reverse_kl", "blue", "held-out prompts")
    _from_zero(axes)


def draw_loss(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "loss", "blue")
    _from_zero(axes)


def draw_kept(axes: Axes, run: RunData) -> None:
    for quadrant, colour in QUADRANT_COLOURS.items():
        _curve(axes, run, f"kept_quadrant_{quadrant}", colour, f"Q{quadrant}")
    steps, values = series(run.train, "kept_ratio")
    if steps:
        axes.plot(steps, values, color=COLOURS["ink"], linestyle=(0, (2, 2)), linewidth=1.2, label="all")
        axes.set_ylim(-0.02, 1.04)
    _as_percent(axes)


def draw_quadrants(axes: Axes, run: RunData) -> None:
    _stack(axes, run, {f"quadrant_{q}": (f"Q{q}", colour) for q, colour in QUADRANT_COLOURS.items()})
    _as_percent(axes)


def draw_named_mass(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "named_mass", "blue")
    if axes.has_data():
        axes.set_ylim(-0.02, 1.04)
    _as_percent(axes)


def draw_length(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "response_length", "grey", "training")
    _points(axes, run, "eval/response_length", "blue", "held-out")
    _from_zero(axes)


def draw_truncated(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "truncated", "grey", "training")
    _points(axes, run, "eval/truncated", "blue", "held-out")
    _as_percent(axes)
    _from_zero(axes)


def draw_agreement(axes: Axes, run: RunData) -> None:
    _points(axes, run, "eval/top1_agreement", "blue")
    _as_percent(axes)


def draw_entropy(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "entropy", "blue")
    _from_zero(axes)


def draw_grad_norm(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "grad_norm", "blue")
    _from_zero(axes)


def draw_staleness(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "staleness_max", "grey", "largest")
    _curve(axes, run, "staleness", "blue", "mean")
    _from_zero(axes)


def draw_throughput(axes: Axes, run: RunData) -> None:
    _curve(axes, run, "tokens_per_s", "blue")
    _from_zero(axes)


def draw_phases(axes: Axes, run: RunData) -> None:
    _stack(axes, run, {f"phase_s/{name}": (name, colour) for name, colour in PHASE_COLOURS.items()})


def draw_idle(axes: Axes, run: RunData) -> None:
    metrics = sorted({name for line in run.train for name in line if name.startswith("idle_s/")})
    for metric, colour in zip(metrics, itertools.cycle(("blue", "orange", "green", "purple"))):
        _curve(axes, run, metric, colour, metric.removeprefix("idle_s/"))
    _from_zero(axes)


CHARTS = {
    "accuracy": Chart(title="Accuracy", note="Share of right answers.", draw=draw_accuracy, wide=True),
    "kl": Chart(title="Reverse KL to the teacher", note="Nats per token, lower is closer.", draw=draw_kl, wide=True),
    "loss": Chart(title="Loss", note="Weighted mean over the kept tokens, nats.", draw=draw_loss),
    "kept": Chart(title="Kept share by quadrant", note="Part of each quadrant's tokens in the loss.", draw=draw_kept),
    "quadrants": Chart(title="Tokens by quadrant", note="Share of all response tokens.", draw=draw_quadrants),
    "agreement": Chart(title="Top-1 agreement", note="Same first choice as the teacher.", draw=draw_agreement),
    "entropy": Chart(title="Student entropy", note="Mean, as a share of log V.", draw=draw_entropy),
    "named_mass": Chart(
        title="Compared mass", note="Student's mass on the tokens that both models named.", draw=draw_named_mass
    ),
    "length": Chart(title="Answer length", note="Mean response tokens.", draw=draw_length),
    "truncated": Chart(title="Cut answers", note="Share that hit the length limit.", draw=draw_truncated),
    "grad_norm": Chart(title="Gradient norm", note="Before clipping.", draw=draw_grad_norm),
    "staleness": Chart(
        title="Staleness of tokens", note="Steps from the weights that drew them to the learner's.", draw=draw_staleness
    ),
    "throughput": Chart(title="Throughput", note="Tokens a second of each step.", draw=draw_throughput),
    "phases": Chart(title="Seconds per step, by phase", note="Wall seconds.", draw=draw_phases, wide=True),
    "idle": Chart(
        title="Seconds per step, waiting",
        note="In which a role's workers had nothing to do.",
        draw=draw_idle,
        wide=True,
    ),
}
