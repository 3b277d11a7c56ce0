"""A misspelt setting is refused with the nearest name; a model's name on the hub with the command that fetches it."""

import re

import pytest

from opsd.config.run import RunConfig
from opsd.config.setting_names import refuse_misspelt
from opsd.errors import ConfigError
from opsd.models.folder import model_config
from tip.config import TipRunConfig


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("teacher.topk=3", "teacher.topk: there is no such setting; did you mean teacher.top_k? "),
        ("+teacher.topk=3", "teacher.topk: there is no such setting; did you mean teacher.top_k? "),
        ("learning_rate=1e-5", "learning_rate: there is no such setting; did you mean learner.learning_rate? "),
        ("data.num_steps=5", "data.num_steps: there is no such setting; did you mean num_steps? "),
        ("selektor=entropy", "selektor: there is no such setting; did you mean selector? "),
        ("zzz=1", "zzz: there is no such setting (docs/settings.md has them all)"),
    ],
)
def test_a_misspelt_setting_is_answered_with_the_nearest_name(argument, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        refuse_misspelt(["seed=1", argument], TipRunConfig, "tip.conf")


def test_what_hydra_takes_is_left_to_it():
    arguments = [
        "selector=entropy", "method=gkd", "selector.ratio=0.2", "+loss.options={beta: 0.3}", "+loss.options.beta=0.3",
        "++adjust.reward.beta=1", "hydra.verbose=true", "~loss.options", "--cfg", "job", "teacher.http.timeout_s=3",
        "data.train_path=a=b.jsonl",
    ]  # fmt: skip
    refuse_misspelt(arguments, TipRunConfig, "tip.conf")
    with pytest.raises(ConfigError, match="^selector.ratio: there is no such setting"):
        refuse_misspelt(["selector.ratio=0.2"], RunConfig, "opsd.conf")  # tip's


def test_a_name_on_the_hub_is_answered_with_the_download_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        model_config("student.path", "Qwen/Qwen3-4B", False)
    assert str(caught.value).endswith(
        "hf download Qwen/Qwen3-4B --local-dir models/Qwen3-4B, then student.path=models/Qwen3-4B"
    )
    (tmp_path / "runs" / "mine").mkdir(parents=True)  # a folder that is there, and a path, are no names on the hub
    for path in ("runs/mine", "/models/Qwen3-4B", "outputs/pair/student"):
        with pytest.raises(ConfigError, match="no model here") as caught:
            model_config("teacher.path", path, False)
        assert "hf download" not in str(caught.value)
