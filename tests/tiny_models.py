"""Tiny random models and a tokenizer, made on disk in a second, for tests that run the real engines.

make_tiny_qwen3(tmp_path / "student", tied=True, seed=0, eos_token_id=0)
make_char_tokenizer(tmp_path / "student", vocab_size=64, eos_token_id=0)
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes
END_TOKEN = "<end>"
ALPHABET = string.digits + "+-*/=#() \n" + string.ascii_letters  # 72 characters

# Of a config in memory whose random model has logits of a few nats, for models that no engine runs.
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def make_tiny_qwen3(
    path: Path | str,
    *,
    vocab_size: int = 64,
    width: int = 64,
    layers: int = 2,
    heads: int = 2,
    tied: bool,
    seed: int,
    eos_token_id: int,
    scale: float = 6.0,
) -> Path:
    """A random Qwen3 in float32, saved as a Hugging Face folder (config, safetensors, generation config).

    `scale` is the standard deviation of the logits, roughly: at 0.1 every token is alike, at 6 a few carry most of the
    mass, so that two seeds disagree by nats and a greedy choice is no tie. Equal arguments give equal weights.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=_std(name, parameter, scale), generator=generator)
    model.generation_config.eos_token_id = eos_token_id
    model.save_pretrained(path)
    return Path(path)


def make_char_tokenizer(path: Path | str, *, vocab_size: int = 64, eos_token_id: int, alphabet: str = ALPHABET) -> Path:
    """A tokenizer for AutoTokenizer in the same folder: one character a token, `<end>` at `eos_token_id`.

    The other ids hold the characters of `alphabet` in order; ids that it does not fill are absent, so `vocab_size`
    beyond its length makes a model whose vocabulary is padded. Raises ValueError where eos_token_id is no id of the
    model.
    """
    if not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id must lie in 0..{vocab_size - 1}, got {eos_token_id}")
    free_ids = [index for index in range(vocab_size) if index != eos_token_id]
    vocabulary = dict(zip(alphabet, free_ids, strict=False))  # the shorter of the two decides
    vocabulary[END_TOKEN] = eos_token_id
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_TOKEN).save_pretrained(path)
    return Path(path)


def make_tiny_pair(root: Path) -> Path:
    """`student` (tied), `teacher` (untied, deeper), one tokenizer, and 100 sums with solutions in prompts.jsonl."""
    for name, tied, layers, seed in (("teacher", False, 3, 1), ("student", True, 2, 2)):
        make_tiny_qwen3(root / name, tied=tied, layers=layers, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(root / name, eos_token_id=0)
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "solution": f"{a}+{b} is {a + b}"} for a, b in sums]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _std(name: str, parameter: torch.Tensor, scale: float) -> float:
    """Linear layers keep their input's variance; the head spreads logits by `scale` (its input has unit variance)."""
    fan_in = parameter.shape[1]
    is_head = name in ("lm_head.weight", "model.embed_tokens.weight")
    return (scale if is_head else 1.0) / fan_in**0.5
