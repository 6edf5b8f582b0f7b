"""Quantized weights that no loss reaches, found after the first step.

A quantizer that is made when a YAML is loaded sees no Brain and no optimizer.
So it listens to the steps of all optimizers, by torch's hook for these, until
it has seen one of its own; the hook goes when the answer is known, and with
the weights that it is about.
"""

import weakref

from speechbrain.utils.logger import get_logger
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..quantization.tensors import named_tensors

logger = get_logger(__name__)
UNREACHED = ("error", "ignore")
LISTED = 12  # patterns in a message


def check_unreached(unreached):
    """Refuses unknown ways with weights that have no gradient.

    Example
    -------
    >>> check_unreached("ignore")
    """
    if unreached not in UNREACHED:
        raise ValueError(
            f"unreached must be one of {UNREACHED}, not {unreached!r}"
        )


def listen_to_steps(owner, called):
    """Call a hook after all optimizers' steps, while an owner lives."""
    handle = register_optimizer_step_post_hook(called)
    weakref.finalize(owner, handle.remove)
    return handle


def watch_gradients(model):
    """Check after one step that every quantized weight had a gradient."""
    tensors = [t for t in named_tensors(model).values() if t.fake_quantize]
    watch = _Watch({tensor.name: tensor.parameter for tensor in tensors})
    steps = listen_to_steps(tensors[0].parameter, watch)

    def end(module, given):
        if watch.done:
            steps.remove()
            forwards.remove()

    forwards = tensors[0].fake_quantize.register_forward_pre_hook(end)
    return [steps, forwards]


class _Watch:
    """What has been seen of some quantized weights."""

    def __init__(self, weights):
        self.weights = {
            name: weakref.ref(weight) for name, weight in weights.items()
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
            raise ValueError(_message(unreached, weights))


def fewest_patterns(names, all_names):
    """Patterns that match some names, and none of the others.

    Example
    -------
    >>> others = ["net.cls", "net.out.weight"]
    >>> names = ["net.cls", "net.head.a.weight", "net.head.b.bias"]
    >>> fewest_patterns(names, others + names)
    ['net.cls', 'net.head.*']
    """
    others = set(all_names) - set(names)
    patterns = []
    for name in names:
        parts, pattern = name.split("."), name
        for depth in range(1, len(parts)):
            module = ".".join(parts[:depth]) + "."
            if not any(other.startswith(module) for other in others):
                pattern = f"{module}*"
                break
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns


def _message(names, all_names):
    """What is wrong, and the ways out."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    patterns = fewest_patterns(names, all_names)
    listed = ", ".join(f'"{pattern}"' for pattern in patterns[:LISTED])
    cut = ", ..." if patterns[LISTED:] else ""
    return (
        f"no loss reaches {', '.join(names[:3])}{more}, which the quantizer "
        f"covers: add exclude: [{listed}{cut}], take their modules out of its "
        'targets, or give it unreached: "ignore" where later steps reach them'
    )


def _warn_of_others(names):
    """Weights that no optimizer had by the second step of one."""
    if names:
        logger.warning(
            f"{len(names)} quantized tensors are trained by no optimizer yet, "
            f"{names[0]} first: they keep their values"
        )
