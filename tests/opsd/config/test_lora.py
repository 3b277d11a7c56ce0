"""student.lora as settings: what is off by default, what contradicts itself or the run."""

from dataclasses import replace

import pytest

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.lora import LoraConfig, check_lora
from opsd.config.run import RunConfig, StudentConfig
from opsd.errors import ConfigError
from opsd.run_folder import RunFolder
from opsd.weight_sync import weight_transfer
from tests.opsd.config.test_checks import composed


def test_it_is_off_unless_a_rank_is_given():
    assert composed({}).student.lora == LoraConfig()
    assert LoraConfig().scale == 0.0
    assert composed({"student": {"lora": {"rank": 16}}}).student.lora.scale == 2.0


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": -1}, "student.lora.rank must be at least 0, got -1"),
        ({"rank": 4, "alpha": 0}, "student.lora.alpha must be greater than 0, got 0"),
        ({"alpha": 16}, "student.lora.rank=0 trains the student itself"),
        ({"targets": ["q_proj"]}, "student.lora.rank=0 trains the student itself"),
        ({"rank": 4, "targets": [3, "q_proj"], "dropout": 0.1}, "dropout"),
    ],
)
def test_what_contradicts_itself_is_refused(lora, said):
    with pytest.raises(ConfigError, match=said):
        composed({"student": {"lora": lora}})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": TeacherConfig(path="t", follow_decay=0.9)}, "which teacher.follow_decay asks for, is not"),
        ({"rollout": RolloutConfig(weight_transfer="nccl")}, "set rollout.weight_transfer=auto, got nccl"),
        ({"rollout": RolloutConfig(weight_transfer="ipc")}, "set rollout.weight_transfer=auto, got ipc"),
    ],
)
def test_what_an_adapter_cannot_give_is_refused(sections, said):
    cfg = RunConfig(student=StudentConfig(path="s", lora=LoraConfig(rank=4)), **sections)
    with pytest.raises(ConfigError, match=f"student.lora.rank=4 .*{said}"):
        check_lora(cfg)
    check_lora(replace(cfg, student=StudentConfig(path="s")))


def test_merged_weights_go_through_the_object_store_by_themselves():
    whole = RunConfig(student=StudentConfig(path="s"))
    adapter = RunConfig(student=StudentConfig(path="s", lora=LoraConfig(rank=4)))
    assert weight_transfer(whole, "cuda", renamed=False) == "nccl"
    assert weight_transfer(adapter, "cuda", renamed=False) == "object_store"


@pytest.mark.parametrize("name", ["rank", "alpha", "targets"])
def test_a_run_does_not_go_on_with_another_adapter(name, tmp_path):
    lora = LoraConfig(rank=4)
    cfg = RunConfig(output_dir=str(tmp_path / "run"), student=StudentConfig(path="s", lora=lora))
    RunFolder(cfg.output_dir).claim(cfg)
    other = replace(lora, **{name: ["q_proj"] if name == "targets" else 8})
    cfg = replace(cfg, resume="auto", student=StudentConfig(path="s", lora=other))
    with pytest.raises(ConfigError, match=f"resume=auto: student.lora.{name} differs from the run in"):
        RunFolder(cfg.output_dir).claim(cfg)
