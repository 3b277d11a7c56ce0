"""The data sets that opsd.data.prepare knows: where they are, what their rows hold, how a question is asked."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from opsd.data.deepplanning.folder import read_folder
from opsd.data.grading import last_box
from opsd.data.rows import Row, first_of, lookup, messages, read_rows, reference_answer
from opsd.errors import DataError

QUESTION_KEYS = ("question", "problem", "Problem", "prompt")
SOLUTION_KEYS = ("solution", "Solution")
ANSWER_KEYS = ("answer", "Answer", "reward_model.ground_truth")

# As the prompts of DAPO-Math-17k have it: recognised to be taken off, and put around other questions by the variant.
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
# As the model cards of Qwen advise.
BOXED_AFTER = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

VARIANTS = {
    "boxed": lambda question: question + BOXED_AFTER,
    "dapo": lambda question: DAPO_BEFORE + question + DAPO_AFTER,
    "none": lambda question: question,
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set that is known by name. Loading from the hub is untested: it needs the network."""

    data_source: str  # as verl names it, which has its graders by this name
    repository: str  # on the Hugging Face hub
    configuration: str | None = None
    train_split: str | None = None  # None: the hub's set is for evaluation only
    eval_split: str | None = None
    train_ratio: float = 1.0  # of its training set; the rest is held out


DATA_SETS = {
    "dapo": DataSet(
        data_source="math_dapo", repository="YouJiacheng/DAPO-Math-17k-dedup", train_split="train", train_ratio=0.8
    ),
    "gsm8k": DataSet(
        data_source="openai/gsm8k",
        repository="openai/gsm8k",
        configuration="main",
        train_split="train",
        eval_split="test",
    ),
    "math500": DataSet(
        data_source="HuggingFaceH4/MATH-500", repository="HuggingFaceH4/MATH-500", eval_split="test"
    ),
    "aime24": DataSet(data_source="aime24", repository="HuggingFaceH4/aime_2024", eval_split="train"),
    "aime25": DataSet(data_source="aime25", repository="math-ai/aime25", eval_split="test"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FolderSet:
    """A set that comes as a folder, whose reader makes rows in verl's format; no variant of a question fits it."""

    read: Callable[[str], list[Row]]
    train_ratio: float = 0.8  # of what is trained on; the rest is held out


FOLDER_SETS = {
    "deepplanning": FolderSet(read=partial(read_folder, language="en")),
    "deepplanning_zh": FolderSet(read=partial(read_folder, language="zh")),
}


def load_rows(name: str, file: str, split: str) -> list[Row]:
    """The raw rows of the file, or, where `file` is empty, of the set `name` on the hub. `split`: train | test."""
    if name in FOLDER_SETS:
        if not file:
            raise DataError(f"{name}: give the folder that it is in, {name}=FOLDER")
        return FOLDER_SETS[name].read(file)
    return read_rows(file) if file else _hub_rows(name, split)


def train_ratio_of(name: str) -> float:
    """The share of a training set that is trained on, where the user says nothing."""
    known: DataSet | FolderSet | None = DATA_SETS.get(name) or FOLDER_SETS.get(name)
    return known.train_ratio if known else 1.0


def verl_row(name: str, row: Row, index: int, *, split: str, variant: str, keys: tuple[str, str]) -> dict[str, Any]:
    """A row in verl's format. `keys`: the prompt's and the answer's field, for data that is not known by name.

    A row that is in verl's format already keeps all its fields; its last message gets the variant. Raises DataError.
    """
    if name in DATA_SETS:
        return _known_row(DATA_SETS[name], row, index, split=split, variant=variant)
    if name in FOLDER_SETS:
        return {**row.fields, "extra_info": {"split": split, "index": index, **row.fields["extra_info"]}}
    prompt_key, answer_key = keys
    *earlier, last = messages(row, prompt_key)
    if variant != "none":
        last = {**last, "content": VARIANTS[variant](bare_question(last["content"]))}
    prompt = [*earlier, last]
    if prompt_key == "prompt" and lookup(row, "reward_model.ground_truth") is not None:
        return {**row.fields, "prompt": prompt}
    return {
        "data_source": str(lookup(row, "data_source") or name),
        "prompt": prompt,
        "ability": str(lookup(row, "ability") or "chat"),
        "reward_model": {"style": "rule", "ground_truth": reference_answer(row, answer_key)},
        "extra_info": {"split": split, "index": index},
    }


def bare_question(text: str) -> str:
    """The question without the instructions of the variants, where it carries one."""
    return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).removesuffix(BOXED_AFTER)


def fingerprint(row: dict[str, Any]) -> str:
    """Equal for questions that differ in case, in spaces or in Unicode's ways to write a character, and for no others.

    Of a conversation, all messages. Signs count: 3 + 4 is not 3 - 4.
    """
    text = "\n".join(bare_question(message["content"]) for message in row["prompt"])
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text).casefold())


def _known_row(known: DataSet, row: Row, index: int, *, split: str, variant: str) -> dict[str, Any]:
    found = first_of(row, QUESTION_KEYS)
    if found is None:
        raise DataError(f"{row.where}: expected a question in one of {', '.join(QUESTION_KEYS)}, got {row.names}")
    question = bare_question(found if isinstance(found, str) else messages(row, "prompt")[-1]["content"])
    truth = _ground_truth(row)
    solution = first_of(row, (*SOLUTION_KEYS, *ANSWER_KEYS))
    return {
        "data_source": known.data_source,
        "prompt": [{"role": "user", "content": VARIANTS[variant](question)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index, "question": question, "solution": str(solution)},
    }


def _ground_truth(row: Row) -> str:
    """The answer's field, for GSM8K the number after its ####; where there is none, what is in the solution's box."""
    answer = first_of(row, ANSWER_KEYS)
    if "####" in str(answer):
        return str(answer).rpartition("####")[2].strip().replace(",", "")
    if answer is not None:
        return str(answer)
    box = last_box(str(first_of(row, SOLUTION_KEYS)))
    if box is None:
        raise DataError(f"{row.where}: expected an answer, or a solution with a \\boxed{{}}, got {row.names}")
    return box.removeprefix("\\boxed{").removesuffix("}")


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets

    known = DATA_SETS.get(name)
    hub_split = known and {"train": known.train_split, "test": known.eval_split}[split]
    if known is None or not hub_split:
        raise DataError(f"{name}: no {split} split of it is known on the hub: give a file, {name}=FILE")
    try:
        loaded = datasets.load_dataset(known.repository, known.configuration, split=hub_split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: cannot load {known.repository} from the hub: {error}") from error
    where = f"{known.repository}, {hub_split}"
    return [Row(where=f"{where}, row {number}", fields=dict(fields)) for number, fields in enumerate(loaded, start=1)]
