"""Students that cannot be packed, and heads of every form: found before the first step, and right where they train."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    MistralConfig,
    PhiConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import opsd.learner.group
from opsd.config.engine import EngineSpec, RolloutConfig
from opsd.config.run import StudentConfig
from opsd.engines.groups import in_order
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.errors import ConfigError
from opsd.learner.group import LearnerGroup
from opsd.learner.loading import open_student
from opsd.learner.model import DistillationModel, shard
from opsd.learner.packing import pack
from opsd.learner.step import token_stats
from opsd.learner.verify import has_chunks, keeps_sequences_apart, require_student_head
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Prompt, ScoredRollout, Selection, Vocabulary
from tests.opsd.builders import batch_of
from tests.opsd.process_group import one_rank
from tests.tiny_models import SIZES

VOCABULARY = Vocabulary(size=60, stop_ids=(2,))
CPU = torch.device("cpu")
LINEAR = dict(
    head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
STATE_SPACE = dict(
    attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8
)
PACKED = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "a window": MistralConfig(**SIZES, sliding_window=4),
    "experts": Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
ALONE = {
    "lfm2, a convolution": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "qwen3.5, linear attention": Qwen3_5TextConfig(**SIZES, **LINEAR),
    "bamba, a state space": BambaConfig(**SIZES, **STATE_SPACE),
    "bloom, attention that is not told": BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
}

FORMS = {
    "phi, a bias": PhiConfig(**SIZES),
    "gemma 2, a soft cap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "granite, a divisor": GraniteConfig(**SIZES, logits_scaling=0.4),
    "cohere, a multiplier": CohereConfig(**SIZES, logit_scale=0.25),
}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in {**PACKED, **ALONE}.items():
        torch.manual_seed(0)
        found[name] = str(tmp_path_factory.mktemp("student"))
        AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(found[name])
    return found


def sharded(path, dtype="float32", divergence=reverse_kl):
    causal_lm = open_student(StudentConfig(path=path, dtype=dtype), rank=0, device="cpu")
    model = DistillationModel(causal_lm, divergence, VOCABULARY)
    shard(model, device="cpu", num_ranks=1, dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*PACKED, *ALONE])
def test_whether_a_student_can_be_packed_is_measured(name, dtype, folders):
    assert keeps_sequences_apart(sharded(folders[name], dtype), dtype, CPU) == (name in PACKED)


def test_chunks_by_place_in_the_row_are_too_long_for_the_measurement_and_known_by_name():
    config = Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=16)
    assert has_chunks(SimpleNamespace(config=config))
    assert not has_chunks(SimpleNamespace(config=PACKED["qwen3"]))


def scored_by_itself(path):
    """Sampled answers with the engine's own log-probabilities, and the same engine's scores of them."""
    config = RolloutConfig(backend="transformers")
    spec = EngineSpec(path=path, vocabulary=VOCABULARY, config=config, device="cpu", max_model_tokens=64)
    engine = TransformersEngine(spec)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(index=i, token_ids=rng.integers(3, 60, n).astype(np.int32), text="", answer=None, source="test")
        for i, n in enumerate([3, 9, 5, 4])
    ]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8, num_candidates=4)
    rollouts = in_order(engine.generate([(prompt, 0, 1 + prompt.index) for prompt in prompts], sampling, 0))
    return [
        ScoredRollout(rollout=rollout, scores=scores)
        for rollout, scores in zip(rollouts, engine.score(rollouts, 8), strict=True)
    ]


def true_logprobs(path, item):
    """float64 [T], of each answer alone, stop ids being one."""
    ids = torch.from_numpy(np.concatenate([item.rollout.prompt.token_ids, item.rollout.response_ids])).long()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, len(item.rollout.prompt.token_ids) - 1 : -1, :60].double()
    return logits.log_softmax(-1).gather(1, ids[-len(item.rollout) :, None])[:, 0]


@pytest.mark.parametrize("name", list(ALONE)[:3])
def test_rollouts_statistics_and_gradients_are_those_of_each_answer_alone(name, folders):
    """And packed they are not, by a tenth of a nat and more, silently."""
    path = folders[name]
    scored = scored_by_itself(path)
    expected = [true_logprobs(path, item) for item in scored]
    for item, logprobs in zip(scored, expected, strict=True):
        for found in (item.rollout.sampled_logprobs, item.scores.sampled_logprobs):
            np.testing.assert_allclose(found, logprobs.numpy(), atol=1e-4)

    every = Selection(index_N=torch.arange(sum(map(len, expected))), weight_N=torch.ones(sum(map(len, expected))))
    model, truth = sharded(path), torch.cat(expected)
    [alone], [packed] = (
        pack(batch_of(scored), every, "teacher", VOCABULARY, num_ranks=1, max_tokens=max_tokens)
        for max_tokens in (0, 1000)
    )
    assert (len(alone), len(packed)) == (4, 1)
    found = student_logprobs(model, alone)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)
    assert (student_logprobs(model, packed) - truth).abs().max() > 0.1

    require_equal_gradients(sharded(path, divergence=sampled_logprob), path, alone)


def require_equal_gradients(model, path, batches):
    """Of the sampled tokens' log-probabilities, in every weight; `batches` hold one answer each."""
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    for batch in batches:
        logprobs = plain(batch.token_ids_L[None], use_cache=False).logits[0, batch.row_N, :60].log_softmax(-1)
        sampled = logprobs.gather(1, batch.support_NU[:, :1])[:, 0]
        (batch.weight_N * sampled).sum().backward()
    for batch in batches:
        model(batch)[0].backward()
    for key, parameter in model.causal_lm.named_parameters():
        wanted = plain.get_parameter(key).grad
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted, rtol=1e-3, atol=1e-5, msg=key)


