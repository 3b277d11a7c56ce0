"""Texts that no tokenizer should be given, and characters that one lacks."""

import copy
import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from opsd.config.run import DataConfig
from opsd.data.prompts import load_prompts
from opsd.data.tokens import within_measure
from opsd.errors import DataError
from tests.tiny_models import END_TOKEN, make_char_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_char_tokenizer(folder, vocab_size=64, eos_token_id=0)
    return AutoTokenizer.from_pretrained(folder)


def loaded(tmp_path, tokenizer, *rows, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(str(path), DataConfig(train_path="", **options), tokenizer, 20)


class Counting:
    """A tokenizer that knows how many characters it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.given = tokenizer, 0

    def __call__(self, texts, **options):
        self.given += sum(map(len, texts))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_a_prompt_beyond_all_measure_is_not_tokenised_whole(tmp_path, tokenizer):
    """20 tokens are the limit, and the longest token has 5 characters."""
    assert max(map(len, tokenizer.get_vocab())) == len(END_TOKEN) == 5
    huge, rows = "1" * 1_000_000, [{"prompt": "1+1="}, {"prompt": "1" * 1_000_000 + "+2="}]
    for overlong, kept in (("drop", ["1+1="]), ("truncate_left", ["1+1=", "1" * 17 + "+2="])):
        counting = Counting(tokenizer)
        prompts = loaded(tmp_path, counting, *rows, overlong=overlong).prompts
        assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == kept
        assert counting.given < 1000
    counting = Counting(tokenizer)
    with pytest.raises(DataError, match="line 2: the prompt has at least 200 tokens, the limit is 20 "):
        loaded(tmp_path, counting, *rows)
    with pytest.raises(DataError, match="line 1: the teacher's prompt has at least 200 tokens, the limit is 20 "):
        template = {"teacher_template": "{solution}{prompt}"}
        loaded(tmp_path, counting, {"prompt": "1=", "answer": huge}, **template)
    assert counting.given < 2000


def test_a_cut_text_is_still_too_long_and_keeps_its_bos():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "<bos>": 1, "bcd": 2}, bos_token="<bos>")
    most = 2 * 7 * 5
    texts = ["a" * most, "a" * (most + 1), "<bos>" + "a" * most + "b"]
    assert within_measure(tokenizer, texts, 7) == ["a" * most, "a" * most, "<bos>" + "a" * (most - 1) + "b"]
    tokenizer.bos_token = None
    assert within_measure(tokenizer, texts[2:], 7) == ["a" * (most - 1) + "b"]


def test_a_character_that_the_tokenizer_lacks_is_named_with_its_row(tmp_path, tokenizer):
    said = r"line 2: .*: its tokenizer has no token for '\\xe9', and none for what is unknown: "
    with pytest.raises(DataError, match=said.replace(r"\\xe9", "\xe9")):
        loaded(tmp_path, tokenizer, {"prompt": "1+1="}, {"prompt": "caf\xe9"})
    with pytest.raises(DataError, match="line 1: .*: its tokenizer has no token for '\u4e00'"):
        loaded(tmp_path, tokenizer, {"prompt": "1", "answer": "\u4e00"}, response_key="answer")
    with pytest.raises(DataError, match="line 1: .*: its tokenizer has no token for '!'"):
        loaded(tmp_path, tokenizer, {"prompt": "1", "answer": "3"}, teacher_template="{prompt}!")


@pytest.mark.parametrize(
    ("template", "options"),
    [
        ("{{ 1 / 0 }}", {}),
        ("{{ messages[0].content.nothing.more }}", {}),
        ("{% for m in messages %}", {}),
        ("{{ none_of_mine() }}", {}),
        ("{{ range(10 ** 9) }}", {}),
        ("{{ messages[0].content }}", {"tokenize": True}),
    ],
)
def test_a_chat_template_that_fails_in_any_way_is_named_with_the_row(tmp_path, tokenizer, template, options):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = template
    with pytest.raises(DataError, match="prompts.jsonl, line 1: the chat template of .* refuses the roles user: "):
        loaded(tmp_path, templated, {"prompt": "1"}, chat_template=True, template_options=options)
