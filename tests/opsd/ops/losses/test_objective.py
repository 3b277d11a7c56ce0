"""The sum of a divergence and its terms, and what each part is given."""

import pickle
from functools import partial

import pytest
import torch

from opsd.config.loss import LossConfig
from opsd.errors import ConfigError
from opsd.hooks import bind_objective
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import forward_kl, jsd, reverse_kl
from opsd.ops.losses.objective import RESIDUAL_INPUTS, ROLLOUT_LOGPROB, Loss, Objective
from opsd.ops.losses.table import LOSSES
from opsd.ops.losses.terms import pearson
from opsd.ops.losses.token_adaptive import head_share


def scaled(student_NB, teacher_NB, *, scale_N, exponent=1.0):
    return scale_N * (student_NB[:, 0] - teacher_NB[:, 0]) ** exponent


def make_logprobs(seed, rows=7, buckets=5):
    return torch.randn(rows, buckets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(1)


def test_the_sum_weighs_each_part_and_gives_it_only_what_it_names():
    student, teacher, scale = make_logprobs(0), make_logprobs(1), torch.arange(7.0)
    second = Loss(partial(scaled, exponent=2.0), inputs=("scale_N",))
    objective = Objective(parts=((1.0, Loss(reverse_kl)), (0.25, second)))
    available = {"scale_N": scale, "support_NU": torch.zeros(7, 4)}
    assert objective.inputs == {"scale_N"} and set(objective.takes(available)) == {"scale_N"}
    expected = reverse_kl(student, teacher) + 0.25 * scale * (student[:, 0] - teacher[:, 0]) ** 2
    torch.testing.assert_close(objective(student, teacher, **available), expected)


def test_a_divergence_alone_keeps_its_value_bit_for_bit():
    student, teacher = make_logprobs(2), make_logprobs(3)
    assert torch.equal(Objective.of(reverse_kl)(student, teacher), reverse_kl(student, teacher))


def test_row_inputs_follow_their_rows_through_the_chunks_of_the_head():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    support = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(7)])
    arguments = (hidden, weight, support, make_logprobs(1), torch.rand(7, generator=generator), scaled)
    inputs = {"scale_N": torch.randn(7, generator=generator, dtype=torch.float64)}
    gradients = []
    for chunk_rows in (7, 2):
        loss, per_token = sparse_head_loss(*arguments, chunk_rows=chunk_rows, row_inputs=inputs)
        gradients.append((loss, per_token, torch.autograd.grad(loss, hidden)[0]))
    torch.testing.assert_close(gradients[0], gradients[1])
    student = (hidden @ weight.T).log_softmax(1).gather(1, support[:, :1])[:, 0]
    torch.testing.assert_close(gradients[0][1], (inputs["scale_N"] * (student - make_logprobs(1)[:, 0])).detach())


def test_a_configured_loss_travels_to_the_learner():
    loss = LossConfig(divergence="jsd", options={"beta": 0.3}, terms={"pearson": {"weight": 0.5}})
    objective = pickle.loads(pickle.dumps(bind_objective(loss)))
    student, teacher = make_logprobs(4), make_logprobs(5)
    plain = jsd(student, teacher, beta=0.3)
    term = 2 * (objective(student, teacher) - plain)
    named = [x[:, :-1].exp() for x in (student, teacher)]
    for row, value in enumerate(term.tolist()):
        correlation = torch.corrcoef(torch.stack([named[0][row], named[1][row]]))[0, 1]
        assert value == pytest.approx(1 - correlation.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "k1"}, "loss.divergence=k1: .* gradient of 0 in expectation"),
        ({"divergence": "revers_kl"}, "loss.divergence must be one of .*reverse_kl.*, got 'revers_kl'"),
        (
            {"divergence": "kdrl", "options": {"advantage_N": 1}},
            "loss.options: 'kdrl' takes coefficient, got advantage_N",
        ),
        ({"terms": {"pearsn": {"weight": 1.0}}}, "loss.terms must be one of .*pearson.*, got 'pearsn'"),
        ({"divergence": "pearson"}, "loss.divergence must be one of .*, got 'pearson'"),
        ({"divergence": "jsd", "options": {"beta": "a"}}, "loss.options.beta must be a number, got 'a'"),
        ({"divergence": "akl", "options": {"crossing": 1}}, "loss.options.crossing must be a text, got 1"),
        ({"divergence": "jsd", "options": {"beta": True}}, "loss.options.beta must be a number, got True"),
        (
            {"terms": {"sinkhorn": {"weight": 1.0, "iterations": 2.5}}},
            "loss.terms.sinkhorn.iterations must be a whole number, got 2.5",
        ),
        ({"terms": {"pearson": {}}}, r"loss.terms.pearson must look like \{weight: 0.1\}"),
    ],
)
def test_a_wrong_loss_is_refused_in_words(settings, message):
    with pytest.raises(ConfigError, match=message):
        bind_objective(LossConfig(**settings))


def test_the_residual_takes_the_place_of_the_reverse_kl_alone():
    objective = pickle.loads(
        pickle.dumps(bind_objective(LossConfig(residual=True, terms={"pearson": {"weight": 0.5}})))
    )
    assert objective.inputs == RESIDUAL_INPUTS
    assert bind_objective(LossConfig()).inputs == set()
    for name in ("forward_kl", "jsd", "kdrl", "policy_gradient"):
        with pytest.raises(ConfigError, match=f"^loss.residual=true needs loss.divergence=reverse_kl, got {name}"):
            bind_objective(LossConfig(divergence=name, residual=True))
    with pytest.raises(ConfigError, match="loss.divergence must be one of .*, got 'residual_reverse_kl'"):
        bind_objective(LossConfig(divergence="residual_reverse_kl"))


