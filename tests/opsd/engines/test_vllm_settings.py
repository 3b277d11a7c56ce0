"""What each device, placement and role resolves to: no vLLM is started."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from opsd.config.engine import EngineConfig, EngineSpec, RolloutConfig, TeacherConfig
from opsd.config.placement import PlacementConfig, ScheduleConfig
from opsd.config.run import LearnerConfig, RunConfig
from opsd.engines import vllm as vllm_engine
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.engines.vllm_settings import check_engine_args, llm_arguments, sleep_level
from opsd.errors import ConfigError, StageError
from opsd.preflight import check_counts
from opsd.types import Prompt, Vocabulary
from opsd.weight_sync import weight_transfer

ROLES = {"rollout": RolloutConfig, "teacher": TeacherConfig, "evaluation": EngineConfig}


def arguments(role, device, *, shares_gpu=False, **settings):
    return llm_arguments(ROLES[role](**settings), device, max_model_tokens=64, shares_gpu=shares_gpu)


@pytest.mark.parametrize(
    ("role", "device", "shares_gpu", "caches", "share"),
    [
        ("rollout", "cpu", False, False, None),
        ("teacher", "cpu", False, False, None),
        ("rollout", "cuda", False, True, 0.9),
        ("evaluation", "cuda", False, True, 0.9),
        ("teacher", "cuda", False, False, 0.9),
        ("rollout", "cuda", True, True, 0.35),
        ("teacher", "cuda", True, False, 0.35),
    ],
)
def test_caches_of_prompts_and_shares_of_a_gpu(role, device, shares_gpu, caches, share):
    found = arguments(role, device, shares_gpu=shares_gpu)
    assert found["enable_prefix_caching"] is caches
    assert found.get("gpu_memory_utilization") == share
    assert found["enable_sleep_mode"] is shares_gpu
    if share:
        told = arguments(role, device, shares_gpu=shares_gpu, gpu_memory_utilization=0.5)
        assert told["gpu_memory_utilization"] == 0.5


def test_students_engines_drop_their_weights_to_sleep_and_a_teachers_keep_them():
    assert (sleep_level(RolloutConfig()), sleep_level(TeacherConfig())) == (2, 1)


@pytest.mark.parametrize(
    ("device", "mode", "rollout", "renamed", "expected"),
    [
        ("cpu", "separate", {}, False, "object_store"),
        ("cuda", "separate", {}, False, "nccl"),
        ("cuda", "separate", {"tensor_parallel_size": 2}, False, "nccl"),
        ("cuda", "separate", {"backend": "transformers"}, False, "object_store"),
        ("cuda", "separate", {"weight_transfer": "object_store"}, False, "object_store"),
        ("cuda", "separate", {}, True, "object_store"),
        ("cuda", "colocated", {"num_workers": 2}, False, "ipc"),
        ("cuda", "colocated", {"num_workers": 2}, True, "object_store"),
        ("cuda", "colocated", {"num_workers": 3}, False, "object_store"),
    ],
)
def test_the_way_of_the_weights(device, mode, rollout, renamed, expected):
    cfg = RunConfig(
        rollout=RolloutConfig(**rollout), placement=PlacementConfig(mode=mode), learner=LearnerConfig(num_workers=2)
    )
    assert weight_transfer(cfg, device, renamed=renamed) == expected
    if mode == "separate":
        schedule = ScheduleConfig(max_staleness=1, partial_rollouts=True)
        assert weight_transfer(replace(cfg, schedule=schedule), device, renamed=renamed) == "object_store"
    if expected == "object_store":
        assert not arguments("rollout", device, weight_transfer=expected).get("weight_transfer_config")
    else:
        found = arguments("rollout", device, weight_transfer=expected)
        assert found["weight_transfer_config"] == {"backend": expected}


@pytest.mark.parametrize(
    ("device", "mode", "rollout", "said"),
    [
        ("cpu", "separate", {"weight_transfer": "ipc"}, "weight_transfer=ipc needs GPUs and rollout.backend=vllm"),
        ("cuda", "separate", {"weight_transfer": "ipc"}, "ipc is for engines on the learner's GPUs"),
        ("cuda", "colocated", {"weight_transfer": "nccl"}, "NCCL joins no two processes on one GPU"),
        ("cuda", "colocated", {"weight_transfer": "ipc", "num_workers": 2}, "must be at most learner.num_workers=1"),
    ],
)
def test_a_way_that_cannot_be_is_refused(device, mode, rollout, said):
    cfg = RunConfig(rollout=RolloutConfig(**rollout), placement=PlacementConfig(mode=mode))
    with pytest.raises(ConfigError, match=said):
        check_counts(cfg, 1000, device)


def test_arguments_for_vllm_are_passed_on_and_ours_are_refused_before_a_start():
    extra = {"quantization": "fp8", "kv_cache_dtype": "fp8", "max_num_batched_tokens": 4096}
    assert arguments("rollout", "cuda", engine_args=extra).items() >= extra.items()
    for role, ours in (("rollout", "dtype"), ("rollout", "model"), ("teacher", "max_num_batched_tokens")):
        cfg = RunConfig(**{role: ROLES[role](engine_args={ours: 1})})
        with pytest.raises(ConfigError, match=rf"^{role}\.engine_args\.{ours} is not to be set there"):
            check_counts(cfg, 1000, "cuda")
    with pytest.raises(ConfigError, match=r"teacher\.engine_args are vLLM's; teacher\.backend is transformers"):
        TeacherConfig(backend="transformers", engine_args={"quantization": "fp8"})


@pytest.mark.slow  # it imports vLLM
def test_an_argument_that_vllm_does_not_have_is_named_with_the_nearest():
    check_engine_args(RolloutConfig(engine_args={"quantization": "fp8"}))
    with pytest.raises(ConfigError, match=r"rollout\.engine_args\.quantisation: vLLM has no .* mean quantization\?"):
        check_engine_args(RolloutConfig(engine_args={"quantisation": "fp8"}))


def test_batch_invariance_is_vllms_and_for_gpus():
    plain, invariant = RolloutConfig(), RolloutConfig(batch_invariant=True)
    assert engine_environment(invariant, "cuda")["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in engine_environment(plain, "cuda")
    assert engine_environment(invariant, "cpu") == engine_environment(plain, "cpu")


def test_a_teacher_whose_rows_are_scored_runs_the_runner_that_they_are_taken_from():
    """On a CPU vLLM has no other one."""
    rows, own_way = TeacherConfig(path="/m"), TeacherConfig(path="/m", scoring="prompt_logprobs")
    assert engine_environment(rows, "cuda")["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    for config, device in ((own_way, "cuda"), (RolloutConfig(), "cuda"), (rows, "cpu")):
        assert "VLLM_USE_V2_MODEL_RUNNER" not in engine_environment(config, device)


class RecordingLLM:
    """vLLM's LLM, as far as sleeping and waking go: writes down what it is asked for."""

    def __init__(self, **_):
        self.calls = []
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 2)
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(use_v2_model_runner=False), set_weight_version=lambda version: None
        )

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags=None):
        self.calls.append(f"wake {' '.join(tags) if tags else 'all'}")

    def collective_rpc(self, name, args):
        self.calls.append(name)

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def enqueue(self, *_, **__):
        raise AssertionError("nothing is asked of an engine that has no weights")


