"""Golden trajectories of a scripted model: exact ids, which of them are the student's, ends and counts."""

import random
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from opsd.agents.toolbox import AgentSpec, Toolbox
from opsd.agents.trajectories import AgentWork
from opsd.agents.turn_template import TurnTemplate
from opsd.config.tools import ToolsConfig
from opsd.engines.sampling import Sampling
from opsd.engines.work import Work
from opsd.errors import ConfigError
from opsd.sequences import version_fields
from opsd.types import Prompt, Rollout
from tests.opsd.agents.agent_models import BUILD, call, ids_of, make_agent_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_agent_tokenizer(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def spec(folder):
    tools = ToolsConfig(build=BUILD, max_turns=3, call_timeout_s=1.0, max_answer_chars=60)
    return AgentSpec(tools=tools, path=str(folder), trust_remote_code=False, stop_ids=(0,))


@pytest.fixture(scope="module")
def toolbox(spec):
    made = Toolbox(spec)
    yield made
    made.runner.close()


class ScriptedEngine:
    """Answers the turns of each prompt with texts, a few requests at a time."""

    def __init__(self, tokenizer, script, room=2):
        self.tokenizer, self.script, self.max_num_seqs = tokenizer, script, room
        self.prompts = {index: [] for index in range(len(script))}  # what each turn was asked with
        self.seeds, self.most_open = [], 0

    def generate(self, work, sampling, policy_version, group_size=None):
        while work.more and (batch := work.take(self.max_num_seqs, 0)):
            begun = {index for index, prompts in self.prompts.items() if prompts}
            begun |= {prompt.index for prompt, _, _ in batch.values()}
            is_open = [index for index in begun if len(self.prompts[index]) < len(self.script[index])]
            self.most_open = max(self.most_open, len(is_open))
            yield {place: self.turn(request, policy_version) for place, request in batch.items()}

    def turn(self, request, policy_version):
        prompt, sample, seed = request
        self.seeds.append((prompt.index, len(self.prompts[prompt.index]), seed))
        text = self.script[prompt.index][len(self.prompts[prompt.index])]
        self.prompts[prompt.index].append(prompt.token_ids.tolist())
        ids = ids_of(self.tokenizer, text)[: prompt.max_response_tokens]
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) - 100 * len(self.prompts[prompt.index])
        return Rollout(
            prompt=prompt,
            sample=sample,
            response_ids=np.array(ids, np.int32),
            sampled_logprobs=logprobs,
            candidate_ids=np.array(ids, np.int32)[:, None],
            candidate_logprobs=logprobs[:, None],
            stopped=ids[-1] == 0,
            policy_version=policy_version,
        )


def request_of(toolbox, index, row=None):
    ids = np.array(ids_of(toolbox.tokenizer, f"[u:{index}<end>[a:"), np.int32)
    return Prompt(index=index, token_ids=ids, text="", answer=None, source="test", row=row or {}), 0, 7 + index


def played(monkeypatch, toolbox, spec, script, *, room=400, rows=None, group_size=1, slots=2):
    """(engine, rollouts by place) of a script: for each prompt the texts of its turns."""
    monkeypatch.setattr("opsd.agents.trajectories.toolbox_of", lambda _: toolbox)
    engine = ScriptedEngine(toolbox.tokenizer, script, slots)
    requests = {i: request_of(toolbox, i, (rows or {}).get(i)) for i in range(len(script))}
    work = AgentWork(Work(requests), spec)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=room, num_candidates=1)
    groups = list(work.made_by(engine, sampling, 5, group_size))
    return engine, groups


def text_of(toolbox, ids):
    return toolbox.tokenizer.decode(ids)


