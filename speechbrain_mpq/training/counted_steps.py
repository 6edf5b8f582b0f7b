"""Which steps of sequences a Brain's loss depends on: all but padding.

What is behind the end of a shorter sequence in a batch goes through a network
as the rest does. Where no lengths tell it, the gradient of the loss does: it
is zero there. A step of a recurrent layer counts where the loss depends on it,
or on a later one, which remembers it.
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn as nn
from speechbrain.utils.logger import get_logger
from torch.nn.utils.rnn import PackedSequence

from .recurrent_rounding import items_of

logger = get_logger(__name__)


def counted_steps(calibration, layers, index):
    """Find the steps that count, for each use of some layers in a pass.

    Arguments
    ---------
    calibration : Calibration
        In its `ready` context.
    layers : dict
        Name -> linear or recurrent layer of the calibration's model.
    index : int
        Of the pass.

    Returns
    -------
    dict or None
        Name -> for each use whether a step counts, a tensor [steps] for each
        item; None where there is no loss to ask.
    """
    uses = defaultdict(list)  # name -> outputs, and what was added to them

    def add(name, layer, args, kwargs, output):
        zeros = []
        uses[name].append((output, zeros))
        return _plus_zeros(output, zeros)

    # cuDNN's recurrent layers have no backward pass in eval mode.
    cudnn = torch.backends.cudnn.flags(enabled=False)
    with ExitStack() as hooks, torch.enable_grad(), cudnn:
        for name, layer in layers.items():
            hook = partial(add, name)
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        try:
            loss = calibration.loss(index)
            if loss is None or not loss.requires_grad:
                return None
            zeros = [z for rows in uses.values() for _, r in rows for z in r]
            found = torch.autograd.grad(loss.sum(), zeros, allow_unused=True)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            reason = str(error) or "the Brain has no compute_objectives"
            logger.warning(f"Padding is rounded for as well: {reason}")
            return None
    gradients = (z if g is None else g for g, z in zip(found, zeros))
    return {
        name: [
            _counted(layers[name], output, [next(gradients) for _ in row])
            for output, row in rows
        ]
        for name, rows in uses.items()
    }


def _plus_zeros(value, zeros):
    """An output plus zeros, which have the gradients of the output."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_plus_zeros(value.data, zeros))
    if isinstance(value, tuple):
        return tuple(_plus_zeros(part, zeros) for part in value)
    zeros.append(torch.zeros_like(value, requires_grad=True))
    return value + zeros[-1]


def _counted(layer, output, gradients):
    """Steps of each item that count, by the gradients of a use's outputs."""
    gradients = [gradient.detach() for gradient in gradients]
    if isinstance(layer, nn.Linear):
        return list(gradients[0].any(-1))
    if isinstance(layer, nn.RNNCellBase):  # h, and of an LSTM c
        steps = sum(gradient.abs() for gradient in gradients)
        return [item.any(-1) for item in items_of(layer, steps)]
    output, (found, *states) = output[0], gradients
    if isinstance(output, PackedSequence):
        found = output._replace(data=found)
    counted = []
    for number, item in enumerate(items_of(layer, found)):
        steps = item.any(-1)
        last = [s.reshape(len(s), -1, s.shape[-1])[:, number] for s in states]
        if layer.bidirectional:
            last.append(steps)
        whole = torch.stack([part.any() for part in last]).any()
        # What comes before a step that counts has gone into its memory.
        before = steps.int().flip(0).cummax(0).values.flip(0).bool()
        counted.append(before | whole)
    return counted
