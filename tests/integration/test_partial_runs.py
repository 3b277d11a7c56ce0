"""Runs whose engines take new weights in mid-answer."""

import pytest

from tests.integration.runs import TRANSFORMERS, finished, training_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
PARTIAL = ("schedule.partial_rollouts=true", "schedule.max_staleness=1")
# Answers that take much longer than the learner's step, so that its weights find the next ones under way.
LONG = ("rollout.max_response_tokens=200", "learner.micro_batch_tokens=1200", "data.prompts_per_step=6")
SETTINGS = (*TRANSFORMERS, *LONG, *PARTIAL)


def expect_several_weights(lines, num_steps):
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert any(line["mixed_versions"] > 0 for line in lines)
    for line in lines:
        assert 0 <= line["staleness"] <= line["staleness_max"] <= 1
        if line["mixed_versions"] > 0:
            assert 0 < line["staleness"] < line["staleness_max"] == 1


def test_a_run_learns_from_answers_of_several_weights(pair, tmp_path):
    expect_several_weights(training_lines(finished(pair, tmp_path, *SETTINGS, "num_steps=4")), 4)


@pytest.mark.long
def test_a_run_of_vllm_engines_is_stopped_and_goes_on(pair, tmp_path):
    settings = (*SETTINGS, "rollout.backend=vllm", "rollout.num_workers=2", "num_steps=6")
    finished(pair, tmp_path, *settings, "stop_at_step=3")
    expect_several_weights(training_lines(finished(pair, tmp_path, *settings, "resume=auto")), 6)
