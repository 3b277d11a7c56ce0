"""What the process of an engine needs for trajectories: tools, parser and chat template, made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.agents.calls import PARSERS, Parsed
from opsd.agents.runner import ToolRunner
from opsd.agents.turn_template import TurnTemplate
from opsd.config.tools import ToolsConfig
from opsd.models.folder import model_tokenizer
from opsd.types import Rollout


@dataclass(frozen=True, kw_only=True)
class AgentSpec:
    """How a run's trajectories are made; travels to the engines."""

    tools: ToolsConfig
    path: str  # of the student, for its tokenizer and chat template
    trust_remote_code: bool
    stop_ids: tuple[int, ...]
    template_options: dict[str, Any] = field(default_factory=dict)


class Toolbox:
    """Reads a student's turns, calls its tools and writes down what they answer."""

    def __init__(self, spec: AgentSpec) -> None:
        """Raises ConfigError where the tools cannot be built, or the template shows no tools' answers."""
        self.tokenizer = model_tokenizer("student.path", spec.path, spec.trust_remote_code)
        self.template = TurnTemplate(self.tokenizer, spec.stop_ids, spec.template_options)
        self.parser = PARSERS[spec.tools.parser]
        self.max_turns, self.max_open = spec.tools.max_turns, spec.tools.max_open
        self.runner = tool_runner(spec.tools)

    def calls(self, turn: Rollout) -> Parsed:
        """What a turn that has ended with a stop token calls."""
        return self.parser(self.tokenizer.decode(turn.response_ids[:-1], clean_up_tokenization_spaces=False))


def tool_runner(cfg: ToolsConfig, processes: int | None = None) -> ToolRunner:
    return ToolRunner(
        build=cfg.build,
        options=cfg.options,
        processes=processes or cfg.processes,
        call_timeout_s=cfg.call_timeout_s,
        max_answer_chars=cfg.max_answer_chars,
    )


_made: list[tuple[AgentSpec, Toolbox]] = []  # by this process


def toolbox_of(spec: AgentSpec) -> Toolbox:
    """The toolbox of this process, started at the first call."""
    for known, toolbox in _made:
        if known == spec:
            return toolbox
    _made.append((spec, Toolbox(spec)))
    return _made[-1][1]


def end_toolbox(spec: AgentSpec) -> None:
    """Ends its processes; the next `toolbox_of` starts others."""
    for made in [made for made in _made if made[0] == spec]:
        _made.remove(made)
        made[1].runner.close()
