"""The names of a program's settings: a misspelt one is refused with the nearest that there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any, get_origin, get_type_hints

from opsd.errors import ConfigError

OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=")  # of what Hydra takes: no deletions (~), no group@package


def refuse_misspelt(arguments: Sequence[str], config_class: type, conf_module: str) -> None:
    """Raises ConfigError for `name=value` where no setting has that name. `conf_module`: where the YAML groups are."""
    known = setting_names(config_class)
    groups = [entry.name for entry in files(conf_module).iterdir() if entry.is_dir()]
    free = [name for name, is_mapping in known.items() if is_mapping]
    for argument in arguments:
        found = OVERRIDE.match(argument)
        name = found[1] if found else ""
        below_free = any(name.startswith(f"{mapping}.") for mapping in free)
        if found and name not in (*known, *groups) and not below_free and not name.startswith("hydra."):
            near = nearest(name, [*known, *groups])
            raise ConfigError(f"{name}: there is no such setting{near} (docs/settings.md has them all)")


def setting_names(config_class: type, prefix: str = "") -> dict[str, bool]:
    """Every dotted name, sections included, and whether it is a free mapping, below which any name may stand."""
    names: dict[str, bool] = {}
    hints: dict[str, Any] = get_type_hints(config_class)
    for field in fields(config_class):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        names[name] = get_origin(hint) is dict
        if isinstance(hint, type) and is_dataclass(hint):
            names.update(setting_names(hint, f"{name}."))
    return names


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where none is near. A name that lacks its section is near, too."""
    ends = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    found = ends or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""
