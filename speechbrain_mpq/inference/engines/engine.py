"""Libraries that are not installed with the package.

Choosing what runs a packed separator's mask network.

Features, mask and inverse STFT stay in PyTorch; the network between them is
nearly all of the work and may run elsewhere. PyTorch is the reference and
needs nothing more.
"""

from importlib import import_module

import torch
import torch.nn as nn

from ...lobes.models.tcn import fold_norms_, mask_network
from ...quantization.packing import load_packed_
from .activations import read_ranges
from .lowered import lower
from .reference import decibels, rounding, run


class MissingExtra:
    """Stands for a library that is not there; its use says how to get it.

    Arguments
    ---------
    message : str
        What needs it, and the pip command.

    Example
    -------
    >>> MissingExtra("pip install openvino").Core()
    Traceback (most recent call last):
    ...
    ImportError: pip install openvino
    """

    def __init__(self, message):
        self.message = message

    def __getattr__(self, name):
        """Refuse, but to tools that look at what every object has."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(self.message)


def _require(*libraries):
    """Refuse to begin where a library is missing."""
    for library in libraries:
        if isinstance(library, MissingExtra):
            raise ImportError(library.message)


ENGINES = ("torch", "openvino", "onnx")
MIN_DECIBELS = 10.0  # sound kernels give over 20, wrong ones under 5
CHECKED_FRAMES = 24


def load_network(folder, engine="torch", threads=1):
    """The mask network of a packed separator, ready to run.

    An engine is held against PyTorch on a few frames before it is returned:
    on a processor whose kernels give other numbers it is refused.

    Returns
    -------
    network : callable
        Maps float32 features [batch, inputs, frames] to the mask
        [batch, 2 * bins, frames].
    """
    if engine == "torch":
        return torch_network(folder)
    module = import_engine(engine)
    network = lower(folder)
    int8 = any(layer.is_int8 for layer in network.convolutions())
    ranges = read_ranges(folder, network) if int8 else {}
    compiled = module.compiled(network, ranges, threads)
    check_engine(engine, compiled, network, ranges)
    compiled.context_frames = network.context_frames  # for long files
    return compiled


def import_engine(engine):
    """The module of an engine other than PyTorch."""
    if engine not in ENGINES[1:]:
        raise ValueError(f"engine must be one of {ENGINES}, not {engine!r}")
    module = import_module(f".{engine}_engine", __package__)
    _require(*module.LIBRARIES)
    return module


def check_engine(name, compiled, network, ranges):
    """Refuse an engine that computes something else than it should."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, network.inputs, CHECKED_FRAMES)
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():
        wanted = run(network, inputs, rounding(network, ranges))
    snr = decibels(wanted, compiled(inputs))
    if not snr > MIN_DECIBELS:
        raise ValueError(
            f"{name} gives other numbers than PyTorch on this processor "
            f'({snr:.1f} dB): choose engine="torch", or another release of it'
        )


def torch_network(folder):
    """The mask network in PyTorch, in the architecture its tensors tell.

    Example
    -------
    >>> network = torch_network("pretrained/separator_mini")
    >>> network(torch.zeros(1, 3598, 5)).shape
    torch.Size([1, 514, 5])
    """
    lowered = lower(folder)
    blocks = {block.name.split("_")[1] for block in lowered.blocks}
    channels, inputs = lowered.conv_in.levels.shape[:2]
    hidden, _, kernel_size = lowered.blocks[0].d_conv.levels.shape
    model = nn.Module()
    model.mask_net = mask_network(
        inputs,
        lowered.outputs,
        channels,
        hidden,
        kernel_size,
        len(blocks),
        len(lowered.blocks) // len(blocks),
        scale_inputs=lowered.scale_in is not None,
    )
    fold_norms_(model)
    load_packed_(model, folder)
    return model.mask_net.eval().requires_grad_(False)
