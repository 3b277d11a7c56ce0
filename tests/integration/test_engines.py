"""Both engines on real tiny models: every log-probability against a plain transformers forward pass in float64.

The vLLM engines live in this process and are started once for the module.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opsd.config.backends import ENGINES
from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.engines.groups import in_order
from opsd.engines.worker import MADE_BY
from opsd.errors import StageError
from opsd.types import Prompt, Rollout
from tests.integration.engine_reference import (
    CLOSE,
    NUM_IDS,
    OWN_EOS,
    SAMPLING,
    VOCABULARY,
    cpu_engine_process,
    expect_candidates,
    expect_top,
    generate,
    make_models,
    make_prompts,
    reference_events,
)

pytestmark = pytest.mark.slow
ALL_IDS = replace(SAMPLING, num_candidates=NUM_IDS + 6)  # more candidates than there are events


@pytest.fixture(scope="module", autouse=True)
def process_of_an_actor():
    """What the actor's environment would have set before the first import."""
    with cpu_engine_process():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine_of(models):
    """engine_of(backend, model name, settings): made at first use. The scoring bound forces several groups a call."""
    engines = {}

    def get(backend: str, name: str, **settings: str):
        key = backend, name, *settings.values()
        if key not in engines:
            small = {"kv_cache_gib": 0.03, "max_num_seqs": 64, "max_batch_tokens": 100}
            cfg = TeacherConfig(path=str(models[name]), backend=backend, **small, **settings)
            spec = teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64)
            engines[key] = MADE_BY[backend](spec)
        return engines[key]

    return get


@pytest.mark.parametrize("backend", ENGINES)
def test_top_k_draws_from_the_likeliest_only(engine_of, backend):
    """Two stop ids are one event, so a token among the two likeliest may be the third event at most."""

    def ranks(rollouts):
        events = [np.where(np.isin(r.response_ids, VOCABULARY.stop_ids), 2, r.response_ids) for r in rollouts]
        return np.concatenate([
            (r.candidate_ids == event[:, None]).argmax(1) + 99 * ~(r.candidate_ids == event[:, None]).any(1)
            for r, event in zip(rollouts, events, strict=True)
        ])  # fmt: skip

    engine = engine_of(backend, "tied")
    assert ranks(generate(engine)).max() > 3
    limited = ranks(generate(engine, replace(SAMPLING, top_k=2)))
    assert limited.max() <= 2 and set(limited) >= {0, 1}


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("name", ["tied", "untied", "own_head"])
def test_rollouts_carry_the_models_own_logprobs(engine_of, models, backend, name):
    for rollout in generate(engine_of(backend, name), ALL_IDS):
        reference, events = reference_events(models[name], rollout)
        np.testing.assert_allclose(rollout.sampled_logprobs, reference[np.arange(len(events)), events], **CLOSE)
        expect_top(rollout.candidate_ids, rollout.candidate_logprobs, reference, ALL_IDS.num_candidates)


@pytest.mark.parametrize("backend", ENGINES)
def test_logprobs_are_at_temperature_1_whatever_the_sampling(engine_of, models, backend):
    for rollout in generate(engine_of(backend, "tied"), replace(ALL_IDS, temperature=0.7, top_p=0.9)):
        reference, _ = reference_events(models["tied"], rollout)
        expect_top(rollout.candidate_ids, rollout.candidate_logprobs, reference, ALL_IDS.num_candidates)


def test_vllm_hands_over_rollouts_in_groups_before_all_are_finished(engine_of):
    engine = engine_of("vllm", "tied")
    prompts = make_prompts(20)
    requests = [(prompt, 0, 1000 + prompt.index) for prompt in prompts]
    groups = list(engine.generate(requests, SAMPLING, 0, group_size=4))
    assert len(groups) > 2 and min(len(group) for group in groups[:-1]) >= 4
    assert max(len(rollout) for rollout in groups[0].values()) < SAMPLING.max_tokens
    [whole] = engine.generate(requests, SAMPLING, 0)
    assert {place for group in groups for place in group} == set(range(20))
    for place, rollout in enumerate(in_order(groups)):
        assert rollout.prompt is prompts[place]
        assert rollout.response_ids.tolist() == whole[place].response_ids.tolist()


@pytest.mark.parametrize("backend", ENGINES)
def test_either_stop_id_ends_an_answer_and_nothing_else_does(engine_of, backend):
    rollouts = generate(engine_of(backend, "tied"), num_prompts=60)
    last_ids = {int(rollout.response_ids[-1]) for rollout in rollouts if rollout.stopped}
    assert last_ids == set(VOCABULARY.stop_ids)
    for rollout in rollouts:
        assert not np.isin(rollout.response_ids[:-1], VOCABULARY.stop_ids).any()
        assert rollout.stopped or len(rollout) == SAMPLING.max_tokens
    assert any(OWN_EOS in rollout.response_ids[:-1] for rollout in rollouts)


