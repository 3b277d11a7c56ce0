"""A transformers engine: exact log-probabilities of any causal model, without vLLM. Slower; the reference for it."""
# B sequences of a batch, L tokens of the longest, T response tokens, S steps, R rows, V vocabulary, D width,
# C candidates

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.engines.groups import score_in_groups
from opsd.engines.incoming import Incoming, require_version
from opsd.engines.logits import draw, event_logprobs, float32_logits, shared_logits, top_events, uniforms
from opsd.engines.protocols import Request
from opsd.engines.row_scores import score_rows, teacher_scores
from opsd.engines.sampling import Sampling
from opsd.engines.weights import complete_weights
from opsd.engines.work import Work, as_work, room_of
from opsd.errors import ConfigError
from opsd.models.head import head_difference, head_form, require_head
from opsd.ops.align import predicting_rows
from opsd.ops.mixing import mixed_embeddings
from opsd.sequences import version_fields
from opsd.types import Mixture, Rollout, TeacherScores


class TransformersEngine:
    """One model, in eval mode. Padded ids have no probability and all stop ids are merged, exactly."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.max_model_tokens` is no matter. Raises ConfigError where the logits are of a form not known here."""
        config = spec.config
        self.vocabulary = spec.vocabulary
        self.policy_version = 0  # the weights of `spec.path`, until others come
        self.partial_rollouts, self.incoming = spec.partial_rollouts, Incoming()
        self.device = torch.device(spec.device)
        self.max_num_seqs = config.max_num_seqs
        self.max_batch_tokens = config.scoring_bound or sys.maxsize  # padding counts
        self.scores_candidates = spec.scores_candidates
        self.returns_hidden = spec.returns_hidden
        self.returns_attention = isinstance(config, TeacherConfig) and config.attention
        eager = self.returns_attention or caps_attention(spec.path, spec.trust_remote_code)  # what eager alone does
        self.model = AutoModelForCausalLM.from_pretrained(
            spec.path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=spec.trust_remote_code,
            attn_implementation="eager" if eager else None,
        )
        self.model.eval().requires_grad_(False).to(self.device)
        # `score` applies the head by itself, so nothing else (a soft cap, a scale) may stand between it and the logits.
        self.head_form = head_form(self.model.config)
        difference = head_difference(self.model, self.head_form)
        require_head(f"{config.section}.backend=transformers, path", spec.path, self.model, self.head_form, difference)

    def generate(
        self,
        requests: Sequence[Request] | Work,
        sampling: Sampling,
        policy_version: int,
        group_size: int | None = None,
    ) -> Iterator[dict[int, Rollout]]:
        """A rollout for each request, by its place.

        A seed draws the same tokens in any batch on the CPU; on a GPU a batch of another size rounds otherwise.

        A batch of max_num_seqs finishes as one group, whatever `group_size` says. Weights that come meanwhile are taken
        in between two tokens, and what the cache holds of the older ones stays. Raises StageError where the engine
        holds the weights of another policy version.
        """
        self._take_in()
        require_version(self.policy_version, policy_version, or_newer=self.partial_rollouts)
        work = as_work(requests)
        while work.more and (batch := work.take(self.max_num_seqs, 0)):
            rollouts = self._generate_batch(list(batch.values()), sampling)
            yield dict(zip(batch, rollouts, strict=True))

    @torch.inference_mode()
    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        """This model's log-probabilities on the response rows, in the order of `rollouts`."""
        return score_in_groups(rollouts, self.max_batch_tokens, partial(self._score_group, top_k=top_k))

    def update_weights(self, named: dict[str, Tensor], policy_version: int) -> None:
        """Copy a full Hugging Face state dict (a tied `lm_head.weight` may be in it or not) into the model, in place.

        Raises StageError, with the model unchanged, where the names are not this model's.
        """
        own = self.model.state_dict()
        for name, weight in complete_weights(self.model, named).items():
            own[name].copy_(weight)
        self.policy_version = policy_version

    def _take_in(self) -> None:
        if self.incoming:
            self.update_weights(*self.incoming.take())

    @torch.inference_mode()
    def _generate_batch(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        """Decode until every sequence has stopped or is full; prompts are padded on the left."""
        prompt_ids = [torch.from_numpy(prompt.token_ids.astype(np.int64)) for prompt, _, _ in requests]
        token_ids_BL, mask_BL = (part.to(self.device) for part in _pad_left(prompt_ids))
        uniform_BT = torch.stack([uniforms(seed, sampling.max_tokens) for _, _, seed in requests]).to(self.device)
        stop_ids = torch.tensor(self.vocabulary.stop_ids, device=self.device)
        room_B = torch.tensor([room_of(request, sampling.max_tokens) for request in requests], device=self.device)
        done_B = torch.zeros(len(requests), dtype=torch.bool, device=self.device)
        cache = None
        steps = []  # of (tokens [B], their events' log-probabilities [B], candidate ids and log-probabilities [B, C])
        versions = []  # of the weights of each step
        for step in range(int(room_B.max())):
            self._take_in()
            versions.append(self.policy_version)
            position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -token_ids_BL.shape[1] :]
            output = self.model(
                input_ids=token_ids_BL,
                attention_mask=mask_BL,
                position_ids=position_BL,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise ConfigError(
                    f"{type(self.model).__name__} has no cache of keys and values, so the transformers engine cannot "
                    "generate with it: set backend=vllm"
                )
            logits_BV = shared_logits(output.logits[:, -1], self.vocabulary)
            token_B = draw(logits_BV, sampling, uniform_BT[:, step])
            events_BV = event_logprobs(logits_BV, self.vocabulary)
            logprob_B = events_BV.gather(1, self._events(token_B)[:, None])[:, 0]
            steps.append((token_B, logprob_B, *top_events(events_BV, sampling.num_candidates)))
            done_B |= torch.isin(token_B, stop_ids) | (room_B == step + 1)
            if done_B.all():
                break
            token_ids_BL = token_B[:, None]
            mask_BL = torch.cat([mask_BL, torch.ones_like(token_ids_BL)], dim=1)
        decoded = [torch.stack(part, dim=1) for part in zip(*steps, strict=True)]
        return self._cut_at_stop(requests, room_B.tolist(), decoded, np.array(versions, np.int32))

    def _cut_at_stop(
        self, requests: list[Request], rooms: list[int], decoded: list[Tensor], version_S: np.ndarray
    ) -> list[Rollout]:
        """`decoded`: the steps of `_generate_batch`, [B, steps, ...]; what follows a sequence's stop, or the end of its
        room, is not its own. `version_S`: the policy version of each step."""
        tokens, logprobs, candidate_ids, candidate_logprobs = (part.cpu().numpy() for part in decoded)
        rollouts = []
        for row, ((prompt, sample, _), room) in enumerate(zip(requests, rooms, strict=True)):
            is_stop_T = np.isin(tokens[row, :room], self.vocabulary.stop_ids)
            length = int(is_stop_T.argmax()) + 1 if is_stop_T.any() else len(is_stop_T)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sample=sample,
                    response_ids=tokens[row, :length].astype(np.int32),
                    sampled_logprobs=logprobs[row, :length],
                    candidate_ids=candidate_ids[row, :length],
                    candidate_logprobs=candidate_logprobs[row, :length],
                    stopped=bool(is_stop_T.any()),
                    **version_fields(version_S[:length]),
                )
            )
        return rollouts

    def _score_group(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        """One pass of the trunk, padded on the right: causal attention keeps the padding out without a mask."""
        sequences = [np.concatenate([rollout.prompt.scored_after, rollout.response_ids]) for rollout in rollouts]
        output = self.model.base_model(
            **self._trunk_inputs(rollouts, sequences), use_cache=False, output_attentions=self.returns_attention
        )
        scores = [
            self._score_rows(rollout, hidden_LD[_response_rows(rollout)], top_k)
            for rollout, hidden_LD in zip(rollouts, output.last_hidden_state, strict=True)
        ]
        if not self.returns_attention:
            return scores
        lengths = [len(ids) for ids in sequences]
        paid = attention_paid(output.attentions, lengths)
        return [
            replace(score, attention=paid_L[-len(rollout) :].cpu().numpy())
            for rollout, score, paid_L in zip(rollouts, scores, paid, strict=True)
        ]

    def _trunk_inputs(self, rollouts: list[Rollout], sequences: list[np.ndarray]) -> dict[str, Tensor]:
        token_ids_BL = self._padded(sequences)
        if all(rollout.mixture is None for rollout in rollouts):
            return {"input_ids": token_ids_BL}
        mixtures = [
            rollout.mixture or Mixture(other_ids=ids, own_share=1.0)
            for rollout, ids in zip(rollouts, sequences, strict=True)
        ]
        own_share_BL = torch.tensor([[m.own_share] for m in mixtures], device=self.device).expand(token_ids_BL.shape)
        other_ids_BL = self._padded([m.other_ids for m in mixtures])
        embed = self.model.get_input_embeddings()
        return {"inputs_embeds": mixed_embeddings(embed, token_ids_BL, other_ids_BL, own_share_BL)}

    def _padded(self, sequences: list[np.ndarray]) -> Tensor:
        """int64 [B, L], padded on the right."""
        ids = [torch.from_numpy(ids.astype(np.int64)) for ids in sequences]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device)

    def _score_rows(self, rollout: Rollout, hidden_TD: Tensor, top_k: int) -> TeacherScores:
        head = self.model.get_output_embeddings()
        whole = slice(0, len(rollout))
        logits_of = partial(float32_logits, head, self.head_form)
        rows = score_rows(hidden_TD, logits_of, [(rollout, whole)], top_k=top_k, vocabulary=self.vocabulary)
        num_candidates = rollout.candidate_ids.shape[1] if self.scores_candidates else None
        hidden = [hidden_TD] if self.returns_hidden else []
        return teacher_scores([rows], num_candidates=num_candidates, hidden=hidden)

    def _events(self, token_ids: Tensor) -> Tensor:
        stop_ids = torch.tensor(self.vocabulary.stop_ids, device=token_ids.device)
        return token_ids.masked_fill(torch.isin(token_ids, stop_ids), self.vocabulary.stop_event)


