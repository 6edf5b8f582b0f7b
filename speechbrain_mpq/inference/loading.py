"""Loading packed folders: build what they describe, then fill it.

There is one way for all of them. From a folder of a stranger nothing is
executed, and memory is reserved when the header is known to fit what it asks
for. SpeechBrain is not imported: that would take another second and 75 MiB.
"""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch

from ..lobes.models.audio_visual import begin_with_audio_
from ..lobes.models.separator import build_separator
from ..lobes.models.tcn import equalize_inputs_, fold_norms_
from ..quantization.container import PackedModelError
from ..quantization.packing import MODEL_FILE, load_packed_, read_model
from ..quantization.tensors import named_tensors
from ..quantization.unpacking import check_declared
from .registry import build, describe

HYPERPARAMS_FILE = "hyperparams.yaml"


def load(folder, trusted=False):
    """Load the model of a packed folder, in eval mode.

    Arguments
    ---------
    folder : str or Path
        Packed folder.
    trusted : bool
        False: `model.safetensors` alone is read, whose header says in JSON
        which registered class to build; nothing is executed, and the weights
        take no gradient. True: what `hyperparams.yaml` says is executed, as
        SpeechBrain does it, and the weights can be trained.

    Returns
    -------
    torch.nn.Module
        Its parameters are plain ones with the values that the stored integers
        stand for.

    Example
    -------
    >>> separator = load("pretrained/separator_mini")
    >>> sum(p.numel() for p in separator.parameters())
    930302
    """
    folder = Path(folder)
    with _plain_defaults():
        if trusted:
            separator = build_separator(_hyperparams(folder)).eval()
            return fill_(separator, read_model(folder))
        model, packed = read_described(folder)
        check_finite_floats(packed)
        _give_memory_(model)
        return fill_(model, packed).requires_grad_(False)


def load_separator(folder):
    """Load the separator of a trusted packed folder, in eval mode.

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
    return load(folder, trusted=True)


def fill_(model, packed):
    """Load the weights of a packed model into a module."""
    if not any(name.endswith("running_mean") for name in packed.floats):
        fold_norms_(model)
    return load_packed_(model, packed)


def read_described(folder):
    """Read a packed model, and build what its header describes.

    Names, types and shapes are held against what they are to fill before any
    weight is read: a file of few bytes may stand for very many weights.

    Arguments
    ---------
    folder : str or Path
        Packed folder.

    Returns
    -------
    model : torch.nn.Module
        Without memory for what the file fills.
    packed : PackedModel
        What is to fill it.
    """
    built = []

    def compatible(path, shapes, header, version):
        model = _build(path, header.get("architecture"), version)
        if not any(name.endswith("running_mean") for name in shapes):
            fold_norms_(model)
        check_declared(path, shapes, model)
        built.append(model)

    packed = read_model(folder, compatible)
    return built[0], packed


def check_finite_floats(packed):
    """Raise PackedModelError on NaN or infinity in floating-point weights."""
    for name, tensor in packed.floats.items():
        if not torch.isfinite(tensor).all():
            raise PackedModelError(
                packed.path, f"{name} holds NaN or infinity", "pack it again"
            )


def weights_file(folder):
    """Locate the weights to start from."""
    return Path(folder or "", MODEL_FILE)


def initial_separator(model_file, folder, full_precision=False, equalize=False):
    """Make the separator that an experiment starts from.

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
        audio = load(folder, trusted=True)
        if audio.lips_size is None:  # lips are yet to be learned
            begin_with_audio_(separator.mask_net, audio.mask_net)
            return separator
    fill_(separator, read_model(folder))
    fold_norms_(separator)
    if equalize:
        equalize_inputs_(separator)
    return separator


def check_describable(separator):
    """Raise ValueError where no packed folder could name the separator."""
    packed = copy.deepcopy(separator)
    fold_norms_(packed)
    describe(packed)


def _hyperparams(folder):
    """The YAML file of a folder."""
    path = folder / HYPERPARAMS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}: name a packed folder, such as packed/ of a finished "
            "run of train.py"
        )
    return path


def _build(path, architecture, version):
    """The module that a packed model asks for, without memory."""
    if architecture is None:
        raise PackedModelError(
            path,
            f"format {version} does not say what to build",
            "if you trust the folder, whose hyperparams.yaml is executed "
            'then, write it anew with speechbrain_mpq.repack("OLD", "NEW")',
        )
    try:
        return build(architecture, name=None)
    except ValueError as error:
        fix = "pack the model again"
        raise PackedModelError(path, str(error), fix) from error


def _give_memory_(model):
    """Room for the values of all tensors; tied ones stay tied."""
    tied = [t.owners for t in named_tensors(model).values() if t.aliases]
    # `to_empty` would do, but imports SymPy: a second and 60 MiB
    model._apply(_with_memory)
    for (module, attribute), *others in tied:
        for other, name in others:
            setattr(other, name, getattr(module, attribute))


def _with_memory(tensor):
    """A tensor that has room for values."""
    if not tensor.is_meta:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@contextmanager
def _plain_defaults():
    """Build on the CPU in float32, whatever a program has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
