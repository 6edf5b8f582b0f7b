"""What else a Brain holds: norms, searches and metrics beside its modules."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.metric_stats import MetricStats


def _parts(brain):
    """Modules of a Brain by name, those of its hyper-parameters included."""
    hparams = vars(getattr(brain, "hparams", None) or object).items()
    own = {n: v for n, v in hparams if isinstance(v, torch.nn.Module)}
    return {**own, **dict(brain.modules.named_modules())}


def unmeasured_norms(brain):
    """Names of global normalizations that have seen no batch."""
    found = {
        id(part): name
        for name, part in _parts(brain).items()
        if isinstance(part, InputNormalization)
        and part.norm_type == "global"
        and not part.count
    }
    return sorted(found.values())


def searchers_of(brain):
    """The searches of a Brain, whatever they search."""
    found = {
        id(part): part
        for part in _parts(brain).values()
        if _is_searcher(type(part))
    }
    return list(found.values())


@contextmanager
def without_metrics():
    """No score depends on SpeechBrain's metrics, some of which take long."""
    with ExitStack() as stack:
        for cls in _with_subclasses(MetricStats):
            if "append" in vars(cls):
                stack.enter_context(patch.object(cls, "append", _nothing))
        yield


def _nothing(*args, **kwargs):
    """In the place of a metric."""


def _with_subclasses(cls):
    """A class and all that inherit from it."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _is_searcher(cls):
    """Whether a class is one of SpeechBrain's searchers, or inherits."""
    return any(
        base.__module__.startswith("speechbrain.decoders")
        and base.__name__.endswith("Searcher")
        for base in cls.__mro__
    )