def _response_rows(rollout: Rollout) -> np.ndarray:
    return predicting_rows(len(rollout.prompt.scored_after), np.arange(len(rollout)))


def caps_attention(path: str, trust_remote_code: bool) -> bool:
    """Whether attention scores are squashed: of transformers' attentions only eager does so, sdpa leaves it out."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    return getattr(config, "attn_logit_softcapping", None) is not None


def attention_paid(attentions: Sequence[Tensor], lengths: list[int]) -> list[Tensor]:
    """The attention paid to each token of each sequence: float32 [its length], in [0, 1].

    The mean over layers, heads, and the rows that can see the token: its own and those after it. `attentions`: a
    layer's weights [B, heads, L, L] each, padded on the right.
    """
    mean_BLL = sum((layer.float().mean(1) for layer in attentions), torch.zeros(())) / len(attentions)
    return [
        mean_LL[:length, :length].sum(0) / torch.arange(length, 0, -1, device=mean_LL.device)
        for mean_LL, length in zip(mean_BLL, lengths, strict=True)
    ]


def _pad_left(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [B, L]; mask 0 on the padding."""
    length = max(map(len, sequences))
    missing = [(length - len(sequence), 0) for sequence in sequences]
    pad = torch.nn.functional.pad
    ids_BL = torch.stack([pad(ids, left) for ids, left in zip(sequences, missing, strict=True)])
    mask_BL = torch.stack([pad(torch.ones_like(ids), left) for ids, left in zip(sequences, missing, strict=True)])
    return ids_BL, mask_BL
