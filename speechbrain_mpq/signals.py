"""Signals end a program as errors do, and its worker processes with it."""

import multiprocessing
import multiprocessing.pool
import os
import signal
import threading
import time
from contextlib import contextmanager

# What a system and a closed terminal send; Windows knows no SIGHUP
ENDING = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
ENDING = [getattr(signal, name) for name in ENDING]
_LOOK = 1.0  # seconds without a result, before dead workers are looked for


@contextmanager
def exit_on_signals():
    """Let SIGTERM and SIGHUP end the program as an error would.

    Then temporary files are removed and locks are given back, as they are
    after Ctrl-C. The exit status is 128 and the signal's number.

    Example
    -------
    >>> import time
    >>> try:
    ...     with exit_on_signals():
    ...         os.kill(os.getpid(), signal.SIGTERM)
    ...         time.sleep(60)
    ... except SystemExit as ended:
    ...     print(ended.code)
    143
    """
    # Ignored signals stay ignored: `nohup` asks for that
    numbers = [n for n in ENDING if signal.getsignal(n) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may set handlers

    process = os.getpid()

    def end(number, frame):
        if os.getpid() != process:  # a worker, whose files are its parent's
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in numbers:  # once is enough: cleaning up takes a moment
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _Pool(multiprocessing.pool.Pool):
    """Processes; where one was killed, what it did is not waited for."""

    def __init__(self, workers):
        context = multiprocessing.get_context("fork")
        super().__init__(workers, _restore_signals, context=context)
        self._first = [worker.pid for worker in self._pool]

    def imap(self, function, jobs):
        """Results in order, as they come."""
        return self._watched(super().imap(function, jobs))

    def imap_unordered(self, function, jobs):
        """Results as they come."""
        return self._watched(super().imap_unordered(function, jobs))

    def _watched(self, results):
        """Results; ChildProcessError where none can be waited for."""
        while True:
            try:
                yield results.next(_LOOK)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                # They live as long as the pool, which replaces dead ones.
                if [worker.pid for worker in self._pool] != self._first:
                    raise ChildProcessError(
                        "a worker process was killed, maybe for want of "
                        "memory: start again, with fewer workers"
                    ) from None

    @staticmethod
    def _help_stuff_finish(inqueue, task_handler, size):
        """Empty the queue of jobs; a dead worker may have its lock."""
        inqueue._rlock.acquire(timeout=_LOOK)
        reader = inqueue._reader
        while task_handler.is_alive() and reader.poll():
            os.read(reader.fileno(), 2**16)  # it may have taken half a job
            time.sleep(0)


def worker_pool(workers):
    """Makes worker processes that end with their parent's signals.

    They are forked, which knows what was imported and costs no time. Handlers
    of signals come along; those of ``exit_on_signals`` run between two
    instructions of Python, and never in a worker that a signal meets on its
    way into a wait.

    Arguments
    ---------
    workers : int

    Returns
    -------
    multiprocessing.pool.Pool
        Its ``imap`` and ``imap_unordered`` fail where a worker was killed.

    Example
    -------
    >>> with exit_on_signals(), worker_pool(2) as pool:
    ...     list(pool.imap(abs, [-1, 2]))
    [1, 2]
    """
    return _Pool(workers)


def _restore_signals():
    """SIGTERM and SIGHUP end a worker, whatever its parent does then."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
