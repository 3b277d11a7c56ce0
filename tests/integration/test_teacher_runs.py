"""Whole runs with the teacher behind HTTP: the same losses as with the teacher in the run, whatever dies meanwhile."""

import dataclasses
import json
from contextlib import ExitStack

import pytest

import opsd.hooks
from tests.integration import runs
from tests.integration.runs import training_lines
from tests.teacher_servers import TOKEN, client_token, make_models, teacher_server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
NUM_STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def token():
    with client_token():
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    make_models(root)
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "data_source": "odd" if a % 2 else "even"}
        for a in range(9)
        for b in range(9)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def servers_of(pair):
    """servers_of(backend): two servers of "teacher", started at first use. The first test ends the first of them."""
    with ExitStack() as stack:
        found = {}

        def get(backend):
            if backend not in found:
                found[backend] = [
                    stack.enter_context(teacher_server(pair / "teacher", token=TOKEN, backend=backend))
                    for _ in range(2)
                ]
            return found[backend]

        yield get


def finished(pair, output_dir, backend, *overrides):
    """(the training lines without what depends on the clock, the summary's figures, what was printed)."""
    run = runs.train(
        pair, output_dir, f"num_steps={NUM_STEPS}", "data.grader=final_hash", f"rollout.backend={backend}",
        "rollout.max_num_seqs=6", "rollout.group_size=32", "eval.num_problems=4", *overrides, program="opsd.train",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [
        {name: value for name, value in line.items() if not name.startswith(CLOCK)}
        for line in training_lines(output_dir)
    ]
    summary = json.loads((output_dir / "summary.json").read_text())
    figures = {name: summary[name] for name in ("reverse_kl_after", "teacher_accuracy", "tokens_scored")}
    return lines, figures, run.stdout + run.stderr


CLOCK = ("phase_s", "tokens_per_s", "queue", "idle_s")
# Added up of the parts in which a step was scored, and servers are asked in other parts than engines.
SUMMED = (
    "overlap_ratio",
    "overlap_token_advantage",
    "kept_overlap_ratio",
    "kept_overlap_token_advantage",
    "coarse_kl_gap",
)
DYING = []  # the server that the run's hooks end; the driver is this process


def hooks_that_end_a_server(cfg):
    """Plain distillation's, which end it after the second step."""
    hooks = opsd.hooks.build_hooks(cfg)
    steps = []

    def after_step(report):
        steps.append(report)
        if len(steps) == 2:
            DYING.pop().end()
        hooks.after_step(report)

    return dataclasses.replace(hooks, after_step=after_step)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_run_over_http_loses_a_server_and_nothing_else(pair, servers_of, tmp_path, backend):
    """In process with two engines, whose batches the servers' are; then one of two servers dies after two steps."""
    local = [f"teacher.backend={backend}", "teacher.num_workers=2"]
    wanted = finished(pair, tmp_path / "local", backend, *local)
    servers = servers_of(backend)
    urls = ",".join(server.url for server in servers)
    DYING.append(servers[0])
    over_http = ["teacher.path=", "teacher.backend=http", f"teacher.urls=[{urls}]"]
    over_http.append("hooks=tests.integration.test_teacher_runs:hooks_that_end_a_server")
    lines, figures, output = finished(pair, tmp_path / "http", backend, *over_http)
    assert f"teacher server {servers[0].url}: " in output
    assert [line["dropped"] for line in lines] == [0] * NUM_STEPS
    for own, local in zip(lines, wanted[0], strict=True):
        assert own.keys() == local.keys()
        for name in SUMMED:
            assert own.pop(name) == pytest.approx(local.pop(name), rel=1e-12)
        assert own == local  # losses, gradients, lengths, shares: bit for bit
    assert figures == wanted[1]


def test_a_run_with_two_teachers_one_of_them_behind_http(pair, servers_of, tmp_path):
    server = servers_of("transformers")[1]
    local = [f"teacher.path={pair / 'other'}", "teacher.backend=transformers", "num_steps=2"]
    by_source = f"+teacher.by_source={{odd: '{server.url}'}}"
    lines, figures, _ = finished(pair, tmp_path / "run", "transformers", *local, by_source)
    assert len(lines) == 2 and figures["teacher_accuracy"] is not None