def sampled_logprob(student_NB, teacher_NB):
    """The sampled event is first in every support."""
    return student_NB[:, 0]


def student_logprobs(model, batches):
    index_N, stats = token_stats(model, batches, device=CPU)
    return stats.student_logprob_T[index_N.argsort()].double()


@pytest.mark.parametrize("name", list(FORMS))
def test_a_head_of_its_own_form_has_the_models_values_and_gradients(name, tmp_path):
    """A bias, a soft cap or a scale: rollouts, scores, statistics, and the gradient of every weight."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(FORMS[name]))
    if causal_lm.lm_head.bias is not None:
        torch.nn.init.normal_(causal_lm.lm_head.bias)
    causal_lm.save_pretrained(tmp_path)
    path = str(tmp_path)
    model = sharded(path, divergence=sampled_logprob)
    require_student_head(model, path, CPU)
    scored = scored_by_itself(path)
    expected = [true_logprobs(path, item) for item in scored]
    for item, logprobs in zip(scored, expected, strict=True):
        for found in (item.rollout.sampled_logprobs, item.scores.sampled_logprobs):
            np.testing.assert_allclose(found, logprobs.numpy(), atol=1e-4)
    truth = torch.cat(expected)
    every = Selection(index_N=torch.arange(len(truth)), weight_N=torch.ones(len(truth)))
    [batches] = pack(batch_of(scored), every, "teacher", VOCABULARY, num_ranks=1, max_tokens=0)
    torch.testing.assert_close(student_logprobs(model, batches), truth, rtol=0, atol=1e-4)
    require_equal_gradients(model, path, batches)


def test_a_head_of_another_form_is_refused_by_name(folders, monkeypatch):
    model = sharded(folders["qwen3"])
    forward = model.causal_lm.forward

    def cubed(**inputs):
        output = forward(**inputs)
        output.logits = output.logits**3
        return output

    monkeypatch.setattr(model.causal_lm, "forward", cubed)
    with pytest.raises(ConfigError, match="student.path=the/student: Qwen3ForCausalLM makes logits of another form"):
        require_student_head(model, "the/student", CPU)


def test_a_plain_head_passes_on_the_sharded_student(folders):
    for dtype in ("float32", "bfloat16"):
        model = sharded(folders["qwen3"], dtype)
        require_student_head(model, "x", CPU)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # sharded again


@pytest.mark.parametrize(("answers", "tokens"), [([True, True], 512), ([True, False], 0)])
def test_a_student_that_cannot_be_packed_gets_a_micro_batch_for_each_sequence(answers, tokens, monkeypatch, capsys):
    monkeypatch.setattr(opsd.learner.group, "gather", lambda stage, refs: answers)
    group = LearnerGroup.__new__(LearnerGroup)
    vars(group).update(student_path="the/student", micro_batch_tokens=512, _starting=[])
    group.wait_ready()
    assert group.micro_batch_tokens == tokens
    assert ("the/student" in capsys.readouterr().err) == (tokens == 0)
