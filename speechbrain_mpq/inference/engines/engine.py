"""What runs a packed separator's mask network: PyTorch, OpenVINO, ONNX.

Features, mask and inverse STFT stay in PyTorch; the network between them is
nearly all of the work and may run elsewhere. PyTorch is the reference and
needs nothing more.
"""

from importlib import import_module

import torch
import torch.nn as nn

from ...lobes.models.tcn import block_place, mask_network
from ...quantization.packing import read_model
from ..loading import fill_, load
from .activations import FIX, read_ranges
from .lowered import decibels, lower, rounding, run

ENGINES = ("torch", "openvino", "onnx")
MIN_DECIBELS = 10.0  # sound kernels give over 20, wrong ones under 5
MIN_EXACT = 3.0  # against the network without rounding; sound: over 7
CHECKED_FRAMES = 24


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


def load_network(folder, engine="torch", threads=1, separator=None):
    """Load the mask network of a packed separator into an engine.

    An engine is held against PyTorch before it is returned: on a processor
    whose kernels give other numbers, and with activation ranges that are not
    of these weights, it is refused.

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
    if separator is None and read_model(folder).architecture is not None:
        separator = load(folder)
    inputs = probe_inputs(network, separator)
    check_engine(engine, compiled, network, ranges, inputs)
    compiled.context_frames = network.context_frames  # for long files
    return compiled


def import_engine(engine):
    """Import the module of an engine other than PyTorch."""
    if engine not in ENGINES[1:]:
        raise ValueError(f"engine must be one of {ENGINES}, not {engine!r}")
    module = import_module(f".{engine}_engine", __package__)
    _require(*module.LIBRARIES)
    return module


def check_engine(name, compiled, network, ranges, inputs=None):
    """Refuse an engine that computes something else than it should.

    Arguments
    ---------
    inputs : torch.Tensor or None
        Features [1, inputs, frames]; None: noise.
    """
    inputs = probe_inputs(network, None) if inputs is None else inputs
    with torch.no_grad():
        exact = run(network, inputs)
        rounded = run(network, inputs, rounding(network, ranges))
    if not torch.isfinite(exact).all():
        raise ValueError(
            "the model puts out NaN or infinity: its weights are damaged or "
            "diverged; take another packed folder"
        )
    estimate = compiled(inputs)
    snr = decibels(rounded, estimate)
    # By ranges that are wrong both would be rounded alike
    if not snr > MIN_DECIBELS and decibels(exact, rounded) > MIN_EXACT:
        raise ValueError(
            f"{name} gives other numbers than PyTorch on this processor "
            f'({snr:.1f} dB): choose engine="torch", or another release of it'
        )
    snr = decibels(exact, estimate)
    if not snr > MIN_EXACT:
        raise ValueError(
            f"{name} with these activation ranges is {snr:.1f} dB from the "
            f"network without rounding: {FIX}, or choose "
            'engine="torch"'
        )


def probe_inputs(network, separator):
    """Make inputs to try an engine on: features of noise.

    Returns
    -------
    inputs : torch.Tensor
        [1, inputs, frames].
    """
    generator = torch.Generator().manual_seed(0)
    if separator is None or separator.lips_size is not None:
        shape = (1, network.inputs, CHECKED_FRAMES)
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    features = separator.features
    samples = features.hop * CHECKED_FRAMES + features.n_fft
    shape = (1, samples, len(features.microphones))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    doa = torch.tensor([90.0], dtype=torch.float32)
    with torch.no_grad():
        return separator.analyse(noise, doa)[0]


def torch_network(folder):
    """Load the mask network in PyTorch.

    Example
    -------
    >>> network = torch_network("pretrained/separator_mini")
    >>> network(torch.zeros(1, 3598, 5)).shape
    torch.Size([1, 514, 5])
    """
    packed = read_model(folder)
    if packed.architecture is not None:
        return load(folder).mask_net
    lowered = lower(folder)
    places = [block_place(block.name) for block in lowered.blocks]
    channels, inputs = lowered.conv_in.levels.shape[:2]
    hidden, _, kernel_size = lowered.blocks[0].d_conv.levels.shape
    model = nn.Module()
    model.mask_net = mask_network(
        inputs,
        lowered.outputs,
        channels,
        hidden,
        kernel_size,
        len({block for block, _ in places}),
        len({layer for _, layer in places}),
        scale_inputs=lowered.scale_in is not None,
    )
    fill_(model, packed)
    return model.mask_net.eval().requires_grad_(False)
