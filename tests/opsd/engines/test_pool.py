"""What leaves the engines is looked at before anything is made of it."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.engines.pool import require_numbers
from opsd.errors import StageError
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts


def test_an_answer_that_was_drawn_from_nan_names_the_model_and_its_weights_version():
    first, second = (item.rollout for item in scored_rollouts([3, 4], Vocabulary(size=20, stop_ids=(0,))))
    require_numbers("rollout", [first, second])
    logprobs = second.sampled_logprobs.copy()
    logprobs[2] = np.nan
    broken = replace(second, sampled_logprobs=logprobs, policy_version=5, prompt=replace(second.prompt, index=11))
    said = (
        r"^rollout: worker 1, /models/s: the model's log-probabilities of its own answer to test, row 12, are NaN "
        r"\(policy version 5\)"
    )
    with pytest.raises(StageError, match=said):
        require_numbers("rollout: worker 1, /models/s", [first, broken])
    require_numbers("rollout", [replace(first, sampled_logprobs=np.full(3, -np.inf, np.float32))])  # no shared token
