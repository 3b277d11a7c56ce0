"""The agents' task: trajectories are what template and tools make, and a model is judged by its last turn."""

from itertools import islice

import torch

from opsd.agents.calls import hermes
from opsd.agents.lookups import SCHEMAS, build_tools
from opsd.agents.tools import ToolCall
from opsd.agents.turn_template import TurnTemplate
from pairs.lookups import (
    KEYS,
    LOOKUPS,
    MAX_TURNS,
    TURN_TOKENS,
    Lookup,
    between,
    call,
    draw,
    last_turns,
    row,
    trajectories,
)
from pairs.task import EOS, EOS_ID, MAX_TOKENS
from pairs.training import IGNORED, collate

PROBLEM = Lookup("bda", (9, 7, 5, 3, *[0] * 8))


def conversation(problem):
    turns = [{"role": "user", "content": problem.question}]
    for key in problem.keys:
        asked = {"type": "function", "function": {"name": "get", "arguments": {"key": key}}}
        turns += [{"role": "assistant", "content": "", "tool_calls": [asked]}]
        turns += [{"role": "tool", "content": str(problem.table[key])}]
    return [*turns, {"role": "assistant", "content": problem.response}]


def test_worked_trajectory_of_the_documented_example():
    parts = [text for text, is_own in PROBLEM.trajectory if is_own]
    assert parts[0] == '<tool_call>{"name":"get","arguments":{"key":"b"}}</tool_call><eos>'
    assert parts[1:] == [call("d") + EOS, call("a") + EOS, "7+3=10;10+9=19#19<eos>"]
    assert row(PROBLEM)["answer"] == "19" and row(PROBLEM)["table"]["b"] == 7


def test_a_trajectory_is_what_the_template_writes_of_its_conversation():
    tokenizer = LOOKUPS.tokenizer()
    for problem in islice(draw("texts"), 50):
        text = tokenizer.apply_chat_template(conversation(problem), tools=SCHEMAS, tokenize=False)
        assert text == "".join(part for part, _ in problem.trajectory)
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids and len(ids) <= LOOKUPS.max_response_tokens
        asked = tokenizer.apply_chat_template(
            row(problem)["prompt"], tools=SCHEMAS, tokenize=False, add_generation_prompt=True
        )
        assert asked == problem.prompt
        assert len(tokenizer.encode(asked)) + LOOKUPS.max_response_tokens <= MAX_TOKENS
        assert len(tokenizer.encode(problem.response)) < TURN_TOKENS


def test_between_turns_is_what_a_run_puts_there():
    tokenizer = LOOKUPS.tokenizer()
    template = TurnTemplate(tokenizer, [EOS_ID], {})
    for answers in (["7"], ["7", "3"]):
        assert template.between(answers).tolist() == tokenizer.encode(between(*answers))
    failed = template.between(["error: the table has no x"])  # other words than the vocabulary's, and no error
    assert tokenizer.unk_token_id in failed


def test_a_call_is_one_that_a_run_reads_and_the_tool_answers():
    assert hermes(call("b")) == (ToolCall("get", {"key": "b"}),)
    session = build_tools().open(row(PROBLEM))
    assert [session.call("get", {"key": key}) for key in "bda"] == ["7", "3", "9"]


def test_a_model_learns_its_own_turns_only():
    tokenizer = LOOKUPS.tokenizer()
    [text] = islice(trajectories(LOOKUPS.student, 0), 1)
    _, labels_BT = collate([text], tokenizer)
    assert tokenizer.decode(labels_BT[labels_BT != IGNORED]) == "".join(part for part, is_own in text if is_own)


class Scripted:
    """Calls for the keys of its prompt one after another, as often as `num_calls`, then says the answer."""

    def __init__(self, tokenizer, num_calls):
        self.tokenizer, self.num_calls = tokenizer, num_calls

    def generate(self, ids_BT, **_):
        rows = []
        for ids in ids_BT:
            text = self.tokenizer.decode(ids)
            keys = text.split("<user>")[1].split("?")[0].split("+")
            values = [part[0] for part in text.split("<tool>")[1:]]
            turn = (
                call(keys[len(values)]) if len(values) < min(len(keys), self.num_calls) else f"#{sum(map(int, values))}"
            )
            rows.append(self.tokenizer.encode(turn + EOS))
        longest = max(map(len, rows))
        return torch.cat([ids_BT, torch.tensor([ids + [EOS_ID] * (longest - len(ids)) for ids in rows])], dim=1)


def test_accuracy_is_that_of_the_last_turn_after_the_tools_answers():
    tokenizer, problems = LOOKUPS.tokenizer(), list(islice(draw("played"), 30))
    assert LOOKUPS.accuracy(Scripted(tokenizer, 4), tokenizer, problems) == 1.0
    assert LOOKUPS.accuracy(Scripted(tokenizer, 1), tokenizer, problems) < 0.3  # it adds what it looked up: one value
    unfinished = last_turns(Scripted(tokenizer, 4), tokenizer, problems, max_turns=1)
    assert all(map(hermes, unfinished)) and MAX_TURNS > 4 and set(KEYS) == set(problems[0].table)
