"""Writes docs/settings.md and docs/settings_programs.md: every setting, with its default and what it means.

The first page has those of a training, the second those of the other programs. The meanings are the comments beside the
fields in the dataclasses: that is where to change them. A test holds the pages against them. Run it after a change:
python scripts/settings_page.py
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from opsd.evaluation.config import EvaluateConfig
from opsd.plan.cluster import ClusterConfig
from opsd.plan.simulate.config import SimulateConfig
from opsd.teacher.server.config import ServerConfig
from tip.config import TipRunConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN = "Written by `scripts/settings_page.py` from the comments in the code; change them there."
TRAINING = f"""# Settings

{WRITTEN} Those of the plan, the
evaluation and the teacher's server are on [a page of their own](settings_programs.md).

Every program takes its settings as `name=value`, below `section.name=value`. A recipe passes on what follows it:
`bash recipes/quickstart.sh selector.ratio=0.2 seed=3`. A free mapping such as `loss.options` needs a plus for what is
new in it: `+loss.options={{beta: 0.3}}`. `--cfg job` prints what a command would run with, and starts nothing.
*Required* means that there is no default.
"""
PROGRAMS = f"""# Settings of the other programs

{WRITTEN} How they are given: [settings](settings.md).
"""


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


def pages() -> dict[str, str]:
    """The files' texts by name."""
    training = [
        (
            "Training: `python -m tip.train`",
            "`python -m opsd.train` has these without `selector`, `filters`, `adjust`, `answers` and `answer_options`. "
            "`selector=NAME` and `method=NAME` choose a file of `tip/conf/`, which sets several at once.",
            TipRunConfig,
            composed("tip.conf", "tip", "schema", TipRunConfig),
        ),
    ]
    programs = [
        (
            "Plan: `python -m tip.plan`",
            "A training's settings, and these.",
            ClusterConfig,
            {field.name: field.default for field in fields(ClusterConfig)},
        ),
        ("", "", SimulateConfig, {field.name: field.default for field in fields(SimulateConfig)}),
        (
            "Evaluation: `python -m opsd.evaluate`",
            "",
            EvaluateConfig,
            composed("opsd.conf", "evaluate", "schema", EvaluateConfig),
        ),
        (
            "Teacher's server: `python -m opsd.teacher.server`",
            "",
            ServerConfig,
            composed("opsd.conf", "teacher_server", "teacher_server_schema", ServerConfig),
        ),
    ]
    return {"settings.md": page(TRAINING, training), "settings_programs.md": page(PROGRAMS, programs)}


def page(introduction: str, programs: list[tuple[str, str, type, dict[str, Any]]]) -> str:
    """`programs`: title, note, class of the settings, defaults."""
    parts = [introduction]
    for title, note, config_class, defaults in programs:
        prefix = {ClusterConfig: "cluster.", SimulateConfig: "simulate."}.get(config_class, "")
        parts += [*([f"## {title}"] if title else []), *([note] if note else [])]
        parts += sections(config_class, defaults, prefix)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def composed(module: str, name: str, schema: str, config_class: type) -> dict[str, Any]:
    """A program's defaults, those that its YAML file sets included."""
    ConfigStore.instance().store(name=schema, node=config_class)
    with initialize_config_module(module, version_base=None):
        return OmegaConf.to_container(compose(name))


def sections(config_class: type, defaults: dict[str, Any], prefix: str) -> Iterator[str]:
    """Headings and tables: the class's own settings, then those of each section in it."""
    hints, meanings = get_type_hints(config_class), comments(config_class)
    own = [field for field in fields(config_class) if not is_dataclass(hints[field.name])]
    rows = [
        f"| `{prefix}{field.name}` | {type_name(hints[field.name])} | {shown(defaults[field.name])} | "
        f"{meanings[field.name].replace('|', chr(92) + '|')} |"
        for field in own
    ]
    if prefix:
        yield f"### `{prefix.removesuffix('.')}`"
        if not (config_class.__doc__ or "").startswith(f"{config_class.__name__}("):  # what dataclass makes up
            yield inspect.cleandoc(config_class.__doc__ or "")
    if rows:
        yield "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows])
    for field in fields(config_class):
        if is_dataclass(hints[field.name]):
            yield from sections(hints[field.name], defaults[field.name], f"{prefix}{field.name}.")


def comments(config_class: type) -> dict[str, str]:
    """What the source says beside or above each field; a field of a parent is described there."""
    found: dict[str, str] = {}
    for parent in reversed(config_class.__mro__):
        if is_dataclass(parent):
            found.update({name: text for name, text in own_comments(parent).items() if text})
    return {field.name: found.get(field.name, "") for field in fields(config_class)}


def own_comments(config_class: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(config_class))
    lines = source.splitlines()
    at_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while above in at_line and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            places = [*range(above + 1, node.lineno), node.end_lineno]
            found[node.target.id] = " ".join(at_line[place] for place in places if place in at_line)
    return found


def type_name(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", None) else str(hint)
    return text.replace("typing.", "").replace("|", "or").replace("NoneType", "None")


def shown(default: Any) -> str:
    if default == "???":
        return "*required*"
    if default is None:
        return "null"
    if isinstance(default, str):
        return f"`{default}`" if default else "empty"
    return f"`{default}`".lower() if isinstance(default, bool) else f"`{default}`"


if __name__ == "__main__":
    main()
