"""The teacher's output head on a learner's rank: with it, hidden states are the teacher's whole distribution.

For `loss.payload=hidden`. Read from the weight files alone, so no rank ever holds the teacher; every rank has all of
it. Measured on CPU only.
"""
# N kept rows, V rows of the head, E the teacher's width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.errors import ConfigError
from opsd.learner.packing import MicroBatch
from opsd.models.head import head_form
from opsd.models.weights import model_without_weights, read_weight
from opsd.ops.head.form import PLAIN, HeadForm
from opsd.ops.head.loss import bucket_logprobs
from opsd.types import Vocabulary

NUM_CHECKED = 8  # rows of the first micro-batch
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # nats; both sides sum the same products in float32


@dataclass(frozen=True, kw_only=True)
class TeacherHead:
    path: str
    weight_VE: Tensor
    bias_V: Tensor | None = None
    form: HeadForm = PLAIN

    @torch.no_grad()
    def require_scores(self, batch: MicroBatch, vocabulary: Vocabulary) -> None:
        """Raises ConfigError where hidden states through this head are not what the teacher's engine said of its
        sampled tokens: then something stands between them that is not here, or the server serves other weights."""
        if batch.teacher_hidden_NE is None or len(batch.row_N) == 0:
            return
        rows = slice(0, NUM_CHECKED)
        logprobs_NB, _ = bucket_logprobs(
            batch.teacher_hidden_NE[rows],
            self.weight_VE,
            batch.support_NU[rows],
            vocab_size=vocabulary.size,
            stop_ids=vocabulary.stop_ids,
            foreign_ids=vocabulary.foreign_ids,
            bias_V=self.bias_V,
            form=self.form,
        )
        off = (logprobs_NB[:, 0] - batch.teacher_logprobs_NB[rows, 0]).abs().max().item()
        if not off <= TOLERANCE[batch.teacher_hidden_NE.dtype]:
            raise ConfigError(
                f"loss.payload=hidden: the teacher's hidden states times the lm_head of {self.path} are not the "
                f"teacher's log-probabilities: they differ by up to {off:.3g} nats; set loss.payload=logprobs"
            )


def load_teacher_head(path: str, *, trust_remote_code: bool, device: torch.device, dtype: str) -> TeacherHead:
    """Raises ConfigError where the folder has no files that hold it alone."""
    model = model_without_weights(path, trust_remote_code=trust_remote_code)
    head, found = model.get_output_embeddings(), {}
    for name in ("weight", "bias"):
        wanted = getattr(head, name, None)
        if wanted is None:
            continue
        value = read_weight(path, model, wanted)
        if value is None:
            raise ConfigError(
                f"loss.payload=hidden: no weight file of {path} holds the {name} of its lm_head: set "
                "loss.payload=logprobs"
            )
        found[name] = value.to(device, getattr(torch, dtype))
    return TeacherHead(path=path, weight_VE=found["weight"], bias_V=found.get("bias"), form=head_form(model.config))
