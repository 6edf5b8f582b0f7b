"""Uniform prototypes: trained models of one bit width, to start others from.

A mixed-precision system inherits every cluster from the prototype that has the
cluster's bits, and is fine-tuned from there.
"""

from pathlib import Path

import torch

from ..quantization.codebook import dequantize
from ..quantization.packing import read_packed
from ..quantization.tensors import named_tensors


def load_prototype(folder):
    """The values of a packed model, by parameter name."""
    if not Path(folder, "model.safetensors").exists():
        raise FileNotFoundError(
            f"no prototype in {folder}: make it with `python train.py "
            "hparams/uniform_4bit.yaml --bits N` or name another"
        )
    quantized, floats = read_packed(folder)
    values = {
        name: dequantize(packed.integers, packed.alpha)
        for name, packed in quantized.items()
    }
    return {**floats, **values}


def inherit_(model, plan, prototypes):
    """Give a plain model the prototypes' weights, cluster by cluster.

    What the plan leaves in full precision comes from the prototype that most
    parameters come from.
    """
    used = {cluster.bits for cluster in plan.clusters.values()}
    missing = sorted(used - set(prototypes))
    if missing:
        raise ValueError(
            f"the plan uses {missing} bits and there are prototypes of "
            f"{sorted(prototypes)} only: make the others, or choose among "
            "these as candidate_bits"
        )
    count = dict.fromkeys(used, 0)
    source = {}
    for cluster in plan.clusters.values():
        count[cluster.bits] += cluster.parameters
        source.update(dict.fromkeys(cluster.tensors, cluster.bits))
    most = max(count, key=count.get)
    tensors = named_tensors(model)
    for bits in used:
        _check_architecture(prototypes[bits], tensors, bits)
    with torch.no_grad():
        for name, tensor in tensors.items():
            values = prototypes[source.get(name, most)][name]
            tensor.parameter.copy_(values)


def _check_architecture(values, tensors, bits):
    """Raise ValueError unless a prototype has the model's parameters."""
    for name, tensor in tensors.items():
        found = tuple(values[name].shape) if name in values else "nothing"
        wanted = tuple(tensor.parameter.shape)
        if found != wanted:
            raise ValueError(
                f"the {bits}-bit prototype is of another architecture: "
                f"{name} is {found}, the model's {wanted}; make prototypes "
                "of this model"
            )
