"""What the tiny pairs' tasks have in common: problems, which of them are held out, and tokenizers of a few words."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
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
    """The first `count` problems of an endless stream that differ in their prompts."""
    seen: set[str] = set()
    new = (seen.add(problem.prompt) or problem for problem in problems if problem.prompt not in seen)
    return list(islice(new, count))


def is_right(response: str, problem: Problem) -> bool:
    """Whether the answer stands after the last #; a response without # is wrong."""
    _, mark, final = response.rpartition("#")
    return bool(mark) and final == problem.answer


def build_tokenizer(vocabulary: tuple[str, ...], word: str = ".") -> PreTrainedTokenizerFast:
    """One token for each match of the pattern `word`. Encoding what the vocabulary does not have raises.

    `vocabulary` begins with PAD and EOS; the place of a word is its id.
    """
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=MAX_TOKENS
    )
