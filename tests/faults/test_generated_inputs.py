"""Generated bad inputs: whatever settings, data files and model folders say, a user gets a run or one line.

More than a thousand of them are refused, the same ones at every run of the tests; with `-m long` some four thousand.
Nothing outside of the test's own folder is written.
"""

import functools
import inspect
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from opsd.config.auto import with_dtypes
from opsd.config.run import DataConfig, compose_config
from opsd.config.setting_names import setting_names
from opsd.data.epochs import with_epochs_as_steps
from opsd.data.prompts import load_prompts
from opsd.errors import ConfigError, DataError
from opsd.hook_checks import check_hooks
from opsd.hooks import load_build_hooks
from opsd.models.facts import read_facts
from opsd.models.weights import check_weights
from opsd.ops.losses.table import LOSSES
from opsd.preflight import check_counts
from opsd.strict_json import MAX_DEPTH
from tests.faults.audit import changes_outside
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3
from tip.adjustments import ADJUSTMENTS
from tip.answers import ANSWERS
from tip.config import TipRunConfig
from tip.filters import FILTERS
from tip.plugin import SCHEDULES

pytestmark = pytest.mark.slow

NUMBERS = st.one_of(
    st.integers(-3, 100), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0.0, -1.0, 1e300, 1e-320])
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["\0", "\ud800", "${a}", "a:b", ".:x", "x" * 5000, "true", "é"]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, in a folder that becomes the working one. Changes outside of it are an error."""
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_qwen3(root / "model", tied=True, layers=1, seed=0, eos_token_id=0)
    make_char_tokenizer(root / "model", eos_token_id=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        # Imports on first use, and what libraries write once, are no work of an input.
        check_weights("student.path", "model", False)
        with changes_outside(root) as found:
            yield root
        assert found == []


def refused(call):
    """Whether the call ends in an error of ours; then in one line."""
    try:
        call()
    except (ConfigError, DataError) as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1 and len(message) <= 1003
        message.encode()  # it can be printed
        return True
    return False


def number_refused(strategy, call, number):
    """Of `number` generated inputs, those that `call` refused."""
    results = []

    @settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def try_one(value):
        results.append(refused(lambda: call(value)))

    try_one()
    assert len(results) >= number
    return sum(results)


def options_of(function):
    """Values for the options that it has, and now and then for one that it has not."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return st.dictionaries(st.sampled_from([*names, "no_such"]), st.one_of(NUMBERS, SCALARS), max_size=3)


def one_of_entries(entries, write):
    return st.sampled_from(sorted(entries)).flatmap(
        lambda name: options_of(getattr(entries[name], "function", entries[name])).map(lambda o: write(name, o))
    )


