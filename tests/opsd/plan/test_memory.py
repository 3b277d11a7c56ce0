"""What the plan computes, against tensors that autograd really keeps and against sums done by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opsd.config.lora import LoraConfig
from opsd.ops.head.plan import PLANS
from opsd.plan.memory import GIB, saved_bytes_a_token
from opsd.plan.models import read_model
from opsd.plan.roles import plan_roles
from opsd.plan.table import plan_text
from tests.opsd.plan.jobs import gpu_job

NUM_TOKENS = 64


def role_of(job, name):
    [role] = [role for role in plan_roles(job) if role.name == name]
    return role


def tiny(model_type, layers, dtype):
    head_dim = {"head_dim": 64} if model_type == "qwen3" else {}
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=128, intermediate_size=320, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **head_dim,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def kept_for_backward(model):
    """Bytes of the distinct storages that a forward pass of the trunk keeps, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.base_model(
            input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long),
            position_ids=torch.arange(NUM_TOKENS)[None],
            use_cache=False,
        )
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_saved_activations_are_what_autograd_keeps(model_type, dtype, tmp_path):
    two, four = (kept_for_backward(tiny(model_type, layers, getattr(torch, dtype))) for layers in (2, 4))
    tiny(model_type, 2, torch.float32).config.save_pretrained(tmp_path)
    assert saved_bytes_a_token(read_model("student", str(tmp_path)), dtype) == (four - two) / 2 / NUM_TOKENS


def test_a_rank_holds_its_share_of_sixteen_bytes_a_parameter():
    job = gpu_job()
    memory = role_of(job, "learner").memory
    assert memory.weights + memory.gradients + memory.optimizer == 16 * job.student.num_parameters / 4
    assert memory.cache == 0
    assert memory.total == sum(vars(memory).values())


def test_the_heads_chunk_is_that_of_the_device_with_its_gradient_beside_it():
    def chunk(device, **sections):
        job = gpu_job(**sections)
        size = 4 if sections else 2
        model, job = job.student, replace(job, device=device)
        gathered = size * (model.num_root_parameters + 2 * model.num_layer_parameters)
        stored = 2 * model.num_parameters if device == "cpu" else 0
        return role_of(job, "learner").memory.buffers - stored - gathered - (4 + size) * model.num_embedding_parameters

    assert chunk("cuda") == 1.5 * PLANS["cuda"].chunk_bytes  # the shares in float32, their gradient in bfloat16
    assert chunk("cuda", student={"dtype": "float32"}) == PLANS["cuda"].chunk_bytes
    assert chunk("cpu") == PLANS["cpu"].chunk_bytes


def test_more_ranks_and_checkpointing_need_less_and_a_running_mean_more():
    def learner(**sections):
        return role_of(gpu_job(**sections), "learner").memory

    base = learner()
    assert learner(learner={"num_workers": 8}).total < base.total
    assert learner(learner={"activation_checkpointing": False}).activations > 5 * base.activations
    assert learner(teacher={"follow_decay": 0.999}).weights == 2 * base.weights


def test_an_adapter_alone_has_gradients_and_moments_and_its_student_is_kept_as_it_computes():
    job, whole = gpu_job(student={"lora": LoraConfig(rank=16)}), role_of(gpu_job(), "learner").memory
    memory, adapter = role_of(job, "learner").memory, job.student.num_adapter_parameters
    assert adapter == 36 * 16 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    assert memory.gradients == memory.optimizer / 2 == 4 * adapter / 4
    assert memory.weights == memory.gradients + 2 * job.student.num_parameters / 4
    assert whole.buffers - memory.buffers == 6 * job.student.num_embedding_parameters, "no gradient of the head"
    offloading = replace(job.cfg, learner=replace(job.cfg.learner, cpu_offload=True))
    offloaded = role_of(replace(job, cfg=offloading), "learner").memory
    assert offloaded.weights == offloaded.gradients == offloaded.optimizer == 0
    assert "33.03 M of a LoRA adapter of rank 16 train" in plan_text(job)


def test_a_checkpoint_in_the_background_takes_a_copy_of_what_is_saved_from_the_host():
    def on_the_cpu(**sections):
        return role_of(replace(gpu_job(**sections), device="cpu"), "learner").memory

    plain, copied = on_the_cpu(), on_the_cpu(checkpoint={"in_background": True})
    assert copied.total - plain.total == plain.weights + plain.optimizer
    assert (
        role_of(gpu_job(checkpoint={"in_background": True}), "learner").memory == role_of(gpu_job(), "learner").memory
    )


def test_offloaded_weights_leave_the_gpu_and_on_a_cpu_the_engines_copy_is_rank_zeros():
    memory = role_of(gpu_job(learner={"cpu_offload": True}), "learner").memory
    assert memory.weights == memory.gradients == memory.optimizer == 0
    job = gpu_job(learner={"micro_batch_tokens": 1}, data={"max_prompt_tokens": 1}, rollout={"max_response_tokens": 1})
    host = role_of(replace(job, device="cpu"), "learner").memory
    without_gradients = host.weights + host.optimizer + host.runtime
    copied = 2 * 2 * job.student.num_parameters + 4 * job.student.num_embedding_parameters
    assert host.total >= without_gradients + copied


