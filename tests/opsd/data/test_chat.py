"""From rows to what a model reads: roles, templates, special tokens, and the files that hold them."""

import copy
import json

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from opsd.config.run import DataConfig, PromptConfig, compose_config
from opsd.data.prompts import load_prompts
from opsd.data.rows import count_rows
from opsd.errors import DataError
from tests.tiny_models import make_char_tokenizer

# Roles by a letter: the tokenizer knows single characters. As Gemma's and Mistral's, it has opinions on roles.
TEMPLATE = (
    "{% if tools %}t{{ tools | length }}{{ tools[0].name }}-{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m.role == messages[loop.index0 - 1].role and not loop.first %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.role[0] }}({{ m.content }}){% endfor %}"
    "{% if add_generation_prompt %}a({% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_char_tokenizer(folder, vocab_size=64, eos_token_id=0)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def load(tmp_path, tokenizer, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(str(path), DataConfig(train_path="", **options), tokenizer, 60)


def texts(tmp_path, tokenizer, *prompts, **options):
    file = load(tmp_path, tokenizer, *({"prompt": prompt, "answer": "2"} for prompt in prompts), **options)
    assert [tokenizer.decode(prompt.token_ids) for prompt in file.prompts] == [prompt.text for prompt in file.prompts]
    return [prompt.text for prompt in file.prompts]


USER = turns(("user", "1+1"))


def test_messages_go_through_the_template_and_strings_stay_plain(tmp_path, plain, chat):
    assert texts(tmp_path, chat, USER, "1+1") == ["u(1+1)a(", "1+1"]
    assert texts(tmp_path, chat, USER, "1+1", chat_template="true") == ["u(1+1)a("] * 2
    assert texts(tmp_path, chat, USER, "1+1", chat_template="false") == ["1+1"] * 2
    assert texts(tmp_path, plain, "1+1") == ["1+1"]
    with pytest.raises(DataError, match=r"line 2: 'prompt' is a list of messages, .* has no chat template"):
        texts(tmp_path, plain, "1+1", USER)


@pytest.mark.parametrize(("given", "kept"), [(True, "true"), ("True", "true"), (False, "false"), ("auto", "auto")])
def test_yamls_true_and_false_stay_what_they_were(given, kept):
    assert compose_config({"chat_template": given}, PromptConfig).chat_template == kept
    assert PromptConfig(chat_template=given).chat_template == kept


def test_the_run_says_what_it_did_and_shows_the_first_prompt_to_both_models(tmp_path, chat):
    rows = [{"prompt": USER, "answer": "2"}, {"prompt": "1", "answer": "3"}]
    path, first, teacher = load(tmp_path, chat, *rows, teacher_template="{solution}={prompt}").described(chat)
    assert path.endswith("rows.jsonl: 2 prompts, 1 through the chat template")
    assert "'u(1+1)a('" in first and "as the teacher sees it: 'u(2=1+1)a('" in teacher
    line, long = load(tmp_path, chat, {"prompt": turns(("user", "1" * 50))}).described(chat)
    assert line.endswith("1 prompts, all through the chat template") and len(long) < 200


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (turns(("system", "a"), ("user", "1")), "refuses the roles system, user: System role not supported"),
        (turns(("user", "1"), ("user", "2")), "refuses the roles user, user: Roles must alternate"),
        (turns(("user", "1"), ("assistant", "2")), "ends with a turn of the assistant"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "has content of type 'image', expected text"),
        ([{"role": "user", "content": [{"type": "text", "text": "1"}, 5]}], "has content of type 'int', expected text"),
        ([{"role": "user", "content": None}], "must be a string or a list of role/content objects"),
        ([], "must be a string or a list of role/content objects"),
    ],
)
def test_what_no_model_can_answer_is_refused_with_its_row(tmp_path, chat, prompt, said):
    with pytest.raises(DataError) as caught:
        texts(tmp_path, chat, USER, prompt)
    assert "rows.jsonl, line 2: " in str(caught.value) and said in str(caught.value)


def test_the_last_turn_may_be_the_files_own_answer(tmp_path, chat):
    conversation = turns(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "45"))
    [prompt] = load(tmp_path, chat, {"prompt": conversation}, response_key="prompt").prompts
    assert prompt.text == "u(1)a(2)u(3)a(" and chat.decode(prompt.response_ids[:-1]) == "45"
    assert prompt.response_ids[-1] == chat.eos_token_id


