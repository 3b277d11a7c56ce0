"""A measured run on tiny models: its figures are those of its answers, and one command makes it again exactly."""

import pytest
import torch

from opsd.errors import ConfigError
from opsd.types import Selection, StepReport
from scripts.ablation.in_process import Step, config
from scripts.ablation.measures import measured_run, selection_figures
from tests.integration.runs import arguments
from tests.opsd.process_group import leave_group
from tests.tiny_models import make_tiny_pair
from tests.tip.batches import make_batch

OF_A_RUN = ("losses", "evaluations", "selection", "cosine")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    pair = make_tiny_pair(tmp_path_factory.mktemp("pair"))
    own = arguments(pair, "unused", "selector=entropy", "selector.ratio=0.25", "data.grader=final_hash", "num_steps=3")
    return [each for each in own if not each.startswith("output_dir=")]


@pytest.mark.slow
def test_a_run_can_be_made_again_exactly(settings):
    leave_group()
    first, second = (measured_run(settings, 2, 5) for _ in range(2))
    assert {name: first[name] for name in OF_A_RUN} == {name: second[name] for name in OF_A_RUN}
    assert [each["step"] for each in first["evaluations"]] == [0, 2, 3]
    for each in first["evaluations"]:
        assert len(each["greedy"]) == len(each["samples"]) == 5
        assert each["accuracy"] == each["greedy"].count("1") / 5
        assert each["mean_at_8"] == sum(map(int, each["samples"])) / 40
    assert [len(each.get("kl", [])) for each in first["evaluations"]] == [0, 0, 5]
    tokens = [each["trained_tokens"] for each in first["evaluations"]]
    assert 0 == tokens[0] < tokens[1] < tokens[2] <= 3 * 12 * 12 * 0.25


def test_what_no_ablation_can_run_is_refused(settings):
    for setting, wanted in (("answers=mixed stats=learner", "answers=student"), ("stats=learner", "stats=rollout")):
        with pytest.raises(ConfigError, match=f"an ablation's run needs {wanted}"):
            config([*settings, *setting.split()])


def test_selection_figures_are_means_over_the_kept_tokens_by_weight():
    batch = make_batch((5, 3))
    selection = Selection(index_N=torch.tensor([1, 4, 5]), weight_N=torch.tensor([1.0, 2.0, 1.0]))
    report = StepReport(loss=1.0, grad_norm=1.0, learning_rate=1.0, num_kept=3, num_trunk_tokens=9)
    step = Step(
        batch=batch, scored=None, selection=selection, report=report, learner_s=0.0, learner_peak_mib=0.0, cosine=None
    )
    found = selection_figures(step)
    entropy, divergence = batch.tokens.entropy_T, batch.tokens.reverse_kl_T
    assert found["entropy"] == pytest.approx(float(entropy[1] + 2 * entropy[4] + entropy[5]) / 4)
    assert found["position"] == pytest.approx((1 / 4 + 2 * 1.0 + 0.0) / 4)
    high_entropy, high_divergence = (axis > axis.sort().values[3] for axis in (entropy, divergence))
    kept = [(bool(high_entropy[t]), bool(high_divergence[t]), w) for t, w in ((1, 1), (4, 2), (5, 1))]
    for name, kind in {"q1": (True, True), "q2": (True, False), "q3": (False, True), "q4": (False, False)}.items():
        assert found[name] == pytest.approx(sum(w for *own, w in kept if tuple(own) == kind) / 4)
