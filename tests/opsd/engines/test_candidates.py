"""The candidates of every rollout come back to it, whichever group they were taken out of and in whatever order."""

from dataclasses import replace

import numpy as np

from opsd.engines.candidates import away, put_back, taken_out, with_references
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts


def test_candidates_find_their_rollouts_again():
    rollouts = [item.rollout for item in scored_rollouts([4, 2, 5, 3], Vocabulary(size=20, stop_ids=(0,)))]
    rollouts[0] = replace(rollouts[0], policy_version=2, token_versions=np.array([2, 2, 3, 5], np.int32))
    store, known = {}, {}
    for name, places in (("a", (3, 0)), ("b", (1,))):
        written, store[name] = taken_out({place: rollouts[place] for place in places})
        known |= away(written, [(rollout.prompt, 3, 0) for rollout in rollouts], name)
    assert all(rollout.candidate_ids.size == rollout.candidate_logprobs.size == 0 for rollout in known.values())
    assert all(known[place].prompt is rollouts[place].prompt and known[place].sample == 3 for place in known)
    asked = [known[1], rollouts[2], known[0], known[3]]  # one that has never been away
    named, groups = with_references(asked)
    assert groups == ["b", "a"] and not any(name in repr(named) for name in ("'a'", "'b'"))
    for found, place in zip(put_back(named, [store[name] for name in groups]), (1, 2, 0, 3), strict=True):
        assert found.candidates is None
        np.testing.assert_array_equal(found.response_ids, rollouts[place].response_ids)
        np.testing.assert_array_equal(found.version_T, rollouts[place].version_T)
        np.testing.assert_array_equal(found.candidate_ids, rollouts[place].candidate_ids)
        np.testing.assert_array_equal(found.candidate_logprobs, rollouts[place].candidate_logprobs)
