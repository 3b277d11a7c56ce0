"""A killed parent takes the processes that it started by multiprocessing with it."""

import multiprocessing
import os
import signal
import time

from opsd.engines.lifetime import end_with_parent


def wait(pipe):
    end_with_parent()
    pipe.send(os.getpid())
    time.sleep(600)


def start_child(pipe):
    context = multiprocessing.get_context("spawn")
    context.Process(target=wait, args=(pipe,)).start()
    time.sleep(600)


def test_a_child_ends_with_a_parent_that_was_killed():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    parent = context.Process(target=start_child, args=(sender,))
    parent.start()
    sender.close()
    child = receiver.recv()
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    try:
        assert receiver.poll(60), "the child runs on: its end of the pipe is still open"
    finally:
        os.kill(child, signal.SIGKILL) if os.path.exists(f"/proc/{child}") else None


def test_a_process_of_its_own_stays():
    end_with_parent()
