"""loss.payload=auto: the teacher's whole distribution, wherever it can be had and nothing else is asked for."""

from dataclasses import replace

import pytest

from opsd.config.engine import TeacherConfig
from opsd.config.loss import LossConfig
from opsd.config.payload import check_payload, with_payload
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.errors import ConfigError
from opsd.hooks import bind_objective

TEACHER = TeacherConfig(path="teacher")


def run(*, teacher=TEACHER, **loss):
    return RunConfig(
        output_dir="out",
        student=StudentConfig(path="student"),
        teacher=teacher,
        data=DataConfig(train_path="train.jsonl"),
        loss=LossConfig(**loss),
    )


def payload(cfg):
    return with_payload(cfg, by_token=bind_objective(cfg.loss).by_token).loss.payload


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "todi", "akl"])
def test_by_default_the_loss_sees_the_whole_distribution(backend, divergence):
    assert payload(run(teacher=replace(TEACHER, backend=backend), divergence=divergence)) == "hidden"


@pytest.mark.parametrize(
    "asked",
    [
        {"support": "teacher"},
        {"support": "union"},
        {"residual": True},
        {"divergence": "policy_gradient", "importance_cap": 2.0},
        {"divergence": "policy_gradient"},
        {"terms": {"policy_gradient": {"weight": 0.1}}},
    ],
)
def test_a_loss_of_log_probabilities_gets_them(asked):
    assert payload(run(**asked)) == "logprobs"


@pytest.mark.parametrize(
    "teacher",
    [
        replace(TEACHER, scoring="prompt_logprobs"),
        replace(TEACHER, backend="http", urls=["http://server"]),
        replace(TEACHER, by_source={"math": {"path": "another"}}),
        replace(TEACHER, follow_decay=0.99),
    ],
)
def test_so_does_a_run_whose_teacher_has_no_head_of_its_own_here(teacher):
    assert payload(run(teacher=teacher)) == "logprobs"


@pytest.mark.parametrize("wanted", ["logprobs", "hidden"])
def test_what_is_asked_for_stays(wanted):
    assert payload(run(payload=wanted)) == wanted


def test_what_cannot_be_is_refused_only_where_it_is_asked_for():
    teacher = replace(TEACHER, follow_decay=0.99)
    check_payload(run(teacher=teacher))
    with pytest.raises(ConfigError, match=r"teacher\.follow_decay changes it: set loss\.payload=logprobs$"):
        check_payload(run(teacher=teacher, payload="hidden"))
