"""Each mistake gets one clear message before a weight is read."""

import json
import shutil
from dataclasses import replace

import pytest

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.lora import LoraConfig
from opsd.config.loss import LossConfig
from opsd.config.placement import PlacementConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.errors import ConfigError, DataError
from opsd.models.facts import read_facts
from opsd.models.folder import model_config, text_setting
from opsd.plan.models import read_model
from opsd.preflight import check, check_counts, check_prompts, shared_vocabulary
from tests.tiny_models import ALPHABET, make_char_tokenizer, make_tiny_qwen3
from tiny_architectures import make_architecture


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """student and teacher share ids 0..63; `padded` has more rows than tokens; `other` maps characters to other ids."""
    root = tmp_path_factory.mktemp("models")
    for name, vocab_size, eos in (("student", 64, 0), ("teacher", 64, 0), ("padded", 96, 0), ("other", 64, 5)):
        make_tiny_qwen3(root / name, vocab_size=vocab_size, tied=True, seed=0, eos_token_id=eos)
        make_char_tokenizer(root / name, vocab_size=64, eos_token_id=eos)
    return root


def config(models, tmp_path, *, teacher="teacher", prompts=("1+2=",), **sections):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return RunConfig(
        output_dir=str(tmp_path / "run"),
        student=StudentConfig(path=str(models / "student")),
        teacher=TeacherConfig(**{"path": str(models / teacher), **sections.pop("teacher_options", {"top_k": 8})}),
        data=DataConfig(train_path=str(path), eval_path=str(path)),
        **sections,
    )


def test_a_sound_configuration_passes(models, tmp_path):
    setup = check(config(models, tmp_path))
    assert setup.vocabulary.size == 64
    assert setup.vocabulary.stop_ids == (0,)
    assert setup.student.max_model_tokens == 4 + 512 + 1


def test_what_trains_of_a_lora_student_is_counted_or_refused(models, tmp_path):
    cfg = config(models, tmp_path)
    assert check(cfg).adapter is None
    adapter = check(replace(cfg, student=replace(cfg.student, lora=LoraConfig(rank=2, targets=["q_proj"])))).adapter
    assert (adapter.num_layers, adapter.num_trained) == (2, 2 * 2 * (64 + 64))
    with pytest.raises(ConfigError, match="student.lora.targets: Qwen3ForCausalLM has no layer 'query'"):
        check(replace(cfg, student=replace(cfg.student, lora=LoraConfig(rank=2, targets=["query"]))))
    adapted = replace(cfg.student, lora=LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="student.lora.rank=2 sends merged weights"):
        check(replace(cfg, student=adapted, rollout=RolloutConfig(weight_transfer="nccl")))


def test_a_padded_vocabulary_is_legal_and_cut_to_the_shared_one(models, tmp_path):
    assert check(config(models, tmp_path, teacher="padded")).vocabulary.size == 64


def test_stop_ids_of_both_models_are_one_event(models, tmp_path):
    generation = models / "padded" / "generation_config.json"
    saved = generation.read_text()
    generation.write_text(json.dumps({"eos_token_id": [0, 9]}))
    assert check(config(models, tmp_path, teacher="padded")).vocabulary.stop_ids == (0, 9)
    generation.write_text(saved)


def test_a_missing_model_is_named(models, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.path=.*nothing-here: there is no model here"):
        check(config(models, tmp_path, teacher="nothing-here"))


def test_a_teacher_with_other_ids_is_refused(models, tmp_path):
    with pytest.raises(
        ConfigError, match="its tokenizer does not share the student's ids: .* the first is id 0: '<end>'"
    ):
        check(config(models, tmp_path, teacher="other"))


def test_a_prompt_longer_than_the_context_is_refused_with_its_line(models, tmp_path):
    with pytest.raises(DataError, match="line 2: the prompt has 600 tokens, the limit is 511"):
        check(config(models, tmp_path, prompts=("1+2=", "1" * 600)))


def test_engines_of_several_processes_are_for_any_device_but_need_heads_for_each(models, tmp_path):
    """The tiny models have two heads."""
    two, three = ({"top_k": 8, "tensor_parallel_size": n} for n in (2, 3))
    assert check(config(models, tmp_path, device="cpu", teacher_options=two)).device == "cpu"
    with pytest.raises(ConfigError, match=r"teacher\.tensor_parallel_size=3 does not divide the 2 attention heads"):
        check(config(models, tmp_path, teacher_options=three))
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel_size=4 does not divide the 2 attention heads"):
        check(config(models, tmp_path, rollout=RolloutConfig(tensor_parallel_size=4)))
    by_source = {"a": {"path": str(models / "padded"), "tensor_parallel_size": 3}}
    with pytest.raises(ConfigError, match=r"teacher\.by_source\.a\.tensor_parallel_size=3 does not divide"):
        check(config(models, tmp_path, teacher_options={"top_k": 8, "by_source": by_source}))


def test_a_response_longer_than_the_context_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="max_response_tokens=2000 leaves no room"):
        check(config(models, tmp_path, rollout=RolloutConfig(max_response_tokens=2000)))


