"""Which teacher a prompt has: teacher.by_source={gsm8k: /models/a, code: "http://b:8100", chat: {path: ..., ...}}."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opsd.config.engine import TeacherConfig
from opsd.errors import ConfigError, DataError
from opsd.types import Prompt

DEFAULT = ""  # the name of the teacher that the section itself describes
OWN = ("path", "urls", "by_source")  # never taken over from the section


def teachers_by_source(cfg: TeacherConfig) -> dict[str, TeacherConfig]:
    """Every teacher of a run by the data_source that it scores; DEFAULT scores the sources that by_source lacks.

    A value of by_source is a folder, the address or addresses of a server, or a mapping of teacher settings; what it
    does not say is as in the section. Raises ConfigError.
    """
    teachers = {DEFAULT: cfg} if cfg.given else {}
    teachers.update({source: _teacher(cfg, source, value) for source, value in cfg.by_source.items()})
    if not teachers:
        raise ConfigError("teacher.path must name the teacher's folder (or teacher.urls, or teacher.by_source)")
    return teachers


def section_of(source: str) -> str:
    """Where this teacher stands in the config, for messages."""
    return "teacher" if source == DEFAULT else f"teacher.by_source.{source}"


def source_of(prompt: Prompt, teachers: Iterable[str]) -> str:
    """The name of this prompt's teacher. Raises KeyError where there is none."""
    for name in (prompt.data_source, DEFAULT):
        if name in teachers:
            return name
    raise KeyError(prompt.data_source)


def check_sources(prompts: list[Prompt], teachers: dict[str, TeacherConfig]) -> None:
    """Raises DataError for a prompt without a teacher, ConfigError for a teacher without a prompt."""
    named = [name for name in teachers if name != DEFAULT]
    for prompt in prompts:
        if DEFAULT not in teachers and prompt.data_source not in teachers:
            raise DataError(
                f"{prompt.source}, row {prompt.index + 1}: no teacher for data_source {prompt.data_source!r}: "
                f"teacher.by_source has {', '.join(named)}, and no teacher.path or teacher.urls for the others"
            )
    unused = set(named) - {prompt.data_source for prompt in prompts}
    if unused:
        raise ConfigError(f"{section_of(min(unused))}: no prompt has this data_source")


def _teacher(cfg: TeacherConfig, source: str, value: Any) -> TeacherConfig:
    inherited = {name: setting for name, setting in asdict(cfg).items() if name not in OWN}
    if isinstance(value, str) and not value.startswith(("http://", "https://")):
        value = {"path": value}
    elif isinstance(value, (str, list)):
        urls = [value] if isinstance(value, str) else value
        value = {"urls": urls, "backend": cfg.backend if cfg.remote else "http"}
    field = section_of(source)
    if not isinstance(value, dict):
        raise ConfigError(f"{field} must be a folder, an address, addresses or a mapping, got {value!r}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TeacherConfig), inherited, value)
        teacher: TeacherConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]  # of a structured config
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{field}: {' '.join(str(error.__cause__ or error).split())}") from error
    if not teacher.given or teacher.by_source or teacher.top_k != cfg.top_k:
        raise ConfigError(f"{field} must have a path or urls, no by_source of its own, and the section's top_k")
    return teacher