@pytest.mark.parametrize("backend", ENGINES)
def test_a_seed_draws_the_same_tokens_in_another_batch(engine_of, backend):
    engine = engine_of(backend, "tied")
    full = generate(engine)
    chosen = [17, 3, 4, 11]
    again = in_order(engine.generate([(full[i].prompt, 5, 1000 + i) for i in chosen], SAMPLING, 0))
    for i, rollout in zip(chosen, again, strict=True):
        assert rollout.response_ids.tolist() == full[i].response_ids.tolist()
        np.testing.assert_allclose(rollout.sampled_logprobs, full[i].sampled_logprobs, **CLOSE)
        assert rollout.sample == 5 and rollout.prompt is full[i].prompt
    reseeded = in_order(engine.generate([(full[i].prompt, 0, 7 + i) for i in chosen], SAMPLING, 0))
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(again, reseeded, strict=True))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("name", ["untied", "padded"])
def test_scores_are_the_teachers_logprobs_on_the_response_rows(engine_of, models, backend, name):
    """The student is another model; the padded teacher puts mass on ids that do not exist for it."""
    rollouts = generate(engine_of("transformers", "tied"), ALL_IDS)
    for top_k in (6, NUM_IDS + 16):
        for rollout, scores in zip(rollouts, engine_of(backend, name).score(rollouts, top_k), strict=True):
            reference, events = reference_events(models[name], rollout)
            expect_top(scores.top_ids, scores.top_logprobs, reference, top_k)
            expected = reference[np.arange(len(events)), events]
            np.testing.assert_allclose(scores.sampled_logprobs, expected, **CLOSE)
            expect_candidates(scores, rollout, reference)
            entropy = -(np.exp(reference) * np.where(np.isneginf(reference), 0.0, reference)).sum(axis=1)
            np.testing.assert_allclose(scores.entropy, entropy, **CLOSE)


@pytest.mark.parametrize("name", ["untied", "padded"])
def test_vllms_own_way_names_the_top_k_alone(engine_of, models, name):
    """It knows the padded and the stop mass of its top ids only, so it is exact where all are named."""
    rollouts = generate(engine_of("transformers", "tied"), ALL_IDS)
    for top_k in (6, NUM_IDS + 16):
        scored = engine_of("vllm", name, scoring="prompt_logprobs").score(rollouts, top_k)
        for rollout, scores in zip(rollouts, scored, strict=True):
            reference, events = reference_events(models[name], rollout)
            if top_k > NUM_IDS:
                expect_top(scores.top_ids, scores.top_logprobs, reference, top_k)
                expected = reference[np.arange(len(events)), events]
                np.testing.assert_allclose(scores.sampled_logprobs, expected, **CLOSE)
            elif name == "untied":
                named = (scores.top_ids >= 0) & (scores.top_ids != VOCABULARY.stop_event)
                expected = np.take_along_axis(reference, np.where(named, scores.top_ids, 0), axis=1)
                np.testing.assert_allclose(scores.top_logprobs[named], expected[named], **CLOSE)
            assert scores.top_ids.max() < NUM_IDS
            assert scores.candidate_logprobs is None and scores.entropy is None


@pytest.mark.parametrize("backend", ENGINES)
def test_logits_of_a_bfloat16_teacher_are_summed_and_kept_in_float32(engine_of, backend):
    """Logits in bfloat16 above 1 are multiples of 1/128, and so would be their differences."""
    rollouts = generate(engine_of("transformers", "tied"))
    scored = engine_of(backend, "untied", dtype="bfloat16").score(rollouts, 4)
    differences = np.concatenate([scores.top_logprobs[:, :1] - scores.top_logprobs[:, 1:] for scores in scored])
    from_grid = np.abs(differences * 128 - np.round(differences * 128))
    assert (from_grid > 0.01).mean() > 0.9
    exact = engine_of(backend, "untied").score(rollouts, 4)
    error = np.concatenate([a.sampled_logprobs - b.sampled_logprobs for a, b in zip(scored, exact, strict=True)])
    assert np.abs(error).mean() < 0.1


@pytest.mark.parametrize("backend", ENGINES)
def test_scores_follow_the_teachers_own_prompt_where_there_is_one(engine_of, models, backend):
    """Self-distillation: the student saw 3 to 11 tokens, the same model as teacher sees 1 to 36 others."""
    engine, path = engine_of(backend, "untied"), models["untied"]
    rollouts = generate(engine_of("transformers", "untied"), ALL_IDS)
    rng = np.random.default_rng(3)
    lengths = [1 + 7 * place % 36 for place in range(len(rollouts))]
    shown = [
        replace(rollout.prompt, teacher_token_ids=rng.integers(0, NUM_IDS, length, dtype=np.int32))
        for rollout, length in zip(rollouts, lengths, strict=True)
    ]
    longer = [len(prompt.teacher_token_ids) - len(prompt.token_ids) for prompt in shown]
    assert min(longer) < 0 < max(longer)
    scored = engine.score([replace(r, prompt=p) for r, p in zip(rollouts, shown, strict=True)], NUM_IDS)
    for rollout, prompt, scores in zip(rollouts, shown, scored, strict=True):
        as_scored = replace(rollout, prompt=replace(prompt, token_ids=prompt.teacher_token_ids))
        reference, events = reference_events(path, as_scored)
        expect_top(scores.top_ids, scores.top_logprobs, reference, NUM_IDS)
        np.testing.assert_allclose(scores.sampled_logprobs, reference[np.arange(len(events)), events], **CLOSE)
        assert np.abs(scores.sampled_logprobs - rollout.sampled_logprobs).max() > 0.1
        expect_candidates(scores, rollout, reference)