def test_more_log_probabilities_than_tokens_are_refused(models, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.top_k must be at most the shared vocabulary's 64 tokens, got 65"):
        check(config(models, tmp_path, teacher_options={"top_k": 65}))
    with pytest.raises(ConfigError, match=r"rollout\.num_candidates must be at most"):
        check(config(models, tmp_path, rollout=RolloutConfig(num_candidates=65)))


def test_the_support_is_the_best_that_the_teacher_can_score(models, tmp_path):
    assert check(config(models, tmp_path)).support == "union"
    own_way = {"top_k": 8, "scoring": "prompt_logprobs"}
    assert check(config(models, tmp_path, teacher_options=own_way)).support == "teacher"
    asked = check(config(models, tmp_path, loss=LossConfig(support="teacher")))
    assert asked.support == "teacher"


def test_a_support_that_the_teacher_cannot_score_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="loss.support=union needs .*, which teacher does not give: take a"):
        own_way = {"top_k": 8, "scoring": "prompt_logprobs"}
        check(config(models, tmp_path, teacher_options=own_way, loss=LossConfig(support="union")))


def test_the_vocabulary_of_several_teachers_is_what_all_of_them_share(models, tmp_path):
    by_source = {"a": str(models / "padded")}
    with pytest.raises(DataError, match="row 1: no teacher for data_source ''"):
        check(config(models, tmp_path, teacher_options={"path": "", "top_k": 8, "by_source": by_source}))
    rows = [{"prompt": "1+2=", "data_source": "a"}, {"prompt": "1+3="}]
    cfg = config(models, tmp_path, teacher_options={"top_k": 8, "by_source": by_source})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(cfg).vocabulary.size == 64
    cfg.teacher.by_source = {"a": str(models / "other")}
    with pytest.raises(ConfigError, match=r"teacher\.by_source\.a\.path: its tokenizer does not share the student's"):
        check(cfg)


