"""Worker processes and the signals of their parents."""

import signal

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
