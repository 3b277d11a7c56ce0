"""Whether a run's tools can be used: built once, their schemas looked at, a row of each file opened, before a model is
loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opsd.agents.runner import ToolRunner
from opsd.agents.toolbox import AgentSpec, tool_runner
from opsd.agents.turn_template import TurnTemplate
from opsd.config.engine import TeacherConfig
from opsd.config.run import RunConfig
from opsd.config.tools import ToolsConfig
from opsd.errors import ConfigError
from opsd.types import Prompt, Vocabulary


def check_teachers(cfg: RunConfig, teachers: Mapping[str, TeacherConfig]) -> None:
    """Raises ConfigError for one that is to answer with tools and cannot. `teachers`: by their sections."""
    asked = cfg.eval.teacher and cfg.eval.num_problems and cfg.data.eval_path and cfg.data.grader != "none"
    for section, teacher in teachers.items():
        if cfg.tools.build and asked and teacher.remote:
            raise ConfigError(
                f"tools.build with {section}.backend={teacher.backend} needs eval.teacher=false: the teacher's own "
                "accuracy is that of trajectories, and a server answers without tools"
            )


def agent_spec(cfg: RunConfig, vocabulary: Vocabulary) -> AgentSpec | None:
    """None: the run has no tools."""
    if not cfg.tools.build:
        return None
    return AgentSpec(
        tools=cfg.tools,
        path=cfg.student.path,
        trust_remote_code=cfg.student.trust_remote_code,
        stop_ids=vocabulary.stop_ids,
        template_options=cfg.data.template_options,
    )


@dataclass(frozen=True)
class TriedTools:
    """Tools that were built for a look at them."""

    build: str = ""
    runner: ToolRunner | None = None

    @property
    def schemas(self) -> Sequence[dict[str, Any]]:
        return () if self.runner is None else self.runner.schemas

    def try_rows(self, prompts: Sequence[Prompt]) -> None:
        """Opens their rows. Raises ConfigError where one cannot be opened."""
        for prompt in prompts if self.runner is not None else ():
            assert self.runner is not None and prompt.row is not None, "prompts are read with the tools' schemas"
            wrong = self.runner.open(prompt.row)
            if wrong:
                where = f"{prompt.source}, row {prompt.index + 1}"
                raise ConfigError(
                    f"tools.build={self.build}: {where} cannot be opened: {wrong.removeprefix('error: ')}"
                )


@contextmanager
def checked_tools(tools: ToolsConfig) -> Iterator[TriedTools]:
    """The tools, in a process of their own, which ends with the block. Raises ConfigError."""
    if not tools.build:
        yield TriedTools()
        return
    runner = tool_runner(tools, processes=1)
    try:
        yield TriedTools(tools.build, runner)
    finally:
        runner.close()


def check_template(agents: AgentSpec | None, tokenizer: Any) -> None:
    """Raises ConfigError where the chat template does not show what tools answer."""
    if agents is not None:
        TurnTemplate(tokenizer, agents.stop_ids, agents.template_options)
