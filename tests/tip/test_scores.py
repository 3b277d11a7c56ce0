"""Scores against their formulas, written out with numpy in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.types import TokenStats
from tip import scaling, scores
from tip.scaling import ranks
from tip.scores import DEFAULTS, FUSED, READS, SCORES, ScoreOptions, compares_models

CLIP = DEFAULTS.clip_quantile


def make_stats(num_tokens=400, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    entropy, reverse, forward, distance, norm, mass, paid = torch.rand(
        7, num_tokens, generator=generator, dtype=torch.float64
    )
    worth, student, teacher = torch.rand(3, num_tokens, generator=generator, dtype=torch.float64)
    return TokenStats(
        entropy_T=entropy.to(dtype),
        reverse_kl_T=(4 * reverse**3).to(dtype),
        forward_kl_T=(3 * forward**2).to(dtype),
        compatibility_T=mass.sqrt().to(dtype),
        attention_T=paid.to(dtype),
        student_logprob_T=(-5 * student).to(dtype),
        teacher_logprob_T=(-8 * teacher).to(dtype),
        extra={
            "hellinger_T": distance.to(dtype),
            "grad_norm_T": (2 * norm**2).to(dtype),
            "ier_T": (9 * worth).to(dtype),
        },
    )


def with_other(stats, name, others):
    """`stats` with the statistic of that name from `others`."""
    if name in stats.extra:
        return replace(stats, extra={**stats.extra, name: others.extra[name]})
    return replace(stats, **{name: getattr(others, name)})


def drawing_from(seed):
    return ScoreOptions(generator=torch.Generator().manual_seed(seed))


def numpy_minmax(values, clip_quantile=1.0):
    values = np.minimum(values, np.quantile(values, clip_quantile))
    return (values - values.min()) / (values.max() - values.min())


def numpy_quantile_scale(values):
    low, high = np.quantile(values, [0.05, 0.95])
    return (np.clip(values, low, high) - low) / (high - low)


def numpy_ranks(values):
    """By comparison of all pairs: the mean place of each value among its equals."""
    below, equal = (values < values[:, None]).sum(1), (values == values[:, None]).sum(1)
    return (below + (equal - 1) / 2) / max(1, len(values) - 1)


def expected_scores(stats, scaling, clip_quantile):
    entropy, reverse, forward = (
        values.double().numpy() for values in (stats.entropy_T, stats.reverse_kl_T, stats.forward_kl_T)
    )
    if scaling == "minmax":
        h, d = numpy_minmax(entropy, clip_quantile), numpy_minmax(reverse)
    else:
        h, d = numpy_quantile_scale(entropy), numpy_quantile_scale(reverse)
    soft_or = 1 - (1 - h) * (1 - d)  # the identity of eq. 7; the code has the sum form
    student, teacher = stats.student_logprob_T.numpy(), stats.teacher_logprob_T.numpy()
    worth, gap = stats.extra["ier_T"].numpy(), np.abs(np.exp(teacher) - np.exp(student))
    return {
        "dial": gap,
        "ier": worth,
        "sampled_rkl": student - teacher,
        "sampled_rkl_min": teacher - student,
        "sparse_advantage": np.abs(teacher - student),
        "surprisal": -student,
        "soft_or": soft_or,
        "entropy": h,
        "divergence": reverse,
        "q3": forward * (1 - h),
        "bottom": -soft_or,
        "hellinger": stats.extra["hellinger_T"].numpy(),
        "grad_norm": stats.extra["grad_norm_T"].numpy(),
        "attention": stats.attention_T.numpy(),
        "teachability": numpy_quantile_scale(forward) * numpy_quantile_scale(stats.compatibility_T.numpy()),
    }


@pytest.mark.parametrize("name", sorted(name for name in SCORES if name != "random" and "_ier" not in name))
@pytest.mark.parametrize(("scaling", "clip_quantile"), [("minmax", CLIP), ("minmax", 0.7), ("quantile", CLIP)])
@pytest.mark.parametrize("num_tokens", [2, 3, 101, 400])
def test_score_matches_its_formula(name, scaling, clip_quantile, num_tokens):
    stats = make_stats(num_tokens)
    score = SCORES[name](stats, ScoreOptions(scaling=scaling, clip_quantile=clip_quantile))
    np.testing.assert_allclose(score.numpy(), expected_scores(stats, scaling, clip_quantile)[name], atol=1e-12)


@pytest.mark.parametrize("name", sorted(FUSED))
@pytest.mark.parametrize("scaling", ["minmax", "quantile"])
@pytest.mark.parametrize("num_tokens", [1, 2, 101])
def test_fusions_are_of_the_ranks(name, scaling, num_tokens):
    stats, options = make_stats(num_tokens), ScoreOptions(scaling=scaling)
    u, v = numpy_ranks(SCORES[name](stats, options).numpy()), numpy_ranks(stats.extra["ier_T"].numpy())
    np.testing.assert_allclose(SCORES[f"{name}_or_ier"](stats, options).numpy(), u + v - u * v, atol=1e-12)
    np.testing.assert_allclose(SCORES[f"{name}_and_ier"](stats, options).numpy(), u * v, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, CLIP, 1.0])
@pytest.mark.parametrize("num_values", [1, 2, 7, 100])
def test_quantile_is_torch_quantile(share, num_values):
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(scaling.quantile(values, share), torch.quantile(values, share))


def test_quantile_covers_batches_that_torch_quantile_refuses():
    values = torch.zeros(2**24 + 1)
    values[0] = 1.0
    assert scaling.quantile(values, CLIP) == 0 and scaling.quantile(values, 1.0) == 1


def test_entropy_outlier_does_not_flatten_the_others():
    entropy = torch.cat([torch.linspace(0, 0.1, 99), torch.tensor([1.0])])
    stats = TokenStats(entropy_T=entropy, reverse_kl_T=torch.zeros(100), forward_kl_T=torch.zeros(100))
    clipped = SCORES["entropy"](stats)
    assert clipped[-1] == 1 and clipped[49] > 0.45
    assert SCORES["entropy"](stats, ScoreOptions(clip_quantile=1.0))[49] < 0.06


def test_quantile_scaling_resists_a_divergence_outlier():
    reverse = torch.cat([torch.linspace(0, 1, 99), torch.tensor([1000.0])])
    stats = TokenStats(entropy_T=torch.zeros(100), reverse_kl_T=reverse, forward_kl_T=torch.zeros(100))
    assert SCORES["soft_or"](stats)[49] < 1e-3
    robust = SCORES["soft_or"](stats, ScoreOptions(scaling="quantile"))
    assert robust[49] == pytest.approx(0.5, abs=0.02) and robust[-1] == 1 and robust[0] == 0


@pytest.mark.parametrize("scaling", ["minmax", "quantile"])
def test_constant_axis_scales_to_zero(scaling):
    constant = torch.full((5,), 0.3)
    reverse = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    stats = TokenStats(entropy_T=constant, reverse_kl_T=reverse, forward_kl_T=reverse)
    assert SCORES["entropy"](stats, ScoreOptions(scaling=scaling)).tolist() == [0.0] * 5
    assert torch.equal(SCORES["q3"](stats, ScoreOptions(scaling=scaling)), reverse)
    soft_or = SCORES["soft_or"](stats, ScoreOptions(scaling=scaling))
    assert soft_or[0] == 0 and soft_or[4] == 1 and soft_or.isfinite().all()


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("scaling", ["minmax", "quantile"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_every_score_takes_the_same_options_and_any_float_dtype(name, scaling, dtype, num_tokens):
    options = ScoreOptions(scaling=scaling, clip_quantile=0.9, generator=torch.Generator())
    score = SCORES[name](make_stats(num_tokens, dtype=dtype), options)
    assert score.shape == (num_tokens,) and score.isfinite().all()


def test_low_precision_input_is_scaled_in_float32():
    stats = make_stats(dtype=torch.bfloat16)
    expected = 1 - (1 - numpy_minmax(stats.entropy_T.double().numpy(), CLIP)) * (
        1 - numpy_minmax(stats.reverse_kl_T.double().numpy())
    )
    np.testing.assert_allclose(SCORES["soft_or"](stats).numpy(), expected, atol=1e-6)


def test_random_draws_from_its_generator_and_ignores_the_tokens():
    first, second = (SCORES["random"](make_stats(5000, seed=seed), drawing_from(3)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, SCORES["random"](make_stats(5000), drawing_from(4)))
    assert first.min() >= 0 and first.max() < 1
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / 5000) ** 0.5


def test_random_without_generator_follows_the_global_seed():
    torch.manual_seed(5)
    first = SCORES["random"](make_stats(10))
    torch.manual_seed(5)
    assert torch.equal(first, SCORES["random"](make_stats(10)))


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_score_reads_what_it_says(name):
    """Other numbers in a statistic change the score where READS has it, and only there."""

    def score(stats):
        return SCORES[name](stats, drawing_from(0))

    stats, others = make_stats(), make_stats(seed=1)
    changed = {f for f in stats.known() if not torch.equal(score(with_other(stats, f, others)), score(stats))}
    assert changed == set(READS[name])


def test_a_score_of_a_users_own_may_compare_the_models():
    comparing = {name for name in SCORES if compares_models(name)}
    assert comparing == set(SCORES) - {
        "entropy",
        "random",
        "attention",
        "dial",
        "sampled_rkl",
        "sampled_rkl_min",
        "sparse_advantage",
        "surprisal",
    }
    assert compares_models("surprise")


def test_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="scaling must be one of minmax, quantile, got 'log'"):
        SCORES["soft_or"](make_stats(), ScoreOptions(scaling="log"))


def test_a_high_divergence_off_the_students_candidates_is_not_teachable():
    tokens = torch.linspace(0, 1, 21)
    stats = TokenStats(
        entropy_T=tokens, reverse_kl_T=tokens, forward_kl_T=tokens, compatibility_T=torch.cat([tokens[:-1], tokens[:1]])
    )
    score = SCORES["teachability"](stats)
    assert score[-1] == 0 and score.argmax() == 19


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hellinger", "hellinger_T"),
        ("grad_norm", "grad_norm_T"),
        ("teachability", "compatibility_T"),
        ("attention", "attention_T"),
        ("dial", "student_logprob_T"),
        ("entropy_and_ier", "ier_T"),
    ],
)
def test_statistics_that_lack_what_a_score_needs_are_refused(name, field):
    values = torch.rand(5)
    stats = scores.TokenStats(entropy_T=values, reverse_kl_T=values, forward_kl_T=values)
    with pytest.raises(ValueError, match=f"needs the statistic {field}, which is not known: a run has it where"):
        SCORES[name](stats)


@pytest.mark.parametrize("name", ["soft_or", "entropy", "divergence", "q3", "random", "bottom"])
def test_the_papers_scores_need_no_more_than_entropy_and_two_divergences(name):
    values = torch.rand(5)
    assert len(SCORES[name](scores.TokenStats(entropy_T=values, reverse_kl_T=values, forward_kl_T=values))) == 5


def test_dial_is_a_power_of_the_logarithmic_mean_times_the_log_ratio():
    stats = make_stats()
    p, q = stats.student_logprob_T.exp(), stats.teacher_logprob_T.exp()
    mean = (q - p) / (q.log() - p.log())
    for beta in (0.0, 0.4, 1.0, 1.2):
        torch.testing.assert_close(SCORES["dial"](stats, beta=beta), mean**beta * (q / p).log().abs())
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        SCORES["dial"](stats, beta=-1.0)


def test_dial_is_finite_where_the_models_agree_or_the_teacher_rules_the_token_out():
    logprobs = torch.tensor([-0.5, -1e-9, -1.0, -0.1]), torch.tensor([-0.5, -1e-9, -torch.inf, -0.2])
    stats = replace(make_stats(4), student_logprob_T=logprobs[0], teacher_logprob_T=logprobs[1])
    for beta in (1.0, 1.2):
        score = SCORES["dial"](stats, beta=beta)
        assert score[:2].tolist() == [0, 0] and score.isfinite().all() and score[3] > 0
    assert SCORES["dial"](stats)[2].item() == pytest.approx(np.exp(-1))


def test_equal_values_share_a_rank():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 0.0, 3.0])).tolist() == [0.75, 0.25, 0.75, 0.0, 0.75]
    assert ranks(torch.tensor([7.0])).tolist() == [0] and ranks(torch.zeros(0)).tolist() == []
