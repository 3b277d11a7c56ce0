"""The response rows of sequences that a vLLM worker runs over: their hidden states become scores where they are.

vLLM's own `prompt_logprobs` makes float32 log-probabilities [tokens, V] of every row of the prompt, then Python lists
of the largest. Here the rows of the response alone meet the head, in chunks, and arrays leave the worker. It hangs on
the one method that vLLM's V1 runner calls with the hidden states of every step, `_get_prompt_logprobs_dict`; so the
engine still generates, takes new weights and splits its layers as before. Sequences may be prefilled in parts, and
again after a preemption.

Measured on CPU only, with vLLM 0.32; on a GPU the engine is started with the V1 runner, and has not been run there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.engines.row_scores import RowScores, score_rows, teacher_scores
from opsd.ops.align import predicting_rows
from opsd.types import Rollout, TeacherScores, Vocabulary

HOOK = "_get_prompt_logprobs_dict"  # of vLLM's runner: (hidden states [tokens, D], tokens of each request) -> its own


class ResponseRows:
    """In each worker of an engine, one per rank of tensor parallelism; the first rank alone keeps the scores."""

    def __init__(self, runner: Any, *, keeps_scores: bool) -> None:
        self.runner = runner
        self.keeps_scores = keeps_scores
        self.rollouts: dict[str, Rollout] = {}  # by vLLM's names of their requests
        self.parts: dict[str, list[RowScores]] = {}  # of each request, one after another
        self.hidden: dict[str, list[Tensor]] = {}  # the rows that they come from, where these are asked for
        own = getattr(runner, HOOK)

        def with_scores(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            if self.rollouts:
                self._score(hidden_states, num_scheduled_tokens)
            return own(hidden_states, num_scheduled_tokens)

        setattr(runner, HOOK, with_scores)

    def expect(
        self, rollouts: Mapping[str, Rollout], top_k: int, vocabulary: Vocabulary, *, keeps_hidden: bool = False
    ) -> None:
        """Requests under these names are about to run: prompt and response of a rollout each, as one prompt."""
        self.rollouts, self.parts, self.hidden = dict(rollouts), {}, {}
        self.top_k, self.vocabulary, self.keeps_hidden = top_k, vocabulary, keeps_hidden

    def take(self) -> dict[str, TeacherScores]:
        """The scores of all expected rollouts, which are expected no longer."""
        rollouts, parts, hidden = self.rollouts, self.parts, self.hidden
        self.rollouts, self.parts, self.hidden = {}, {}, {}
        return {
            name: teacher_scores(
                parts[name], num_candidates=rollout.candidate_ids.shape[1], hidden=hidden.get(name, ())
            )
            for name, rollout in rollouts.items()
            if self.keeps_scores
        }

    def _score(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> None:
        """Those of the step's rows that predict a response token. All ranks do this, for the head is divided."""
        spans = {name: self._span(name, num) for name, num in num_scheduled_tokens.items() if name in self.rollouts}
        spans = {name: (rows, tokens) for name, (rows, tokens) in spans.items() if tokens.start < tokens.stop}
        if not spans:
            return
        hidden_RD = torch.cat([hidden_states[rows] for rows, _ in spans.values()])
        scores = score_rows(
            hidden_RD,
            self.runner.model.compute_logits,
            [(self.rollouts[name], tokens) for name, (_, tokens) in spans.items()],
            top_k=self.top_k,
            vocabulary=self.vocabulary,
        )
        if not self.keeps_scores:
            return
        lengths = [tokens.stop - tokens.start for _, tokens in spans.values()]
        hidden = hidden_RD.cpu().split(lengths) if self.keeps_hidden else None
        for place, (name, part) in enumerate(zip(spans, scores.to("cpu").split(lengths), strict=True)):
            if spans[name][1].start == 0:  # also where a preempted request begins anew
                self.parts[name], self.hidden[name] = [], []
            self.parts[name].append(part)
            if hidden is not None:
                self.hidden[name].append(hidden[place])

    def _span(self, name: str, num_tokens: int) -> tuple[slice, slice]:
        """Rows of the step's hidden states, and the response tokens that they predict; empty where there are none."""
        rollout = self.rollouts[name]
        first_row = int(predicting_rows(len(rollout.prompt.scored_after), np.arange(1))[0])
        begin = self.runner.requests[name].num_computed_tokens  # before this step
        start = max(begin, first_row)
        stop = max(start, min(begin + num_tokens, first_row + len(rollout)))
        offset = int(self.runner.query_start_loc.np[self.runner.input_batch.req_id_to_index[name]]) - begin
        return slice(offset + start, offset + stop), slice(start - first_row, stop - first_row)
