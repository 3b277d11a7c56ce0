"""The engines and the learner must compute the same model, and the answer that shows it leaves nothing behind."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from opsd.config.engine import EngineConfig, EngineSpec, RolloutConfig
from opsd.config.run import RunConfig, StudentConfig
from opsd.engines.groups import in_order
from opsd.engines.transformers import TransformersEngine
from opsd.errors import ConfigError
from opsd.rollout import RolloutPool
from opsd.types import Prompt, Vocabulary
from opsd.weight_sync import NUM_ANSWER_TOKENS, NUM_PROMPT_TOKENS, check_agreement
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(0,))
PROMPT = Prompt(index=7, token_ids=np.arange(1, 40, dtype=np.int32), text="", answer=None, source="test")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = make_tiny_qwen3(tmp_path_factory.mktemp("tiny"), tied=True, layers=1, seed=0, eos_token_id=0, scale=2.0)
    config = EngineConfig(backend="transformers")
    spec = EngineSpec(path=str(path), vocabulary=VOCABULARY, config=config, device="cpu", max_model_tokens=64)
    return TransformersEngine(spec)


def check(engine, *, learner_off_by=0.0, vocabulary=VOCABULARY, **dtypes):
    """Against a learner whose log-probabilities are the engine's, and so much more. Returns what it was asked for."""
    cfg = RunConfig(student=StudentConfig(path="the/student", dtype=dtypes.get("student", "float32")), seed=3)
    cfg.rollout = RolloutConfig(num_workers=2, dtype=dtypes.get("rollout", "float32"))
    pool = RolloutPool.__new__(RolloutPool)
    pool.cfg, pool.seed, pool.policy_version = cfg.rollout, cfg.seed, 0
    pool.engines = engine
    asked, order = [], []

    def token_stats(scored):
        order.append("learner")
        asked.extend(scored.rollouts)
        stats = scored.tokens
        return replace(stats, student_logprob_T=stats.student_logprob_T + learner_off_by)

    check_agreement(
        cfg, SimpleNamespace(token_stats=token_stats), pool, PROMPT, vocabulary, lambda: order.append("sleep")
    )
    assert order in (["sleep", "learner"], ["sleep"])
    return asked


def test_equal_engines_pass_with_a_short_answer_of_each(engine):
    answers = check(engine)
    assert len(answers) == 2 and answers[0].response_ids.tolist() != answers[1].response_ids.tolist()
    assert all(len(answer.prompt.token_ids) == NUM_PROMPT_TOKENS for answer in answers)
    assert all(len(answer) <= NUM_ANSWER_TOKENS and np.isfinite(answer.sampled_logprobs).all() for answer in answers)


@pytest.mark.parametrize(
    ("off_by", "dtypes", "limit"),
    [
        (0.002, {}, "0.001"),
        (-0.3, {"student": "bfloat16"}, "0.2"),
        (0.3, {"rollout": "bfloat16"}, "0.2"),
        (float("nan"), {}, "0.001"),
    ],
)
def test_a_difference_beyond_rounding_is_refused(engine, off_by, dtypes, limit):
    said = rf"the/student: the rollout engines .* differ by {abs(off_by):.3g} nats on average, at most {limit} is"
    with pytest.raises(ConfigError, match=said):
        check(engine, learner_off_by=off_by, **dtypes)
    check(engine, learner_off_by=0.02 if dtypes else 0.0002, **dtypes)


def test_an_answer_of_padding_says_nothing(engine):
    tokens = np.concatenate([answer.response_ids for answer in check(engine)])
    ignored = tuple(sorted(set(tokens.tolist()) - {0}))
    assert check(engine, vocabulary=replace(VOCABULARY, foreign_ids=ignored)) == []


def test_it_leaves_what_is_sampled_next_as_it_was(engine):
    def sample():
        requests = [(PROMPT, 0, 5), (PROMPT, 1, 6)]
        sampling = SimpleNamespace(temperature=1.0, top_p=1.0, top_k=0, max_tokens=9, num_candidates=2)
        return in_order(engine.generate(requests, sampling, 0))

    before = sample()
    check(engine)
    for one, other in zip(before, sample(), strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.sampled_logprobs.tolist() == other.sampled_logprobs.tolist()
