"""Passes over a file of prompts as steps."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from opsd.config.run import DataConfig, RunConfig
from opsd.data.epochs import with_epochs_as_steps
from opsd.data.rows import count_rows
from opsd.errors import ConfigError, DataError


def write_rows(path, number):
    rows = [{"prompt": str(i)} for i in range(number)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_three_passes_over_ten_prompts_in_fours_are_eight_steps(tmp_path, name):
    path = write_rows(tmp_path / name, 10)
    assert count_rows(path) == 10
    cfg = RunConfig(output_dir="out", num_epochs=3, data=DataConfig(train_path=path, prompts_per_step=4))
    assert with_epochs_as_steps(cfg).num_steps == 8  # the last two prompts of the last pass fill half a step


def test_without_epochs_the_steps_stand_and_no_file_is_read():
    cfg = RunConfig(output_dir="out", num_steps=7, data=DataConfig(train_path="no-such-file.jsonl"))
    assert with_epochs_as_steps(cfg) is cfg


def test_a_missing_or_empty_file_is_named(tmp_path):
    data = DataConfig(train_path=str(tmp_path / "train.jsonl"))
    with pytest.raises(DataError, match=r"train\.jsonl: there is no such file"):
        with_epochs_as_steps(RunConfig(output_dir="out", num_epochs=1, data=data))
    write_rows(tmp_path / "train.jsonl", 0)
    with pytest.raises(DataError, match=r"train\.jsonl: no prompts in it"):
        with_epochs_as_steps(RunConfig(output_dir="out", num_epochs=1, data=data))


def test_steps_and_epochs_together_are_refused():
    with pytest.raises(ConfigError, match="num_steps=7 and num_epochs=1 contradict each other"):
        RunConfig(output_dir="out", num_steps=7, num_epochs=1)
