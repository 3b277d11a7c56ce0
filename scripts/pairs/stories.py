"""Task three of the ablation: word problems of two to four steps, from templates.

    prompt    Ann has 4 apples. Ann buys 3 more. Ann gives 2 to Bob. How many apples does Ann have?
    response  4+3=7;7-2=5#5<eos>

A story begins with what someone has and goes on with two or three events, each in one of several wordings.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pairs.task import EOS, PAD, Worked
from pairs.training import ModelPlan, PairPlan

NAMES = ("Ann", "Bob", "Eve", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens")
MORE = ("{who} buys {n} more.", "{who} finds {n}.", "{who} gets {n} from {other}.")
LESS = ("{who} gives {n} to {other}.", "{who} loses {n}.", "{who} sells {n}.")
BAGS = ("{who} buys {k} bags of {n}.", "{who} finds {k} bags of {n}.")
START = ("{who} has {n} {things}.", "At first {who} has {n} {things}.")
ASK = ("How many {things} does {who} have?", "How many {things} does {who} have now?")
NUM_EVENTS = (2, 3)
WORD = r" ?[A-Za-z]+|."  # a word with the space before it, or a character


@dataclass(frozen=True)
class Event:
    sentence: str
    steps: tuple[str, ...]
    total: int


def draw(seed: str) -> Iterator[Worked]:
    rng = random.Random(seed)
    while True:
        yield story(rng)


def story(rng: random.Random) -> Worked:
    who, other = rng.sample(NAMES, 2)
    words = {"who": who, "other": other, "things": rng.choice(THINGS)}
    total = rng.randrange(2, 10)
    sentences, steps = [rng.choice(START).format(n=total, **words)], []
    num_events = rng.choice(NUM_EVENTS)
    with_bags = rng.randrange(2 * num_events)  # which event, in half of the stories none
    for place in range(num_events):
        kind = BAGS if place == with_bags else rng.choice((MORE, LESS)) if total > 2 else MORE
        event = happens(rng, total, kind, words)
        sentences.append(event.sentence)
        steps += event.steps
        total = event.total
    question = rng.choice(ASK).format(**words)
    return Worked(prompt=" ".join([*sentences, question]), response=f"{';'.join(steps)}#{total}", answer=str(total))


def happens(rng: random.Random, total: int, kind: tuple[str, ...], words: dict[str, str]) -> Event:
    """Something that changes a total: by a number below 10, or by two or three bags; never to 0 or below."""
    wording = rng.choice(kind)
    if kind is BAGS:
        k, n = rng.randrange(2, 4), rng.randrange(2, 6)
        after = total + k * n
        return Event(wording.format(k=k, n=n, **words), (f"{k}*{n}={k * n}", f"{total}+{k * n}={after}"), after)
    n = rng.randrange(1, 10 if kind is MORE else min(10, total))
    after = total + n if kind is MORE else total - n
    return Event(wording.format(n=n, **words), (f"{total}{'+' if kind is MORE else '-'}{n}={after}",), after)


def vocabulary() -> tuple[str, ...]:
    """Every word of the templates, with and without a space before it where it can stand first."""
    texts = [*MORE, *LESS, *BAGS, *START, *ASK]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", text))}
    spaced = sorted(f" {word}" for word in (*words, *NAMES, *THINGS))
    return (PAD, EOS, *"0123456789+-*=;#. ?", *sorted((*NAMES, "At")), *spaced)


STORIES = PairPlan(
    draw=draw,
    vocabulary=vocabulary(),
    word=WORD,
    max_response_tokens=48,
    teacher=ModelPlan("teacher", num_layers=3, width=96, num_heads=4, tied=False, stop_at=None, num_steps=700),
    student=ModelPlan("student", num_layers=2, width=64, num_heads=2, tied=True, stop_at=0.27, num_steps=700),
    student_between=(0.2, 0.5),
    teacher_at_least=0.95,
)
