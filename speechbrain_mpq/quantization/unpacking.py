"""Packed models, read: every check comes before what it protects."""

from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import torch

from .codebook import dequantize
from .container import PackedModelError, read_container
from .fit import check_fit
from .pools import unpool
from .row_groups import first_row, split_name
from .tensors import named_tensors, plain_buffers

MODEL_FILE = "model.safetensors"
# What the header of each format version holds.
KEYS = {
    **dict.fromkeys(("1", "2"), {"granularity", "tensors"}),
    "3": {"granularity", "shapes", "bits", "architecture"},
}
OPTIONAL = {"codebook"}
# What a header can raise that was written by a stranger.
_INCONSISTENT = (
    *(AttributeError, KeyError, TypeError, ValueError, IndexError),
    *(OverflowError, RecursionError, RuntimeError),
)


@dataclass(frozen=True)
class PackedModel:
    """A packed model as it is in the file, verified.

    Arguments
    ---------
    path : Path
        The file.
    quantized : dict of str -> PackedTensor
        What was quantized, by the name of the parameter or slice.
    floats : dict of str -> torch.Tensor
        What was not.
    header : dict
        Granularity, codebook, architecture, and what describes the tensors.
    version : int
        Version of the format.
    content : bytes
        The whole file.
    """

    path: Path
    quantized: dict
    floats: dict
    header: dict
    version: int
    content: bytes = field(repr=False)

    @property
    def architecture(self):
        """What the model was saved with as its architecture, or None."""
        return self.header.get("architecture")

    def values(self, targets):
        """Float values of every tensor, in the types that a model has.

        Arguments
        ---------
        targets : dict of str -> torch.Tensor
            The model's tensors by name.

        Returns
        -------
        dict of str -> torch.Tensor
        """
        return {**self.floats, **_dequantized(self.quantized, targets)}


def read_model(path):
    """Reads and checks a packed model, without any model.

    Arguments
    ---------
    path : str or Path
        Folder that ``save_packed`` wrote, or its model.safetensors.

    Returns
    -------
    PackedModel
    """
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    container = read_container(path)
    header = container.config
    try:
        if not isinstance(header, dict):
            raise TypeError("mpq_config is no JSON object")
        if not set(header) - OPTIONAL == KEYS[container.version]:
            raise ValueError(f"not what format {container.version} has")
        quantized, floats = unpool(container.tensors, header)
    except _INCONSISTENT as error:
        raise PackedModelError(
            path, f"inconsistent ({error!r})", "pack the model again"
        ) from error
    version = int(container.version)
    return PackedModel(
        path, quantized, floats, header, version, container.content
    )


def read_packed(folder):
    """Reads and checks the tensors of a packed model.

    Arguments
    ---------
    folder : str or Path
        Folder that ``save_packed`` wrote, or its model.safetensors.

    Returns
    -------
    quantized : dict of str -> PackedTensor
        What was quantized, by the name of the parameter or slice.
    floats : dict of str -> torch.Tensor
        What was not.
    """
    packed = read_model(folder)
    return packed.quantized, packed.floats


def load_packed_(model, folder):
    """Loads a packed model into a plain model of the same architecture.

    The parameters become plain tensors that hold the dequantized values, so
    that the forward is bit-identical to the quantized model's. Everything is
    checked before the model is touched.

    Arguments
    ---------
    model : torch.nn.Module
        Model without quantized parameters.
    folder : str or Path or PackedModel
        Folder that ``save_packed`` wrote, its model.safetensors, or what
        ``read_model`` read of it. As a custom hook of SpeechBrain's
        Pretrainer it gets the file.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    targets = plain_targets(model)
    is_read = isinstance(folder, PackedModel)
    packed = folder if is_read else read_model(folder)
    check_fit(packed, targets)
    values = packed.values(targets)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    return model


def stored_buffers(model):
    """The persistent buffers of a model, without those of its quantizers.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.

    Returns
    -------
    dict of str -> torch.Tensor
    """
    stored = model.state_dict()
    extra = [name for name in stored if name.endswith("_extra_state")]
    if extra:
        raise ValueError(f"{extra[0]}: packed models hold tensors only")
    buffers = plain_buffers(model)
    return {name: b for name, b in buffers.items() if name in stored}


def plain_targets(model):
    """What a packed file must fill.

    Arguments
    ---------
    model : torch.nn.Module
        Without quantized parameters.

    Returns
    -------
    dict of str -> torch.Tensor
        Parameters and persistent buffers by name.
    """
    tensors = named_tensors(model)
    if any(tensor.fake_quantize for tensor in tensors.values()):
        raise ValueError(
            "packed models load into plain models and this one is quantized: "
            "call dequantize_(model) first"
        )
    targets = {name: tensor.parameter for name, tensor in tensors.items()}
    return {**targets, **stored_buffers(model)}


def _dequantized(quantized, targets):
    """Parameter name -> float values in the type that the model has."""
    pieces = defaultdict(list)
    for name, tensor in quantized.items():
        parameter, rows = split_name(name)
        value, target = tensor.integers, targets.get(parameter, tensor.alpha)
        if target.is_floating_point():
            value = dequantize(value, tensor.alpha, target.dtype)
        pieces[parameter].append((first_row(rows), value))
    values = {}
    for name, slices in pieces.items():
        ordered = [value for _, value in sorted(slices, key=itemgetter(0))]
        values[name] = torch.cat(ordered) if len(ordered) > 1 else ordered[0]
    return values
