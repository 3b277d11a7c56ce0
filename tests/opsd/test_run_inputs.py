"""What a run reads never lies where it writes, and a resumed run reads what the first one read."""

import pytest

from opsd.config.engine import TeacherConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.errors import ConfigError
from opsd.run_inputs import SAMPLE, fingerprint, fingerprints, require_outside


@pytest.fixture
def cfg(tmp_path):
    for name in ("s", "t", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 5 * SAMPLE)
    for name in ("train.jsonl", "data/eval.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return RunConfig(
        output_dir=str(tmp_path / "out"),
        student=StudentConfig(path=str(tmp_path / "s")),
        teacher=TeacherConfig(path=str(tmp_path / "t"), by_source={"code": str(tmp_path / "other")}),
        data=DataConfig(train_path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "data" / "eval.jsonl")),
    )


def test_every_input_has_its_sum(cfg):
    assert list(fingerprints(cfg)) == [
        "student.path", "data.train_path", "data.eval_path", "teacher.path", "teacher.by_source.code.path"
    ]  # fmt: skip


@pytest.mark.parametrize(("output_dir", "named"), [("s", "student.path"), ("data", "data.eval_path"), (".", "student")])
def test_what_lies_in_the_output_folder_is_refused(cfg, tmp_path, output_dir, named):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / output_dir)  # by another name
    for folder in (tmp_path / output_dir, link):
        with pytest.raises(ConfigError, match=f"{named}.* lies in output_dir="):
            require_outside(folder, cfg)
    require_outside(tmp_path / "another", cfg)


@pytest.mark.parametrize("place", [0, 5 * SAMPLE - 1])
def test_other_weights_of_the_same_size_are_noticed(tmp_path, place):
    path = tmp_path / "model"
    path.mkdir()
    weights = bytearray(5 * SAMPLE)
    (path / "model.safetensors").write_bytes(weights)
    before = fingerprint(path)
    (path / ".cache").write_text("what a download left")
    assert fingerprint(path) == before
    weights[place] = 1
    (path / "model.safetensors").write_bytes(weights)
    assert fingerprint(path) != before


def test_a_data_file_is_read_to_its_end_and_may_move(tmp_path):
    data = bytearray(5 * SAMPLE)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    data[2 * SAMPLE + 7] = 1
    (tmp_path / "b").write_bytes(data)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
