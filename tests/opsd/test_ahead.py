"""Which weights write which answers, whoever is slow, and what a stopped run leaves."""

import threading
from types import SimpleNamespace

import pytest

from opsd.ahead import RolloutsAhead
from opsd.errors import StageError

NUM_STEPS, BATCH = 7, 4


class Driver:
    """The order of the driver's calls to engines that do as they are told, one thing after another."""

    def __init__(self, max_staleness, *, first_step=0, fails_in=None):
        self.calls, self.fails_in, self.may_go_on = [f"weights {first_step}"], fails_in, threading.Event()
        self.may_go_on.set()
        self.prompts = SimpleNamespace(position=first_step * BATCH, next_batch=self.next_batch)
        self.ahead = RolloutsAhead(
            self.prompts,
            self.sample,
            self.begin,
            samples_per_prompt=1,
            first_step=first_step,
            last_step=NUM_STEPS,
            max_staleness=max_staleness,
        )

    def next_batch(self):
        self.prompts.position += BATCH
        return self.prompts.position - BATCH

    def sample(self, prompts, *, samples_per_prompt, step):
        self.calls.append(f"answers {step}")
        assert prompts == step * BATCH
        return step

    def begin(self, groups):
        self.may_go_on.wait()
        if groups == self.fails_in:
            raise StageError(f"step {groups} is lost")
        return [f"scores {groups}"]

    def run(self, last_step):
        for step in range(self.calls and int(self.calls[0].split()[1]), last_step):
            assert self.ahead.take(step) == [f"scores {step}"]
            self.calls.append(f"weights {step + 1}")


def versions(calls):
    """The weights of each step's answers."""
    newest, found = None, {}
    for call in calls:
        what, number = call.split()
        if what == "weights":
            newest = int(number)
        else:
            found[int(number)] = newest
    return found


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 9])
@pytest.mark.parametrize("first_step", [0, 3])
def test_the_answers_of_a_step_are_of_the_weights_so_many_steps_before(max_staleness, first_step):
    driver = Driver(max_staleness, first_step=first_step)
    driver.run(NUM_STEPS)
    wanted = {step: max(first_step, step - max_staleness) for step in range(first_step, NUM_STEPS)}
    assert versions(driver.calls) == wanted
    assert driver.ahead.num_begun() == 0


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_resumed_run_begins_with_the_prompts_of_the_first_step_that_it_does(max_staleness):
    driver = Driver(max_staleness)
    driver.run(3)
    assert driver.ahead.num_begun() == max_staleness
    assert driver.ahead.position_before(3) == 3 * BATCH


def test_a_step_does_not_wait_for_the_answers_of_the_next_one():
    driver = Driver(1)
    driver.run(1)
    driver.ahead._begun[1].result()
    driver.may_go_on.clear()
    assert driver.ahead.take(1) == ["scores 1"] and driver.calls[-1] == "answers 2"
    driver.may_go_on.set()
    assert driver.ahead.take(2) == ["scores 2"]


def test_an_error_comes_out_in_the_step_whose_answers_it_costs():
    driver = Driver(2, fails_in=2)
    driver.run(2)
    with pytest.raises(StageError, match="^step 2 is lost$"):
        driver.ahead.take(2)


def test_closing_ends_the_engines_where_a_thread_waits_for_them():
    driver, ended = Driver(1), []
    driver.ahead.close(lambda: ended.append("not needed"))
    driver.ahead.take(0)
    driver.may_go_on.clear()
    driver.ahead._start(2)

    def end():
        ended.append("engines")
        driver.may_go_on.set()

    driver.ahead.close(end)
    assert ended == ["engines"] and not any(thread.is_alive() for thread in driver.ahead._threads)
