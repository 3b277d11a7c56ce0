"""What a run writes down while it trains: seconds of each phase, metrics.jsonl, wandb and the progress line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from opsd.monitor.jsonl import append_jsonl, read_jsonl, truncate_jsonl
from opsd.monitor.wandb import WandbRun
from opsd.monitor.warned import Warned

if TYPE_CHECKING:  # it loads Ray, which a report does without
    from opsd.monitor.ray import RayMetrics

PHASES = ("rollout", "score", "select", "learn", "sync", "evaluate")


class PhaseTimer:
    """Wall seconds of the loop by phase. Phases must not nest: their sum is part of the loop's wall time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._active: str | None = None
        self._total_s = dict.fromkeys(PHASES, 0.0)
        self._taken_s = dict.fromkeys(PHASES, 0.0)

    def start(self) -> None:
        """The loop begins now."""
        self._started = self._clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to `name`, also where the block raises."""
        assert name in PHASES, f"phase must be one of {PHASES}, got {name!r}"
        assert self._active is None, f"phase {name} inside phase {self._active}"
        self._active, began = name, self._clock()
        try:
            yield
        finally:
            self._total_s[name] += self._clock() - began
            self._active = None

    def take(self) -> dict[str, float]:
        """Seconds of each of the six phases since the last take."""
        taken = {name: self._total_s[name] - self._taken_s[name] for name in PHASES}
        self._taken_s = dict(self._total_s)
        return taken

    def totals(self) -> dict[str, float]:
        """Seconds of each phase since start(), and "other": the loop's wall time outside all of them."""
        assert self._started is not None, "totals() before start()"
        wall_s = self._clock() - self._started
        return {**self._total_s, "other": wall_s - sum(self._total_s.values())}


class MetricsLog:
    """Each step's numbers go to output_dir/metrics.jsonl, and the same record to Ray and, unless it is off, to wandb.

    The rollouts of the token view go to output_dir/tokens.jsonl and to wandb. What cannot be written is a warning.
    """

    def __init__(
        self,
        output_dir: Path,
        wandb_mode: str,
        project: str,
        run_name: str,
        config_dict: dict[str, Any],
        ray_metrics: RayMetrics | None = None,
        warned: Warned | None = None,
    ) -> None:
        """`wandb_mode`: "auto" (online where WANDB_API_KEY is set, else offline) or "off" (wandb is not imported)."""
        self.path = Path(output_dir) / "metrics.jsonl"
        self.tokens_path = Path(output_dir) / "tokens.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._optional = (warned or Warned()).optional
        self._ray_metrics = ray_metrics
        self._wandb = None
        if wandb_mode != "off":
            with self._optional("wandb"):
                self._wandb = WandbRun(self.path.parent, project, run_name, config_dict)

    def log(self, step: int, values: dict[str, float | None]) -> None:
        record = {"step": step, **values}
        with self._optional(self.path.name):
            append_jsonl(self.path, record)
        if self._ray_metrics:
            with self._optional("Ray's metrics"):
                self._ray_metrics.log(record)
        if self._wandb:
            with self._optional("wandb"):
                self._wandb.log(record)

    def evaluation_at(self, step: int) -> dict[str, float | None] | None:
        """What the file has of an evaluation after `step` steps; None: nothing."""
        lines = [line for line in read_jsonl(self.path) if line["step"] == step] if self.path.exists() else []
        figures = [{name: line[name] for name in line if name.startswith("eval/")} for line in lines]
        newest = next(filter(None, reversed(figures)), None)
        return newest and {name.removeprefix("eval/"): value for name, value in newest.items()}

    def log_tokens(self, rows: list[dict[str, Any]]) -> None:
        """The token view's rollouts of one step; there may be none."""
        with self._optional(self.tokens_path.name):
            for row in rows:
                append_jsonl(self.tokens_path, row)
        if self._wandb and rows:
            with self._optional("wandb"):
                self._wandb.log_tokens(rows)

    def truncate_after(self, step: int) -> list[Path]:
        """Takes the lines after `step` out of the files: a run that resumes there writes them again.

        Returns the files that keep them.
        """
        copies = (truncate_jsonl(path, step) for path in (self.path, self.tokens_path))
        return [copy for copy in copies if copy is not None]

    def log_report(self, path: Path) -> None:
        """Shows report.html, a file of output_dir, on wandb."""
        if self._wandb:
            with self._optional("wandb"):
                self._wandb.log_report(path)

    def close(self) -> None:
        if self._ray_metrics:
            self._ray_metrics.close()
        if self._wandb:
            with self._optional("wandb"):
                self._wandb.finish()


class ProgressBar:
    """A tqdm bar on a terminal; elsewhere (a log file, Slurm) a plain line every tenth of the run or 30 s."""

    def __init__(self, total: int, initial: int, stream: TextIO, clock: Callable[[], float]) -> None:
        self._total, self._done, self._stream, self._clock = total, initial, stream, clock
        self._accuracy: float | None = None
        self._printed_step, self._printed_at = initial, clock()
        layout = "{n_fmt}/{total_fmt} |{bar:24}| {elapsed}<{remaining}{postfix}"
        self._bar = (
            tqdm(total=total, initial=initial, file=stream, bar_format=layout, dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def set_accuracy(self, accuracy: float | None) -> None:
        """The last evaluation's accuracy, shown from the next step on."""
        self._accuracy = accuracy

    def update(self, values: dict[str, float | None]) -> None:
        """One step is done; `values` as they go to metrics.jsonl."""
        self._done += 1
        summary = progress_summary(values, self._accuracy)
        if self._bar is not None:
            self._bar.set_postfix_str(summary, refresh=False)
            self._bar.update()
            return
        due = self._done - self._printed_step >= self._total / 10 or self._clock() - self._printed_at >= 30
        if due or self._done == self._total:
            print(f"step {self._done}/{self._total}  {summary}", file=self._stream, flush=True)
            self._printed_step, self._printed_at = self._done, self._clock()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_bar(total: int, initial: int) -> ProgressBar:
    """The progress of a run of `total` steps of which `initial` are done, on stderr."""
    return ProgressBar(total, initial, sys.stderr, time.monotonic)


def progress_summary(values: dict[str, float | None], accuracy: float | None) -> str:
    """For example: loss 0.0821  kept 50%  1,240 tok/s  rollout 2.1s score 0.8s learn 1.9s  acc 71.5%"""
    shown = {
        "loss {:.4f}": values.get("loss"),
        "kept {:.0%}": values.get("kept_ratio"),
        "{:,.0f} tok/s": values.get("tokens_per_s"),
        **{f"{name} {{:.1f}}s": values.get(f"phase_s/{name}") for name in ("rollout", "score", "learn")},
        "acc {:.1%}": accuracy,
    }
    return "  ".join(text.format(value) for text, value in shown.items() if value is not None)
