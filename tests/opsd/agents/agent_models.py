"""Tiny models whose vocabulary has whole calls as tokens, so that random weights call tools."""

from __future__ import annotations

import json
import string
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

VOCAB_SIZE = 128
STOPS = "ABCDFGHI"
BUILD = "tests.opsd.agents.some_tools:build_tools"
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}({{ tool.function.name }}){% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}[T:{{ m.content }}]"
    "{% else %}[{{ m.role[0] }}:{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a:{% endif %}"
)


def call(name: str, n: int | str = 1) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'n': n}})}</tool_call>"


# One token each.
CALLS = [call("add"), call("add", 2), call("later"), call("fail"), call("none"), "<tool_call>{</tool_call>"]


def make_agent_tokenizer(path: Path, template: str = TEMPLATE) -> Path:
    characters = sorted(set(string.printable) - set("\r\x0b\x0c"))
    characters += [chr(0xC0 + number) for number in range(VOCAB_SIZE)]  # what is left over: vLLM samples padding
    make_char_tokenizer(path, vocab_size=VOCAB_SIZE, eos_token_id=0, alphabet=[*CALLS, *characters])
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def make_agent_model(path: Path, *, seed: int, tied: bool = True, scale: float = 1.0, stops: str = STOPS) -> Path:
    """One that ends a turn with any of `stops`, too, so that turns are a dozen tokens long."""
    make_tiny_qwen3(path, vocab_size=VOCAB_SIZE, tied=tied, seed=seed, eos_token_id=0, scale=scale)
    make_agent_tokenizer(path)
    tokenizer, settings = AutoTokenizer.from_pretrained(path), GenerationConfig.from_pretrained(path)
    settings.eos_token_id = [0, *(tokenizer.convert_tokens_to_ids(stop) for stop in stops)]
    settings.save_pretrained(path)
    return path


def ids_of(tokenizer, text: str) -> list[int]:
    """With whole calls as one token where CALLS has them."""
    found = []
    while text:
        known = next(
            (each for each in CALLS if text.startswith(each)), "<end>" if text.startswith("<end>") else text[0]
        )
        found.append(tokenizer.convert_tokens_to_ids(known))
        text = text[len(known) :]
    return found
