"""What several files of whole runs start from."""

import json

import pytest

from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An untied teacher and a tied student that share a tokenizer, with prompts."""
    root = tmp_path_factory.mktemp("pair")
    for name, tied, layers, seed in (("teacher", False, 3, 1), ("student", True, 2, 2)):
        make_tiny_qwen3(root / name, tied=tied, layers=layers, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(root / name, eos_token_id=0)
    rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(10) for b in range(10)]
    (root / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return root
