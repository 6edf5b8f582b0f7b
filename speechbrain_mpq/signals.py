"""Signals end a program as errors do, and its worker processes with it."""

import multiprocessing
import os
import pickle
import signal
import threading
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.pool import ExceptionWithTraceback

# What a system and a closed terminal send; Windows knows no SIGHUP
ENDING = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
ENDING = [getattr(signal, name) for name in ENDING]
_KILLED = (
    "a worker process was killed, maybe for want of memory: start again, with "
    "fewer workers"
)


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


class _Workers:
    """Processes with a pipe of their own each.

    The pools of Python's library share queues and their locks: a worker that
    is killed while it holds one of them keeps the others waiting for ever.
    """

    def __init__(self, count):
        fork = multiprocessing.get_context("fork")
        self.processes, self.busy = {}, {}
        for _ in range(count):
            here, there = fork.Pipe()
            # With no end of another's pipe, it ends when its parent does.
            others = [here, *self.processes]
            process = fork.Process(target=_work, args=[there, others])
            process.daemon = True
            process.start()
            there.close()
            self.processes[here] = process

    def imap(self, function, jobs):
        """Results in the order of the jobs, as they come."""
        early, following = {}, 0
        for number, result in self._results(function, jobs):
            early[number] = result
            while following in early:
                yield early.pop(following)
                following += 1

    def imap_unordered(self, function, jobs):
        """Results as they come."""
        for _, result in self._results(function, jobs):
            yield result

    def _results(self, function, jobs):
        """Number of a job, and its result."""
        free, jobs = list(self.processes), enumerate(jobs)
        while True:
            for connection, (number, job) in zip(list(free), jobs):
                self._send(connection, function, job)
                self.busy[connection] = number
                free.remove(connection)
            if not self.busy:
                return
            for connection in wait(list(self.busy)):
                done, result = self._receive(connection)
                free.append(connection)
                number = self.busy.pop(connection)
                if not done:
                    raise result
                yield number, result

    def _send(self, connection, function, job):
        """Hand a job to a worker."""
        try:
            connection.send((function, job))
        except OSError as error:
            raise ChildProcessError(_KILLED) from error

    def _receive(self, connection):
        """What came of a job: whether it is done, and its result or error."""
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ChildProcessError(_KILLED) from error
        return pickle.loads(data)

    def end(self):
        """End all, also those that are at work."""
        for connection, process in self.processes.items():
            connection.close()
            if connection in self.busy:
                process.terminate()
        for process in self.processes.values():
            process.join()


def _work(connection, others):
    """Do jobs until the pipe ends."""
    for number in ENDING:
        # A handler of Python's runs between two instructions, and never in a
        # worker that a signal meets on its way into a wait.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for other in others:
        other.close()
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            function, job = connection.recv()
            try:
                data = pickle.dumps((True, function(job)))
            except Exception as error:
                traced = ExceptionWithTraceback(error, error.__traceback__)
                data = pickle.dumps((False, traced))
            connection.send_bytes(data)


@contextmanager
def worker_pool(workers):
    """Makes worker processes that end with what they are needed for.

    They are forked, which knows what was imported and costs no time. An error
    or a signal in their parent ends them at once.

    Arguments
    ---------
    workers : int

    Yields
    ------
    pool : object
        Its ``imap`` and ``imap_unordered`` are those of
        ``multiprocessing.Pool``. A worker that was killed is a
        ChildProcessError.

    Example
    -------
    >>> with exit_on_signals(), worker_pool(2) as pool:
    ...     list(pool.imap(abs, [-1, 2]))
    [1, 2]
    """
    pool = _Workers(workers)
    try:
        yield pool
    finally:
        pool.end()
