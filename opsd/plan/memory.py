"""How much memory each role takes at its peak, in bytes per process (CPU) or per GPU.

What follows from the code (weights, gradients, moments, saved activations, caches, logits) is computed; what belongs
to Python, torch, Ray and vLLM themselves is RUNTIME_CPU, measured by scripts/bench/measure_memory.py, or RUNTIME_GPU,
an untested estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from opsd.config.engine import EngineConfig, RolloutConfig, TeacherConfig
from opsd.config.run import RunConfig
from opsd.engines.row_scores import CHUNK_BYTES
from opsd.ops.head.plan import PLANS
from opsd.plan.models import BYTES, ModelSizes
from opsd.plan.traffic import Traffic

GIB = 2**30
# A process that has started and holds no model yet: resident memory, libraries included. (transformers: not measured.)
RUNTIME_CPU = {"driver": 0.6 * GIB, "vllm": 0.85 * GIB, "transformers": 0.5 * GIB, "learner": 0.5 * GIB}
# On a GPU: the context, NCCL's buffers, and for vLLM the CUDA graphs. Estimates.
RUNTIME_GPU = {"vllm": 2.0 * GIB, "transformers": 1.0 * GIB, "learner": 1.5 * GIB}
VLLM_STEP_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one engine step, where nothing else is said: vLLM 0.32's default
SAMPLING_BYTES_A_LOGIT = 12  # float32: processed logits, log-probabilities and a sort key


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak; the fields add up to it."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0  # keys and values
    buffers: float = 0.0  # logits, gathered layers, weights on their way
    runtime: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def saved_bytes_a_token(model: ModelSizes, dtype: str) -> int:
    """What one decoder layer keeps of a token for its backward pass.

    Llama-like layers of transformers under an attention that forms no weights: two norms, which compute in float32;
    the MLP's four products; queries, keys, values and output; and the norms of queries and keys where there are any.
    """
    size = BYTES[dtype]
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    norms = 2 * ((4 + 2 * size) * model.hidden_size + 4)
    attention = size * 2 * (queries + keys) + 4 * model.num_attention_heads
    head_norms = (4 + size) * (queries + keys) + 4 * (model.num_attention_heads + model.num_key_value_heads)
    return norms + attention + 4 * size * model.intermediate_size + (head_norms if model.has_head_norms else 0)


def learner_memory(cfg: RunConfig, model: ModelSizes, device: str, teacher: ModelSizes | None = None) -> Memory:
    """One FSDP2 rank. The peak is in the training step or while the full weights are gathered for the engines.

    `teacher`: whose head it holds, see loss.payload; None: no one's.
    """
    ranks, size = cfg.learner.num_workers, BYTES[cfg.student.dtype]
    adapter = model.num_adapter_parameters
    shard = 4.0 * (adapter or model.num_parameters) / ranks  # float32 master weights
    beside = size * model.num_parameters / ranks if adapter else 0.0  # frozen, kept as they compute
    held, frozen = (0.0, 0.0) if cfg.learner.cpu_offload else (shard, beside)  # else a layer at a time comes from host
    tokens = max(cfg.learner.micro_batch_tokens, cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens)
    layers = model.num_hidden_layers
    saved = saved_bytes_a_token(model, cfg.student.dtype)
    if cfg.learner.activation_checkpointing:
        activations = tokens * (layers * size * model.hidden_size + saved)
    else:
        activations = tokens * layers * saved
    gathered = size * (model.num_root_parameters + 2 * model.num_layer_parameters)
    # Of a chunk: the shares in float32; on a GPU their gradient, in a product's dtype, beside them.
    logits: float = min(PLANS[device].chunk_bytes, 4 * tokens * model.vocab_size)
    if device == "cuda" and size < 4:
        logits *= 1 + size / 4
    # And the head's gradient, its sum in float32, where it trains.
    head = logits + (0.0 if adapter else (4 + size) * model.num_embedding_parameters)
    # On the CPU the engines' weights are gathered in rank 0's own memory, when gradients are gone, and then lie in the
    # object store, whose pages count as its own.
    stored = BYTES[cfg.rollout.dtype] * model.num_parameters if device == "cpu" else 0.0
    sending = stored + 4.0 * model.num_embedding_parameters - held - activations
    follows = held if cfg.teacher.follow_decay is not None else 0.0  # the running mean of the weights
    # What is being saved lies in host memory while the next steps run.
    copied = 3 * shard + follows if device == "cpu" and cfg.checkpoint.in_background else 0.0
    of_teacher = 0.0 if teacher is None else BYTES[cfg.teacher.dtype] * teacher.num_embedding_parameters
    return Memory(
        weights=held + frozen + follows + of_teacher,
        gradients=held,
        optimizer=2 * held,
        activations=activations,
        buffers=stored + copied + max(gathered + head, sending),
        runtime=RUNTIME_CPU["learner"] if device == "cpu" else RUNTIME_GPU["learner"],
    )


def rollout_memory(
    cfg: RunConfig, engine: RolloutConfig, model: ModelSizes, traffic: Traffic, device: str, gpu_bytes: float
) -> Memory:
    """One rollout engine: on each GPU of its tensor parallel group, on the CPU in all of its processes together.

    `gpu_bytes`: of a whole GPU.
    """
    in_flight = min(engine.max_num_seqs, traffic.rollouts_an_engine)
    step_tokens = min(VLLM_STEP_TOKENS[device], engine.max_num_seqs * cfg.data.max_prompt_tokens)
    sampling = in_flight * model.vocab_size * (BYTES[engine.dtype] + SAMPLING_BYTES_A_LOGIT)
    arriving = _arriving_bytes(engine, model) if device == "cpu" else 0.0
    if not engine.can.reserves_cache:
        cache = in_flight * traffic.longest_sequence * model.cache_bytes_a_token(engine.dtype)
        step_tokens = in_flight * cfg.data.max_prompt_tokens
        return _plain_engine(engine, model, device, step_tokens, cache=cache, buffers=sampling + arriving)
    share = engine.gpu_share(colocated=cfg.placement.mode == "colocated") * gpu_bytes
    return _vllm_engine(engine, model, device, share, step_tokens, in_share=sampling, beside=arriving)


def teacher_memory(
    cfg: RunConfig, engine: TeacherConfig, model: ModelSizes, traffic: Traffic, device: str, gpu_bytes: float
) -> Memory:
    """One teacher engine: on each GPU of its tensor parallel group, on the CPU in all of its processes together.

    `gpu_bytes`: of a whole GPU.
    The logits of a scoring step come on top of vLLM's share: it does not budget for them.
    """
    step_tokens = max(engine.max_batch_tokens, traffic.longest_sequence)
    steps = 1 + cfg.schedule.max_staleness  # whose payload is kept in the host's memory
    payload = steps * (traffic.score_bytes + traffic.rollout_bytes) / engine.num_workers if device == "cpu" else 0.0
    scoring = 3 * min(CHUNK_BYTES[device], 4 * step_tokens * model.vocab_size)
    if not engine.can.reserves_cache:
        return _plain_engine(engine, model, device, step_tokens, cache=0.0, buffers=scoring + payload)
    if engine.scoring == "prompt_logprobs":  # of a whole sequence: logits, log-probabilities, a comparison
        scoring = traffic.longest_sequence * model.vocab_size * (BYTES[engine.dtype] + 4 + 1)
    follows = device == "cpu" and engine.follow_decay is not None
    arriving = _arriving_bytes(engine, model) if follows else 0.0
    share = engine.gpu_share(colocated=cfg.placement.mode == "colocated") * gpu_bytes
    return _vllm_engine(engine, model, device, share, step_tokens, in_share=0.0, beside=scoring + arriving + payload)


def driver_memory(traffic: Traffic, steps_ahead: int = 0, *, asks_servers: bool = False) -> Memory:
    """The process that runs the loop: what it is told of a step, as it comes, in order, and as it is dealt out; and of
    the steps to come. `asks_servers`: it is a teacher's client, and has its payload.
    """
    steps = 1 + steps_ahead
    payload = traffic.score_bytes + traffic.batch_bytes + steps * traffic.rollout_bytes if asks_servers else 0
    return Memory(buffers=traffic.told_bytes * (2 + steps) + payload, runtime=RUNTIME_CPU["driver"])


def _vllm_engine(
    engine: EngineConfig,
    model: ModelSizes,
    device: str,
    share: float,
    step_tokens: int,
    *,
    in_share: float,
    beside: float,
) -> Memory:
    """`share`: bytes of a GPU that vLLM fills; `in_share`: buffers within it, which leave less for the cache; `beside`:
    those on top."""
    weights = _held_weights(engine, model, device)
    activations = _passing_bytes(engine, model, step_tokens, device)
    if device == "cpu":
        runtime, cache = RUNTIME_CPU[engine.backend] * _cpu_processes(engine), engine.kv_cache_gib * GIB
    else:
        runtime = RUNTIME_GPU[engine.backend]
        cache = max(0.0, share - weights - activations - in_share - runtime)
    return Memory(weights=weights, activations=activations, cache=cache, buffers=in_share + beside, runtime=runtime)


def _plain_engine(
    engine: EngineConfig, model: ModelSizes, device: str, step_tokens: int, *, cache: float, buffers: float
) -> Memory:
    runtime = RUNTIME_CPU if device == "cpu" else RUNTIME_GPU
    return Memory(
        weights=BYTES[engine.dtype] * model.num_parameters,
        activations=_passing_bytes(engine, model, step_tokens, device),
        cache=cache,
        buffers=buffers,
        runtime=runtime[engine.backend],
    )


def _held_weights(engine: EngineConfig, model: ModelSizes, device: str) -> float:
    """vLLM on CPU keeps a packed copy of a tied head beside the embedding."""
    if device == "cpu":
        copies = model.num_embedding_parameters if model.tied else 0
        return BYTES[engine.dtype] * (model.num_parameters + copies)
    return BYTES[engine.dtype] * model.num_parameters / engine.tensor_parallel_size


def _arriving_bytes(engine: EngineConfig, model: ModelSizes) -> float:
    """New weights: in the object store, and a copy of them in each process that takes its share."""
    return (1 + engine.tensor_parallel_size) * BYTES[engine.dtype] * model.num_parameters


def _cpu_processes(engine: EngineConfig) -> int:
    """The actor holds the model itself, or starts a process for each part of it."""
    return 1 if engine.tensor_parallel_size == 1 else 1 + engine.tensor_parallel_size


def _passing_bytes(engine: EngineConfig, model: ModelSizes, tokens: int, device: str) -> float:
    """What a forward pass without a backward holds at once: the residual stream, and one layer's attention or MLP."""
    attention = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    of_one_part = 4 * model.hidden_size + max(3 * model.intermediate_size, attention) / engine.tensor_parallel_size
    parts = engine.tensor_parallel_size if device == "cpu" else 1
    return tokens * BYTES[engine.dtype] * parts * of_one_part
