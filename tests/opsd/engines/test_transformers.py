"""The transformers engine alone: its batches, its refusals."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig, Qwen3ForCausalLM

from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.engines.groups import in_order
from opsd.engines.row_scores import CHUNK_BYTES
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.errors import ConfigError, StageError
from opsd.types import Mixture, Prompt, Vocabulary
from tests.opsd.builders import merge_stops
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 1))  # the model has 64 ids
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=12, num_candidates=4)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("tiny"), tied=True, seed=0, eos_token_id=0, scale=2.0)


def make_engine(path, **settings) -> TransformersEngine:
    cfg = TeacherConfig(path=str(path), backend="transformers", **settings)
    return TransformersEngine(teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64))


def make_prompts(num_prompts: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(index=i, token_ids=rng.integers(2, 60, 3 + i % 5).astype(np.int32), text="", answer=None, source="test")
        for i in range(num_prompts)
    ]


def generate(engine, num_prompts=10, sampling=SAMPLING, policy_version=0):
    requests = [(prompt, number, 100 + number) for number, prompt in enumerate(make_prompts(num_prompts))]
    return in_order(engine.generate(requests, sampling, policy_version))


def test_a_request_draws_the_same_in_any_batch_size(model_path):
    together = generate(make_engine(model_path))
    apart = generate(make_engine(model_path, max_num_seqs=3))
    for one, other in zip(together, apart, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=1e-5)
    assert len({tuple(rollout.response_ids) for rollout in together}) > 5  # different seeds, different answers


def test_padded_ids_are_never_sampled(model_path):
    hot = Sampling(temperature=20.0, top_p=1.0, max_tokens=40, num_candidates=4)
    tokens = np.concatenate([rollout.response_ids for rollout in generate(make_engine(model_path), 40, hot)])
    assert tokens.max() == 59  # at this temperature every shared id turns up, and no padded one


def test_scores_do_not_depend_on_the_batch_bound(model_path):
    rollouts = generate(make_engine(model_path))
    all_at_once = make_engine(model_path).score(rollouts, top_k=5)
    engine = make_engine(model_path, max_batch_tokens=30)
    assert engine.max_batch_tokens == 30  # or the two could not differ
    bounded = engine.score(rollouts, top_k=5)
    for one, other in zip(all_at_once, bounded, strict=True):
        np.testing.assert_array_equal(one.top_ids, other.top_ids)
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=1e-5)
        np.testing.assert_allclose(one.candidate_logprobs, other.candidate_logprobs, atol=1e-5)


def test_scores_in_small_head_chunks_are_the_same(model_path, monkeypatch):
    engine = make_engine(model_path)
    rollouts = generate(engine)
    whole = engine.score(rollouts, top_k=5)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 3 * 4 * 64)  # three rows
    for one, other in zip(whole, engine.score(rollouts, top_k=5), strict=True):
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=1e-5)


def test_a_teacher_in_bfloat16_scores_with_logits_in_float32(model_path):
    """With a head that makes logits near 20: those of bfloat16 are off by up to 0.06."""
    rollouts = generate(make_engine(model_path))
    engine = make_engine(model_path, dtype="bfloat16")
    head = engine.model.get_output_embeddings()
    head.weight.mul_(3.0)
    for rollout in rollouts[:4]:
        (score,) = engine.score([rollout], top_k=5)  # alone, as the trunk below
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
        with torch.no_grad():
            hidden = engine.model.base_model(input_ids=ids[None]).last_hidden_state[0, -len(rollout) - 1 : -1]
        logits = (hidden.double() @ head.weight.double().T)[:, : engine.vocabulary.size]
        assert logits.amax(1).median() > 15
        exact = merge_stops(logits.log_softmax(1), engine.vocabulary)
        found = torch.from_numpy(score.top_logprobs)
        expected = exact.gather(1, torch.from_numpy(score.top_ids).long())
        assert (found - expected).abs().max() < 1e-4


def test_an_engine_refuses_to_answer_for_weights_that_it_does_not_hold(model_path):
    engine = make_engine(model_path)
    with pytest.raises(StageError, match="asked for policy version 3, the engine holds 0"):  # those of its folder
        generate(engine, policy_version=3)
    engine.update_weights(engine.model.state_dict(), policy_version=3)
    assert generate(engine, policy_version=3)[0].policy_version == 3
    with pytest.raises(StageError, match="asked for policy version 4, the engine holds 3"):
        generate(engine, policy_version=4)


def test_attention_is_that_paid_by_the_token_and_all_after_it(model_path):
    rollouts = generate(make_engine(model_path))
    scores = make_engine(model_path, attention=True).score(rollouts, top_k=3)
    plain = make_engine(model_path).score(rollouts, top_k=3)
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    for rollout, score, other in zip(rollouts, scores, plain, strict=True):
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
        weights = torch.cat(model(ids[None], output_attentions=True).attentions).flatten(0, 1)  # [layers x heads, L, L]
        first = len(rollout.prompt.token_ids)
        expected = [weights[:, token:, token].mean().item() for token in range(first, len(ids))]
        np.testing.assert_allclose(score.attention, expected, atol=1e-6)
        np.testing.assert_allclose(score.top_logprobs, other.top_logprobs, atol=1e-5)
        assert other.attention is None


def test_no_work_is_no_error(model_path):
    engine = make_engine(model_path)
    assert list(engine.generate([], SAMPLING, 0)) == [] and engine.score([], top_k=4) == []


@pytest.mark.slow  # a process of its own that imports torch
def test_the_driver_imports_the_vllm_engine_without_vllm():
    code = "import sys, opsd.engines.vllm; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr


def test_a_mixture_is_scored_on_mixed_embeddings_and_leaves_its_neighbours_alone(model_path):
    engine = make_engine(model_path, max_batch_tokens=1000)
    plain = generate(engine, num_prompts=4)
    longest = max(plain, key=len)
    sequence = np.concatenate([longest.prompt.token_ids, longest.response_ids])
    mixture = Mixture(other_ids=sequence[::-1].copy(), own_share=0.6)
    mixed = replace(longest, mixture=mixture)
    scores, mixed_scores = engine.score(plain, 5), engine.score([*plain, mixed], 5)
    for one, other in zip(scores, mixed_scores[:-1], strict=True):
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    own, other = (model.get_input_embeddings()(torch.tensor(ids)) for ids in (sequence, mixture.other_ids))
    with torch.no_grad():
        logits_LV = model(inputs_embeds=(0.6 * own + 0.4 * other)[None]).logits[0, :, : VOCABULARY.size]
    rows_TV = logits_LV[len(longest.prompt.token_ids) - 1 : -1].log_softmax(-1)
    rows_TV[:, 0] = rows_TV[:, :2].logsumexp(-1)  # both stop ids are one event
    events = torch.tensor(longest.response_ids).long()
    expected = rows_TV.gather(1, events.masked_fill(events == 1, 0)[:, None])[:, 0]
    np.testing.assert_allclose(mixed_scores[-1].sampled_logprobs, expected.numpy(), atol=1e-5)


def test_an_ignored_token_is_neither_sampled_nor_scored(model_path):
    engine = make_engine(model_path)
    hot = Sampling(temperature=20.0, top_p=1.0, max_tokens=40, num_candidates=4)
    rollouts = generate(engine, 20, hot)
    tokens = np.concatenate([rollout.response_ids for rollout in rollouts])
    ignored = int(np.bincount(tokens, minlength=60)[2:].argmax()) + 2
    kept = [rollout for rollout in rollouts if ignored not in rollout.response_ids]
    before = engine.score(kept, top_k=60)
    engine.vocabulary = replace(VOCABULARY, foreign_ids=(ignored,))
    assert ignored not in np.concatenate([rollout.response_ids for rollout in generate(engine, 20, hot)])
    assert kept
    for plain, without in zip(before, engine.score(kept, top_k=60), strict=True):
        foreign = np.exp(plain.top_logprobs)[plain.top_ids == ignored]
        expected = plain.sampled_logprobs - np.log1p(-foreign)
        np.testing.assert_allclose(without.sampled_logprobs, expected, atol=1e-4)
        assert not (without.top_ids == ignored).any()


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 0, "pad_token_id": 0}


def saved(config, path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    model.save_pretrained(path)
    return model


def test_a_cap_on_attention_scores_is_kept(tmp_path):
    """transformers' sdpa leaves it out, with a line in its log at most."""
    shape = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma2Config(**SIZES, **shape, attn_logit_softcapping=0.1, final_logit_softcapping=None)
    model = saved(config, tmp_path)
    engine = make_engine(tmp_path)
    [rollout] = generate(engine, 1)
    ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
    with torch.no_grad():
        rows = model(input_ids=ids[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    expected = merge_stops(rows, VOCABULARY)
    events = [0 if token in VOCABULARY.stop_ids else token for token in rollout.response_ids.tolist()]
    wanted = expected[torch.arange(len(events)), events].numpy()
    np.testing.assert_allclose(rollout.sampled_logprobs, wanted, atol=1e-4)
    np.testing.assert_allclose(engine.score([rollout], 4)[0].sampled_logprobs, wanted, atol=1e-4)


def test_a_model_whose_logits_its_head_does_not_make_is_refused_by_name(model_path, monkeypatch):
    forward = Qwen3ForCausalLM.forward

    def cubed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits**3
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", cubed)
    with pytest.raises(ConfigError, match=rf"teacher.backend=transformers, path.*{model_path}.*Qwen3ForCausalLM"):
        make_engine(model_path)


def test_a_model_without_a_cache_is_refused_by_name(tmp_path):
    saved(MambaConfig(**SIZES, state_size=8), tmp_path)
    with pytest.raises(ConfigError, match="MambaForCausalLM has no cache of keys and values.*set backend=vllm"):
        generate(make_engine(tmp_path), 1)
