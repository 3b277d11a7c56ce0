"""Tiny random models of many architectures, in float32, with the char tokenizer of a test: what architectures.py tries.

Widths are the smallest that vLLM's CPU kernels take (heads of 32).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

VOCAB_SIZE, STOP_ID = 64, 0
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "eos_token_id": STOP_ID,
    "bos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GROUPS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


def _of(model_type: str, **settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**SHAPE, **settings})


def _gemma3_with_vision() -> PreTrainedConfig:
    text = {**SHAPE, "tie_word_embeddings": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    return transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=True, eos_token_id=STOP_ID
    )


def _qwen3_5_with_vision() -> PreTrainedConfig:
    text = {**SHAPE, **LINEAR, "layer_types": ["linear_attention", "full_attention"]}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 1,
        "out_hidden_size": 64,
        "patch_size": 14,
        "num_position_embeddings": 16,
    }
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3": lambda: _of("qwen3", tie_word_embeddings=True),
    "Qwen2": lambda: _of("qwen2"),
    "Llama": lambda: _of("llama"),
    "Mistral": lambda: _of("mistral", sliding_window=8),
    "Gemma 3": lambda: _of("gemma3_text", tie_word_embeddings=True, sliding_window=8),
    "Gemma 3 with vision": _gemma3_with_vision,
    "Phi-3": lambda: _of("phi3"),
    "OLMo 2": lambda: _of("olmo2"),
    "GPT-NeoX": lambda: _of("gpt_neox"),
    "GPT-2": lambda: AutoConfig.for_model(
        "gpt2", vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=2, eos_token_id=STOP_ID, bos_token_id=None
    ),
    "SmolLM3": lambda: _of("smollm3", no_rope_layers=[1, 0]),
    "Qwen3-MoE": lambda: _of("qwen3_moe", num_experts=4, **EXPERTS),
    "Mixtral": lambda: _of("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "GLM-4-MoE": lambda: _of("glm4_moe", **EXPERTS, **GROUPS),
    "DeepSeek-V3": lambda: _of(
        "deepseek_v3",
        **EXPERTS,
        **GROUPS,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        head_dim=32,
    ),
    "GPT-OSS": lambda: _of("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "LFM2": lambda: _of("lfm2", layer_types=["conv", "full_attention"]),
    "Qwen3.5 with vision": _qwen3_5_with_vision,
    "Falcon-H1": lambda: _of(
        "falcon_h1", mamba_d_ssm=64, mamba_n_heads=2, mamba_d_head=32, mamba_d_state=16, lm_head_multiplier=0.5
    ),
    "Phi": lambda: _of("phi"),
    "Gemma 2": lambda: _of("gemma2", tie_word_embeddings=True),
    "Granite": lambda: _of("granite", logits_scaling=8.0),
    "Cohere": lambda: _of("cohere", tie_word_embeddings=True, logit_scale=0.25),
}


def make_architecture(name: str, folder: Path, *, seed: int, scale: float = 2.0) -> Path:
    """A model of this name with weights of this seed; its logits spread by about `scale`."""
    config = ARCHITECTURES[name]()
    config.dtype = torch.float32
    whole = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = whole.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                spread = scale if parameter is head.weight else 1.0
                parameter.normal_(std=spread / parameter.shape[-1] ** 0.5, generator=generator)
        if head.bias is not None:
            head.bias.normal_(generator=generator)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.5, generator=generator)
    model.generation_config.eos_token_id = STOP_ID
    model.save_pretrained(folder)
    return folder
