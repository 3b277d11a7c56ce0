"""A task with a tool, for recipes/agent_quickstart.sh: values stand in a table that only a tool reads, and are added.

    student   b+d+a?  ->  <tool_call>{"name":"get","arguments":{"key":"b"}}</tool_call><eos>
    tool      7
              ... a call for d, a call for a: one per turn
    student   7+3=10;10+9=19#19<eos>

The models learn to write the student's turns of whole trajectories; what stands between these is read only.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opsd.agents.calls import hermes
from opsd.agents.lookups import GET, Table
from opsd.agents.tools import ToolCall
from pairs.sums import Sum
from pairs.task import EOS, MAX_TOKENS, PAD, UNKNOWN, one_side
from pairs.training import ModelPlan, PairPlan, Text, greedy_responses

KEYS = "abcdefghijkl"
NUM_KEYS = (2, 3, 4)
MAX_TURNS = max(NUM_KEYS) + 1
TURN_TOKENS = 32  # the longest, an answer of three steps, has 27 with <eos>
USER, ASSISTANT, TOOL = "<user>", "<assistant>", "<tool>"
CALL_WORDS = ("<tool_call>", '{"name":"', GET, '","arguments":{"', "key", '":"', '"}}', "</tool_call>")
VOCABULARY = (PAD, EOS, UNKNOWN, USER, ASSISTANT, TOOL, "<tools>", *CALL_WORDS, *KEYS, *"0123456789+=;#?")
# What a tool says of a failed call has other words: each is <unk>.
WORD = r'</?[a-z_]+>|\{"name":"|","arguments":\{"|":"|"\}\}|[a-z]+|\s+|.'
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name":"{{ call.function.name }}",'
    '"arguments":{{ call.function.arguments | tojson(separators=(",", ":")) }}}</tool_call>{% endfor %}'
    "{% if message.role == 'assistant' %}" + EOS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Lookup:
    keys: str  # a letter each
    values: tuple[int, ...]  # of KEYS, each 0..9

    @property
    def prompt(self) -> str:
        """As the template writes it, with the tools."""
        return f"<tools>{GET}{USER}{self.question}{ASSISTANT}"

    @property
    def question(self) -> str:
        return "+".join(self.keys) + "?"

    @property
    def table(self) -> dict[str, int]:
        return dict(zip(KEYS, self.values, strict=True))

    @property
    def sum(self) -> Sum:
        return Sum(tuple(self.table[key] for key in self.keys))

    @property
    def response(self) -> str:
        return self.sum.response

    @property
    def answer(self) -> str:
        return self.sum.answer

    @property
    def trajectory(self) -> Text:
        parts = [(self.prompt, False)]
        for key in self.keys:
            parts += [(call(key) + EOS, True), (between(str(self.table[key])), False)]
        return [*parts, (self.response + EOS, True)]


def call(key: str) -> str:
    return f"<tool_call>{json.dumps({'name': GET, 'arguments': {'key': key}}, separators=(',', ':'))}</tool_call>"


def between(*answers: str) -> str:
    """What the template puts between the end of a turn and the beginning of the next one."""
    return "".join(TOOL + answer for answer in answers) + ASSISTANT


def draw(seed: str) -> Iterator[Lookup]:
    rng = random.Random(seed)
    while True:
        keys = "".join(rng.choices(KEYS, k=rng.choice(NUM_KEYS)))
        yield Lookup(keys, tuple(rng.randrange(10) for _ in KEYS))


def trajectories(plan: ModelPlan, seed: int) -> Iterator[Text]:
    return (problem.trajectory for problem in one_side(draw(f"{plan.name} {seed}"), held_out=False))


def last_turns(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Lookup], max_turns: int = MAX_TURNS
) -> list[str]:
    """The last turn of each problem's greedy trajectory; of one that never stops to call, its last call."""
    texts, turns = [problem.prompt for problem in problems], [""] * len(problems)
    going = list(range(len(problems)))
    for _ in range(max_turns):
        written = greedy_responses(model, tokenizer, [texts[place] for place in going], TURN_TOKENS)
        for place, turn in zip(going, written, strict=True):
            turns[place] = turn
            texts[place] += turn + EOS + between(*answers_of(turn, problems[place]))
        going = [place for place in going if hermes(turns[place]) and has_room(texts[place])]
    return turns


def has_room(text: str) -> bool:
    """For another turn: an untrained student calls many times in one."""
    return len(re.findall(WORD, text)) + TURN_TOKENS <= MAX_TOKENS


def answers_of(turn: str, problem: Lookup) -> list[str]:
    """What its calls are answered; a wrong one is answered with a word that no model knows."""
    table = Table(problem.table)
    calls = hermes(turn)
    good = [
        isinstance(one, ToolCall) and one.name == GET and one.arguments.get("key") in problem.table for one in calls
    ]
    return [table.call(GET, one.arguments) if is_good else UNKNOWN for one, is_good in zip(calls, good, strict=True)]


def row(problem: Lookup) -> dict:
    """Of the prompt file."""
    turns = [{"role": "user", "content": problem.question}]
    return {"prompt": turns, "answer": problem.answer, "table": problem.table}


LOOKUPS = PairPlan(
    draw=draw,
    vocabulary=VOCABULARY,
    word=WORD,
    template=TEMPLATE,
    max_response_tokens=96,
    respond=last_turns,
    row=row,
    teacher=ModelPlan(
        "teacher", num_layers=3, width=96, num_heads=4, tied=False, stop_at=None, num_steps=450, texts=trajectories
    ),
    student=ModelPlan(
        "student",
        num_layers=2,
        width=64,
        num_heads=2,
        tied=True,
        stop_at=0.2,
        num_steps=500,
        probe_every=5,
        texts=trajectories,
    ),
    student_between=(0.10, 0.40),
    teacher_at_least=0.99,
)
