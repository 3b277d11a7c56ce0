"""What the benchmarks of the stages share: models and prompts from the command line, and one table on stdout."""

from __future__ import annotations

import argparse
import os

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.preflight import Setup, check


def parse_args(description: str, *extra: tuple[str, dict]) -> argparse.Namespace:
    """The shared arguments, and `extra` ones as (flag, options of add_argument)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", help="folder with student/ and teacher/")
    parser.add_argument("prompts", help="JSONL, one prompt a line")
    parser.add_argument(
        "--student", default="", help="folder of another student than the pair's, such as a trained one"
    )
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--chat-template", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=48, help="of one response")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: written, not run on a GPU yet")
    for flag, options in extra:
        parser.add_argument(flag, **options)
    return parser.parse_args()


def load_setup(args: argparse.Namespace, rollout: RolloutConfig, teacher_top_k: int) -> tuple[RunConfig, Setup]:
    """The configuration of a run on these models, and what its start-up checks found."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    data = DataConfig(
        train_path=args.prompts, eval_path=args.prompts, prompt_key=args.prompt_key, chat_template=args.chat_template
    )
    cfg = RunConfig(
        output_dir="",
        device=args.device,
        student=StudentConfig(path=args.student or f"{args.pair}/student"),
        teacher=TeacherConfig(path=f"{args.pair}/teacher", top_k=teacher_top_k, dtype=rollout.dtype),
        rollout=rollout,
        data=data,
    )
    return cfg, check(cfg)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Markdown, as it goes into recipes/results."""
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |", flush=True)
