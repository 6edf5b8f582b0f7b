"""Packed files of a toy model, whole or forged, for the tests of readers."""

import pytest
import torch

from speechbrain_mpq.quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)
from speechbrain_mpq.quantization.packing import read_model, save_packed
from speechbrain_mpq.quantization.quantizer import quantize_


def refused(path, match):
    """Reading fails with a message that names the file."""
    with pytest.raises(PackedModelError, match=match) as caught:
        read_model(path)
    assert str(path) in str(caught.value)


def forge(path, change):
    """A toy model with a changed configuration and a checksum that fits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    quantize_(model, 4, exclude=["1.bias"])
    file = save_packed(model, path.parent, architecture={"class": "Toy"})
    container = read_container(file)
    tensors, config = dict(container.tensors), container.config
    change(config, tensors)
    write_container(path, tensors, config, "3")
    return model
