"""Worker processes and the signals of their parents."""

import multiprocessing
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
        assert list(pool.imap(handlers, range(4))) == 4 * [usual]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signals(), worker_pool(1) as pool:
            assert list(pool.imap(handlers, [0]))[0][-1] == signal.SIG_IGN
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
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            list(pool.imap(abs, range(9)))


def nap(seconds):
    """Work that takes its time."""
    time.sleep(seconds)
    return bytes(2**20)


@pytest.mark.parametrize("jobs", [[30, 30], [0.1] + 400 * [30]])
def test_an_error_waits_for_nobody(jobs):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="elsewhere"):
        with worker_pool(2) as pool:
            if len(jobs) == 2:
                next(pool.imap_unordered(nap, [30, 0]))
            else:
                next(pool.imap(nap, jobs))
            raise RuntimeError("elsewhere")
    assert time.monotonic() - began < 20
    assert not multiprocessing.active_children()


def test_large_jobs_and_results():
    jobs = [bytes([number]) * 2**20 for number in range(20)]
    with worker_pool(2) as pool:
        assert list(pool.imap(bytes, jobs)) == jobs
    with pytest.raises(ValueError, match="of a job"):
        with worker_pool(2) as pool:
            list(pool.imap_unordered(refuse, jobs))


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_worker_that_is_killed_while_it_answers_is_not_waited_for(share):
    with pytest.raises(ChildProcessError, match="a worker process was killed"):
        with worker_pool(2) as pool:
            list(pool.imap(Half(share), range(9)))


class Half:
    """Work that is killed when a share of its answer is under way."""

    def __init__(self, share):
        self.share = share

    def __call__(self, number):
        if number == 4:
            plain = os.write

            def write(descriptor, data):
                plain(descriptor, data[: int(self.share * len(data))])
                os.kill(os.getpid(), signal.SIGKILL)

            multiprocessing.connection.Connection._write = write
            multiprocessing.connection.Connection._send.__defaults__ = (write,)
        return bytes(100)


def refuse(job):
    """A job that cannot be done."""
    raise ValueError("of a job")
