"""A Brain as its own `fit` has it before the first batch, then as it was.

A Brain's passes may need what its `on_fit_start` and `on_stage_start` set:
losses of the last epoch, a vocoder, metrics. Bits are chosen before `fit`, so
that these hooks are rehearsed: they run as they are, but nothing is compiled
or loaded, and afterwards the Brain has the attributes, the checkpointer and
the random state of before. The hooks run again when `fit` does.
"""

import random
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import speechbrain as sb

_TRAINS = (
    "{} trains in its on_stage_start, which would change the weights that bits "
    'are chosen for: use scores that look at weights only, such as "size", '
    'with rounding="nearest"'
)


class Rehearsal:
    """What a Brain's hooks set before its first batch.

    Arguments
    ---------
    brain : speechbrain.Brain
        Before `fit`.
    stage : speechbrain.Stage
        That it is told to start.

    Example
    -------
    >>> class Brain(sb.Brain):
    ...     def on_fit_start(self):
    ...         self.last_epoch = 0
    ...         super().on_fit_start()
    >>> brain = Brain()
    >>> rehearsal = Rehearsal(brain, sb.Stage.VALID)
    >>> with rehearsal.started():
    ...     brain.last_epoch
    0
    >>> hasattr(brain, "last_epoch")
    False
    """

    def __init__(self, brain, stage):
        self.brain = brain
        self.stage = stage
        self._set = None  # attributes that on_fit_start has set, once it ran
        self._trains = False  # whether on_stage_start(TRAIN) is needed, too

    @contextmanager
    def started(self):
        """The Brain between the start of a stage and its first batch."""
        with as_before(self.brain):
            self._start_fit()
            self._start_stage()
            yield

    def start_training(self):
        """Start a training stage before the other; False if it has been."""
        if self._trains:
            return False
        self._trains = True
        self._start_stage()
        return True

    def _start_stage(self):
        """What `fit` calls before the first batch of the stage."""
        if self._trains:
            with patch.object(self.brain, "fit", self._refuse_fit):
                self.brain.on_stage_start(sb.Stage.TRAIN, 1)
        self.brain.on_stage_start(self.stage, 1)
        self.brain.modules.eval()

    def _refuse_fit(self, *args, **kwargs):
        """In the place of `fit`."""
        raise ValueError(_TRAINS.format(type(self.brain).__name__))

    def _start_fit(self):
        """Run on_fit_start; later only set anew what it has set."""
        brain = self.brain
        hook = getattr(brain.on_fit_start, "__func__", None)
        if hook is sb.Brain.on_fit_start:
            return  # an optimizer is all that it would set
        if self._set is None:
            before = [dict(owner) for owner in _attributes(brain)]
            with _preparing_nothing(brain):
                brain.on_fit_start()
            self._set = [
                {k: v for k, v in owner.items() if old.get(k, owner) is not v}
                for owner, old in zip(_attributes(brain), before)
            ]
        for owner, new in zip(_attributes(brain), self._set):
            owner.update(new)


def _attributes(brain):
    """Where the hooks of a Brain set things: dicts of name to value."""
    owners = [brain]
    owners += [x for x in (getattr(brain, "hparams", None),) if x is not None]
    attributes = [vars(owner) for owner in owners]
    if brain.checkpointer is not None:
        own = vars(brain.checkpointer).values()
        attributes += [value for value in own if isinstance(value, dict)]
    return attributes


@contextmanager
def as_before(brain):
    """Attributes, recoverables, frozen weights, random states come back."""
    kept = [(owner, dict(owner)) for owner in _attributes(brain)]
    flags = [(p, p.requires_grad) for p in brain.modules.parameters()]
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for owner, values in kept:
            owner.clear()
            owner.update(values)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _preparing_nothing(brain):
    """Modules stay what they are, and no checkpoint is read or written."""
    with ExitStack() as stack:
        for name in ("_compile", "_wrap_distributed"):
            stack.enter_context(patch.object(brain, name, _nothing))
        if brain.checkpointer is not None:
            for name in (
                "recover_if_possible",
                "load_checkpoint",
                "save_checkpoint",
                "delete_checkpoints",
            ):
                stack.enter_context(
                    patch.object(brain.checkpointer, name, _nothing)
                )
        yield


def _nothing(*args, **kwargs):
    """In the place of what must not happen yet."""
