"""A long run of tiny steps: no process of it grows, in memory or in open files.

`pytest -s -m long tests/faults/test_soak.py` prints each process's figures.
"""

import json
import subprocess
import sys
import time
from collections import defaultdict

import psutil
import pytest

from tests.faults.test_kills import ROOT
from tests.integration.conftest import pair  # noqa: F401  (a fixture)
from tests.integration.runs import arguments

pytestmark = pytest.mark.long
NUM_STEPS, WARM_UP, WINDOW = 3000, 300, 300
MOST_GROWTH = 1.05
LITTLE_MIB = 3.0  # a process of 20 MiB grows by 5 % with a page here and there
FEW_FILES = 4  # connections of Ray's agents that come and go
SETTINGS = (
    f"num_steps={NUM_STEPS}", "data.prompts_per_step=2", "rollout.max_response_tokens=6", "rollout.group_size=2",
    "checkpoint.every=50", "checkpoint.keep=2", "eval.every=50", "eval.num_kl_prompts=4", "log.token_view_every=50",
)  # fmt: skip


def sample(process):
    """By process: its own memory (without what it shares, such as the object store) in MiB, and its open files."""
    found = {}
    for each in [process, *process.children(recursive=True)]:
        try:
            with each.oneshot():
                name = " ".join(each.cmdline())[:60] or each.name()
                memory = each.memory_info()
                found[each.pid, name] = (memory.rss - memory.shared) / 2**20, each.num_fds()
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended meanwhile
            continue
    return found


def newest_step(folder):
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_nothing_grows_over_three_thousand_steps(pair, tmp_path, backend):  # noqa: F811
    engines = f"rollout.backend={backend}", f"teacher.backend={backend}"
    command = [sys.executable, "-m", "tip.train", *arguments(pair, tmp_path / "run", *SETTINGS, *engines)]
    samples = defaultdict(list)  # of each process (step, MiB, open files)
    with (tmp_path / "said").open("w") as said:
        run = psutil.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while run.poll() is None:
            step = newest_step(tmp_path / "run")
            for key, (mib, files) in sample(run).items():
                samples[key].append((step, mib, files))
            time.sleep(3.0)
    assert run.returncode == 0, (tmp_path / "said").read_text()[-3000:]
    grown, seen = [], 0
    for (pid, name), taken in samples.items():
        early = [each[1:] for each in taken if WARM_UP <= each[0] < WARM_UP + WINDOW]
        late = [each[1:] for each in taken if NUM_STEPS - WINDOW <= each[0] < NUM_STEPS]
        if not early or not late:  # it was not there throughout
            continue
        seen += 1
        (mib, files), (mib_late, files_late) = (map(max, zip(*part, strict=True)) for part in (early, late))
        line = f"{name} ({pid}): {mib:.1f} -> {mib_late:.1f} MiB, {files} -> {files_late} open files"
        print(line)
        if mib_late > max(MOST_GROWTH * mib, mib + LITTLE_MIB) or files_late > files + FEW_FILES:
            grown.append(line)
    assert seen >= 4, samples.keys()  # driver, engines, learner
    assert not grown
