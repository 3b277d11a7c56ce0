"""A run's folder is never another run's, and an interrupted checkpoint is never resumed."""

from dataclasses import asdict, replace

import pytest

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.run import CheckpointConfig, DataConfig, LearnerConfig, PlacementConfig, RunConfig, StudentConfig
from opsd.errors import ConfigError
from opsd.run_folder import FREE_ON_RESUME, RunFolder, flat, read_state


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


def test_newest_finished_checkpoint_is_found_and_older_ones_go(tmp_path):
    folder = RunFolder(str(tmp_path))
    assert folder.newest_checkpoint() is None
    for step in (5, 10, 100):
        folder.finish_checkpoint(folder.begin_checkpoint(step), {"step": step}, keep=2)
    folder.begin_checkpoint(200)  # never finished
    assert read_state(folder.newest_checkpoint()) == {"step": 100}
    assert sorted(p.name for p in folder.checkpoints.glob("step_*")) == ["step_000010", "step_000100"]
