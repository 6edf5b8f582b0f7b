"""What runs while a Brain evaluates a batch, and no score depends on.

Beam searches may take minutes and metrics seconds where a forward pass takes
milliseconds. So each search runs once for each batch, and metrics not at all.
Where a search is kept (an attribute of the Brain, an hparam, a variable of the
script) does not matter: SpeechBrain's classes themselves are asked.
"""

import sys
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import torch
from speechbrain.utils.metric_stats import MetricStats

DECODERS = "speechbrain.decoders."


@contextmanager
def searching_once(found):
    """Runs each of SpeechBrain's searches once inside, and remembers.

    Arguments
    ---------
    found : dict
        What the searches of a batch have found, filled where it is empty. A
        search that is called several times is another one each time.

    Example
    -------
    >>> from speechbrain.decoders.seq2seq import S2SGreedySearcher
    >>> class Search(S2SGreedySearcher):
    ...     def forward(self, encoded, lengths):
    ...         print("searches")
    ...         return [1, 2]
    >>> search, found = Search(1, 2, 0.0, 1.0), {}
    >>> for _ in range(2):
    ...     with searching_once(found):
    ...         print(search(None, None))
    searches
    [1, 2]
    [1, 2]
    """
    calls, running = {}, []
    with ExitStack() as stack:
        for kind in _searchers():
            once = _once(kind.__call__, found, calls, running)
            stack.enter_context(patch.object(kind, "__call__", once))
        yield


def _once(plain, found, calls, running):
    """A search that looks up what it has found already."""

    @wraps(plain)
    def search(self, *args, **kwargs):
        if running:  # a search of its own, or the class that it inherits from
            return plain(self, *args, **kwargs)
        count = calls[id(self)] = calls.get(id(self), 0) + 1
        key = id(self), count
        if key not in found:
            running.append(self)
            try:
                found[key] = plain(self, *args, **kwargs)
            finally:
                running.pop()
        return found[key]

    return search


def _searchers():
    """SpeechBrain's classes of searches that anybody has imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith(DECODERS):
            for kind in vars(module).values():
                is_searcher = (
                    isinstance(kind, type)
                    and kind.__module__ == name
                    and kind.__name__.endswith("Searcher")
                )
                if is_searcher:
                    yield kind


@contextmanager
def without_metrics():
    """No score depends on SpeechBrain's metrics, some of which take long."""
    with ExitStack() as stack:
        for cls in _with_subclasses(MetricStats):
            if "append" in vars(cls):
                stack.enter_context(patch.object(cls, "append", nothing))
        yield


def nothing(*args, **kwargs):
    """In the place of a metric, or of what must not happen yet."""


def _with_subclasses(cls):
    """A class and all that inherit from it."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


@contextmanager
def numpy_without_gradients():
    """Let metrics and searches take arrays of tensors that have gradients."""
    # A Brain evaluates without gradients and need not detach what it makes
    # NumPy arrays of. No loss depends on these: it would have no gradient.
    plain = torch.Tensor.numpy

    def numpy(tensor, **options):
        return plain(tensor.detach(), **options)

    with patch.object(torch.Tensor, "numpy", numpy):
        yield