@pytest.fixture
def engine_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=RecordingLLM))
    monkeypatch.setattr(vllm_engine, "model_without_weights", lambda *_, **__: None)
    monkeypatch.setattr(vllm_engine, "untied_settings", lambda *_, **__: {})
    monkeypatch.setattr(vllm_engine, "complete_weights", lambda _, named: named)
    monkeypatch.setattr(vllm_engine, "as_stored", lambda _, named: named)

    def start(role, device="cuda"):
        spec = EngineSpec(
            path="/m", vocabulary=Vocabulary(size=2, stop_ids=(0,)), config=ROLES[role](), device=device,
            max_model_tokens=8, shares_gpu=device == "cuda",
        )  # fmt: skip
        return vllm_engine.VllmEngine(spec)

    return start


def test_a_colocated_student_wakes_for_its_weights_first_then_for_its_cache(engine_of):
    """Weights and cache together would not fit beside what the learner still holds."""
    engine = engine_of("rollout")
    engine.sleep()
    engine.sleep()
    engine.update_weights({}, policy_version=1)
    assert engine.llm.calls == ["sleep 2", "wake weights", "replace_weights", "wake kv_cache", "reset"]
    engine.llm.calls.clear()
    engine.sleep()
    engine.expect_weights()  # as over CUDA IPC
    engine.received_weights(2)
    assert engine.llm.calls == ["sleep 2", "wake weights", "wake kv_cache", "reset"]
    assert engine.policy_version == 2


def test_a_student_without_weights_does_not_answer(engine_of):
    engine = engine_of("rollout")
    engine.sleep()
    prompt = Prompt(index=0, token_ids=np.array([1], np.int32), text="", answer=None, source="")
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=2, num_candidates=1)
    with pytest.raises(StageError, match="dropped its weights when it went to sleep"):
        list(engine.generate([(prompt, 0, 0)], sampling, 0))
    with pytest.raises(StageError, match="dropped its weights when it went to sleep"):
        engine.score([], 1)


def test_a_colocated_teacher_wakes_as_it_was(engine_of):
    engine = engine_of("teacher")
    engine.sleep()
    assert engine.score([], 1) == []
    assert engine.llm.calls == ["sleep 1", "wake all"]
    engine.sleep()
    engine.update_weights({}, policy_version=0)  # one that follows the student
    assert engine.llm.calls[2:] == ["sleep 1", "wake weights", "replace_weights", "wake kv_cache"]


def test_an_update_forgets_prompts_only_where_they_are_kept(engine_of):
    on_cpu, on_gpu = engine_of("rollout", "cpu"), engine_of("rollout", "cuda")
    for engine in (on_cpu, on_gpu):
        engine.update_weights({}, policy_version=1)
    assert (on_cpu.llm.calls, on_gpu.llm.calls) == (["replace_weights"], ["replace_weights", "reset"])
    on_gpu.llm.reset_prefix_cache = lambda: False
    with pytest.raises(StageError, match="the engine is at work"):
        on_gpu.update_weights({}, policy_version=2)


def test_new_weights_wait_for_the_steps_that_vllm_has_begun(engine_of, monkeypatch):
    """With a step in flight, as on a GPU: its outputs come out before, and under the older version."""
    engine = engine_of("rollout")
    engine.partial_rollouts, calls = True, engine.llm.calls
    steps = iter([["an output"], []])
    vllm_config = SimpleNamespace(max_concurrent_batches=2)
    for name, value in {
        "vllm_config": vllm_config,
        "step": lambda: calls.append("step") or next(steps),
        "has_unfinished_requests": lambda: True,
        "set_weight_version": lambda version: calls.append(f"version {version}"),
    }.items():
        monkeypatch.setattr(engine.llm.llm_engine, name, value, raising=False)
    monkeypatch.setattr(engine.llm, "sleep", lambda level, mode: calls.append(f"pause {level} {mode}"))
    assert engine._take_in() == []
    engine.incoming.leave({}, 4)
    assert engine._take_in() == ["an output"]
    assert calls == ["pause 0 keep", "step", "step", "replace_weights", "version 4", "wake scheduling"]
