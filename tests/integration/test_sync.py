"""After a weight sync the running vLLM engine computes what the learner's weights say."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opsd.batch import held_here
from opsd.cluster.ray import ray_cluster
from opsd.config.engine import EngineSpec, RolloutConfig
from opsd.config.lora import LoraConfig
from opsd.config.run import LearnerConfig, StudentConfig
from opsd.engines.groups import in_order
from opsd.learner.group import LearnerGroup
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.rollout import RolloutPool
from opsd.types import Prompt, Selection, Vocabulary
from tests.opsd.builders import scored_rollouts
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
VOCABULARY = Vocabulary(size=64, stop_ids=(0,))
PROMPT = Prompt(index=0, token_ids=np.array([7, 9, 11, 4], np.int32), text="", answer=None, source="test")


def model_logprobs(path, rollout):
    """log-probability of each sampled token under the model in this folder."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.from_numpy(np.concatenate([PROMPT.token_ids, rollout.response_ids])).long()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0], -1)
    start = len(PROMPT.token_ids)
    return logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        pytest.param(True, LoraConfig(), id="tied"),
        pytest.param(False, LoraConfig(), id="untied", marks=pytest.mark.long),
        pytest.param(True, LoraConfig(rank=4, alpha=8.0), id="lora"),
    ],
)
def test_engine_equals_learner_after_every_sync(tied, lora, tmp_path):
    make_tiny_qwen3(tmp_path / "student", tied=tied, seed=4, eos_token_id=0, scale=2.0)
    student = StudentConfig(path=str(tmp_path / "student"), lora=lora)
    make_char_tokenizer(tmp_path / "student", eos_token_id=0)
    common = {"vocabulary": VOCABULARY, "device": "cpu"}
    with ray_cluster(dashboard=False):
        config = RolloutConfig(max_response_tokens=12, num_candidates=4)
        rollouts = RolloutPool(EngineSpec(path=student.path, config=config, max_model_tokens=32, **common), seed=0)
        learner = LearnerGroup(
            student, LearnerConfig(learning_rate=0.05), divergence=DIVERGENCES["reverse_kl"], support="teacher",
            num_steps=10, **common,
        )  # fmt: skip
        rollouts.wait_ready()
        learner.wait_ready()
        folders = [tmp_path / "student"]  # the weights of each version
        for version in range(3):
            rollouts.update_weights(learner.weights("float32"), policy_version=version)
            [rollout] = in_order(rollouts.sample([PROMPT], samples_per_prompt=1, step=version))
            assert rollout.policy_version == version
            np.testing.assert_allclose(rollout.sampled_logprobs, model_logprobs(folders[-1], rollout), atol=1e-4)
            if version > 0:
                older = model_logprobs(folders[-2], rollout)
                assert np.abs(rollout.sampled_logprobs - older).max() > 0.01, "equal weights would hide a lost sync"
            scored = held_here(scored_rollouts([6, 6], VOCABULARY, seed=10 * version), VOCABULARY)
            learner.train_step(scored, Selection(index_N=torch.arange(12), weight_N=torch.ones(12)))
            folders.append(tmp_path / f"after_{version}")
            learner.save_student(folders[-1])