def nested(name, value):
    """{a: {b: value}} for a.b."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


LEAVES = sorted(name for name in setting_names(TipRunConfig) if name != "output_dir")
SETTINGS = st.one_of(
    st.builds(nested, st.sampled_from(LEAVES), VALUES),
    one_of_entries(LOSSES, lambda name, options: {"loss": {"divergence": name, "options": options}}),
    one_of_entries(LOSSES, lambda name, options: {"loss": {"terms": {name: {"weight": 0.1, **options}}}}),
    one_of_entries(FILTERS, lambda name, options: {"filters": {name: options}}),
    one_of_entries(ADJUSTMENTS, lambda name, options: {"adjust": {name: options}, "data": {"grader": "math"}}),
    one_of_entries(ANSWERS, lambda name, o: {"answers": name, "answer_options": o, "stats": "learner"}),
    one_of_entries(SCHEDULES, lambda name, options: {"selector": {"schedule": name, "schedule_options": options}}),
)


REQUIRED = {"output_dir": "out", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train_path": "a"}}


@pytest.mark.parametrize("number", [300, pytest.param(1500, marks=pytest.mark.long)])
def test_settings(folder, monkeypatch, number):
    """Up to the moment at which a run would read its models."""
    monkeypatch.setattr(OmegaConf, "structured", functools.cache(OmegaConf.structured))  # half of the time

    def start(changes):
        given_ = {**REQUIRED, **changes}
        for section in REQUIRED.keys() & changes.keys():
            if isinstance(REQUIRED[section], dict) and isinstance(changes[section], dict):
                given_[section] = {**REQUIRED[section], **changes[section]}
        cfg = compose_config(OmegaConf.create(given_), TipRunConfig)
        cfg = with_dtypes(with_epochs_as_steps(cfg), "cpu")
        check_hooks(load_build_hooks(cfg.hooks)(cfg), cfg)
        check_counts(cfg, 64, "cpu")

    assert number_refused(SETTINGS, start, number) >= 0.8 * number


FIELDS = st.sampled_from(["prompt", "answer", "data_source", "tools", "reward_model", "worked", "a\nb"])
CHAT = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", 5]), "content": VALUES}), max_size=3
)
ROWS = st.dictionaries(FIELDS, st.one_of(VALUES, CHAT, st.sampled_from(["1+1=", "1" * 3000])), max_size=4)
LINES = st.one_of(
    ROWS.map(json.dumps).map(str.encode),
    ROWS.map(lambda row: json.dumps({**row, "prompt": "1+1="}).encode()),
    st.binary(max_size=20),
    st.sampled_from(
        [
            b'{"prompt": "1"}',
            b'{"prompt": "1", "prompt": "2"}',
            b"[" * 100_000,
            b'{"a":' * (MAX_DEPTH + 1),
            b"\xef\xbb\xbf{}",
        ]
    ),
    st.just(b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}"),
)
READINGS = st.fixed_dictionaries(
    {
        "chat_template": st.sampled_from(["auto", "true", "false"]),
        "response_key": st.sampled_from(["", "worked", "prompt"]),
        "teacher_template": st.sampled_from(["", "{prompt}{solution}"]),
        "overlong": st.sampled_from(["refuse", "drop", "truncate_left"]),
        "grader": st.sampled_from(["none", "math", "auto"]),
        "template_options": st.just({}) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2),
    }
)


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{{ tools }}"
    return tokenizer


def read(name, reading, tokenizer):
    load_prompts(name, DataConfig(train_path="", **reading), tokenizer, 20)


@pytest.mark.parametrize("number", [450, pytest.param(1500, marks=pytest.mark.long)])
def test_jsonl(folder, tokenizer, number):
    def load(lines_and_reading):
        lines, reading = lines_and_reading
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
        read("rows.jsonl", reading, tokenizer)

    assert number_refused(st.tuples(st.lists(LINES, min_size=1, max_size=3), READINGS), load, number) >= 0.8 * number


COLUMNS = st.sampled_from(
    [
        pyarrow.array(["1+1=", "2"]),
        pyarrow.array([None, "2"]),
        pyarrow.array([1, 2]),
        pyarrow.array([0.5, float("nan")]),
        pyarrow.array([b"\xff", b"\xfe\x00"]).view(pyarrow.string()),
        pyarrow.array([2**62, 1], pyarrow.timestamp("us")),
        pyarrow.array([2**62, 1], pyarrow.duration("s")),
        pyarrow.array([[{"role": "user", "content": "1"}], [{"role": "x", "content": None}]]),
        pyarrow.array([[], [{"role": "assistant", "content": "1"}]]),
        pyarrow.array([{"ground_truth": [1]}, {"ground_truth": None}]),
        pyarrow.array(["a", "a"]).dictionary_encode(),
        pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.nulls(2),
    ]
)
DAMAGE = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4)


@pytest.mark.parametrize("number", [250, pytest.param(1000, marks=pytest.mark.long)])
def test_parquet(folder, tokenizer, number):
    """Columns of any type, twice too, and files with changed bytes, or with some cut off their end."""
    table = st.lists(st.tuples(FIELDS, COLUMNS), min_size=1, max_size=4)

    def load(given_):
        columns, damage, cut, reading = given_
        names, arrays = [name for name, _ in columns], [array for _, array in columns]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), "rows.parquet")
        content = bytearray((folder / "rows.parquet").read_bytes())
        for place, value in damage:
            content[place % len(content)] = value
        (folder / "rows.parquet").write_bytes(content[: len(content) - cut])
        read("rows.parquet", reading, tokenizer)

    inputs = st.tuples(table, DAMAGE, st.integers(0, 3) | st.just(0), READINGS)
    assert number_refused(inputs, load, number) >= 0.8 * number


CONFIG_VALUES = st.one_of(SCALARS.filter(lambda value: not isinstance(value, int) or abs(value) < 50), VALUES)


@pytest.mark.parametrize("number", [250, pytest.param(1000, marks=pytest.mark.long)])
def test_model_folders(folder, number):
    """One value of a small file that is another, or a file of other bytes."""
    files = {name: (folder / "model" / name).read_text() for name in ("config.json", "generation_config.json")}
    files["tokenizer_config.json"] = (folder / "model" / "tokenizer_config.json").read_text()
    changes = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.dictionaries(st.sampled_from(sorted(json.loads(files[name]))), CONFIG_VALUES, min_size=1, max_size=2)
            | st.binary(max_size=10),
        )
    )
    shutil.copytree(folder / "model", folder / "changed", dirs_exist_ok=True)

    def load(change):
        name, content = change
        if isinstance(content, dict):
            content = json.dumps({**json.loads(files[name]), **content}).encode()
        (folder / "changed" / name).write_bytes(content)
        try:
            read_facts("student.path", "changed", False)
            check_weights("student.path", "changed", False)
        finally:
            (folder / "changed" / name).write_text(files[name])

    assert number_refused(changes, load, number) >= 0.6 * number
