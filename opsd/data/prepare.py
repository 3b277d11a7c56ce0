"""Data sets into files to train on and to evaluate with, in verl's format.

opsd-prepare data --variant boxed --train dapo=distinct-prompts-with-rewards.parquet \\
    --eval math500=test.jsonl --eval aime24=aime_2024_problems.parquet --eval aime25=train.jsonl

writes data/train.parquet, data/val_dapo.parquet (DAPO-Math-17k is split 80/20) and data/val_NAME.parquet. Known by
name: dapo, gsm8k, math500, aime24, aime25; without =FILE they come from the Hugging Face hub (untested). deepplanning
(in Chinese deepplanning_zh) =FOLDER is the published folder of travel tasks, split 80/20: docs/deepplanning.md. Any
other NAME is chat data of your own, verl's rows included. Every FILE is JSONL or parquet.

Training rows whose question is repeated, or is in an evaluation set too, are reported and left out; evaluation sets
stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from opsd.config.paths import require_writable
from opsd.data.data_sets import VARIANTS, fingerprint, load_rows, train_ratio_of, verl_row
from opsd.errors import ConfigError, DataError

NUM_EXAMPLES = 3  # duplicates that are shown


def main() -> None:
    args = arguments().parse_args()
    try:
        print(prepare(args))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the files that are written")
    parser.add_argument("--train", action="append", default=[], metavar="NAME[=FILE]", help="once a training set")
    parser.add_argument("--eval", action="append", default=[], metavar="NAME[=FILE]", help="once an evaluation set")
    parser.add_argument(
        "--variant", choices=sorted(VARIANTS), default="none",
        help="instruction: boxed (answer in \\boxed{}), dapo (a line 'Answer: ...'), none (default)",
    )  # fmt: skip
    parser.add_argument(
        "--train-ratio", type=float, metavar="R",
        help="share of every training set that is trained on; the rest is val_NAME (default: 0.8 of dapo and "
        "deepplanning, else all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of that split (default 42)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--prompt-key", default="prompt", help="field with the prompt of your own data")
    parser.add_argument(
        "--answer-key", default="", help="field with its answer (default: as in opsd's data.answer_key)"
    )
    return parser


def prepare(args: argparse.Namespace) -> str:
    """Writes the files; returns a line of facts. Raises DataError."""
    if not args.train and not args.eval:
        raise DataError("nothing to prepare: give --train NAME=FILE or --eval NAME=FILE")
    if args.train_ratio is not None and not 0 < args.train_ratio <= 1:
        raise DataError(f"--train-ratio must be in (0, 1], got {args.train_ratio}")
    if args.seed < 0:
        raise DataError(f"--seed must be at least 0, got {args.seed}")
    require_writable("output", args.output)
    evaluation: dict[str, list[dict[str, Any]]] = {}
    for name, file in map(name_and_file, args.eval):
        add(evaluation, name, rows_of(name, file, "test", args))
    train: list[dict[str, Any]] = []
    repeats = 0
    for name, file in map(name_and_file, args.train):
        rows = rows_of(name, file, "train", args)
        distinct = first_of_each(rows)
        repeats += len(rows) - len(distinct)
        kept, held_out = split(distinct, train_ratio(name, args.train_ratio), args.seed)
        train += kept
        if held_out:
            add(evaluation, name, held_out)
    clean = without_duplicates(train, evaluation)
    files = {"train": clean} if args.train else {}
    written = [write(args.output, name, rows, args.format) for name, rows in {**files, **evaluation}.items()]
    return (
        f"{args.output}: {', '.join(written)}; variant {args.variant}, seed {args.seed}; left out of train: "
        f"{repeats} repeated, {len(train) - len(clean)} also in an evaluation set"
    )


def add(evaluation: dict[str, list[dict[str, Any]]], name: str, rows: list[dict[str, Any]]) -> None:
    if f"val_{name}" in evaluation:
        raise DataError(f"there are two evaluation sets {name}: give one another name (or --train-ratio 1)")
    evaluation[f"val_{name}"] = rows


def name_and_file(given: str) -> tuple[str, str]:
    name, _, file = given.partition("=")
    return name, file


def rows_of(name: str, file: str, split: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    keys = (args.prompt_key, args.answer_key)
    rows = load_rows(name, file, split)
    return [verl_row(name, row, index, split=split, variant=args.variant, keys=keys) for index, row in enumerate(rows)]


def train_ratio(name: str, given: float | None) -> float:
    return train_ratio_of(name) if given is None else given


def first_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each question."""
    distinct: dict[str, dict[str, Any]] = {}
    for row in rows:
        distinct.setdefault(fingerprint(row), row)
    return list(distinct.values())


def split(rows: list[dict[str, Any]], ratio: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A seeded draw of `ratio` of the rows, and the others; both in the order of the file."""
    drawn = np.random.default_rng(seed).permutation(len(rows)) < round(ratio * len(rows))
    parts = [row for row, is_kept in zip(rows, drawn, strict=True) if is_kept]
    return parts, [row for row, is_kept in zip(rows, drawn, strict=True) if not is_kept]


def without_duplicates(
    train: list[dict[str, Any]], evaluation: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The training rows whose question is in no evaluation set; says on stderr how many are in which, with examples."""
    known = {name: {fingerprint(row) for row in rows} for name, rows in evaluation.items()}
    clean = train
    for name, fingerprints in known.items():
        found = [row for row in train if fingerprint(row) in fingerprints]
        if found:
            print(f"{len(found)} of {len(train)} training rows are also in {name} and are left out:", file=sys.stderr)
        for row in found[:NUM_EXAMPLES]:
            print(f"  {row['prompt'][-1]['content'][:100]!r}", file=sys.stderr)
        clean = [row for row in clean if fingerprint(row) not in fingerprints]
    return clean


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]], form: str) -> str:
    """Returns the file's name and its number of rows. Raises DataError where parquet cannot hold them."""
    file = folder / f"{name}.{form}"
    folder.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        try:
            table = pyarrow.Table.from_pylist(list(rows))
        except (pyarrow.ArrowException, OverflowError) as error:  # the second for integers beyond 64 bits
            raise DataError(f"{file}: parquet cannot hold a field's values: {error}; try --format jsonl") from error
        pyarrow.parquet.write_table(table, file)
    return f"{file.name} {len(rows):,} rows"


if __name__ == "__main__":
    main()