def test_a_files_own_answer_that_is_none_is_refused(tmp_path, chat):
    with pytest.raises(DataError, match="line 1: data.response_key=prompt asks for a last turn of the assistant"):
        load(tmp_path, chat, {"prompt": USER}, response_key="prompt")
    with pytest.raises(DataError, match="line 1: the field 'own' must be a string or a number, got"):
        load(tmp_path, chat, {"prompt": USER, "own": USER}, response_key="own")


def test_text_parts_are_joined_and_calls_without_text_are_kept(tmp_path, chat):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    called = [
        *turns(("user", "1")),
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        *turns(("tool", "2")),
    ]
    assert texts(tmp_path, chat, [{"role": "user", "content": parts}], called) == ["u(1+1)a(", "u(1)a()t(2)a("]


def test_a_rows_own_tools_reach_the_template(tmp_path, chat):
    tools = [{"name": "f", "parameters": {"x": None}}, {"name": "g", "parameters": {"x": "y"}}]
    file = load(tmp_path, chat, *({"prompt": USER, "tools": own} for own in (tools, json.dumps(tools), [], None)))
    assert [prompt.text for prompt in file.prompts] == ["t2f-u(1+1)a("] * 2 + ["u(1+1)a("] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": USER, "tools": tools}]), tmp_path / "t.parquet")
    [prompt] = load_prompts(str(tmp_path / "t.parquet"), DataConfig(train_path=""), chat, 60).prompts
    assert prompt.text == "t2f-u(1+1)a("
    without = copy.deepcopy(chat)
    without.chat_template = "{{ messages[0].content }}"
    for tokenizer, own, said in (
        (without, tools, "has 'tools', which the chat template of .* does not show"),
        (chat, ["f"], "'tools' must be a list of objects"),
        (chat, "{f", "'tools' is a string, but not JSON"),
    ):
        with pytest.raises(DataError, match=f"line 1: .*{said}"):
            load(tmp_path, tokenizer, {"prompt": USER, "tools": own})


def with_specials(tokenizer, pattern):
    """A tokenizer that puts B before and E behind, as `pattern` says."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<b>", "eos_token": "<e>"})
    ids = [(token, own.convert_tokens_to_ids(token)) for token in ("<b>", "<e>")]
    own.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=ids)
    return own


@pytest.mark.parametrize(
    ("pattern", "prompt", "read"),
    [
        ("<b> $A", "1+1", "<b>1+1"),
        ("<b> $A", "<b>1+1", "<b>1+1"),
        ("<b> $A", "<b><b>1", "<b><b>1"),
        ("$A <e>", "1+1", "1+1"),
        ("<b> $A <e>", "1+1", "<b>1+1"),
        ("<b> $A <e>", "<b>1<e>", "<b>1<e>"),
        ("$A", "1+1", "1+1"),
        ("$A", "<b><b>1<e><e>", "<b><b>1<e><e>"),
    ],
)
def test_a_prompt_begins_once_and_does_not_end(tmp_path, plain, pattern, prompt, read):
    tokenizer = with_specials(plain, pattern)
    [own] = load(tmp_path, tokenizer, {"prompt": prompt}).prompts
    assert tokenizer.decode(own.token_ids) == read


def test_a_template_writes_the_special_tokens_itself(tmp_path, plain):
    tokenizer = with_specials(plain, "<b> $A <e>")
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    [own] = load(tmp_path, tokenizer, {"prompt": USER}).prompts
    assert tokenizer.decode(own.token_ids) == "<b>u(1+1)a("


def test_files_in_utf_8_with_a_mark_are_read_and_those_in_utf_16_are_named(tmp_path, plain):
    path = tmp_path / "rows.jsonl"
    lines = '{"prompt": "1+1"}\n{"prompt": "2"}\n'
    path.write_text(lines, encoding="utf-8-sig")
    assert [p.text for p in load_prompts(str(path), DataConfig(train_path=""), plain, 60).prompts] == ["1+1", "2"]
    assert count_rows(str(path)) == 2
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_text(lines, encoding=encoding)
        for read in (
            lambda: load_prompts(str(path), DataConfig(train_path=""), plain, 60),
            lambda: count_rows(str(path)),
        ):
            with pytest.raises(DataError, match=r"rows.jsonl: it is in UTF-16 or UTF-32: save it in UTF-8"):
                read()