def test_a_model_scores_its_own_rollouts_as_it_sampled_them(engine_of):
    engine = engine_of("vllm", "untied")
    rollouts = generate(engine, ALL_IDS)
    for rollout, scores in zip(rollouts, engine.score(rollouts, ALL_IDS.num_candidates), strict=True):
        np.testing.assert_allclose(scores.sampled_logprobs, rollout.sampled_logprobs, **CLOSE)
        np.testing.assert_allclose(scores.top_logprobs, rollout.candidate_logprobs, **CLOSE)
        np.testing.assert_allclose(scores.candidate_logprobs, rollout.candidate_logprobs, **CLOSE)


def test_a_sequence_longer_than_the_scoring_bound_is_scored_whole(engine_of, models):
    """The engine was made for 64 tokens of context and steps of 100 tokens: fill the context to its last token."""
    prompt = Prompt(index=0, token_ids=np.arange(10, 50, dtype=np.int32), text="", answer=None, source="t")
    response = np.arange(10, 34, dtype=np.int32)
    rollout = Rollout(
        prompt=prompt,
        sample=0,
        response_ids=response,
        sampled_logprobs=np.zeros(24, np.float32),
        candidate_ids=np.full((24, 1), -1, np.int32),
        candidate_logprobs=np.full((24, 1), -np.inf, np.float32),
        stopped=False,
        policy_version=0,
    )
    scores = engine_of("vllm", "tied").score([rollout] * 3, top_k=NUM_IDS)
    reference, events = reference_events(models["tied"], rollout)
    for each in scores:
        np.testing.assert_allclose(each.sampled_logprobs, reference[np.arange(24), events], **CLOSE)


def test_both_engines_agree_on_greedy_answers(engine_of):
    greedy = replace(SAMPLING, temperature=0.0)
    for name in ("tied", "untied"):
        of_vllm, of_transformers = (generate(engine_of(backend, name), greedy) for backend in ENGINES)
        for one, other in zip(of_vllm, of_transformers, strict=True):
            assert one.response_ids.tolist() == other.response_ids.tolist()
            assert one.stopped == other.stopped


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize(("name", "with_head"), [("tied", True), ("tied", False), ("untied", True), ("own_head", True)])
def test_new_weights_replace_the_old_ones_while_the_engine_runs(models, engine_of, backend, name, with_head):
    """Different weights on purpose: the same ones would hide a head or a packed layer that keeps its old values."""
    engine = engine_of(backend, name)
    before = engine.score(generate(engine, policy_version=engine.policy_version), NUM_IDS)
    weights = AutoModelForCausalLM.from_pretrained(models[f"{name}_new"], dtype=torch.float32).state_dict()
    if not with_head:
        del weights["lm_head.weight"]
    try:
        engine.update_weights(weights, policy_version=1)
        rollouts = generate(engine, ALL_IDS, policy_version=1)
        for rollout, scores in zip(rollouts, engine.score(rollouts, NUM_IDS), strict=True):
            reference, _ = reference_events(models[f"{name}_new"], rollout)
            expect_top(rollout.candidate_ids, rollout.candidate_logprobs, reference, ALL_IDS.num_candidates)
            expect_top(scores.top_ids, scores.top_logprobs, reference, NUM_IDS)
            assert rollout.policy_version == 1
            old, _ = reference_events(models[name], rollout)
            assert np.abs(old[:, 0] - reference[:, 0]).max() > 0.1
    finally:
        old_weights = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).state_dict()
        engine.update_weights(old_weights, policy_version=0)
    after = engine.score(generate(engine), NUM_IDS)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, **CLOSE)


@pytest.mark.parametrize("backend", ENGINES)
def test_weights_of_another_model_are_refused_and_change_nothing(models, engine_of, backend):
    engine = engine_of(backend, "tied")
    before = generate(engine)
    weights = AutoModelForCausalLM.from_pretrained(models["tied_new"], dtype=torch.float32).state_dict()
    layer = "model.layers.0.self_attn.k_proj.weight"
    incomplete = {name: weight for name, weight in weights.items() if name != layer}
    with pytest.raises(StageError, match=layer):
        engine.update_weights(incomplete, policy_version=1)
    with pytest.raises(StageError, match="model.layers.7.mlp.up_proj.weight"):
        engine.update_weights({**weights, "model.layers.7.mlp.up_proj.weight": torch.zeros(1)}, policy_version=1)
    for one, other in zip(before, generate(engine), strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
