"""Writes the report of a run into its directory: report.html and one PNG a curve."""

from __future__ import annotations

from pathlib import Path

from opsd.report.page import render_page
from opsd.report.plots import CHARTS, write_png
from opsd.report.read import read_run


def build_report(run_dir: Path) -> Path:
    """Reads metrics.jsonl, and summary.json and tokens.jsonl where they are; returns the path of report.html.

    Raises DataError where metrics.jsonl is missing or one of the files is malformed; it names the file.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    for name, chart in CHARTS.items():
        write_png(chart, run, run_dir / f"{name}.png")
    path = run_dir / "report.html"
    path.write_text(render_page(run), encoding="utf-8")
    return path
