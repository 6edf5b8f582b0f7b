"""Worker processes and the signals of their parents."""

import os
import signal
import time

import pytest

from speechbrain_mpq.signals import ENDING, exit_on_signals, worker_pool


def handlers(_):
    """What signals do in a worker."""
    return [signal.getsignal(number) for number in ENDING]


def test_workers_do_not_have_the_handlers_of_their_parent():
    """Python's own may be kept waiting for ever, and the pool for them."""
    usual = handlers(0)
    with exit_on_signals(), worker_pool(2) as pool:
        assert handlers(0) != usual
        assert pool.map(handlers, range(4)) == 4 * [usual]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signals(), worker_pool(1) as pool:
            assert pool.map(handlers, [0])[0][-1] == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def kill_itself(number):
    """What the system does to a process that takes too much memory."""
    if number == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("way", ["imap", "imap_unordered"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_was_killed_is_not_waited_for(way, workers):
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="a worker process was killed"):
        with worker_pool(workers) as pool:
            list(getattr(pool, way)(kill_itself, range(9)))
    assert time.monotonic() - began < 60


def test_an_idle_worker_that_was_killed_keeps_no_lock():
    with pytest.raises(ChildProcessError, match="a worker process was killed"):
        with worker_pool(2) as pool:
            assert list(pool.imap(abs, [-1])) == [1]
            for worker in list(pool._pool):
                os.kill(worker.pid, signal.SIGKILL)
            list(pool.imap(abs, range(9)))
