"""Prompt files, good and bad; the order of batches."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from opsd.config.run import DataConfig
from opsd.data.prompts import PromptSource, load_prompts
from opsd.errors import ConfigError, DataError
from tests.tiny_models import make_char_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_char_tokenizer(folder, vocab_size=64, eos_token_id=0)
    return AutoTokenizer.from_pretrained(folder)


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def load(path, tokenizer, **options):
    return load_prompts(path, DataConfig(train_path="", eval_path="", **options), tokenizer, 20).prompts


def test_prompts_keep_their_row_answer_and_tokens(tmp_path, tokenizer):
    path = write(tmp_path, '{"prompt": "1+2=", "answer": 3}', "", '{"prompt": "4+4=", "answer": "8"}')
    first, second = load(path, tokenizer)
    assert (first.index, first.text, first.answer) == (0, "1+2=", "3")
    assert (second.index, second.answer, second.source) == (1, "8", path)
    assert tokenizer.decode(second.token_ids) == "4+4="


def test_own_field_names_messages_and_instruction(tmp_path, tokenizer):
    path = write(tmp_path, json.dumps({"question": [{"role": "user", "content": "1+1"}], "label": "2"}))
    names = {"prompt_key": "question", "answer_key": "label"}
    [prompt] = load(path, tokenizer, **names, instruction="box it", grader="math", chat_template=False)
    assert (prompt.text, prompt.answer) == ("1+1\nbox it", "2")


def test_the_teacher_sees_the_solution_and_the_student_does_not(tmp_path, tokenizer):
    path = write(tmp_path, '{"prompt": "1+2=", "worked": "33"}', '{"prompt": "4=", "worked": "4"}')
    template = {"teacher_template": "{solution}+{prompt}", "solution_key": "worked"}
    first, second = load(path, tokenizer, **template)
    assert [tokenizer.decode(p.token_ids) for p in (first, second)] == ["1+2=", "4="]
    assert [tokenizer.decode(p.scored_after) for p in (first, second)] == ["33+1+2=", "4+4="]
    [plain, _] = load(path, tokenizer)
    assert plain.teacher_token_ids is None and plain.scored_after is plain.token_ids


def test_the_files_own_answer_ends_with_a_stop_token(tmp_path, tokenizer):
    [prompt] = load(write(tmp_path, '{"prompt": "1+2=", "worked": "3"}'), tokenizer, response_key="worked")
    assert prompt.response_ids.tolist() == [*tokenizer("3", add_special_tokens=False)["input_ids"], 0]


def test_the_reference_answer_is_the_solution_where_no_field_is_named(tmp_path, tokenizer):
    row = {"prompt": [{"role": "user", "content": "1+2="}], "reward_model": {"ground_truth": "3"}}
    options = {"teacher_template": "{solution}+{prompt}", "chat_template": False}
    [prompt] = load(write(tmp_path, json.dumps(row)), tokenizer, **options)
    assert tokenizer.decode(prompt.scored_after) == "3+1+2="


def test_the_chat_template_gets_its_options_or_is_missed(tmp_path, tokenizer):
    path = write(tmp_path, '{"prompt": "1+2="}')
    with pytest.raises(ConfigError, match="its tokenizer has no chat template"):
        load(path, tokenizer, chat_template=True)
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{{ messages[0].content }}{% if enable_thinking %}#{% endif %}"
    assert load(path, templated, chat_template=True)[0].text == "1+2="
    [prompt] = load(path, templated, chat_template=True, template_options={"enable_thinking": True})
    assert prompt.text == "1+2=#"


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ([], {}, "prompts.jsonl: the file is empty"),
        (['{"prompt": "1"}', "{not json"], {}, "prompts.jsonl, line 2: not JSON"),
        (['{"prompt": "1"}', "", '{"text": "1"}'], {}, "line 3: expected an object with 'prompt', got text"),
        (["[1, 2]"], {}, "line 1: expected an object, got list"),
        (['{"prompt": 5}'], {}, "line 1: 'prompt' must be a string or a list"),
        (['{"prompt": "1"}'], {"grader": "math"}, "line 1: data.grader=math needs 'answer'"),
        (
            ['{"prompt": "1"}', json.dumps({"prompt": "1" * 21})],
            {},
            "line 2: the prompt has 21 tokens, the limit is 20",
        ),
        (['{"prompt": ""}'], {}, "line 1: the prompt has no tokens"),
        (
            ['{"prompt": "1"}'],
            {"teacher_template": "{solution}{prompt}"},
            "line 1: expected the field 'answer' or 'reward_model.ground_truth', got",
        ),
        (['{"prompt": "1"}'], {"response_key": "worked"}, "line 1: expected the field 'worked', got prompt"),
        (
            [json.dumps({"prompt": "1", "answer": "1" * 20})],
            {"teacher_template": "{solution}{prompt}"},
            "line 1: the teacher's prompt has 21 tokens, the limit is 20",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, tokenizer, lines, options, said):
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, *lines), tokenizer, **options)
    assert said in str(caught.value)
    assert "prompts.jsonl" in str(caught.value)


LONG = [json.dumps({"prompt": "1" * length, "answer": "2" * (length % 7)}) for length in (3, 21, 4, *[22] * 5, 30, 19)]


def loaded(path, tokenizer, **options):
    return load_prompts(path, DataConfig(train_path="", **options), tokenizer, 20)


def test_a_refusal_says_how_many_prompts_are_too_long_and_names_five(tmp_path, tokenizer):
    with pytest.raises(DataError) as caught:
        loaded(write(tmp_path, *LONG), tokenizer)
    assert "line 2: the prompt has 21 tokens, the limit is 20" in str(caught.value)
    named = "(also line 4 (22), line 5 (22), line 6 (22), line 7 (22) and 2 more)"
    assert f"too many in 7 of 10 rows {named}: data.overlong=drop" in str(caught.value)


def test_rows_that_are_too_long_are_dropped_and_the_others_keep_their_numbers(tmp_path, tokenizer):
    file = loaded(write(tmp_path, *LONG), tokenizer, overlong="drop")
    assert [(prompt.index, len(prompt.token_ids)) for prompt in file.prompts] == [(0, 3), (2, 4), (9, 19)]
    assert (file.num_dropped, file.num_cut) == (7, 0)
    assert "3 prompts, none through the chat template, 7 rows dropped as too long" in file.described(tokenizer)[0]
    with pytest.raises(DataError, match="each of its 1 prompts has more than 20 tokens"):
        loaded(write(tmp_path, LONG[1]), tokenizer, overlong="drop")


def test_a_prompt_is_cut_on_the_left_and_keeps_its_bos(tmp_path, tokenizer):
    path = write(tmp_path, json.dumps({"prompt": "9" + "1" * 22 + "="}), '{"prompt": "1"}')
    file = loaded(path, tokenizer, overlong="truncate_left")
    assert tokenizer.decode(file.prompts[0].token_ids) == "1" * 19 + "=" and file.num_cut == 1
    opening = copy.deepcopy(tokenizer)
    opening.add_special_tokens({"bos_token": "9"})
    [cut, _] = loaded(path, opening, overlong="truncate_left").prompts
    assert opening.decode(cut.token_ids) == "9" + "1" * 18 + "="


def test_the_teachers_prompt_counts_too(tmp_path, tokenizer):
    """Its rows of 3 + 3, 4 + 4 and 19 + 5 tokens; the student's alone would all fit."""
    path = write(tmp_path, LONG[0], LONG[2], LONG[9])
    template = {"teacher_template": "{prompt}{solution}"}
    with pytest.raises(DataError, match="line 3: the teacher's prompt has 24 tokens"):
        loaded(path, tokenizer, **template)
    dropped = loaded(path, tokenizer, overlong="drop", **template)
    assert [prompt.index for prompt in dropped.prompts] == [0, 1] and dropped.num_dropped == 1
    cut = loaded(path, tokenizer, overlong="truncate_left", **template)
    assert [len(p.teacher_token_ids) for p in cut.prompts] == [6, 8, 20] and cut.num_cut == 1
    assert [len(p.token_ids) for p in cut.prompts] == [3, 4, 19]


