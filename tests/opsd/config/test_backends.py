"""One table says what each backend can do, and nothing else in the code asks a backend for its name."""

import re
from pathlib import Path

import opsd
from opsd.config.backends import CAPABILITIES, ENGINES, REMOTE_BACKENDS, backends_that
from opsd.engines.worker import MADE_BY
from opsd.plan.memory import RUNTIME_CPU, RUNTIME_GPU
from opsd.teacher.facts import FACTS
from opsd.teacher.served import CLIENTS, SERVED

NAMES = "|".join(CAPABILITIES)
COMPARISON = re.compile(rf"""backend\s*(==|!=|(not )?in)\s*\(?["']({NAMES})|["']({NAMES})["']\s*(==|!=)\s*\S*backend""")


def test_what_is_chosen_by_a_backends_name_is_there_for_each():
    assert set(FACTS) == {*ENGINES, *REMOTE_BACKENDS} == set(CAPABILITIES)
    assert set(CLIENTS) == set(SERVED) == set(REMOTE_BACKENDS) and set(MADE_BY) == set(ENGINES)
    assert set(ENGINES) <= set(RUNTIME_CPU) & set(RUNTIME_GPU)


def test_no_name_of_a_backend_is_compared():
    assert COMPARISON.search('if cfg.rollout.backend != "vllm":') and COMPARISON.search('backend in ("http", "x")')
    found = [
        f"{path}: {line.strip()}"
        for package in ("opsd", "tip")
        for path in (Path(opsd.__file__).parents[1] / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if COMPARISON.search(line)
    ]
    assert found == []


def test_a_refusal_names_the_backends_that_can():
    assert backends_that(lambda can: can.takes_weights) == "vllm or transformers"
    assert backends_that(lambda can: can.sleeps) == "vllm"
