"""A run's folder is never another run's, and an interrupted checkpoint is never resumed."""

from dataclasses import replace

import pytest

from opsd.config import CheckpointConfig, DataConfig, LearnerConfig, RunConfig, StudentConfig
from opsd.engine_config import TeacherConfig
from opsd.errors import ConfigError
from opsd.run_folder import RunFolder, read_state


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
    with pytest.raises(ConfigError, match="learner differs from the run in"):
        folder.claim(config(folder.path, resume="auto", learner=LearnerConfig(learning_rate=0.5)))


def test_a_resumed_run_finds_its_teachers_servers_elsewhere(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    servers = TeacherConfig(backend="http", urls=["http://a"])
    folder.claim(replace(config(folder.path), teacher=servers))
    again = config(folder.path, resume="auto")
    folder.claim(replace(again, teacher=replace(servers, urls=["http://b", "http://c"])))
    with pytest.raises(ConfigError, match="teacher differs from the run in"):
        folder.claim(replace(again, teacher=replace(servers, top_k=7)))


def test_resume_and_overwrite_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="contradict each other"):
        config(tmp_path, resume="auto", overwrite=True)


def test_newest_finished_checkpoint_is_found_and_older_ones_go(tmp_path):
    folder = RunFolder(str(tmp_path))
    assert folder.newest_checkpoint() is None
    for step in (5, 10, 100):
        folder.finish_checkpoint(folder.begin_checkpoint(step), {"step": step}, keep=2)
    folder.begin_checkpoint(200)  # never finished
    assert read_state(folder.newest_checkpoint()) == {"step": 100}
    assert sorted(p.name for p in folder.checkpoints.glob("step_*")) == ["step_000010", "step_000100"]
