"""Trajectories of several engines, of a teacher elsewhere, for several ranks: as those of one of each."""

import asyncio
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from opsd.agents.toolbox import end_toolbox
from opsd.agents.trajectories import AgentWork
from opsd.engines.work import SharedWork, deal, size_of
from opsd.engines.work_queue import WorkQueue
from opsd.learner.dealing import deal as dealt
from opsd.learner.dealing import rows_for
from opsd.payload.keeper import KeptHere, looked_through
from opsd.payload.kept import joined
from opsd.payload.whole import own_scores, wholes
from opsd.teacher.remote.client import ServedSpec
from opsd.teacher.served import ClientWorker
from opsd.teacher.server.limits import Limits
from opsd.types import Selection
from tests.opsd.agents.sampled import (
    SAMPLING,
    TOP_K,
    VOCABULARY,
    WANTED,
    engine_spec,
    make_engine,
    requests_of,
    scored_by,
    spec_of,
)  # fmt: skip
from tests.opsd.teacher.server.engine_in_thread import serving


def flat(parts):
    """(place, rollout) of groups, in the order of the places."""
    return sorted(((place, rollout) for group in parts for place, rollout in group.items()), key=lambda each: each[0])


def test_engines_that_share_a_queue_make_the_trajectories_of_one(sampled, paths, monkeypatch):
    """Two engines with room for three each, a step of one after a step of the other."""
    monkeypatch.setattr(
        "opsd.engines.work.ray", SimpleNamespace(get=lambda ref: ref, wait=lambda refs, timeout: (refs, []))
    )
    requests, spec, engine = requests_of(paths[0]), spec_of(paths[0]), make_engine(paths[0])
    engine.max_num_seqs = 3
    sizes = [size_of(request, SAMPLING.max_tokens) for request in requests.values()]
    begun, waiting = deal(sizes, 2, engine.max_num_seqs)
    queue = WorkQueue(2)
    queue.begin(0, [(place, sizes[place]) for place in waiting], [sum(sizes[place] for place in own) for own in begun])
    actor = SimpleNamespace(take=SimpleNamespace(remote=queue.take))
    streams = [
        AgentWork(
            SharedWork(
                {place: requests[place] for place in own},
                requests,
                actor,
                job=0,
                engine=number,
                max_tokens=SAMPLING.max_tokens,
            ),
            spec,
        ).made_by(engine, SAMPLING, 0, 2)
        for number, own in enumerate(begun)
    ]
    made = [[], []]
    for groups in zip_longest(*streams):
        for own, group in zip(made, groups, strict=True):
            own.append(group or {})
    end_toolbox(spec)
    assert waiting and all(len(flat(own)) > len(begun[0]) for own in made)  # both took from the queue
    found = flat([*made[0], *made[1]])
    assert [place for place, _ in found] == list(range(16))
    for place, rollout in found:
        expected = sampled[0][place]
        assert rollout.trajectory.read_ids.tolist() == expected.trajectory.read_ids.tolist()
        assert rollout.trajectory.place_T.tolist() == expected.trajectory.place_T.tolist()
        assert (rollout.trajectory.end, rollout.trajectory.failures) == (
            expected.trajectory.end,
            expected.trajectory.failures,
        )
        np.testing.assert_allclose(rollout.sampled_logprobs, expected.sampled_logprobs, atol=1e-4)


def test_the_teachers_hidden_states_are_those_before_the_students_tokens(sampled, paths):
    """For loss.payload=hidden."""
    rollouts = list(sampled[0].values())
    _, rows = scored_by(make_engine(paths[1], returns_hidden=True), rollouts, with_hidden=True)
    trunk = AutoModelForCausalLM.from_pretrained(paths[1], dtype=torch.float64).model
    expected = []
    for rollout in rollouts:
        ids = np.concatenate([rollout.prompt.token_ids, rollout.trajectory.read_ids]).astype(np.int64)
        with torch.inference_mode():
            hidden_LD = trunk(torch.from_numpy(ids)[None]).last_hidden_state[0]
        expected.append(hidden_LD[len(rollout.prompt.token_ids) + rollout.trajectory.place_T - 1])
    np.testing.assert_allclose(rows.hidden_NE, torch.cat(expected).numpy(), atol=1e-4)


