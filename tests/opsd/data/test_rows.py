"""Rows of JSONL and parquet files, as several writers leave them."""

import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from opsd.data.rows import count_rows, lookup, messages, read_rows, reference_answer
from opsd.errors import DataError

VERL_ROWS = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": f"{index}+1="}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(index + 1)},
        "extra_info": {"split": "train", "index": index},
    }
    for index in range(3)
]


def as_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in VERL_ROWS))


def as_datasets_parquet(path):
    Dataset.from_list(VERL_ROWS).to_parquet(path)


def as_pandas_parquet(path):
    """Through a data frame that was itself read from parquet, whose lists are NumPy arrays."""
    as_datasets_parquet(path)
    pandas.read_parquet(path).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", as_jsonl), ("a.parquet", as_datasets_parquet), ("b.parquet", as_pandas_parquet)],
)
def test_every_writer_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    rows = read_rows(tmp_path / name)
    assert [row.fields for row in rows] == VERL_ROWS
    assert messages(rows[2], "prompt")[-1] == {"role": "user", "content": "2+1="}
    assert reference_answer(rows[2], "") == "3"
    assert lookup(rows[2], "extra_info.index") == 2


def test_a_field_named_answer_comes_before_verls_and_a_named_one_before_both(tmp_path):
    row = {"prompt": "?", "answer": 7, "label": "8", "reward_model": {"ground_truth": "9"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [row] = read_rows(tmp_path / "a.jsonl")
    assert reference_answer(row, "") == "7"
    assert reference_answer(row, "label") == "8"
    assert reference_answer(row, "reward_model.ground_truth") == "9"
    assert reference_answer(row, "reward_model.style") is None


def test_a_null_that_parquet_fills_in_is_no_value(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "answer": "1"},
        {"prompt": [{"role": "user", "content": "b", "name": "x"}], "answer": None},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    first, second = read_rows(tmp_path / "a.parquet")
    assert messages(first, "prompt") == [{"role": "user", "content": "a"}]
    assert reference_answer(second, "") is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"no parquet", "a.parquet: cannot read it as parquet: "),
        ("a.jsonl", b"PAR1\xff\xfe", "a.jsonl: neither JSONL in UTF-8 nor a file named *.parquet"),
        ("a.jsonl", b'{"prompt": "1"}\n\n{', "a.jsonl, line 3: not JSON"),
    ],
)
def test_a_file_that_is_no_such_file_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert said in str(caught.value)


def test_a_bad_parquet_row_is_named(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": []}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet, row 2: 'prompt' must be a string or a list of role/content"):
        messages(read_rows(tmp_path / "a.parquet")[1], "prompt")


def test_an_answer_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "reward_model": {"ground_truth": ["1", "2"]}}')
    with pytest.raises(DataError, match=r"line 1: the answer must be a string or a number, got \['1', '2'\]"):
        reference_answer(read_rows(tmp_path / "a.jsonl")[0], "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "1", "answer": "2", "prompt": "3"}', "the key 'prompt' stands twice in one object"),
        (r'{"prompt": "\ud83d"}', r"it holds '\ud83d', half of a surrogate pair, which is no character"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"answer": ' + "1" * 5000 + "}", "it holds an integer of more than 4,300 digits"),
    ],
)
def test_a_line_that_json_takes_silently_or_fails_of_is_refused_by_its_number(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n' + line)
    with pytest.raises(DataError) as refused:
        read_rows(tmp_path / "a.jsonl")
    assert str(refused.value) == f"{tmp_path}/a.jsonl, line 2: {said}"


def parquet(path, names, arrays):
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), path)
    return path


def test_a_parquet_column_that_stands_twice_is_refused_by_name(tmp_path):
    text = pyarrow.array(["1", "2"])
    path = parquet(tmp_path / "a.parquet", ["prompt", "answer", "prompt"], [text, text, text])
    with pytest.raises(DataError, match=r"a.parquet: the column 'prompt' stands twice in it$"):
        read_rows(path)
    same = [pyarrow.field("role", pyarrow.string()), pyarrow.field("role", pyarrow.string())]
    messages_of = pyarrow.array([[("user", "x")]], pyarrow.list_(pyarrow.struct(same)))
    with pytest.raises(DataError, match=r"b.parquet: the column 'chat.role' stands twice in it$"):
        read_rows(parquet(tmp_path / "b.parquet", ["chat"], [messages_of]))
    other = [pyarrow.field("role", pyarrow.string()), pyarrow.field("prompt", pyarrow.string())]
    nested = pyarrow.array([{"role": "user", "prompt": "x"}], pyarrow.struct(other))
    [row] = read_rows(parquet(tmp_path / "c.parquet", ["prompt", "chat"], [pyarrow.array(["1"]), nested]))
    assert row.fields == {"prompt": "1", "chat": {"role": "user", "prompt": "x"}}


def test_parquet_values_that_are_none_of_pythons_are_refused(tmp_path):
    not_utf8 = pyarrow.array([b"\xff\xfe"]).cast(pyarrow.binary()).view(pyarrow.string())
    too_late = pyarrow.array([2**62], pyarrow.timestamp("us"))
    for values in (not_utf8, too_late):
        with pytest.raises(DataError, match="a.parquet: cannot read it as parquet: "):
            read_rows(parquet(tmp_path / "a.parquet", ["prompt"], [values]))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b"no parquet"])
def test_rows_of_no_parquet_file_are_not_counted(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match="a.parquet: cannot read it as parquet: "):
        count_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "x" * 300 + ".parquet", "folder", "a/" * 3000])
def test_a_file_that_is_not_there_is_named_however_long_its_name(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for read in (read_rows, count_rows):
        with pytest.raises(DataError, match="there is no such file$"):
            read(tmp_path / name)
