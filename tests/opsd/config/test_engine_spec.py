"""What an engine is made of is checked where it is put together, before an actor or a model is started."""

from dataclasses import FrozenInstanceError, replace

import pytest

from opsd.config.engine import EngineConfig, EngineSpec, RolloutConfig, TeacherConfig, teacher_spec
from opsd.errors import ConfigError
from opsd.types import Vocabulary

VOCABULARY = Vocabulary(size=4, stop_ids=(0,))
SPEC = EngineSpec(path="/m", config=RolloutConfig(), vocabulary=VOCABULARY, device="cuda", max_model_tokens=8)
URLS = ["http://127.0.0.1:1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "auto"}, r"^device must be one of cpu, cuda, got 'auto'"),
        ({"max_model_tokens": 0}, r"^rollout: max_model_tokens must be at least 1, got 0"),
        (
            {"shares_gpu": True, "config": RolloutConfig(backend="transformers")},
            r"^rollout: an engine on the learner's GPU must sleep, .*backend must be vllm, got transformers",
        ),
        (
            {"config": TeacherConfig(path="/m", score_candidates=True, scoring="prompt_logprobs")},
            r"^teacher\.score_candidates=true is not possible with teacher\.backend=vllm, .*=prompt_logprobs",
        ),
    ],
)
def test_an_engine_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(SPEC, **changes)


def test_a_server_has_its_own_gpus_so_it_need_not_sleep():
    assert replace(SPEC, config=TeacherConfig(backend="http", urls=URLS), shares_gpu=True).shares_gpu
    assert replace(SPEC, shares_gpu=True).shares_gpu


def test_it_stays_as_it_was_checked():
    with pytest.raises(FrozenInstanceError):
        SPEC.device = "cpu"


def test_a_teachers_section_says_what_its_engine_is_made_of():
    config = TeacherConfig(path="/t", trust_remote_code=True, max_batch_tokens=77)
    spec = teacher_spec(config, vocabulary=VOCABULARY, device="cuda", max_model_tokens=9)
    assert (spec.path, spec.trust_remote_code, spec.max_model_tokens, spec.shares_gpu) == ("/t", True, 9, False)
    assert spec.scores_candidates
    assert not replace(spec, config=replace(config, scoring="prompt_logprobs")).scores_candidates
    assert spec.config.scoring_bound == 77 and EngineConfig().scoring_bound is None