def test_a_teacher_behind_a_server_says_what_the_one_in_the_run_says(sampled, paths):
    """With the candidates, and in requests that hold a few trajectories each."""
    rollouts = list(sampled[0].values())
    told, rows = scored_by(make_engine(paths[1]), rollouts)
    limits = Limits(
        body_bytes=1 << 20, answer_bytes=1 << 22, rollouts=5, tokens=2000, model_tokens=400, top_k=TOP_K, candidates=8,
        vocab_size=VOCABULARY.size, hidden_bytes=0,
    )  # fmt: skip
    with serving(engine_spec(paths[1]), limits) as (url, _):
        info = {f"max_{name}": getattr(limits, name) for name in ("rollouts", "tokens", "body_bytes", "answer_bytes")}
        info |= {"scores_candidates": True, "hidden_bytes": 0}
        spec = engine_spec("", backend="http", urls=[url])
        client = ClientWorker()  # in this process
        client.start(ServedSpec(**vars(spec), served=info, token=""))
        asyncio.run(client.score(0, rollouts, TOP_K, None))
    other_told = client.told([0])
    assert other_told.missing == {} and told.stats.keys() == other_told.stats.keys()
    for name, values in told.stats.items():
        np.testing.assert_allclose(other_told.stats[name], values, atol=1e-4, err_msg=name)
    other_rows = client.rows(0, [np.arange(len(told.stats["entropy_T"]))], WANTED)
    for name in ("token_ids_L", "row_N", "support_NU"):
        np.testing.assert_array_equal(getattr(other_rows, name), getattr(rows, name))
    np.testing.assert_allclose(other_rows.teacher_logprobs_NB, rows.teacher_logprobs_NB, atol=1e-4)


def test_two_ranks_learn_from_every_token_once_and_in_its_place(sampled, paths):
    """Half of the tokens, of two teacher's engines that have scored half of the trajectories each."""
    rollouts, engine = list(sampled[0].values()), make_engine(paths[1])
    payloads = [kept_of(engine, rollouts[:7]), kept_of(engine, rollouts[7:])]
    lengths = np.array([len(rollout) for rollout in rollouts])
    first_R = np.concatenate([np.cumsum([0, *own[:-1]]) for own in (lengths[:7], lengths[7:])])
    index_N = torch.arange(0, lengths.sum(), 2)
    selection = Selection(index_N=index_N, weight_N=torch.ones(len(index_N)))
    shares = {
        num_ranks: dealt(
            rollouts,
            selection,
            payload_R=np.repeat([0, 1], [7, 9]),
            first_R=first_R,
            num_ranks=num_ranks,
            max_tokens=300,
        )
        for num_ranks in (1, 2)
    }
    of_one, of_two = (learnt_from(own, payloads) for own in shares.values())
    assert of_one.keys() == of_two.keys() == set(index_N.tolist())
    assert all(len(share.work.index_N) > 0 for share in shares[2])
    place_N = np.concatenate([len(r.prompt.token_ids) + r.trajectory.place_T for r in rollouts])
    sequences = [[*r.prompt.token_ids, *r.trajectory.read_ids] for r in rollouts]
    rollout_of = np.repeat(np.arange(16), lengths)
    for token, (before, teacher_B) in of_two.items():
        assert before == sequences[rollout_of[token]][: place_N[token]]  # what the model has read when it predicts it
        np.testing.assert_array_equal(teacher_B, of_one[token][1])


def kept_of(engine, rollouts):
    scores = own_scores(rollouts, engine.score(wholes(rollouts), TOP_K))
    return KeptHere(looked_through("teacher", rollouts, scores, VOCABULARY)[1], VOCABULARY)


def learnt_from(shares, payloads):
    """By token of the batch: (all that stands before it, the teacher's log-probabilities)."""
    found = {}
    for share, parts in zip(shares, rows_for(shares, payloads, WANTED), strict=True):
        rows = joined(parts)
        start_S = np.cumsum(rows.length_S) - rows.length_S
        start_N = np.repeat(start_S, rows.num_kept_S)
        for token, start, row, teacher_B in zip(
            share.work.index_N.tolist(), start_N, rows.row_N, rows.teacher_logprobs_NB, strict=True
        ):
            assert token not in found
            found[token] = rows.token_ids_L[start : start + row + 1].tolist(), teacher_B
    return found
