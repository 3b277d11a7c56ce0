"""What a run writes down while it trains: seconds of each phase, metrics.jsonl, wandb and the progress line."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from opsd.jsonl import append_jsonl, finite_or_null, truncate_jsonl

PHASES = ("rollout", "score", "select", "learn", "sync", "evaluate")
WANDB_INIT_TIMEOUT_S = 30.0
WANDB_FINISH_TIMEOUT_S = 60.0  # an upload that takes longer is left to `wandb sync`

logger = logging.getLogger(__name__)


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
    """Sends each step's numbers to output_dir/metrics.jsonl and, unless it is off, to wandb."""

    def __init__(
        self, output_dir: Path, wandb_mode: str, project: str, run_name: str, config_dict: dict[str, Any]
    ) -> None:
        """`wandb_mode`: "auto" (online where WANDB_API_KEY is set, else offline) or "off" (wandb is not imported)."""
        self.path = Path(output_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._wandb = None if wandb_mode == "off" else WandbRun(self.path.parent, project, run_name, config_dict)

    def log(self, step: int, values: dict[str, float | None]) -> None:
        record = {"step": step, **values}
        append_jsonl(self.path, record)
        if self._wandb:
            self._wandb.log(record)

    def truncate_after(self, step: int) -> None:
        """Forgets the lines after `step`: a run that resumes there writes them again."""
        truncate_jsonl(self.path, step)

    def log_files(self, paths: Iterable[Path]) -> None:
        """Attaches files of output_dir to the wandb run, for its Files tab."""
        if self._wandb:
            self._wandb.save(paths)

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()


class WandbRun:
    """A wandb run that cannot end ours: no network means offline, a failure later means a warning and no more wandb.

    A resumed run goes on under its old wandb id, kept in output_dir/wandb/run_id.
    """

    def __init__(self, output_dir: Path, project: str, run_name: str, config_dict: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # Settings(silent=True) leaves some of its lines on
        import wandb  # two seconds, and not wanted at all where wandb_mode is "off"
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
        from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

        # wandb's own, and what a dead or unreachable wandb process makes its client raise
        self._errors = (
            wandb.Error, OSError, ValueError, RuntimeError,
            MailboxClosedError, HandleAbandonedError, ServerResponseError,
        )  # fmt: skip
        self._output_dir = output_dir
        id_file = output_dir / "wandb" / "run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {
            "dir": str(output_dir), "project": project, "name": run_name, "config": config_dict,
            "id": id_file.read_text().strip(), "resume": "allow",
        }  # fmt: skip
        self._run = None
        for mode in ("online", "offline") if os.environ.get("WANDB_API_KEY") else ("offline",):
            try:
                self._run = _start_wandb(mode, options)
                return
            except self._errors as error:
                logger.warning("wandb cannot start %s: %s", mode, error)
                with suppress(*self._errors):
                    wandb.teardown()  # its process still holds the run id

    def log(self, record: dict[str, Any]) -> None:
        values = {name: value for name, value in finite_or_null(record).items() if value is not None}
        self._attempt(lambda run: run.log(values))

    def save(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._attempt(lambda run, path=path: run.save(str(path), base_path=str(self._output_dir), policy="now"))

    def finish(self) -> None:
        self._attempt(lambda run: run.finish())
        self._run = None

    def _attempt(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except self._errors as error:
            logger.warning("wandb failed, going on without it: %s", error)
            self._run = None


def _start_wandb(mode: str, options: dict[str, Any]) -> Any:
    """A silent wandb run whose x axis is our "step": wandb's own cannot go back when a run resumes."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True,
        init_timeout=WANDB_INIT_TIMEOUT_S, finish_timeout=WANDB_FINISH_TIMEOUT_S,
    )  # fmt: skip
    run = wandb.init(mode=mode, settings=settings, **options)
    run.define_metric("*", step_metric="step")
    return run


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