def test_a_golden_trajectory(monkeypatch, toolbox, spec):
    turns = [f"hm {call('add', 2)}{call('later')}<tool_call>{{</tool_call><end>", f"so {call('add')}<end>", "43<end>"]
    engine, [group] = played(monkeypatch, toolbox, spec, [turns], rows={0: {"start": 40}})
    rollout, trajectory = group[0], group[0].trajectory
    answers = ["[T:total 42][T:later 1][T:error: the call is not valid JSON:", "[T:total 43][a:", ""]
    read = text_of(toolbox, trajectory.read_ids)
    assert [part.split("[T:")[0] for part in read.split("[a:")] == turns
    assert all(answer in read for answer in answers)
    # What the student wrote is as sampled, id by id; what it read before each turn is the sequence up to there.
    own = [ids_of(toolbox.tokenizer, turn) for turn in turns]
    assert rollout.response_ids.tolist() == sum(own, [])
    assert trajectory.read_ids[trajectory.place_T].tolist() == rollout.response_ids.tolist()
    is_tool = np.ones(len(trajectory.read_ids), bool)
    is_tool[trajectory.place_T] = False
    between = text_of(toolbox, trajectory.read_ids[is_tool])
    assert between.startswith("[T:total 42][T:later 1][T:error") and between.endswith("][a:[T:total 43][a:")
    whole = [*rollout.prompt.token_ids.tolist(), *trajectory.read_ids.tolist()]
    starts = [len(rollout.prompt.token_ids) + int(trajectory.place_T[first]) for first in trajectory.turn_starts]
    assert engine.prompts[0] == [whole[:start] for start in starts]
    expected = np.concatenate([-np.arange(1, len(ids) + 1) - 100 * (n + 1) for n, ids in enumerate(own)])
    np.testing.assert_array_equal(rollout.sampled_logprobs, expected.astype(np.float32))
    assert (rollout.policy_version, rollout.stopped, trajectory.end) == (5, True, "answered")
    assert (trajectory.num_turns, trajectory.num_calls, trajectory.failures) == (3, 4, {"malformed": 1})
    assert rollout.prompt.row == {"start": 40} and rollout.prompt.max_response_tokens is None


def test_turns_of_several_weights_are_one_rollout_of_the_oldest(monkeypatch, toolbox, spec):
    """The first turn goes on under new weights, and the second begins under newer ones."""
    turn = ScriptedEngine.turn

    def aging(engine, request, policy_version):
        made, number = turn(engine, request, policy_version), len(engine.prompts[request[0].index])
        versions = np.full(len(made), policy_version + number, np.int32)
        versions[0] -= 1
        return replace(made, **version_fields(versions))

    monkeypatch.setattr(ScriptedEngine, "turn", aging)
    _, [group] = played(monkeypatch, toolbox, spec, [[f"{call('add')}<end>", "43<end>"]])
    first, second = np.diff([*group[0].trajectory.turn_starts, len(group[0])])
    assert group[0].policy_version == 5
    assert group[0].version_T.tolist() == [5, *[6] * (first - 1), 6, *[7] * (second - 1)]


def test_how_trajectories_end(monkeypatch, toolbox, spec):
    again, submit = f"{call('add')}<end>", f"{call('submit')}<end>"
    script = [["4<end>"], [again] * 3, [submit], [again, "x" * 500], [again]]
    engine, groups = played(monkeypatch, toolbox, spec, script[:4], room=100)
    rollouts = {place: rollout for group in groups for place, rollout in group.items()}
    assert [rollouts[i].trajectory.end for i in range(4)] == ["answered", "max_turns", "tool", "cut"]
    assert [rollouts[i].stopped for i in range(4)] == [True, True, True, False]
    assert [rollouts[i].trajectory.num_calls for i in range(4)] == [0, 2, 1, 1]
    assert len(rollouts[3].trajectory.read_ids) == 100  # of all tokens, tools' too
    _, [group] = played(monkeypatch, toolbox, spec, [[again]], room=12)
    assert group[0].trajectory.end == "no_room" and group[0].trajectory.num_calls == 1
    assert group[0].trajectory.read_ids.tolist() == group[0].response_ids.tolist()  # nobody has read the answer


