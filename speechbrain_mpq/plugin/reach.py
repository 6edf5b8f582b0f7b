"""Finds quantized weights that training does not train.

Hangs on the hook that torch calls after the step of any optimizer.
"""

import weakref

from speechbrain.utils.logger import get_logger
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..quantization.tensors import named_tensors

logger = get_logger(__name__)


def watch_reach(model):
    """Checks after the first step that every quantized weight had a gradient.

    Weights that do not require a gradient are left alone. Those of a second
    optimizer are checked at its own first step.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model; it is not kept alive.

    Returns
    -------
    handle : torch.utils.hooks.RemovableHandle

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import quantize_
    >>> model = torch.nn.ModuleDict(
    ...     {"used": torch.nn.PReLU(), "idle": torch.nn.PReLU()}
    ... )
    >>> plan, handle = quantize_(model, 4), watch_reach(model)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model["used"](torch.tensor(-1.0)).backward()
    >>> optimizer.step()
    Traceback (most recent call last):
    ...
    ValueError: no loss reaches idle.weight, ...
    """
    return register_optimizer_step_post_hook(_Watch(model))


class _Watch:
    """What has been seen of the quantized weights of a model."""

    def __init__(self, model):
        self.weights = {
            name: weakref.ref(tensor.parameter)
            for name, tensor in named_tensors(model).items()
            if tensor.fake_quantize
        }
        self.seen = {}  # optimizer -> names of its weights
        self.done = False  # torch lets no hook remove itself

    def __call__(self, optimizer, *_):
        """After a step: look at those weights that the optimizer has."""
        if self.done:
            return
        weights = {name: weight() for name, weight in self.weights.items()}
        if None in weights.values():  # the model is gone
            self.done = True
            return
        trained = {n: w for n, w in weights.items() if w.requires_grad}
        groups = optimizer.param_groups
        held = {id(weight) for group in groups for weight in group["params"]}
        mine = {n: w for n, w in trained.items() if id(w) in held}
        if not mine:
            return
        second = id(optimizer) in self.seen
        self.seen.setdefault(id(optimizer), set(mine))
        left = set(trained).difference(*self.seen.values())
        unreached = [n for n, w in mine.items() if w.grad is None]
        self.done = bool(second or unreached or not left)
        if second:
            _warn_of_others(sorted(left))
        elif unreached:
            raise ValueError(_message(unreached))


def _message(names):
    """What is wrong, and the three ways out."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    module = names[0].rpartition(".")[0]
    return (
        f"no loss reaches {', '.join(names[:3])}{more}, which the quantizer "
        f"covers: take {module!r} out of its targets, add '{module}.*' to its "
        'exclude, or give it unreached: "ignore" where later steps reach it'
    )


def _warn_of_others(names):
    """Weights that no optimizer had by the second step of one."""
    if names:
        logger.warning(
            f"{len(names)} quantized tensors are trained by no optimizer yet, "
            f"{names[0]} first: they keep their values"
        )
