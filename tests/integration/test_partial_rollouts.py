"""Answers that go on under new weights, on real tiny models: which weights drew which token, and with what cache.

The vLLM engine lives in this process, and shares prompts' keys and values as on a GPU.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opsd.config.backends import ENGINES
from opsd.config.engine import EngineSpec, RolloutConfig
from opsd.engines import vllm, vllm_settings
from opsd.engines.groups import in_order
from opsd.engines.worker import MADE_BY
from opsd.errors import StageError
from opsd.types import Prompt
from tests.integration.engine_reference import CLOSE, NUM_IDS, VOCABULARY, cpu_engine_process, make_models, make_prompts
from tests.integration.engine_reference import SAMPLING as FEW_IDS

pytestmark = pytest.mark.slow
BLOCK = 32  # tokens whose keys and values vLLM keeps together
SAMPLING = replace(FEW_IDS, num_candidates=NUM_IDS)  # so many that no stop id is left out of the stop event
GREEDY = replace(SAMPLING, temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def process_of_an_actor():
    """What the actor's environment would have set before the first import, and prompts that share, as on a GPU."""
    with cpu_engine_process() as patch:
        for module in (vllm, vllm_settings):
            patch.setattr(module, "caches_prefixes", lambda config, device: True)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def made(models):
    """made(backend): an engine, started at first use."""
    engines = {}

    def get(backend: str):
        if backend not in engines:
            settings = {"engine_args": {"block_size": BLOCK}} if backend == "vllm" else {}
            config = RolloutConfig(backend=backend, kv_cache_gib=0.03, max_num_seqs=8, **settings)
            engines[backend] = MADE_BY[backend](
                EngineSpec(
                    path=str(models["tied"]),
                    config=config,
                    vocabulary=VOCABULARY,
                    device="cpu",
                    max_model_tokens=96,
                    partial_rollouts=True,
                )
            )
        return engines[backend]

    return get


@pytest.fixture(params=ENGINES)
def engine(request, made, models):
    """With the weights of `tied`, of version 0."""
    engine = made(request.param)
    engine.update_weights(weights(models["tied"]), 0)
    return engine


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def before_step(engine, patch, number, happens):
    """`happens()` while the engine makes the step before this one, from 0."""
    steps = iter(range(1000))

    def counted(step):
        def made(*args, **kwargs):
            if next(steps) == number - 1:
                happens()
            return step(*args, **kwargs)

        return made

    where, name = (engine.llm.llm_engine, "step") if hasattr(engine, "llm") else (engine.model, "forward")
    patch.setattr(where, name, counted(getattr(where, name)))


def generate(engine, sampling=SAMPLING, num_prompts=8, policy_version=0):
    requests = [(prompt, 0, 1000 + prompt.index) for prompt in make_prompts(num_prompts)]
    return in_order(engine.generate(requests, sampling, policy_version))


def events_of(logits_TV):
    """float64 [T, NUM_IDS]: the log-probabilities of events."""
    probs = logits_TV[:, :NUM_IDS].double().softmax(-1)
    first, second = VOCABULARY.stop_ids
    probs[:, first] += probs[:, second]
    return probs.log().numpy()


@torch.no_grad()
def sampled_logprobs(old, new, rollout, changed):
    """Of each token, where the weights change after the first `changed` tokens: what was read before stays as it was
    read. float64 [T]."""
    ids = torch.tensor(np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).astype(np.int64))[None]
    read = len(rollout.prompt.token_ids) - 1 + changed  # by the old weights; the last drawn token is read by the new
    before = old(input_ids=ids[:, :read], use_cache=True)
    after = new(input_ids=ids[:, read:-1], past_key_values=before.past_key_values, use_cache=True)
    logits = torch.cat([before.logits[0, len(rollout.prompt.token_ids) - 1 :], after.logits[0]])
    events = np.where(rollout.response_ids == VOCABULARY.stop_ids[1], VOCABULARY.stop_ids[0], rollout.response_ids)
    return events_of(logits)[np.arange(len(events)), events]


