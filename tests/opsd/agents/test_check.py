"""What is said of tools at start-up: built once, a row opened, settings that do not go with them refused."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from opsd.agents.check import agent_spec, check_teachers, checked_tools
from opsd.agents.toolbox import AgentSpec
from opsd.config.engine import TeacherConfig
from opsd.config.run import DataConfig, EvalConfig, RunConfig, StudentConfig
from opsd.config.tools import ToolsConfig
from opsd.data.prompts import load_prompts
from opsd.errors import ConfigError, DataError
from opsd.types import Prompt, Vocabulary
from tests.opsd.agents.agent_models import BUILD, make_agent_tokenizer

VOCABULARY = Vocabulary(size=128, stop_ids=(0,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_agent_tokenizer(tmp_path_factory.mktemp("agent")))


def spec_of(tokenizer, build=BUILD):
    return AgentSpec(
        tools=ToolsConfig(build=build), path=tokenizer.name_or_path, trust_remote_code=False, stop_ids=(0,)
    )


def test_a_prompt_shows_the_tools_and_keeps_its_row(tokenizer, tmp_path):
    own = [{"type": "function", "function": {"name": "mine"}}]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": [{"role": "user", "content": "a"}], "start": 3}\n'
        f'{{"prompt": [{{"role": "user", "content": "b"}}], "tools": {str(own).replace(chr(39), chr(34))}}}\n'
    )
    with checked_tools(spec_of(tokenizer).tools) as tools:
        prompts = load_prompts(str(path), DataConfig(train_path=""), tokenizer, 200, tools.schemas).prompts
        tools.try_rows(prompts)
    assert prompts[0].text.startswith("(add)(later)") and prompts[0].text.endswith("(sleep)[u:a<end>[a:")
    assert prompts[1].text == "(mine)[u:b<end>[a:" and prompts[1].row["tools"] == own
    assert prompts[0].row["start"] == 3 and "tools" not in prompts[0].row
    path.write_text('{"prompt": "plain"}\n')
    with pytest.raises(DataError, match="tools.build needs a chat template"):
        load_prompts(str(path), DataConfig(train_path=""), tokenizer, 200, tools.schemas)


def test_a_row_that_cannot_be_opened_is_named(tokenizer):
    row = Prompt(index=4, token_ids=np.ones(1, np.int32), text="", answer=None, source="file", row={"unopenable": True})
    with (
        pytest.raises(ConfigError, match="file, row 5 cannot be opened: .*no such world"),
        checked_tools(spec_of(tokenizer).tools) as tools,
    ):
        tools.try_rows([row])


def test_tools_that_cannot_be_built_end_the_check(tokenizer):
    with (
        pytest.raises(ConfigError, match="the service is down"),
        checked_tools(ToolsConfig(build="tests.opsd.agents.some_tools:build_nothing")),
    ):
        pass


def test_settings_that_do_not_go_with_tools_are_refused():
    def config(teacher=True):
        data = DataConfig(train_path="a", eval_path="b", grader="math")
        return RunConfig(
            output_dir="x",
            student=StudentConfig(path="s"),
            data=data,
            tools=ToolsConfig(build=BUILD),
            eval=EvalConfig(teacher=teacher),
        )

    local = {"teacher": TeacherConfig(path="t")}
    served = {**local, "teacher.by_source.b": TeacherConfig(backend="http", urls=["http://127.0.0.1:1"])}
    assert agent_spec(config(), VOCABULARY).stop_ids == (0,)
    check_teachers(config(), local)
    check_teachers(config(teacher=False), served)
    with pytest.raises(ConfigError, match="tools.build with teacher.by_source.b.backend=http needs eval.teacher=false"):
        check_teachers(config(), served)
    with pytest.raises(ConfigError, match="tools.max_open must be at least 1, got 0"):
        ToolsConfig(max_open=0)
    with pytest.raises(ConfigError, match="tools.parser"):
        ToolsConfig(parser="none")
