"""The quick start's task: add 3 to 6 one-digit numbers from left to right, one partial sum a step.

    prompt    7+3+9?
    response  7+3=10;10+9=19#19<eos>
    shown     7+3+9?7+3=10;10+9=19#197+3+9?     the prompt of who sees the solution

A problem belongs to the held-out set or to the training set by a checksum of its own text, so the two can never
overlap, whoever draws from them and with whatever seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
VOCABULARY = (PAD, EOS, *"0123456789+=;#?")
NUM_TERMS = (3, 4, 5, 6)
MAX_RESPONSE_TOKENS = 48  # the longest response has 45 tokens, with <eos>
HELD_OUT_SHARE = 10  # one problem in so many is held out


@dataclass(frozen=True)
class Problem:
    terms: tuple[int, ...]  # each 0..9

    @property
    def prompt(self) -> str:
        return "+".join(map(str, self.terms)) + "?"

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    @property
    def response(self) -> str:
        """The worked answer, without <eos>."""
        return self.response_with(list(accumulate(self.terms))[1:])

    def response_with(self, totals: list[int]) -> str:
        """The answer with these partial sums, right or wrong: one less than there are terms."""
        steps = zip([self.terms[0], *totals[:-1]], self.terms[1:], totals, strict=True)
        return ";".join(f"{left}+{term}={total}" for left, term, total in steps) + f"#{totals[-1]}"

    def prompt_showing(self, solution: str) -> str:
        """What `data.teacher_template="{prompt}{solution}{prompt}"` makes of it."""
        return self.prompt + solution + self.prompt

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_SHARE == 0


def draw_problems(seed: str, *, held_out: bool) -> Iterator[Problem]:
    """An endless stream of problems of one side of the split, repeats included. The same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        problem = Problem(tuple(rng.randrange(10) for _ in range(rng.choice(NUM_TERMS))))
        if problem.held_out == held_out:
            yield problem


def distinct_problems(count: int, seed: str, *, held_out: bool) -> list[Problem]:
    """The first `count` distinct problems of the stream."""
    found: dict[Problem, None] = {}
    for problem in draw_problems(seed, held_out=held_out):
        found[problem] = None
        if len(found) == count:
            return list(found)
    raise AssertionError("the stream is endless")


def random_response(problem: Problem, rng: random.Random) -> str:
    """The answer with random partial sums, which only a copy can foretell; no longer than a right one can be."""
    return problem.response_with([rng.randrange(9 * max(NUM_TERMS) + 1) for _ in problem.terms[1:]])


def is_right(response: str, problem: Problem) -> bool:
    """Whether the text after the last # is the sum; a response without # is wrong."""
    _, mark, final = response.rpartition("#")
    return bool(mark) and final == problem.answer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. Encoding a character that the task does not know raises."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=128
    )
