"""Loading a packed separator from its one file, without SpeechBrain.

The command line and the demo need no more than this; importing SpeechBrain
would take them another second and 75 MiB.
"""

import torch
import torch.nn as nn

from ..engines.loading import load_network
from ..quantization.container import PackedModelError
from ..quantization.unpacking import (
    MODEL_FILE,
    check_fit,
    load_packed_,
    plain_targets,
    read_model,
)
from .hub import fetch_folder
from .interface import SeparationInterface
from .registry import build
from .windows import context_frames


class LightSeparator(SeparationInterface):
    """A packed separator that is run and nothing else.

    Arguments
    ---------
    source : str or Path
        Packed folder, or "user/name" on the hub.
    engine : str
        "torch", "openvino" or "onnx": what runs the network.
    threads : int
        Threads of the engine.
    device : str
        Of PyTorch; other engines run on the CPU.

    Example
    -------
    >>> from speechbrain_mpq.inference.folder import repack
    >>> folder = repack("pretrained/separator_mini", getfixture("tmpdir"))
    >>> LightSeparator(folder).microphones
    [1, 4, 6, 8, 10, 12, 15]
    """

    def __init__(self, source, engine="torch", threads=1, device="cpu"):
        folder = fetch_folder(source)
        self.device = device
        self.model_file = folder / MODEL_FILE
        separator = load_for_engine(folder, engine, threads, device)
        self.separator = separator.to(device)


def load_for_engine(folder, engine="torch", threads=1, device="cpu"):
    """The separator of a packed folder, its network in an engine.

    Arguments
    ---------
    folder : Path
        Of format 3.
    engine : str
        "torch", "openvino" or "onnx".
    threads : int
        Threads of the engine.
    device : str
        Where it shall run; only checked here.

    Returns
    -------
    Separator
        In eval mode, on the CPU.
    """
    if engine != "torch" and torch.device(device).type != "cpu":
        raise ValueError(
            f'the engine "{engine}" runs on the CPU: leave device out, '
            'or choose engine="torch"'
        )
    separator = load_checked(folder)
    if engine != "torch":
        network = load_network(folder, engine, threads)
        context = context_frames(separator.mask_net)
        separator.mask_net = EngineNetwork(network, context)
    return separator


class EngineNetwork(nn.Module):
    """A mask network that is run by an engine.

    Arguments
    ---------
    network : callable
        From `engines.load_network`.
    context_frames : int
        Frames to either side that an output frame depends on.
    """

    def __init__(self, network, context_frames):
        super().__init__()
        self.network = network
        self.context_frames = context_frames

    def forward(self, inputs):
        """Map [batch, inputs, frames] to [batch, 2 * bins, frames]."""
        return self.network(inputs)


def load_checked(folder):
    """The separator of a packed folder, from model.safetensors alone.

    Arguments
    ---------
    folder : str or Path
        Of format 3.

    Returns
    -------
    Separator
        In eval mode, with plain weights.
    """
    packed = read_model(folder)
    if packed.architecture is None:
        raise PackedModelError(
            packed.path,
            f"format {packed.version} does not say what to build",
            "if you trust the folder, whose hyperparams.yaml is executed "
            'then, write it anew with speechbrain_mpq.repack("OLD", "NEW")',
        )
    try:
        separator = build(packed.architecture)
    except ValueError as error:
        raise PackedModelError(
            packed.path, str(error), "pack the model again"
        ) from error
    check_fit(packed, plain_targets(separator))
    broken = [n for n, t in packed.floats.items() if not _is_finite(t)]
    if broken:
        raise PackedModelError(
            packed.path, f"{broken[0]} holds NaN or infinity", "pack it again"
        )
    # `to_empty` would do, but imports SymPy: a second and 60 MiB
    separator.mask_net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
    return load_packed_(separator, packed).requires_grad_(False)


def _is_finite(tensor):
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())
