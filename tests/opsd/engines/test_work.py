"""Who takes which request: all of them once, nobody more than its share, and a long one holds only its own engine."""

import heapq
from types import SimpleNamespace

import numpy as np
import pytest

from opsd.engines.work import SharedWork, Work, as_work, deal, size_of
from opsd.engines.work_queue import WorkQueue
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts

ROOM, MAX_TOKENS = 4, 50


def finished(seconds, num_engines, *, sizes=None, shared=True):
    """(when the last answer is there, how many each engine made) where request i takes `seconds[i]`.

    `sizes`: of the prompts. `shared`: False deals everything at the start.
    """
    sizes = [1] * len(seconds) if sizes is None else sizes
    prompts = [SimpleNamespace(token_ids=range(size), max_response_tokens=None) for size in sizes]
    requests = [(prompt, 0, place) for place, prompt in enumerate(prompts)]
    begun, waiting = deal([size_of(request, MAX_TOKENS) for request in requests], num_engines, ROOM)
    if shared and waiting:
        queue = WorkQueue(num_engines)
        own = [[size_of(requests[place], MAX_TOKENS) for place in part] for part in begun]
        queue.begin(0, [(place, size_of(requests[place], MAX_TOKENS)) for place in waiting], list(map(sum, own)))
        actor, others = SimpleNamespace(take=SimpleNamespace(remote=queue.take)), dict(enumerate(requests))
        works = [
            SharedWork(
                {place: requests[place] for place in part}, others, actor, job=0, engine=engine, max_tokens=MAX_TOKENS
            )
            for engine, part in enumerate(begun)
        ]
    else:
        parts = [part + waiting[engine::num_engines] for engine, part in enumerate(begun)]
        works = [Work({place: requests[place] for place in part}) for part in parts]
    running: list[list[int]] = [[] for _ in works]
    made, events, now = [0] * num_engines, [], 0.0

    def fill(engine):
        in_flight = sum(size_of(requests[place], MAX_TOKENS) for place in running[engine])
        new = works[engine].take(ROOM - len(running[engine]), in_flight)
        assert len(running[engine]) + len(new) <= ROOM
        for place in new:
            running[engine].append(place)
            heapq.heappush(events, (now + seconds[place], engine, place))

    for engine in range(num_engines):
        fill(engine)
    seen = []
    while events:
        now, engine, place = heapq.heappop(events)
        running[engine].remove(place)
        seen.append(place)
        made[engine] += 1
        fill(engine)
    assert sorted(seen) == list(range(len(seconds))) and not any(work.more for work in works)
    return now, made


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """A queue that answers at once."""
    ray = SimpleNamespace(get=lambda ref: ref, wait=lambda refs, timeout: (refs, []))
    monkeypatch.setattr("opsd.engines.work.ray", ray)


def test_what_fits_is_dealt_in_order_and_nothing_waits():
    assert deal([1] * 5, 2, ROOM) == ([[0, 1, 2], [3, 4]], [])
    assert deal([], 2, ROOM) == ([[], []], [])


def test_the_longest_prompts_begin_first():
    begun, waiting = deal([1, 9, 5, 7, 3, 4], 2, 2)
    assert (begun, waiting) == ([[1, 2], [3, 5]], [4, 0])
    assert deal([1, 9, 5, 7], 1, 2) == ([[0, 1, 2, 3]], [])  # one engine has nobody to share with


def test_a_tail_of_long_answers_holds_only_the_engine_that_has_it():
    """Lengths whose longest is 20 times the median, four engines of four answers at a time."""
    rng = np.random.default_rng(0)
    seconds = np.minimum(rng.lognormal(0.0, 1.0, 640), 20.0)
    bound = seconds.sum() / (4 * ROOM)
    pulled, _ = finished(seconds, 4)
    dealt, _ = finished(seconds, 4, shared=False)
    assert bound <= pulled <= 1.1 * bound < dealt


def test_a_slow_engine_gets_less():
    seconds = np.ones(64)
    begun, _ = deal([1] * 64, 2, ROOM)
    seconds[begun[0]] = 10.0  # what the first engine begins with
    _, (slow, fast) = finished(seconds, 2)
    assert fast > 2 * slow


def test_the_last_requests_go_to_who_has_least():
    queue = WorkQueue(2)
    queue.begin(0, [(10, 100), (11, 100)], [300, 500])
    assert queue.take(0, 1, 4, 500) == ([], True)  # 500 is the even share of 1,000
    assert queue.take(0, 0, 4, 300) == ([10, 11], False)
    assert queue.take(0, 1, 4, 0) == ([], False)  # of a job that is done
    assert not queue.jobs and not queue.in_flight


def test_an_engine_with_nothing_to_do_gets_something():
    queue = WorkQueue(3)
    queue.begin(7, [(4, 1)], [900, 900, 0])
    assert queue.take(7, 2, 1, 0) == ([4], False)


def test_an_engine_takes_its_own_in_order():
    [item] = scored_rollouts([3], Vocabulary(size=20, stop_ids=(0,)))
    requests = [(item.rollout.prompt, number, 5) for number in range(3)]
    work = as_work(requests)
    assert as_work(work) is work and work.more
    assert work.take(2, 0) == {0: requests[0], 1: requests[1]}
    assert work.take(2, 0) == {2: requests[2]} and not work.more and work.take(2, 0) == {}
    assert list(Work({8: requests[0]}).take(1, 0)) == [8]
    assert size_of(requests[0], 40) == len(item.rollout.prompt.token_ids) + 40


@pytest.mark.parametrize("num_engines", [1, 3])
def test_every_request_is_made_once_whatever_the_sizes(num_engines):
    rng = np.random.default_rng(1)
    finished(rng.random(50), num_engines, sizes=rng.integers(1, 90, 50).tolist())
