"""What a teacher behind HTTP is not asked, without a server."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.config import TeacherConfig
from opsd.errors import StageError
from opsd.teacher.pool import TeacherPool
from opsd.types import Mixture, Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=40, stop_ids=(0,))


@pytest.mark.parametrize("backend", ["http", "openai"])
def test_mixed_embeddings_are_not_sent_as_if_they_were_tokens(backend):
    [item] = scored_rollouts([4], VOCABULARY)
    other_ids = np.concatenate([item.rollout.prompt.token_ids, item.rollout.response_ids])
    mixed = replace(item.rollout, mixture=Mixture(other_ids=other_ids, own_share=0.5))
    cfg = TeacherConfig(backend=backend, urls=["http://127.0.0.1:1"])
    pool = TeacherPool(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64)
    with pytest.raises(StageError, match=f"backend={backend} reads token ids, not mixed embeddings"):
        pool.begin([{0: mixed}])
