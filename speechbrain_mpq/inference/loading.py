"""Building a separator from its YAML file.

Loading a packed separator as a plain module.

Loading a packed separator from its one file, without SpeechBrain.

The command line and the demo need no more than this; importing SpeechBrain
would take them another second and 75 MiB.

The separator that an experiment begins with.
"""

import copy
from pathlib import Path

import torch
import torch.nn as nn

from ..lobes.models.audio_visual import begin_with_audio_
from ..lobes.models.equalization import equalize_inputs_
from ..lobes.models.separator import build_separator
from ..lobes.models.tcn import fold_norms_
from ..quantization.container import PackedModelError
from ..quantization.packing import (
    MODEL_FILE,
    check_compatible,
    load_packed_,
    plain_targets,
    read_model,
)
from .engines.engine import load_network
from .hub import fetch_folder
from .interfaces import SeparationInterface
from .registry import build, describe
from .streaming import context_frames


def load_separator(folder):
    """The separator of a packed folder, in eval mode.

    Its weights are plain parameters with the values that the file's integers
    stand for: it can be run, trained on or quantized again. What
    hyperparams.yaml says is executed: do this with folders that you trust.
    `QuantizedSeparator.from_pretrained` executes nothing.

    Arguments
    ---------
    folder : str or Path
        With model.safetensors and the hyperparams.yaml that builds it.

    Returns
    -------
    separator : Separator

    Example
    -------
    >>> separator = load_separator("pretrained/separator_mini")
    >>> sum(p.numel() for p in separator.parameters())
    930302
    """
    path = Path(folder) / "hyperparams.yaml"
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}: name a packed folder, such as packed/ of a finished "
            "run of train.py"
        )
    separator = build_separator(path).eval()
    fold_norms_(separator)  # packed separators have none left
    return load_packed_(separator, folder)


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
    """The separator of a packed folder, its network in an engine."""
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
    """The separator of a packed folder, from model.safetensors alone."""
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
    check_compatible(packed, plain_targets(separator))
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


def weights_file(folder):
    """Where the weights to start from are."""
    return Path(folder or "", "model.safetensors")


def initial_separator(model_file, folder, full_precision=False, equalize=False):
    """A new separator, or a trained one, ready for an experiment.

    A trained one has its norms folded. In full precision a separator with a
    lip stream may start from one without: its lip stream is new then.
    """
    separator = build_separator(model_file)
    if folder is None:
        if not full_precision:
            raise ValueError(
                "quantization starts from a trained separator: name its "
                "packed folder with --pretrained_separator"
            )
        return separator
    if not weights_file(folder).exists():
        raise FileNotFoundError(
            f"no {weights_file(folder)}: make full-precision weights with "
            "`python train.py hparams/pretrain.yaml` (or grow them, see "
            "recipes/Embedded/growth) and copy the packed/ folder there, or "
            "name another with --pretrained_separator"
        )
    if full_precision and separator.lips_size:
        audio = build_separator(Path(folder, "hyperparams.yaml"))
        if audio.lips_size is None:  # lips are yet to be learned
            fold_norms_(audio)
            load_packed_(audio, folder)
            begin_with_audio_(separator.mask_net, audio.mask_net)
            return separator
    fold_norms_(separator)
    load_packed_(separator, folder)
    if equalize:
        equalize_inputs_(separator)
    return separator


def check_describable(separator):
    """Raise ValueError where no packed folder could name the separator."""
    packed = copy.deepcopy(separator)
    fold_norms_(packed)
    describe(packed)
