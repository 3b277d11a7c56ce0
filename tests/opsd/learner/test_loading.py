"""Two ranks, of which the second begins without weights, against one rank and against the folder itself."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DeepseekV3Config, Lfm2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from opsd.config.run import StudentConfig
from opsd.errors import ConfigError
from opsd.learner.loading import load_student, open_student
from opsd.learner.model import DistillationModel, decoder_layers, full_weights, shard, trained_tensors
from opsd.learner.packing import pack
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts
from tests.opsd.process_group import one_rank

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 5))
LENGTHS = [5, 9, 7]
SIZES = dict(
    vocab_size=63,  # two ranks share its rows unevenly
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DEEPSEEK = DeepseekV3Config(
    **SIZES,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    first_k_dense_replace=1,
)
CONFIGS = {
    "tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "untied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "a conv": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "buffers": DEEPSEEK,
}
LARGE = Qwen3Config(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)  # 330 MB in float32


def make(config, folder):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-1.0, 1.0)
    model.save_pretrained(folder)
    return str(folder)


def sharded(path, rank, num_ranks, **settings):
    causal_lm = open_student(StudentConfig(path=path), rank=rank, device="cpu")
    assert all(tensor.is_meta == (rank > 0) for tensor in causal_lm.parameters())
    model = DistillationModel(causal_lm, reverse_kl, VOCABULARY)
    shard(model, device="cpu", num_ranks=num_ranks, dtype="float32", **settings)
    return model


def weights_and_losses(path, rank, num_ranks, **settings):
    """Every rank runs the same micro-batches, one sequence each."""
    model = sharded(path, rank, num_ranks, **settings)
    weights = {name: w.clone() for name, w in full_weights(trained_tensors(model), torch.float32)}
    every = Selection(index_N=torch.arange(sum(LENGTHS)), weight_N=torch.ones(sum(LENGTHS)))
    scored = batch_of(scored_rollouts(LENGTHS, VOCABULARY))
    [batches] = pack(scored, every, "teacher", VOCABULARY, num_ranks=1, max_tokens=0)
    assert len(batches) == len(LENGTHS)
    return {"weights": weights, "losses": torch.stack([model(batch)[0].detach() for batch in batches])}


def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def old_way(path, num_ranks):
    """Every rank loads the whole model and shards it afterwards."""
    model = DistillationModel(load_student(path, attention="sdpa", trust_remote_code=False), reverse_kl, VOCABULARY)
    mesh = init_device_mesh("cpu", (num_ranks,))
    for unit in [*decoder_layers(model.causal_lm), model]:
        fully_shard(unit, mesh=mesh)


def as_rank(rank, num_ranks, folder, job):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
    store = dist.FileStore(str(folder / f"store_{job}"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    torch.set_num_threads(1)
    path = str(folder / "model")
    if job == "values":
        found = {name: weights_and_losses(str(folder / name), rank, num_ranks) for name in CONFIGS}
        found["offloaded"] = weights_and_losses(str(folder / "tied"), rank, num_ranks, cpu_offload=True)
    else:
        start = peak_bytes()
        sharded(path, rank, num_ranks)
        now = peak_bytes() - start
        old_way(path, num_ranks)
        found = {"now": now, "before": peak_bytes() - start}
    torch.save(found, folder / f"{job}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(folder, job):
    mp.spawn(as_rank, args=(2, folder, job), nprocs=2)
    return [torch.load(folder / f"{job}_{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_equal_one_and_the_folder_bit_for_bit(tmp_path):
    """Weights, buffers and losses: tied, untied, with rows shared unevenly, with a router's bias, offloaded."""
    for name, config in CONFIGS.items():
        make(config, tmp_path / name)
    first, second = run_ranks(tmp_path, "values")
    with one_rank():
        for name, found in first.items():
            path = str(tmp_path / ("tied" if name == "offloaded" else name))
            alone = weights_and_losses(path, 0, 1)
            source = load_student(path, attention="sdpa", trust_remote_code=False).state_dict()
            assert alone["losses"].isfinite().all() and alone["losses"].unique().numel() == len(LENGTHS)
            for other in (found, second[name]):
                assert torch.equal(other["losses"], alone["losses"]), name
                assert other["weights"].keys() == alone["weights"].keys()
                assert source.keys() - other["weights"].keys() <= {"lm_head.weight"}, name  # where it is tied
                for key, weight in other["weights"].items():
                    assert torch.equal(weight, source[key]), f"{name}: {key}"
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in first["buffers"]["weights"]


@pytest.mark.long
def test_a_rank_that_does_not_read_the_folder_needs_little_more_than_its_shards(tmp_path):
    """Its short sibling is the test above: the second rank's tensors are on the meta device."""
    make(LARGE, tmp_path / "model")
    _, second = run_ranks(tmp_path, "memory")
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    print(second, size)
    assert second["before"] > size
    assert second["now"] < 0.6 * second["before"]


def test_one_rank_has_the_folders_weights_and_its_tie():
    with tempfile.TemporaryDirectory() as folder, one_rank():
        path = make(CONFIGS["tied"], folder)
        model = sharded(path, 0, 1)
        assert model.causal_lm.get_output_embeddings().weight is model.causal_lm.get_input_embeddings().weight
        source = load_student(path, attention="sdpa", trust_remote_code=False)
        for name, weight in full_weights(trained_tensors(model), torch.float32):
            assert torch.equal(weight, source.state_dict()[name])
        rotary = "model.rotary_emb.inv_freq"  # not in the file
        assert torch.equal(model.causal_lm.get_buffer(rotary), source.get_buffer(rotary))


def test_layers_that_share_a_weight_are_refused(tmp_path):
    path = make(CONFIGS["untied"], tmp_path)
    with one_rank():
        causal_lm = load_student(path, attention="sdpa", trust_remote_code=False)
        causal_lm.model.layers[1].mlp.up_proj.weight = causal_lm.model.layers[0].mlp.up_proj.weight
        with pytest.raises(ConfigError, match="layers 0 and 1 .* share the weight mlp.up_proj.weight"):
            shard(DistillationModel(causal_lm, reverse_kl, VOCABULARY), device="cpu", num_ranks=1, dtype="float32")
