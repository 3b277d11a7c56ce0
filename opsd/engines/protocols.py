"""What an engine is, whoever made it: nothing here loads vLLM or Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

from opsd.engines.incoming import Incoming
from opsd.engines.sampling import Sampling
from opsd.types import Prompt, Rollout, TeacherScores, Vocabulary

if TYPE_CHECKING:  # it loads Ray
    from opsd.engines.work import Work

Request: TypeAlias = tuple[Prompt, int, int]  # a prompt, the sample's number and its seed


class Engine(Protocol):
    """One model in one process, made of an EngineSpec: vLLM's or transformers'."""

    vocabulary: Vocabulary  # may be replaced between two calls, by one with other shared ids
    returns_hidden: bool  # likewise: whether the scores have the hidden states
    max_num_seqs: int  # that it generates at once, at most
    incoming: Incoming  # weights that it takes in between two steps of `generate`

    def generate(
        self,
        requests: Sequence[Request] | Work,
        sampling: Sampling,
        policy_version: int,
        group_size: int | None = None,
    ) -> Iterator[dict[int, Rollout]]:
        """A rollout for each request, by its place, in groups as they finish.

        `group_size`: rollouts in a group, at least, but for the last one; None: as the engine has them. Raises
        StageError where the engine holds the weights of another policy version; newer ones will do where it takes some
        in meanwhile (EngineSpec.partial_rollouts).
        """
        ...

    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        """This model's log-probabilities on the response rows, in the order of `rollouts`."""
        ...

    def update_weights(self, named: dict[str, Tensor], policy_version: int) -> None:
        """A full Hugging Face state dict into the running model. Raises StageError where its names are others."""
        ...
