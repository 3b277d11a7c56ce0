"""Task two of the ablation: number_sorting of the package reasoning-gym, solved by insertion, one number a step.

    prompt    Sort these numbers in descending order: 13, 5, 28
    response  13;13 5#28 13 5<eos>

Numbers and direction are the package's, whole numbers from 0 to 30; its question has two more paragraphs about Python
lists, which are left out. Only the modules of this task are loaded: the whole package needs a dozen others.
"""

from __future__ import annotations

import importlib
import random
import sys
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType

from pairs.task import EOS, PAD, Worked
from pairs.training import ModelPlan, PairPlan

MIN_NUMBERS, MAX_NUMBERS = 3, 5
MAX_VALUE = 30
WORDS = ("Sort these numbers in ", "ascending", "descending", " order: ", ", ", ";", " ", "#")
VOCABULARY = (PAD, EOS, *WORDS, *map(str, range(MAX_VALUE + 1)))
WORD = r"Sort these numbers in |ascending|descending| order: |, |[0-9]+|."


class NoReasoningGym(ImportError):
    """The package is missing; the message is for the user."""


def draw(seed: str) -> Iterator[Worked]:
    module = task_module("algorithmic.number_sorting")
    config = module.NumberSortingConfig(
        min_numbers=MIN_NUMBERS,
        max_numbers=MAX_NUMBERS,
        min_decimals=0,
        max_decimals=0,
        min_value=0,
        max_value=MAX_VALUE,
        seed=random.Random(seed).getrandbits(48),  # the package adds a problem's index
    )
    data = module.NumberSortingDataset(config)
    index = 0
    while True:
        yield solved(data[index]["metadata"])
        index += 1


def solved(metadata: dict) -> Worked:
    """The problem of an entry of the package."""
    numbers, direction = [int(float(text)) for text in metadata["original_numbers"]], metadata["direction"]
    sign = 1 if direction == "ascending" else -1
    done: list[int] = []
    steps = []
    for number in numbers:
        insort(done, number, key=lambda value: sign * value)
        steps.append(" ".join(map(str, done)))
    return Worked(
        prompt=f"Sort these numbers in {direction} order: {', '.join(map(str, numbers))}",
        response=f"{';'.join(steps[:-1])}#{steps[-1]}",
        answer=steps[-1],
    )


def task_module(name: str) -> ModuleType:
    """The module of one task of reasoning-gym, such as algorithmic.ab. Raises NoReasoningGym."""
    with _package("reasoning_gym"), _package(f"reasoning_gym.{name.split('.')[0]}"):
        return importlib.import_module(f"reasoning_gym.{name}")


@contextmanager
def _package(name: str) -> Iterator[None]:
    """Modules of the package can be imported without its __init__.py, which imports every task."""
    parent, _, _ = name.rpartition(".")
    spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None or not spec.submodule_search_locations:
        raise NoReasoningGym(
            "reasoning-gym is missing: run scripts/setup.sh, or pip install --no-deps reasoning-gym==0.1.25"
        )
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
    yield


SORTING = PairPlan(
    draw=draw,
    vocabulary=VOCABULARY,
    word=WORD,
    max_response_tokens=48,
    teacher=ModelPlan("teacher", num_layers=3, width=96, num_heads=4, tied=False, stop_at=None, num_steps=500),
    student=ModelPlan("student", num_layers=2, width=64, num_heads=2, tied=True, stop_at=0.3, num_steps=600),
    student_between=(0.2, 0.5),
    teacher_at_least=0.95,
)