def test_each_token_is_of_the_weights_that_it_was_drawn_with(engine, models, monkeypatch):
    old, new = (AutoModelForCausalLM.from_pretrained(models[name]).eval() for name in ("tied", "tied_new"))
    before_step(engine, monkeypatch, 5, lambda: engine.incoming.leave(new.state_dict(), 3))
    rollouts = generate(engine)
    mixed = [rollout for rollout in rollouts if len(rollout) > 5]
    assert len(mixed) >= 4
    fresh = []
    for rollout in rollouts:
        assert rollout.version_T.tolist() == ([0] * 5 + [3] * len(rollout))[: len(rollout)]
        assert rollout.policy_version == 0 and (rollout.token_versions is None) == (len(rollout) <= 5)
        if len(rollout) > 5:
            expected = sampled_logprobs(old, new, rollout, 5)
            np.testing.assert_allclose(rollout.sampled_logprobs, expected, **CLOSE)
            fresh.append(np.abs(sampled_logprobs(new, new, rollout, 5) - expected)[5:].max())
    assert min(fresh) > 0.01, "the cache of the older weights is kept"
    [later] = generate(engine, num_prompts=1, policy_version=2)  # of version 2 or newer
    assert later.policy_version == 3 and later.token_versions is None
    np.testing.assert_allclose(later.sampled_logprobs, sampled_logprobs(new, new, later, 1), **CLOSE)


def test_an_update_with_equal_weights_leaves_greedy_answers_as_they_are(engine, models, monkeypatch):
    plain = generate(engine, GREEDY)
    before_step(engine, monkeypatch, 4, lambda: engine.incoming.leave(weights(models["tied"]), 1))
    interrupted = generate(engine, GREEDY)
    assert any(rollout.token_versions is not None for rollout in interrupted)
    for one, other in zip(plain, interrupted, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, **CLOSE)


def test_of_weights_that_come_one_after_another_the_newest_are_taken(engine, models, monkeypatch):
    def two():
        engine.incoming.leave(weights(models["untied"]), 1)
        engine.incoming.leave(weights(models["tied_new"]), 2)

    before_step(engine, monkeypatch, 3, two)
    assert {version for rollout in generate(engine) for version in rollout.version_T.tolist()} == {0, 2}
    with pytest.raises(StageError, match="asked for policy version 4 or a newer one, the engine holds 2"):
        generate(engine, policy_version=4)


def test_weights_of_another_model_end_the_answers_that_wait_for_them(engine, models):
    engine.incoming.leave({"no.such.weight": torch.zeros(1)}, 1)
    with pytest.raises(StageError):
        generate(engine)
    assert generate(engine)[0].policy_version == 0


def test_a_request_that_begins_under_new_weights_shares_nothing_with_older_ones(made, models):
    """Answers to one prompt, of which the last begin when others have ended: the weights changed in between."""
    engine = made("vllm")
    engine.update_weights(weights(models["tied"]), 0)
    old, new = (AutoModelForCausalLM.from_pretrained(models[name]).eval() for name in ("tied", "tied_new"))
    prompt = Prompt(
        index=0, token_ids=(np.arange(2 * BLOCK + 3) * 7 % 60).astype(np.int32), text="", answer=None, source=""
    )
    requests = [(prompt, number, 1000 + number) for number in range(16)]
    groups = engine.generate(requests, SAMPLING, 0, group_size=1)
    found = dict(next(groups))
    engine.incoming.leave(new.state_dict(), 1)
    for group in groups:
        found |= group
    begun_later = [rollout for rollout in found.values() if rollout.policy_version == 1]
    assert len(found) == 16 and begun_later and any(r.token_versions is not None for r in found.values())
    for rollout in begun_later:
        np.testing.assert_allclose(rollout.sampled_logprobs, sampled_logprobs(new, new, rollout, 1), **CLOSE)
    for rollout in found.values():
        if rollout.token_versions is not None:
            expected = sampled_logprobs(old, new, rollout, int((rollout.version_T == 0).sum()))
            np.testing.assert_allclose(rollout.sampled_logprobs, expected, **CLOSE)
