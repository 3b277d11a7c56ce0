"""A vLLM engine in this process: samples rollouts, scores them, takes new weights while it runs.

Measured on CPU only. What a GPU alone does (sleep, a step that begins before the last one's outputs are there) follows
vLLM 0.32's documentation and sources, and has not been run on one.
"""
# T response tokens, C student candidates, S stop ids

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from opsd.config.engine import EngineConfig, EngineSpec, scores_rows
from opsd.engines.events import event_rows, pad_rows
from opsd.engines.groups import score_in_groups
from opsd.engines.incoming import Incoming, require_version
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.vllm_settings import caches_prefixes, check_engine_args, head_settings, llm_arguments, sleep_level
from opsd.engines.weights import complete_weights
from opsd.engines.work import Work, as_work, size_of
from opsd.errors import StageError
from opsd.models.weights import as_stored, model_without_weights, untied_settings
from opsd.types import Rollout, TeacherScores


def engine_environment(config: EngineConfig, device: str) -> dict[str, str]:
    """Environment variables of an engine's process, to be set before it imports torch or vLLM."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core stays in the actor: weights reach it without a copy
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # A scored sequence may fill the model's context, and vLLM samples one token more, which is never fed back.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = str(config.cpu_threads)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several engines share the cores
        environment["TORCH_COMPILE_DISABLE"] = "1"  # else the first call compiles a one-line ranking kernel for 15 s
        return environment
    if config.batch_invariant:
        environment["VLLM_BATCH_INVARIANT"] = "1"
    if scores_rows(config):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the rows are taken from the other one
    return environment


class VllmEngine:
    """One model under vLLM. The process needs `engine_environment`."""

    def __init__(self, spec: EngineSpec) -> None:
        """It can `sleep` where `spec.shares_gpu`. Raises ConfigError for what vLLM's LLM would not take."""
        from vllm import LLM

        config = spec.config
        check_engine_args(config)
        self.skeleton = model_without_weights(spec.path, trust_remote_code=spec.trust_remote_code)
        self.vocabulary = spec.vocabulary
        self.partial_rollouts, self.incoming = spec.partial_rollouts, Incoming()
        self.max_batch_tokens = config.scoring_bound or sys.maxsize
        self.max_num_seqs = config.max_num_seqs
        self.scores_rows = scores_rows(config)
        self.scores_candidates = spec.scores_candidates
        self.returns_hidden = spec.returns_hidden
        self.sleep_level = sleep_level(config)
        self.caches_prefixes = caches_prefixes(config, spec.device)
        self.asleep: set[str] = set()  # of "weights" and "kv_cache"
        arguments = llm_arguments(
            config, spec.device, max_model_tokens=spec.max_model_tokens, shares_gpu=spec.shares_gpu
        )
        # vLLM would read `tie_word_embeddings` and pass over a head in the files.
        untied = untied_settings(spec.path, self.skeleton, trust_remote_code=spec.trust_remote_code)
        overrides = {**head_settings(config, spec.device), **arguments.get("hf_overrides", {}), **untied}
        if overrides:
            arguments["hf_overrides"] = overrides
        self.llm = LLM(model=spec.path, trust_remote_code=spec.trust_remote_code, **arguments)
        self._name_weights(0)  # those of `spec.path`, until others come
        self.vocab_size = self.llm.model_config.get_vocab_size()
        if self.scores_rows and self.llm.llm_engine.vllm_config.use_v2_model_runner:
            raise StageError(
                f"{config.section}: vLLM runs {spec.path} with its V2 model runner, and scores are taken from its V1 "
                f"runner: unset VLLM_USE_V2_MODEL_RUNNER, or set {config.section}.scoring=prompt_logprobs"
            )

    def generate(
        self,
        requests: Sequence[Request] | Work,
        sampling: Sampling,
        policy_version: int,
        group_size: int | None = None,
    ) -> Iterator[dict[int, Rollout]]:
        """A rollout for each request, by its place.

        A seed draws the same tokens in any batch on the CPU, on a GPU only with `batch_invariant`: its kernels round
        otherwise in a batch of another size.

        They come in groups of at least `group_size` (the last may be smaller; None: one group), as they finish. Which
        group a rollout is in depends on the engine's steps, not on the clock.
        Prompt and `sampling.max_tokens` together must fit max_model_tokens. A model with a padded vocabulary may sample
        an id outside the shared one: see `rows.has_foreign_ids`. Raises StageError where the engine holds the weights
        of another policy version.

        Weights that come meanwhile are taken in between two of vLLM's steps. What is under way goes on with the keys
        and values that it has, made by older weights: to make them anew would stop all answers for a prefill of all
        that they have read, at every step of the learner. PipelineRL (arXiv 2509.19128) keeps them, too. A request that
        vLLM is given later shares nothing with those that it was given before.
        """
        self._take_in()
        require_version(self.policy_version, policy_version, or_newer=self.partial_rollouts)
        work = as_work(requests)
        if not work.more:
            return
        self._wake()
        from opsd.engines.vllm_params import sampling_params  # imports vLLM, as the next one
        from opsd.engines.vllm_samples import keep_arrays, rollout_of, sampled_rows

        stop_ids, num_logprobs = list(self.vocabulary.stop_ids), self._num_logprobs(sampling.num_candidates)
        running: dict[str, int] = {}  # place by vLLM's name
        asked: dict[int, Request] = {}  # by place

        def refill() -> None:
            """Begins as many requests as there is room for."""
            if not work.more:
                return
            tokens = sum(size_of(asked[place], sampling.max_tokens) for place in running.values())
            new = work.take(self.max_num_seqs - len(running), tokens)
            if not new:
                return
            params = [sampling_params(sampling, each, stop_ids, num_logprobs) for each in new.values()]
            names = self._enqueue([prompt.token_ids for prompt, _, _ in new.values()], params)
            keep_arrays(self.llm, names)
            asked.update(new)
            running.update(_places(names, new))

        refill()
        for outputs in self._finished(running, group_size, refill):
            answers = [output.outputs[0] for output in outputs.values()]
            events = event_rows(*sampled_rows(answers), self.vocabulary, sampling.num_candidates)
            parts = events.split([len(answer.token_ids) for answer in answers])
            yield {
                place: rollout_of(asked.pop(place), answer, part, self.vocabulary)
                for place, answer, part in zip(outputs, answers, parts, strict=True)
            }

    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        """This model's log-probabilities on the response rows, in the order of `rollouts`.

        `candidate_logprobs` is None unless `opsd.config.engine.scores_candidates`. With teacher.scoring=rows they are
        exact for any vocabulary.
        """
        self._wake()
        return score_in_groups(rollouts, self.max_batch_tokens, partial(self._score_group, top_k=top_k))

    def update_weights(self, named: dict[str, Tensor], policy_version: int) -> None:
        """Load a full Hugging Face state dict (a tied `lm_head.weight` may be in it or not) into the running engine.

        Raises StageError, with the model unchanged, where the names are not this model's.
        """
        stored = as_stored(self.skeleton, complete_weights(self.skeleton, named))  # vLLM knows the files' names
        self.expect_weights()
        self.llm.collective_rpc("replace_weights", args=(stored,))
        self.received_weights(policy_version)

    def expect_weights(self) -> None:
        """New weights are on their way: makes room for them, and for nothing else yet. Then `received_weights`."""
        if "weights" in self.asleep:
            self.llm.wake_up(tags=["weights"])
            self.asleep.discard("weights")

    def received_weights(self, policy_version: int) -> None:
        """New weights are in place: names them, and forgets what was computed with the old ones."""
        if "kv_cache" in self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep.discard("kv_cache")
        at_work = self.partial_rollouts and self.llm.llm_engine.has_unfinished_requests()  # then see `_enqueue`
        if self.caches_prefixes and not at_work and not self.llm.reset_prefix_cache():
            raise StageError("weight update: the engine is at work, so what it knows of prompts cannot be dropped")
        self._name_weights(policy_version)

    def _name_weights(self, policy_version: int) -> None:
        self.policy_version = policy_version
        self.llm.llm_engine.set_weight_version(str(policy_version))  # it tells it of every token

    def _take_in(self) -> list[Any]:
        """New weights, if some have come; what is unfinished waits for them. Returns vLLM's outputs meanwhile.

        On a GPU vLLM begins a step before it has heard of the one before it: that one still ends under its own weights.
        """
        if not self.incoming:
            return []
        self.llm.sleep(level=0, mode="keep")  # no step begins
        most = self.llm.llm_engine.vllm_config.max_concurrent_batches
        outputs = [output for _ in range(most) for output in self.llm.llm_engine.step()]
        try:
            self.update_weights(*self.incoming.take())
        finally:
            self.llm.wake_up(tags=["scheduling"])
        return outputs

    def sleep(self) -> None:
        """Give the GPU's memory back until the next call or weight update, see `sleep_level`. Not run on a GPU."""
        if not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = {"weights", "kv_cache"}

    def _wake(self) -> None:
        """Raises StageError where the weights were dropped and no others have come."""
        if not self.asleep:
            return
        if self.sleep_level == 2:
            raise StageError("the engine dropped its weights when it went to sleep, and has had no new ones since")
        self.llm.wake_up()
        self.asleep = set()

    def _score_group(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        sequences = [np.concatenate([rollout.prompt.scored_after, rollout.response_ids]) for rollout in rollouts]
        if not self.scores_rows:
            return self._score_by_prompt_logprobs(rollouts, sequences, top_k)
        from opsd.engines.vllm_params import scoring_params  # imports vLLM

        names = self._enqueue(sequences, [scoring_params()] * len(rollouts))
        expected = dict(zip(names, rollouts, strict=True))
        self.llm.collective_rpc("expect_scores", args=(expected, top_k, self.vocabulary, self.returns_hidden))
        for _ in self._finished(_places(names, range(len(names))), None):
            pass
        scores = self.llm.collective_rpc("take_scores")[0]
        if not self.scores_candidates:
            scores = {name: replace(each, candidate_logprobs=None) for name, each in scores.items()}
        return [scores[name] for name in names]

    def _score_by_prompt_logprobs(
        self, rollouts: list[Rollout], sequences: list[np.ndarray], top_k: int
    ) -> list[TeacherScores]:
        """vLLM's own way. A stop id outside the top-k is not part of the stop event's mass."""
        from opsd.engines.vllm_params import scoring_params  # imports vLLM

        params = scoring_params(prompt_logprobs=self._num_logprobs(top_k))
        names = self._enqueue(sequences, [params] * len(rollouts))
        [finished] = self._finished(_places(names, range(len(names))), None)
        outputs = [finished[place] for place in range(len(rollouts))]
        first_rows = [len(rollout.prompt.scored_after) for rollout in rollouts]  # vLLM's entry i is about token i
        ids_TM, logprobs_TM = pad_rows([output.prompt_logprobs for output in outputs], first_rows)
        parts = event_rows(ids_TM, logprobs_TM, self.vocabulary, top_k).split([len(rollout) for rollout in rollouts])
        return [
            TeacherScores(
                top_ids=part.top_ids_TK,
                top_logprobs=part.top_logprobs_TK,
                sampled_logprobs=part.sampled_logprobs_T,
                candidate_logprobs=None,
            )
            for part in parts
        ]

    def _enqueue(self, sequences: list[np.ndarray], params: list) -> list[str]:
        """vLLM's names of the requests. Token ids go in as they are.

        Prompts that begin alike share keys and values of the same weights only: no request finds those of an older one
        that is under way when weights change, and which cannot be dropped.
        """
        salt = {"cache_salt": str(self.policy_version)} if self.caches_prefixes else {}
        prompts = [{"prompt_token_ids": ids.tolist(), **salt} for ids in sequences]
        return self.llm.enqueue(prompts, params, use_tqdm=False)

    def _finished(
        self, running: dict[str, int], group_size: int | None, refill: Callable[[], None] = lambda: None
    ) -> Iterator[dict[int, Any]]:
        """vLLM's outputs by place, in groups of at least `group_size` (None: all of them), as they finish.

        `running`: places by name. Who is done leaves it; `refill`, called after each step, may add to it.
        """
        outputs = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in [*self.llm.llm_engine.step(), *self._take_in()]:
                if output.finished:
                    outputs[running.pop(output.request_id)] = output
            if group_size is not None and len(outputs) >= group_size:
                yield outputs
                outputs = {}
            refill()  # after what has finished was handed over: a turn may have a next one
        if outputs:
            yield outputs

    def _num_logprobs(self, num_events: int) -> int:
        """Enough ids for `num_events` events even where all stop ids are among them."""
        return min(num_events + len(self.vocabulary.stop_ids) - 1, self.vocab_size)


def _places(names: list[str], places: Iterable[int]) -> dict[str, int]:
    """Places by the names that vLLM's outputs have: without the random part that it appends."""
    return {name.partition("-")[0]: place for name, place in zip(names, places, strict=True)}