def test_grader_auto_needs_a_data_source_that_it_knows(tmp_path, tokenizer):
    row = {"prompt": "1+1=", "answer": "2", "data_source": "openai/gsm8k"}
    assert len(load(write(tmp_path, json.dumps(row)), tokenizer, grader="auto")) == 1
    for source in ("mine", None):
        with pytest.raises(
            DataError, match=f"line 1: data.grader=auto knows no grader for data_source {source or ''!r}"
        ):
            load(write(tmp_path, json.dumps({**row, "data_source": source})), tokenizer, grader="auto")


def test_a_missing_file_is_named(tokenizer):
    with pytest.raises(DataError, match="nowhere.jsonl: there is no such file"):
        load("nowhere.jsonl", tokenizer)


def test_batches_walk_through_seeded_epochs_and_resume_at_a_position(tmp_path, tokenizer):
    prompts = load(write(tmp_path, *(f'{{"prompt": "{i}+1"}}' for i in range(7))), tokenizer)
    source = PromptSource(prompts, 3, seed=5, shuffle=True)
    batches = [[p.index for p in source.next_batch()] for _ in range(7)]
    flat = [index for batch in batches for index in batch]
    assert all(sorted(flat[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert flat[:7] != flat[7:14]
    resumed = PromptSource(prompts, 3, seed=5, shuffle=True, position=6)
    assert [[p.index for p in resumed.next_batch()] for _ in range(5)] == batches[2:]
    other = PromptSource(prompts, 3, seed=6, shuffle=True)
    assert [[p.index for p in other.next_batch()] for _ in range(7)] != batches