@pytest.mark.parametrize(("name", "cap"), [("policy_gradient", 1.5), ("reverse_kl", 2.0), ("kdrl", 1e9)])
def test_older_answers_weigh_what_the_newest_weights_think_of_them(name, cap):
    objective = pickle.loads(pickle.dumps(bind_objective(LossConfig(divergence=name, importance_cap=cap))))
    plain = bind_objective(LossConfig(divergence=name))
    student, teacher = make_logprobs(6).requires_grad_(), make_logprobs(7)
    rollout = student.detach()[:, 0] - torch.linspace(-1.0, 2.0, len(student), dtype=torch.float64)
    inputs = {"advantage_N": torch.linspace(-1.0, 1.0, len(student), dtype=torch.float64)}
    assert objective.inputs == plain.inputs | {ROLLOUT_LOGPROB}
    value = objective(student, teacher, **objective.takes(inputs | {ROLLOUT_LOGPROB: rollout}))
    ratio = (student.detach()[:, 0].exp() / rollout.exp()).clamp(max=cap)
    assert (ratio < cap).any() and ((ratio == cap).any() or cap > 100)
    wanted = ratio * plain(student, teacher, **plain.takes(inputs))
    torch.testing.assert_close(value, wanted)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (value, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_weighted_policy_gradient_is_on_average_that_of_the_newest_weights():
    """Exactly, over every token that the older weights may draw; without the weight it is another one."""
    newest = torch.log_softmax(torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64), 0).requires_grad_()
    older = torch.log_softmax(torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64), 0)
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def mean_gradient(draws, cap):
        objective = bind_objective(LossConfig(divergence="policy_gradient", importance_cap=cap))
        student = torch.stack([newest, newest], dim=1)  # slot 0 is the token drawn, a row for each
        inputs = {"advantage_N": advantage, ROLLOUT_LOGPROB: older}
        values = objective(student, student.detach(), **objective.takes(inputs))
        return torch.autograd.grad((draws.exp() * values).sum(), newest)[0]

    wanted = mean_gradient(newest.detach(), 0.0)
    torch.testing.assert_close(mean_gradient(older, 1e9), wanted)
    assert not torch.allclose(mean_gradient(older, 0.0), wanted, rtol=0.1)


def test_empty_slots_and_constant_rows_give_pearson_no_nan():
    student = torch.tensor([[-1.0, -torch.inf, -0.4587], [-1.0986, -1.0986, -1.0986]], dtype=torch.float64)
    student.requires_grad_()
    value = pearson(student, student.detach())
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


def test_forward_then_reverse_is_each_of_them_at_its_end():
    objective = bind_objective(LossConfig(divergence="forward_then_reverse"))
    student, teacher = make_logprobs(6), make_logprobs(7)
    share = torch.tensor([0.0, 1.0]).repeat_interleave(torch.tensor([4, 3]))
    expected = torch.cat([forward_kl(student, teacher)[:4], reverse_kl(student, teacher)[4:]])
    torch.testing.assert_close(objective(student, teacher, reverse_share_N=share), expected)


@pytest.mark.parametrize("name", sorted(name for name, entry in LOSSES.items() if Loss.of(entry).by_token))
@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_that_says_so_is_the_sum_of_its_parts_on_columns(name, size):
    student, teacher = 2.0 * make_logprobs(8, buckets=9), 2.0 * make_logprobs(9, buckets=9)
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    objective = bind_objective(LossConfig(divergence=name))
    inputs = {"reverse_share_N": torch.linspace(0.0, 1.0, 7)}
    of_rows = [loss.of_whole_rows(student, teacher) for _, loss in objective.parts]
    parts = [
        objective.on_columns(student_NC, teacher_NC, objective.takes(inputs), of_rows)
        for student_NC, teacher_NC in zip(student.split(size, dim=1), teacher.split(size, dim=1), strict=True)
    ]
    torch.testing.assert_close(sum(parts), objective(student, teacher, **objective.takes(inputs)))


def test_those_that_look_at_one_event_or_at_named_tokens_do_not_say_so():
    no_sums = {name for name, entry in LOSSES.items() if not Loss.of(entry).by_token}
    kdrl = {"policy_gradient", "kdrl", "kdrl_advantage", "kdrl_mask"}
    assert no_sums == kdrl | {"sign_log", "power", "sign_gate", "trust", "pearson", "kendall", "sinkhorn", "dac_kl"}


def test_what_is_needed_of_whole_rows_has_the_options_of_the_loss_and_is_none_itself():
    student, teacher = make_logprobs(8, buckets=9), make_logprobs(9, buckets=9)
    (_, loss), *_ = bind_objective(LossConfig(divergence="akl", options={"head_mass": 0.2})).parts
    assert torch.equal(
        loss.of_whole_rows(student, teacher)["head_share_N"], head_share(student, teacher, head_mass=0.2)
    )
    assert not torch.equal(head_share(student, teacher, head_mass=0.2), head_share(student, teacher))
    with pytest.raises(ConfigError, match="loss.options: 'akl' takes head_mass, crossing, got head_share_N"):
        bind_objective(LossConfig(divergence="akl", options={"head_share_N": 0.5}))
