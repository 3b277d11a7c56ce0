"""`python -m opsd.report RUN_DIR`: builds the report of a run again, also of one that is still going on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opsd.errors import DataError
from opsd.report.build import build_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m opsd.report", description="Build report.html and its PNGs.")
    parser.add_argument("run_dir", type=Path, help="output_dir of the run; it holds metrics.jsonl")
    try:
        print(build_report(parser.parse_args().run_dir))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