@pytest.mark.parametrize(
    ("device", "rollout", "said"),
    [
        ("cpu", {}, "placement.mode=colocated shares GPUs; this run is on the CPU"),
        ("cuda", {"tensor_parallel_size": 2}, "rollout.tensor_parallel_size must be 1, got 2"),
        ("cuda", {"backend": "transformers"}, "rollout.backend=vllm, got transformers"),
        ("cuda", {"weight_transfer": "nccl"}, "NCCL joins no two processes on one GPU"),
        ("cuda", {"gpu_memory_utilization": 0.65}, "must not sum to more than 0.95, got 1.00"),
    ],
)
def test_what_cannot_share_a_gpu_is_refused(models, tmp_path, monkeypatch, device, rollout, said):
    """As on a cluster's node without a GPU: there device=cuda is taken at its word."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    placement = PlacementConfig(mode="colocated")
    with pytest.raises(ConfigError) as refused:
        check(config(models, tmp_path, device=device, placement=placement, rollout=RolloutConfig(**rollout)))
    assert said in str(refused.value)


def test_a_teacher_elsewhere_takes_no_part_of_a_shared_gpu(models, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cfg = config(models, tmp_path, device="cuda", placement=PlacementConfig(mode="colocated"))
    check_counts(replace(cfg, teacher=TeacherConfig(backend="http", urls=["http://a"], top_k=8)), 64, "cuda")
    check_counts(cfg, 64, "cuda")
    cfg.rollout.gpu_memory_utilization = 0.9
    check_counts(replace(cfg, teacher=TeacherConfig(backend="http", urls=["http://a"], top_k=8)), 64, "cuda")
    with pytest.raises(ConfigError, match="must not sum to more than 0.95, got 1.25"):
        check_counts(cfg, 64, "cuda")


def test_a_cache_beyond_the_machines_memory_is_refused(models, tmp_path, monkeypatch):
    said = r"^teacher.kv_cache_gib=1e\+09 for each of 1 engines is more than the \d+\.\d GiB of this machine$"
    huge = {"top_k": 8, "kv_cache_gib": 1e9}
    with pytest.raises(ConfigError, match=said):
        check(config(models, tmp_path, device="cpu", teacher_options=huge))
    many = RolloutConfig(kv_cache_gib=1.0, num_workers=10**6)
    with pytest.raises(ConfigError, match="^rollout.kv_cache_gib=1 for each of 1000000 engines is more than"):
        check(config(models, tmp_path, device="cpu", rollout=many))
    by_source = {"a": {"path": str(models / "padded"), "kv_cache_gib": 1e6}}
    with pytest.raises(ConfigError, match=r"^teacher\.by_source\.a\.kv_cache_gib=1e\+06 for each of 1 engines"):
        check(config(models, tmp_path, device="cpu", teacher_options={"top_k": 8, "by_source": by_source}))
    # An engine of transformers reserves nothing, and a cluster's nodes may have more.
    check(config(models, tmp_path, device="cpu", teacher_options={**huge, "backend": "transformers"}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check(config(models, tmp_path, device="cpu", teacher_options=huge))


def test_a_folder_to_write_to_is_asked_for_before_the_models(models, tmp_path):
    cfg = replace(config(models, tmp_path, teacher="nothing-here"), output_dir=str(tmp_path / "prompts.jsonl" / "run"))
    with pytest.raises(ConfigError, match=r"^output_dir=\S+ lies below \S+prompts.jsonl, which is a file$"):
        check(cfg)


def test_stop_tokens_that_no_shared_id_names_are_refused(models):
    facts = read_facts("student.path", str(models / "padded"), False)
    with pytest.raises(ConfigError, match="^no model can end an answer: their stop tokens are none of the 64 ids"):
        shared_vocabulary(replace(facts, stop_ids=(70,)), {}, {})


def test_a_prompt_with_a_token_that_one_model_lacks_is_refused(models, tmp_path):
    setup = check(config(models, tmp_path, prompts=("1+2=", "1+z=")))
    smaller = replace(setup.vocabulary, size=int(max(setup.train_prompts[1].token_ids)))
    said = rf"prompts.jsonl, row 2: the prompt holds token {smaller.size}, which is none of the {smaller.size} ids"
    with pytest.raises(DataError, match=said):
        check_prompts(setup.train_prompts, smaller)
    check_prompts(setup.train_prompts, setup.vocabulary)


def test_nccl_is_refused_on_the_cpu(models, tmp_path):
    with pytest.raises(ConfigError, match="rollout.weight_transfer=nccl needs GPUs .*, this run has cpu and vllm"):
        check(config(models, tmp_path, rollout=RolloutConfig(weight_transfer="nccl")))


def test_colocated_roles_cannot_be_on_different_nodes():
    with pytest.raises(ConfigError, match="must be equal, got 'a', '', ''"):
        PlacementConfig(mode="colocated", rollout_nodes="a")


@pytest.fixture(scope="module")
def renamed(models):
    """A teacher whose tokenizer has other tokens at the ids of "x" and of "y"; the first of these ids."""
    shutil.copytree(models / "teacher", models / "renamed")
    make_char_tokenizer(models / "renamed", eos_token_id=0, alphabet=ALPHABET.replace("x", "<").replace("y", ">"))
    return 1 + ALPHABET.index("x")


def ignoring(models, tmp_path, tokens, **sections):
    options = {"path": str(models / "renamed"), "top_k": 8, "ignore_tokens": tokens}
    return check(config(models, tmp_path, teacher_options=options, **sections)).vocabulary


def test_renamed_tokens_are_left_out_by_id_or_by_either_name(models, tmp_path, renamed):
    with pytest.raises(ConfigError, match=rf"2 of 64 differ.*teacher.ignore_tokens=\[{renamed},{renamed + 1}\]"):
        ignoring(models, tmp_path, [])
    for tokens in ([renamed, renamed + 1], ["x", "y"], ["<", renamed + 1, 63], ["x", "y", 63]):
        foreign_ids = ignoring(models, tmp_path, tokens).foreign_ids
        assert foreign_ids[:2] == (renamed, renamed + 1) and foreign_ids[2:] in ((), (63,))


def test_what_cannot_be_left_out_is_refused(models, tmp_path, renamed):
    with pytest.raises(ConfigError, match="teacher.ignore_tokens: '<end>' ends answers .id 0."):
        ignoring(models, tmp_path, ["x", "y", "<end>"])
    for unknown in (64, -1, "no such"):
        with pytest.raises(ConfigError, match=f"teacher.ignore_tokens: {unknown!r} is no id below 64 and no token"):
            ignoring(models, tmp_path, ["x", "y", unknown])
    with pytest.raises(DataError, match=f"row 2: the prompt holds token {renamed}, which teacher.ignore_tokens"):
        ignoring(models, tmp_path, ["x", "y"], prompts=("1+2=", "1+x="))


@pytest.fixture
def with_vision(tmp_path):
    """A multimodal folder, whose language model is described within its config."""
    folder = make_architecture("Gemma 3 with vision", tmp_path / "with_vision", seed=0)
    make_char_tokenizer(folder, eos_token_id=0)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id", None)
    config["text_config"].update(eos_token_id=[0, 9], max_position_embeddings=300)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_multimodal_models_facts_are_its_language_models(with_vision):
    facts = read_facts("student.path", str(with_vision), False)
    assert (facts.vocab_size, facts.stop_ids, facts.max_position_embeddings) == (64, (0, 9), 300)
    sizes = read_model("student", str(with_vision))
    assert (sizes.num_hidden_layers, sizes.vocab_size, sizes.tied) == (2, 64, True)


def test_a_config_without_a_context_is_refused_by_the_fields_name(with_vision):
    config = model_config("student.path", str(with_vision), False)
    with pytest.raises(ConfigError, match="with_vision: its config.json does not say num_ghosts"):
        text_setting(str(with_vision), config, "num_ghosts")
