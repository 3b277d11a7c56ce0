"""`opsd-export RUN FOLDER`: the trained student as a Hugging Face folder with a model card.

    opsd-export outputs/run my-model

RUN is a run's folder (its newest checkpoint is taken, or student/ where it has none) or one of its checkpoints, made by
any number of ranks. Neither Ray nor a GPU is needed. transformers and vLLM load what comes out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from opsd.checkpoints import LEARNER, read_state, require_whole
from opsd.config.lora import LoraConfig
from opsd.engines.weights import complete_weights
from opsd.errors import ConfigError, DataError, StageError
from opsd.learner.checkpoint import read_adapter_facts, read_weights
from opsd.models.card import model_card
from opsd.models.facts import weights_fingerprint
from opsd.models.lora import ADAPTER_FOLDER, merge_adapter, save_adapter
from opsd.models.student_folder import save_student
from opsd.models.weights import model_without_weights
from opsd.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported."""

    run: Path
    checkpoint: Path | None  # None: the run's student/
    step: int
    config: dict[str, Any]  # the run's settings
    summary: dict[str, Any]  # of the whole run; empty where it has not ended at this step
    support: str  # loss.support, with auto decided where the run has said how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: the base model's")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that lies in the model's folder"
    )
    parser.add_argument("--base", type=Path, help="folder with config and tokenizer; default: the run's own student")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # just so
    try:
        source = find_source(given.source)
        export(source, given.out, dtype=given.dtype, base=given.base, trust_remote_code=given.trust_remote_code)
    except (ConfigError, DataError, StageError, OSError) as error:
        sys.exit(f"error: {error}")


def find_source(path: Path) -> Source:
    """Raises DataError where `path` is neither a run nor a checkpoint, or holds no weights yet."""
    is_checkpoint = (path / "state.json").is_file()
    run = path.resolve().parent.parent if is_checkpoint else path
    if not (run / "config.yaml").is_file():
        raise DataError(f"{path}: neither a run's folder (with config.yaml) nor one of its checkpoints")
    checkpoint = path if is_checkpoint else RunFolder(str(run)).newest_checkpoint()
    summary_file = run / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
    if checkpoint is None and not (summary and (run / "student").is_dir()):
        raise DataError(f"{run}: no checkpoint and no finished student/ in it: there is nothing to export yet")
    state = {} if checkpoint is None else read_state(checkpoint)
    step: Any = state.get("step", summary.get("steps"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    said = {"support": config["loss"]["support"], **summary, **state}
    return Source(
        run=run,
        checkpoint=checkpoint,
        step=step,
        config=config,
        summary=summary if summary.get("steps") == step else {},
        support=said["support"],
    )


def export(source: Source, out: Path, *, dtype: str | None, base: Path | None, trust_remote_code: bool = False) -> None:
    """Write the folder. What the run's own config.yaml says of trust is not believed: it may be a stranger's.

    Raises ConfigError, DataError or StageError before `out` is touched."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists already: choose a new or an empty folder")
    facts = None if source.checkpoint is None else read_adapter_facts(source.checkpoint / LEARNER)
    base = base or base_folder(source, has_frozen_weights=facts is not None)
    if source.config["student"]["trust_remote_code"] and not trust_remote_code:
        raise ConfigError(
            f"{source.run} was trained with student.trust_remote_code=true: give --trust-remote-code if you trust the "
            f"code in {base}, too"
        )
    adapter: dict[str, Tensor] = {}
    named = weights_of(source, trust_remote_code)
    if facts is not None:
        adapter, named = named, merged_weights(named, facts, base, trust_remote_code)
    weights = complete_weights(model_without_weights(str(base), trust_remote_code=trust_remote_code), named)
    wanted = getattr(torch, dtype) if dtype else None
    save_student(out, weights, str(base), trust_remote_code=trust_remote_code, dtype=wanted)
    if facts is not None:
        lora = LoraConfig(rank=facts["rank"], alpha=facts["alpha"], targets=facts["targets"])
        save_adapter(out / ADAPTER_FOLDER, adapter, lora, str(base))
    elif source.checkpoint is None and (source.run / "student" / ADAPTER_FOLDER).is_dir():
        shutil.copytree(source.run / "student" / ADAPTER_FOLDER, out / ADAPTER_FOLDER)
    config = json.loads((out / "config.json").read_text())
    card = model_card(
        out.name, source.config, source.summary, support=source.support, step=source.step, dtype=config["dtype"]
    )
    card.save(out / "README.md")
    num_weights = sum(weight.numel() for weight in weights.values())
    print(f"{out}: {num_weights / 1e6:.1f} M weights in {config['dtype']} after {source.step} steps")


def base_folder(source: Source, *, has_frozen_weights: bool) -> Path:
    """Where config and tokenizer come from: the run's student, or the model that it began with.

    `has_frozen_weights`: those too, which the run's student has merged with its adapter.
    """
    first = Path(source.config["student"]["path"])
    for folder in (first,) if has_frozen_weights else (source.run / "student", first):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"nothing in {source.run} has the model that it began with, and its student.path={first} is not here: name "
        "that model's folder by --base"
    )


def weights_of(source: Source, trust_remote_code: bool) -> dict[str, Tensor]:
    if source.checkpoint is not None:
        require_whole(source.checkpoint, contents=True)
        return read_weights(source.checkpoint / LEARNER)
    student = AutoModelForCausalLM.from_pretrained(
        source.run / "student", dtype="auto", trust_remote_code=trust_remote_code
    )
    return student.state_dict()


def merged_weights(
    adapter: dict[str, Tensor], facts: dict[str, Any], base: Path, trust_remote_code: bool
) -> dict[str, Tensor]:
    """The student's weights. Raises DataError where `base` is not the model beside which the adapter was trained."""
    if weights_fingerprint(str(base)) != facts["base"]:
        raise DataError(
            f"{base}: the checkpoint's adapter was trained beside other weights than those in this folder: name the "
            "folder of the model that the run began with by --base"
        )
    frozen = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, facts["dtype"]), trust_remote_code=trust_remote_code
    )
    return merge_adapter(frozen.state_dict(), adapter, facts["alpha"] / facts["rank"])


if __name__ == "__main__":
    main()