def test_an_engine_takes_its_share_of_a_gpu_and_the_scores_come_on_top():
    assert role_of(gpu_job(), "rollout").memory.total == pytest.approx(0.9 * 80 * GIB)
    logits = 3 * 512 * 2**20  # logits, log-probabilities and probabilities of a chunk of rows
    assert role_of(gpu_job(), "teacher").memory.total == pytest.approx(0.9 * 80 * GIB + logits)
    own_way = gpu_job(teacher={"scoring": "prompt_logprobs"})
    rows = own_way.traffic.longest_sequence * 151936 * (2 + 4 + 1)
    assert role_of(own_way, "teacher").memory.total == pytest.approx(0.9 * 80 * GIB + rows)


def test_hidden_states_travel_in_the_place_of_supports_and_the_learner_holds_their_head():
    plain, hidden = gpu_job(), gpu_job(loss={"payload": "auto"})
    tokens, width = plain.traffic.response_tokens, hidden.teachers[0].model.hidden_size
    assert hidden.traffic.score_bytes - plain.traffic.score_bytes == 2 * width * tokens
    assert hidden.traffic.batch_bytes - plain.traffic.batch_bytes == (2 * width - 12 * (64 + 32)) * tokens
    head = 2 * hidden.teachers[0].model.num_embedding_parameters
    assert role_of(hidden, "learner").memory.weights - role_of(plain, "learner").memory.weights == head


def test_tensor_parallel_divides_the_weights():
    one, four = (role_of(gpu_job(teacher={"tensor_parallel_size": n}), "teacher") for n in (1, 4))
    assert four.memory.weights == one.memory.weights / 4
    assert (four.num_gpus, four.actors) == (8, "teacher-0..1")


def test_an_engine_of_two_processes_on_a_cpu_is_counted_whole():
    """The actor starts two more, each with half of the layers and a copy of the new weights on their way."""
    one, two = (role_of(replace(gpu_job(rollout={"tensor_parallel_size": n}), device="cpu"), "rollout") for n in (1, 2))
    assert (two.processes, two.num_gpus) == (one.processes, 0)
    assert (two.memory.weights, two.memory.cache) == (one.memory.weights, one.memory.cache)
    assert two.memory.runtime == 3 * one.memory.runtime
    assert two.memory.buffers - one.memory.buffers == 2 * gpu_job().student.num_parameters
    assert one.memory.activations < two.memory.activations < 2 * one.memory.activations


def test_payload_is_the_bytes_of_the_arrays():
    """K ids and log-probabilities, the sampled one's, the entropy; the same for C candidates, and the answer's ids."""
    traffic = gpu_job(teacher={"top_k": 64}, rollout={"num_candidates": 16}).traffic
    tokens = 16 * 16 * 8192
    assert traffic.response_tokens == tokens
    assert traffic.score_bytes == tokens * (64 * 8 + 8 + 16 * 4)
    assert traffic.rollout_bytes == tokens * (16 * 8 + 8)
    assert traffic.weight_bytes == 2 * 4_022_468_096


def test_teachers_by_source_are_roles_and_one_behind_http_is_not():
    job = gpu_job(teacher={"by_source": {"code": "Qwen/Qwen2.5-14B-Instruct", "chat": "http://127.0.0.1:8100"}})
    assert [role.actors for role in plan_roles(job)] == [
        "driver", "rollout-0..1", "teacher-0..1", "teacher-code-0..1", "learner-0..3",
    ]  # fmt: skip
    small, large = role_of(job, "teacher").memory, role_of(job, "teacher-code").memory
    assert (large.weights, small.weights) == (2 * 14_770_033_664, 2 * 8_190_735_360)


def test_teachers_that_score_candidates_send_and_train_on_more():
    """loss.support=auto is the union of both models' tokens there."""
    top = gpu_job(teacher={"score_candidates": False}).traffic
    both = gpu_job().traffic
    assert both.score_bytes - top.score_bytes == 4 * 32 * both.response_tokens
    assert both.batch_bytes - top.batch_bytes == 12 * 32 * both.response_tokens


def test_what_is_made_ahead_waits_with_the_teacher_and_the_driver_is_told_of_it():
    now, ahead = (replace(gpu_job(schedule={"max_staleness": n}), device="cpu") for n in (0, 2))
    more = {
        name: role_of(ahead, name).memory.buffers - role_of(now, name).memory.buffers for name in ("driver", "teacher")
    }
    traffic = now.traffic
    assert more["driver"] == 2 * traffic.told_bytes == 2 * 48 * traffic.response_tokens
    assert more["teacher"] == 2 * (traffic.score_bytes + traffic.rollout_bytes) / 2  # two engines


def test_a_client_of_servers_has_their_answers():
    own, served = gpu_job(), gpu_job(teacher={"by_source": {"chat": "http://127.0.0.1:8100"}})
    more = role_of(served, "driver").memory.buffers - role_of(own, "driver").memory.buffers
    assert more == own.traffic.score_bytes + own.traffic.rollout_bytes + own.traffic.batch_bytes
