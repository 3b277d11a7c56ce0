"""A process that is killed at any moment costs no more than the steps since the last checkpoint.

A run whose driver is killed is resumed by its user; one that loses a learner rank starts itself again; a lost engine is
started again, and the run goes on. Either way losses and weights are those of the unbroken run, bit for bit.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.killing import FAULTS
from tests.integration.conftest import pair  # noqa: F401  (a fixture)
from tests.integration.runs import ROOT, TRANSFORMERS, arguments, losses, weights

pytestmark = pytest.mark.long
MARK = "OPSD_TESTED_RUN"  # of the environment that every process of a run has
SETTINGS = (
    "selector=all", "checkpoint.every=2", "eval.every=2", "hooks=tests.faults.killing:build_hooks", *TRANSFORMERS,
)  # fmt: skip


def run(pair, folder, *overrides):  # noqa: F811
    """The finished process; one that is killed leaves its actors, which must end by themselves."""
    command = [sys.executable, "-m", "tip.train", *arguments(pair, folder, *SETTINGS, *overrides)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment[MARK] = str(folder)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def orphans(folder):
    """Processes of a run that are alive, by what is in their environment."""
    wanted, found = f"{MARK}={folder}".encode(), []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (each / "environ").read_bytes().split(b"\0"):
                found.append(f"{each.name} {(each / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


def whole_run(pair, tmp_path_factory, ranks, known={}):  # noqa: B006, F811
    """The unbroken run on so many ranks, made once."""
    if ranks not in known:
        folder = tmp_path_factory.mktemp("whole") / "run"
        process = run(pair, folder, f"learner.num_workers={ranks}", "hooks=tip.plugin:build_hooks")
        assert process.returncode == 0, process.stderr[-3000:]
        known[ranks] = folder
    return known[ranks]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_killed_process_costs_nothing_but_time(pair, tmp_path, tmp_path_factory, fault):  # noqa: F811
    process_name, _ = FAULTS[fault]
    ranks = f"learner.num_workers={2 if fault.startswith('second') else 1}"
    expected = whole_run(pair, tmp_path_factory, int(ranks[-1]))
    told = (ranks, f"+hook_options.fault='{fault}'")
    first = run(pair, tmp_path / "run", *told)
    assert (tmp_path / "run" / "killed").exists(), first.stderr[-3000:]
    if process_name == "driver":
        assert first.returncode == -9
        deadline = time.monotonic() + 60
        while orphans(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not orphans(tmp_path / "run")
        again = run(pair, tmp_path / "run", *told, "resume=auto")
        assert again.returncode == 0, again.stderr[-3000:]
        assert "has ended without releasing it: its folder is taken over" in again.stderr
    else:
        assert first.returncode == 0, first.stderr[-3000:]
        said = "restart 1 of 3: " if "learner" in process_name else f"{process_name[:-2]} 0 is started again (1 of 3)"
        assert said in first.stderr and "Traceback" not in first.stderr
    assert losses(tmp_path / "run") == losses(expected)
    found, wanted = weights(tmp_path / "run"), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
