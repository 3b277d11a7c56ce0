"""The command: which runs it starts, what it appends, and that it goes on where it was stopped."""

import sys
from concurrent.futures import Future

import pytest

import scripts.ablation.__main__ as program
import scripts.ablation.measures as measures
from scripts.ablation.records import read
from tests.recipes.recipe import start
from tests.scripts.ablation.raw_runs import made_up_run

OF_THE_COMMAND = ("task", "arm", "seed", "settings")
FIGURES = {k: v for k, v in made_up_run("all", 0, final_share=0.5).items() if k not in OF_THE_COMMAND}


class HerePool:
    """Runs each job when it is handed in."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """Calls the command; returns the settings of the runs that it started, and the seeds whose pairs it made."""
    started, pairs = [], []

    def made_up(settings, eval_every, num_problems):
        started.append(settings)
        return FIGURES

    monkeypatch.setattr(program, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(program, "make_pair", lambda task, folder, seed: pairs.append(folder.name))
    monkeypatch.setattr(measures, "measured_run", made_up)
    monkeypatch.setattr("scripts.ablation.tables.write", lambda folder: None)

    def call(*arguments):
        started.clear()
        pairs.clear()
        monkeypatch.setattr(sys, "argv", ["ablation", str(tmp_path / "out"), *arguments])
        program.main()
        return list(started), list(pairs)

    call.folder = tmp_path / "out"
    return call


def test_arms_of_a_seed_share_all_but_their_own_settings(ablation):
    started, pairs = ablation("--arms", "all", "q3@0.1", "--seeds", "0", "4")
    assert pairs == ["sums-0", "sums-4"] and len(started) == 4
    assert started[0][0] == "selector=all" and started[1][:2] == ["selector=q3", "selector.ratio=0.1"]
    assert started[0][1:] == started[1][2:] and "seed=0" in started[0] and "seed=4" in started[2]
    lines = sorted(read(ablation.folder), key=lambda line: (line["seed"], line["arm"]))  # they come as they finish
    assert [(line["arm"], line["seed"]) for line in lines] == [("all", 0), ("q3@0.1", 0), ("all", 4), ("q3@0.1", 4)]
    assert all(line["commit"] and line["evaluations"] for line in lines)


def test_what_is_done_is_not_done_again(ablation):
    ablation("--arms", "all", "--seeds", "0")
    started, pairs = ablation("--arms", "all", "todi", "--seeds", "0", "1")
    assert len(started) == 3 and pairs == ["sums-0", "sums-1"]
    assert ablation("--arms", "all", "todi", "--seeds", "0", "1") == ([], [])
    assert len(read(ablation.folder)) == 4


def test_other_steps_in_the_same_folder_are_one_line_on_stderr(ablation, capsys):
    ablation("--arms", "all", "--seeds", "0")
    with pytest.raises(SystemExit) as ended:
        ablation("--arms", "all", "--seeds", "0", "--steps", "7")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "choose another folder" in last


def test_an_unknown_arm_is_refused_with_those_that_there_are(ablation, capsys):
    with pytest.raises(SystemExit):
        ablation("--arms", "tood")
    assert "--arms tood: there is no such arm; there are all, soft, todi" in capsys.readouterr().err


def test_the_recipe_passes_its_arguments_on(tmp_path):
    printer = tmp_path / "python"
    printer.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" "$OMP_NUM_THREADS"\n')
    printer.chmod(0o755)
    process = start("ablation.sh", "--arms", "*@0.2", OPSD_PYTHON=printer, OUT="mine", OMP_NUM_THREADS="9")
    assert process.stdout.splitlines() == ["-P", "-m", "scripts.ablation", "mine", "--arms", "*@0.2", "1"]
