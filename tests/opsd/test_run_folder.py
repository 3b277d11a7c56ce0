"""A run's folder is never another run's, and an interrupted checkpoint is never resumed."""

import errno
import os
from dataclasses import asdict, replace

import pytest

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.placement import PlacementConfig
from opsd.config.run import CheckpointConfig, DataConfig, LearnerConfig, RunConfig, StudentConfig
from opsd.errors import ConfigError
from opsd.report.plots import CHARTS
from opsd.run_folder import FREE_ON_RESUME, REPORT_CHARTS, RunFolder, flat


def config(folder, **changes):
    return RunConfig(
        output_dir=str(folder),
        student=StudentConfig(path="s"),
        teacher=TeacherConfig(path="t"),
        data=DataConfig(train_path="a", eval_path="b"),
        **changes,
    )


def test_a_second_run_is_refused_unless_asked(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    (folder.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="holds another run: choose another folder, or set resume=auto"):
        folder.claim(config(folder.path))
    folder.claim(config(folder.path, resume="auto"))
    assert (folder.path / "metrics.jsonl").exists()
    folder.claim(config(folder.path, overwrite=True))
    assert not (folder.path / "metrics.jsonl").exists()


@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume": "auto"}])
def test_files_that_are_no_run_are_never_deleted(tmp_path, changes):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        RunFolder(str(tmp_path)).claim(config(tmp_path, **changes))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_resume_refuses_another_configuration_but_not_other_logging(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    folder.claim(config(folder.path, resume="auto", stop_at_step=7, checkpoint=CheckpointConfig(every=5)))
    with pytest.raises(ConfigError, match="learner.learning_rate differs from the run in"):
        folder.claim(config(folder.path, resume="auto", learner=LearnerConfig(learning_rate=0.5)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learner": LearnerConfig(num_workers=2)}, {"learner.num_workers": (1, 2)}),
        ({"rollout": RolloutConfig(num_workers=3)}, {"rollout.num_workers": (1, 3)}),
        ({"placement": PlacementConfig(wait_s=9.0)}, {"placement.wait_s": (120.0, 9.0)}),
        ({"num_steps": 400, "stop_at_step": 350}, {"num_steps": (300, 400)}),
        ({"checkpoint": CheckpointConfig(every=5)}, {}),
    ],
)
def test_where_and_for_how_long_a_resumed_run_works_may_change(tmp_path, changes, named):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    assert folder.claim(config(folder.path, resume="auto", **changes)) == named


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_steps": 299}, "num_steps differs from .*: it had 300, this one has 299; for fewer steps set stop_at_st"),
        ({"learner": LearnerConfig(max_grad_norm=2.0)}, "learner.max_grad_norm differs"),
        ({"rollout": RolloutConfig(temperature=0.5)}, "rollout.temperature differs"),
        ({"seed": 1}, "seed differs"),
    ],
)
def test_what_is_learnt_may_not(tmp_path, changes, said):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    with pytest.raises(ConfigError, match=said):
        folder.claim(config(folder.path, resume="auto", **changes))


def test_every_setting_that_may_change_exists():
    settings = flat(asdict(config("run"))).keys()
    for name in (name for names in FREE_ON_RESUME.values() for name in names):
        assert any(each == name or each.startswith(f"{name}.") for each in settings), name


def test_a_resumed_run_finds_its_teachers_servers_elsewhere(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    servers = TeacherConfig(backend="http", urls=["http://a"])
    folder.claim(replace(config(folder.path), teacher=servers))
    again = config(folder.path, resume="auto")
    folder.claim(replace(again, teacher=replace(servers, urls=["http://b", "http://c"])))
    with pytest.raises(ConfigError, match="teacher.top_k differs from the run in"):
        folder.claim(replace(again, teacher=replace(servers, top_k=7)))


def test_resume_and_overwrite_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="contradict each other"):
        config(tmp_path, resume="auto", overwrite=True)


def test_overwrite_deletes_what_a_run_made_and_nothing_else(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    for name in ("metrics.jsonl", "metrics.replaced_1.jsonl", "summary.json", "loss.png", "student/model.safetensors"):
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).touch()
    for name in ("thesis.tex", "photo.png", "notes/ideas.md"):
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text("years of work")
    folder.claim(config(folder.path, overwrite=True))
    left = {str(each.relative_to(folder.path)) for each in folder.path.rglob("*") if each.is_file()}
    assert left == {"config.yaml", ".opsd-run.json", "thesis.tex", "photo.png", "notes/ideas.md"}


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": "auto"}])
def test_a_config_yaml_makes_no_run_of_a_folder(tmp_path, changes):
    (tmp_path / "config.yaml").write_text("title: a thesis\n")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no .opsd-run.json, so no run of this version made it"):
        RunFolder(str(tmp_path)).claim(config(tmp_path, **changes))
    assert (tmp_path / "thesis.tex").exists() and "thesis" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["checkpoints", "student", "metrics.jsonl"])
def test_overwrite_follows_no_link(tmp_path, name):
    elsewhere = tmp_path / "scratch"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    (folder.path / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{name} is a link to {elsewhere}"):
        folder.claim(config(folder.path, overwrite=True))
    assert (elsewhere / "file").exists()


def test_the_charts_of_a_report_are_known_by_name():
    assert set(REPORT_CHARTS) == set(CHARTS)


def test_a_run_does_not_go_back_behind_its_checkpoint(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    (folder.path / "checkpoints" / "step_000012").mkdir(parents=True)
    folder.claim(config(folder.path, resume="auto", stop_at_step=12))
    with pytest.raises(ConfigError, match="stop_at_step=6: .* has a checkpoint after step 12 already"):
        folder.claim(config(folder.path, resume="auto", stop_at_step=6))


def test_what_changed_is_refused_unless_it_is_asked_for(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    changes = {"resume": "auto", "seed": 3}
    with pytest.raises(ConfigError, match="seed differs .* resume_changed=true goes on all the same"):
        folder.claim(config(folder.path, **changes))
    assert folder.claim(config(folder.path, resume_changed=True, **changes)) == {"seed": (0, 3)}


def test_inputs_with_other_contents_are_noticed_and_equal_ones_may_move(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path), {"data.train_path": "sum 1", "student.path": "sum 2"})
    again = config(folder.path, resume="auto")
    moved = replace(again, data=replace(again.data, train_path="elsewhere"))
    sums = {"data.train_path": "sum 1", "student.path": "sum 2"}
    assert folder.claim(moved, sums) == {"data.train_path": ("a", "elsewhere")}
    with pytest.raises(ConfigError, match="student.path differs .* it had s as it was, this one has s with other cont"):
        folder.claim(again, {**sums, "student.path": "sum 3"})


def test_a_full_disk_leaves_the_settings_of_a_run_as_they_were(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(config(folder.path))
    before = (folder.path / "config.yaml").read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert folder.claim(config(folder.path, resume="auto")) == {}  # nothing changed, nothing written
    with pytest.raises(OSError, match="No space left"):
        folder.claim(config(folder.path, resume="auto", num_steps=400))
    assert (folder.path / "config.yaml").read_text() == before