def test_whatever_a_tool_does_is_counted_and_nothing_is_lost(monkeypatch, toolbox, spec):
    wrong = {"fail": "raised", "hang": "timed_out", "long": "too_long", "half": "not_text", "bytes": "not_text"}
    script = [[f"{call(name, 1_000_000 if name == 'long' else 1)}<end>", "ok<end>"] for name in wrong]
    _, groups = played(monkeypatch, toolbox, spec, [*script, ["fine<end>"]], room=600)
    rollouts = {place: rollout for group in groups for place, rollout in group.items()}
    assert [rollouts[i].trajectory.failures for i in range(6)] == [{kind: 1} for kind in wrong.values()] + [{}]
    assert all(rollouts[i].trajectory.end == "answered" for i in range(6))


def test_order_and_seeds_do_not_depend_on_which_tool_is_first(monkeypatch, toolbox, spec):
    def delayed(seed):
        draws = random.Random(seed)
        return [[f"{call('sleep', draws.randrange(60))}<end>", "ok<end>"] for _ in range(6)]

    engines, orders = [], []
    for seed, slots in ((0, 1), (1, 6)):
        engine, groups = played(monkeypatch, toolbox, spec, delayed(seed), group_size=2, slots=slots)
        engines.append(engine)
        orders.append([list(group) for group in groups])
    assert orders == [[[0, 1], [2, 3], [4, 5]]] * 2
    first, second = (sorted(engine.seeds) for engine in engines)
    assert first == second and len({seed for _, _, seed in first}) == 12


@pytest.mark.parametrize(("max_open", "slots", "expected"), [(3, 4, 3), (None, 2, 4), (1, 2, 1), (5, 2, 5)])
def test_an_engine_begins_no_more_trajectories_than_may_be_open(monkeypatch, toolbox, spec, max_open, slots, expected):
    """The tools of all are slow: without a bound it would begin each of them before the first is answered."""
    monkeypatch.setattr(toolbox, "max_open", max_open)
    script = [[f"{call('sleep', 250)}<end>", f"{n}<end>"] for n in range(8)]
    engine, groups = played(monkeypatch, toolbox, spec, script, slots=slots)
    assert engine.most_open == expected
    made = {place: rollout for group in groups for place, rollout in group.items()}
    assert list(made) == list(range(8)) and {own.trajectory.num_turns for own in made.values()} == {2}


def test_a_template_shows_answers_and_no_answer_ends_a_turn(toolbox):
    between = toolbox.template.between(["a<end>b", "c"])
    assert text_of(toolbox, between) == "[T:a< end>b][T:c][a:" and 0 not in between


def test_tools_that_are_not_kept_end_with_the_work(toolbox, spec):
    """And the next work starts others: a teacher is asked for its own answers once in a run."""
    made = []
    for _ in range(2):
        work = AgentWork(Work({0: request_of(toolbox, 0)}), spec, keeps_tools=False)
        engine = ScriptedEngine(toolbox.tokenizer, [[f"{call('add')}<end>", "1<end>"]])
        [group] = work.made_by(engine, Sampling(temperature=1.0, top_p=1.0, max_tokens=99, num_candidates=1), 0, None)
        assert group[0].trajectory.num_calls == 1
        made.append(work._tools.runner)
        [process] = made[-1]._processes
        process._process.wait(timeout=20)
    assert made[0] is not made[1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{% for m in messages %}{{ m.content }}<end>{% if m.role != 'assistant' %}{% endif %}{% endfor %}", None),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}<end>{% endfor %}[a:", "does not show the answers"),
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", "does not end a turn"),
        ("{{ messages[0].content }}", "does not end a turn"),
    ],
)
def test_a_template_with_which_it_does_not_work_is_refused_in_a_line(folder, template, said):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if said is None:
        TurnTemplate(tokenizer, (0,), {})
        return
    with pytest.raises(ConfigError, match=said):
        TurnTemplate(tokenizer, (0,), {})
