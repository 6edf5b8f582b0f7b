"""Estimation methods: how quantized weights are found, and what happens when.

A method is an object with hooks that a Brain's training calls: before it
starts, around each optimizer step, before and after validation, and at the
end. `attach` hangs them on any Brain; no Brain asks which method it has.
"""

import speechbrain as sb

from ..quantization.fake_quant import LogStep, check_keeps_scale

ROUNDED = (
    "calibrated rounding is for a plan that stays, and for estimators that "
    'begin at rounded weights: ask for rounding="nearest" (of an experiment, '
    "round_calibrated: False)"
)


class EstimationMethod:
    """What all methods have in common: they do nothing beyond training.

    The weights are those that the recipe's own optimizer finds through the
    fake quantizers; this is all that straight-through and learned steps need.

    Arguments
    ---------
    estimator : type
        Fake quantizer of each tensor, such as `LogStep`.

    Example
    -------
    >>> EstimationMethod(LogStep).trains
    True
    """

    recoverable = ""  # key of the method's own state in checkpoints
    keeps_plan = True  # whether bits stay what they are before training
    rounding = "calibrated"  # what training begins with, where it is not said
    candidate_bits = None  # those that it chooses from, where it chooses

    def __init__(self, estimator=LogStep):
        self.estimator = estimator
        self.stats = {}  # what the last validation left to be logged

    @property
    def trains(self):
        """Whether there is anything to train."""
        return getattr(self.estimator, "trains", True)

    def check(self, scheme, rounding, scorer):
        """Refuse what the method cannot do, before any work."""
        check_keeps_scale(self.estimator, scheme.codebook)

    def check_brain(self, brain):
        """Refuse a Brain that the method cannot train, before any work."""

    def check_tensors(self, tensors):
        """Refuse tensors that the method cannot estimate, before any work."""

    def prepare(self, brain):
        """Before the Brain makes its optimizers."""

    def start(self, brain, model):
        """When optimizers are there and a checkpoint is recovered."""

    def before_step(self, brain, batch):
        """Before the forward pass of a step."""

    def after_step(self, brain):
        """After a step of the optimizer."""

    def before_valid(self):
        """Before validation."""

    def validated(self, loss):
        """After validation; returns what is to be logged of it, a dict."""
        return {}

    def finish(self, model):
        """When the best checkpoint is recovered, before a model is packed."""


def attach(brain, method, model):
    """Have a Brain call the hooks of a method in its training."""
    if method.recoverable and brain.checkpointer:
        brain.checkpointer.add_recoverable(method.recoverable, method)

    def before_step(batch, should_step):
        method.before_step(brain, batch)

    def started():
        method.start(brain, model)
        for optimizer in _optimizers_of(brain, model):
            # Not on_fit_batch_end: recipes replace fit_batch.
            optimizer.register_step_post_hook(
                lambda *_: method.after_step(brain)
            )

    def before_stage(stage, epoch=None):
        if stage == sb.Stage.VALID:
            method.before_valid()

    def after_stage(stage, stage_loss, epoch=None):
        if stage == sb.Stage.VALID:
            method.stats = method.validated(stage_loss)

    def recovered(*args, **kwargs):
        method.finish(model)

    _hook(brain, "init_optimizers", before=lambda: method.prepare(brain))
    _hook(brain, "on_fit_start", after=started)
    _hook(brain, "on_fit_batch_start", before=before_step)
    _hook(brain, "on_stage_start", before=before_stage)
    _hook(brain, "on_stage_end", before=after_stage)
    _hook(brain, "on_evaluate_start", after=recovered)
    return method


def _hook(brain, name, before=None, after=None):
    """Call something before or after a method of a Brain."""
    plain = getattr(brain, name)

    def call(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        result = plain(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(brain, name, call)


def _optimizers_of(brain, model):
    """The Brain's optimizers that train weights of a model."""
    weights = {id(weight) for weight in model.parameters()}
    for optimizer in (brain.optimizers_dict or {}).values():
        groups = optimizer.param_groups
        if any(id(w) in weights for group in groups for w in group["params"]):
            yield optimizer
