"""loss.payload=hidden: the teacher's hidden states are its whole distribution, from whatever engine they come."""

import pytest

from tests.integration.runs import TRANSFORMERS, finished, losses, train, weights

NUM_STEPS = 4
EVERY_EVENT = ("teacher.top_k=64", "loss.support=union", "loss.payload=logprobs")  # of the tiny pair's vocabulary
SHORT = (f"num_steps={NUM_STEPS}", "eval.num_kl_prompts=0")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param((), id="plain"),
        pytest.param(
            ("loss.divergence=jsd", "+loss.options={beta: 0.3}", "method=adakd"),
            id="adakd and jsd",
            marks=pytest.mark.long,  # the head's own tests have the oracle of every divergence
        ),
    ],
)
def test_by_default_the_loss_is_the_dense_one(pair, tmp_path, method):
    """As where every event has a bucket of its own, which the tiny vocabulary allows."""
    known = (*SHORT, *TRANSFORMERS, "teacher.top_k=64", *method)
    hidden = finished(pair, tmp_path / "hidden", *known)
    dense = finished(pair, tmp_path / "dense", *known, *EVERY_EVENT)
    assert losses(hidden) == pytest.approx(losses(dense), abs=2e-5)
    moved = weights(dense)
    for name, weight in weights(hidden).items():
        assert (weight - moved[name]).abs().max() < 1e-3, name


@pytest.mark.long
def test_any_engine_and_any_number_of_ranks_give_the_same_loss(pair, tmp_path):
    known = (*SHORT, "selector=all", "loss.payload=hidden", "rollout.backend=transformers")
    one = finished(pair, tmp_path / "one", *known, "teacher.backend=transformers")
    coarse = finished(pair, tmp_path / "coarse", *known[:-2], *TRANSFORMERS, "teacher.top_k=2", "loss.support=teacher")
    two = finished(pair, tmp_path / "two", *known, "learner.num_workers=2", "teacher.num_workers=2")
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert abs(losses(coarse)[0] - losses(one)[0]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("loss.divergence=policy_gradient",), "loss must be a sum over tokens"),
        (("teacher.scoring=prompt_logprobs",), "loss.payload=hidden needs teacher.backend=vllm"),
        (("loss.residual=true",), "loss.payload=hidden leaves nothing out"),
        (("teacher.follow_decay=0.9",), "teacher.follow_decay changes it"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(pair, tmp_path, settings, said):
    run = train(pair, tmp_path / "run", "loss.payload=hidden", *settings)
    assert run.returncode != 0
    assert said in run.stderr and "Traceback" not in run.stderr
