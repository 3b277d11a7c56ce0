"""KDRL's objectives: in expectation over every event of a small vocabulary, and event by event."""
# V events

import pytest
import torch

from opsd.ops.losses.policy import kdrl, kdrl_advantage, kdrl_mask

VOCAB = 5
TEACHER_V = torch.tensor([0.4, -1.0, 0.3, 1.5, -0.2], dtype=torch.float64).log_softmax(0)
ADVANTAGE_V = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5], dtype=torch.float64)
NOTHING_V = torch.zeros(VOCAB, dtype=torch.float64)


def student_logits():
    return torch.tensor([0.1, 0.9, -0.7, 0.0, -2.0], dtype=torch.float64, requires_grad=True)


def buckets(logprobs_V):
    """Row y: the event y as the sampled one, all others as the rest. [V, 2]."""
    return torch.stack([logprobs_V, torch.log1p(-logprobs_V.exp())], dim=1)


def objective(function, logits, **options):
    return function(buckets(logits.log_softmax(0)), buckets(TEACHER_V), **options)


def expected_gradient(loss_V, logits):
    """Of the loss of every event, weighted by how often the student samples it; the sampling has no gradient."""
    (gradient,) = torch.autograd.grad((logits.softmax(0).detach() * loss_V).sum(), logits)
    return gradient


def reverse_kl_gradient():
    logits = student_logits()
    value = (logits.softmax(0) * (logits.log_softmax(0) - TEACHER_V)).sum()
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("function", [kdrl, kdrl_advantage])
def test_without_reward_the_expected_gradient_is_the_reverse_kls(function):
    logits = student_logits()
    loss = objective(function, logits, advantage_N=NOTHING_V, coefficient=1.0)
    torch.testing.assert_close(expected_gradient(loss, logits), reverse_kl_gradient())


def test_k1_as_a_loss_would_teach_nothing():
    """Why it is not offered."""
    logits = student_logits()
    k1 = logits.log_softmax(0) - TEACHER_V
    torch.testing.assert_close(expected_gradient(k1, logits), torch.zeros(VOCAB, dtype=torch.float64))
    assert reverse_kl_gradient().abs().max() > 0.1


def test_values_of_each_event():
    logits = student_logits()
    student = logits.log_softmax(0)
    policy = -ADVANTAGE_V * student
    k2 = (TEACHER_V - student).square() / 2
    options = {"advantage_N": ADVANTAGE_V}
    torch.testing.assert_close(objective(kdrl, logits, **options), policy + 2e-3 * k2)
    in_advantage = -(ADVANTAGE_V + 0.3 * (TEACHER_V - student)) * student
    torch.testing.assert_close(objective(kdrl_advantage, logits, **options, coefficient=0.3), in_advantage)
    wrong = torch.tensor([True, False, True, False, False])
    masked = objective(kdrl_mask, logits, **options, wrong_N=wrong, coefficient=0.3)
    torch.testing.assert_close(masked, policy + 0.3 * k2 * wrong)


def test_both_forms_have_one_gradient_and_the_rewards_part_is_reinforce():
    gradients = []
    for function in (kdrl, kdrl_advantage):
        logits = student_logits()
        loss = objective(function, logits, advantage_N=ADVANTAGE_V, coefficient=0.5)
        gradients.append(expected_gradient(loss, logits))
    torch.testing.assert_close(gradients[0], gradients[1])
    logits = student_logits()
    (reward,) = torch.autograd.grad((logits.softmax(0) * ADVANTAGE_V).sum(), logits)
    torch.testing.assert_close(gradients[0], 0.5 * reverse_kl_gradient() - reward)


def test_the_mask_takes_the_teacher_away_from_right_answers_only():
    wrong = torch.tensor([True, False, True, False, False])
    logits = student_logits()
    loss = objective(kdrl_mask, logits, advantage_N=NOTHING_V, wrong_N=wrong, coefficient=1.0)
    assert (loss[wrong] > 0).all() and (loss[~wrong] == 0).all()
    assert objective(kdrl_mask, logits, advantage_N=NOTHING_V, wrong_N=~wrong & wrong).abs().max() == 0


def test_one_value_a_token_is_asked_for():
    models = torch.zeros(4, 2), torch.zeros(4, 2)
    for function in (kdrl, kdrl_advantage):
        with pytest.raises(ValueError, match=r"advantage_N must have shape \(4,\), got \(1,\)"):
            function(*models, advantage_N=torch.zeros(1))
    with pytest.raises(ValueError, match=r"wrong_N must have shape \(4,\), got \(2,\)"):
        kdrl_mask(*models, advantage_N=torch.zeros(4), wrong_N=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="same buckets"):
        kdrl(torch.zeros(4, 2), torch.zeros(4, 3), advantage_N=torch.zeros(4))
