"""What the tiny pairs' tasks have in common: problems, which of them are held out, and tokenizers of a few words."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PAD_ID, EOS_ID = 0, 1  # the first two words of every vocabulary
MAX_TOKENS = 128  # of a text: as far as the models' positions go
HELD_OUT_SHARE = 10  # one problem in so many is held out


class Problem(Protocol):
    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str:
        """The worked answer, without <eos>."""
        ...

    @property
    def answer(self) -> str:
        """What stands behind the last # of the response."""
        ...


@dataclass(frozen=True, kw_only=True)
class Worked:
    """A problem that is just its texts."""

    prompt: str
    response: str
    answer: str


Draw = Callable[[str], Iterator[Problem]]  # of a seed: an endless stream, repeats included


def is_held_out(problem: Problem) -> bool:
    """By a checksum of the prompt, so that the two sets never overlap, whoever draws from them with whatever seed."""
    return zlib.crc32(problem.prompt.encode()) % HELD_OUT_SHARE == 0


def one_side(problems: Iterator[Problem], *, held_out: bool) -> Iterator[Problem]:
    return (problem for problem in problems if is_held_out(problem) == held_out)


def distinct(problems: Iterator[Problem], count: int) -> list[Problem]:
    """The first `count` different problems of an endless stream."""
    found: dict[Problem, None] = {}
    for problem in problems:
        found[problem] = None
        if len(found) == count:
            return list(found)
    raise AssertionError("the stream is endless")


def is_right(response: str, problem: Problem) -> bool:
    """Whether the answer stands after the last #; a response without # is wrong."""
    _, mark, final = response.rpartition("#")
    return bool(mark) and final == problem.answer


def row_of(problem: Problem) -> dict[str, Any]:
    """Its row of a prompt file."""
    return {"prompt": problem.prompt, "answer": problem.answer, "solution": problem.response}


def build_tokenizer(vocabulary: tuple[str, ...], word: str = ".", template: str = "") -> PreTrainedTokenizerFast:
    """One token for each match of the pattern `word`.

    `vocabulary` begins with PAD and EOS; the place of a word is its id. Encoding what it does not have raises, unless
    it has UNKNOWN.
    """
    unknown = {"unk_token": UNKNOWN} if UNKNOWN in vocabulary else {}
    words = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, **unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        **unknown,
    )
    made.chat_template = template or None
    return made
