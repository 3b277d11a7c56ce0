"""What a rollout says of the weights that drew its tokens."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.payload.whole import wholes
from opsd.sequences import Trajectory, version_fields
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts

VERSIONS = np.array([3, 3, 4, 6], np.int32)


@pytest.fixture
def rollout():
    [item] = scored_rollouts([4], Vocabulary(size=20, stop_ids=(0,)))
    return item.rollout


def test_the_oldest_weights_are_the_rollouts_and_one_version_needs_no_array(rollout):
    mixed = replace(rollout, **version_fields(VERSIONS))
    assert mixed.policy_version == 3 and mixed.version_T.tolist() == [3, 3, 4, 6]
    whole = replace(rollout, **version_fields(np.full(4, 7, np.int32)))
    assert whole.policy_version == 7 and whole.token_versions is None and whole.version_T.tolist() == [7] * 4


@pytest.mark.parametrize(
    ("oldest", "versions", "message"),
    [
        (3, [3, 4, 5], r"token_versions must have shape \(4,\), got \(3,\)"),
        (2, [3, 3, 4, 6], r"token_versions must ascend from policy_version=2, got \[3 3 4 6\]"),
        (3, [3, 4, 3, 6], r"token_versions must ascend from policy_version=3"),
    ],
)
def test_versions_of_other_tokens_or_going_back_are_refused(rollout, oldest, versions, message):
    with pytest.raises(ValueError, match=message):
        replace(rollout, policy_version=oldest, token_versions=np.array(versions, np.int32))


def test_a_trajectory_of_several_weights_is_read_whole_by_its_teacher(rollout):
    read_ids = np.insert(rollout.response_ids, 2, [5, 6])
    turns = Trajectory(read_ids=read_ids, place_T=np.array([0, 1, 4, 5]), turn_starts=(0, 2), end="answered")
    [whole] = wholes([replace(rollout, trajectory=turns, **version_fields(VERSIONS))])
    assert whole.response_ids.tolist() == read_ids.tolist()
