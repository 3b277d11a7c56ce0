"""The quick start's task: add 3 to 6 one-digit numbers from left to right, one partial sum a step.

    prompt    7+3+9?
    response  7+3=10;10+9=19#19<eos>
    shown     7+3+9?7+3=10;10+9=19#197+3+9?     the prompt of who sees the solution

COPYING_STUDENT also learns to copy a solution that it is shown, so that it can be its own teacher (`method=opsd`). Its
texts for that hold random sums: true ones it would soon rather compute than copy, and then a solution is of no use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from pairs.task import EOS, PAD, Problem, one_side
from pairs.training import ModelPlan, PairPlan, Text, worked

VOCABULARY = (PAD, EOS, *"0123456789+=;#?")
NUM_TERMS = (3, 4, 5, 6)
MAX_RESPONSE_TOKENS = 48  # the longest response has 45 tokens, with <eos>


@dataclass(frozen=True)
class Sum:
    terms: tuple[int, ...]  # each 0..9

    @property
    def prompt(self) -> str:
        return "+".join(map(str, self.terms)) + "?"

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    @property
    def response(self) -> str:
        return self.response_with(list(accumulate(self.terms))[1:])

    def response_with(self, totals: list[int]) -> str:
        """The answer with these partial sums, right or wrong: one less than there are terms."""
        steps = zip([self.terms[0], *totals[:-1]], self.terms[1:], totals, strict=True)
        return ";".join(f"{left}+{term}={total}" for left, term, total in steps) + f"#{totals[-1]}"


def draw(seed: str) -> Iterator[Sum]:
    rng = random.Random(seed)
    while True:
        yield Sum(tuple(rng.randrange(10) for _ in range(rng.choice(NUM_TERMS))))


def prompt_showing(problem: Problem, solution: str) -> str:
    """What `data.teacher_template="{prompt}{solution}{prompt}"` makes of it."""
    return problem.prompt + solution + problem.prompt


def random_response(problem: Sum, rng: random.Random) -> str:
    """The answer with random partial sums, which only a copy can foretell; no longer than a right one can be."""
    return problem.response_with([rng.randrange(9 * max(NUM_TERMS) + 1) for _ in problem.terms[1:]])


def copying_texts(plan: ModelPlan, seed: int) -> Iterator[Text]:
    """The endless training stream of a student that copies: problems solved, and random answers copied."""
    rng = random.Random(f"shown {plan.name} {seed}")
    for problem in one_side(draw(f"{plan.name} {seed}"), held_out=False):
        if rng.random() < SHOWN_SHARE:
            answer = random_response(problem, rng)
            yield worked(prompt_showing(problem, answer), answer)
        else:
            yield worked(problem.prompt, problem.response)


TEACHER = ModelPlan("teacher", num_layers=3, width=96, num_heads=4, tied=False, stop_at=None)
STUDENT = ModelPlan("student", num_layers=2, width=64, num_heads=2, tied=True, stop_at=0.2)
SHOWN_SHARE = 2 / 3  # of the texts teach to copy; at a half, some seeds learn to add sooner
COPYING_STUDENT = replace(
    STUDENT, num_steps=1100, batch_texts=32, probe_every=20, texts=copying_texts, showing=prompt_showing
)
SUMS = PairPlan(
    draw=draw,
    vocabulary=VOCABULARY,
    max_response_tokens=MAX_RESPONSE_TOKENS,
    teacher=TEACHER,
    student=STUDENT,
    student_between=(0.10, 0.38),
)
COPYING_SUMS = replace(SUMS, student=COPYING_STUDENT)
