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
    """The values of a packed model, by parameter name.

    Arguments
    ---------
    folder : str or Path
        Packed folder of a uniform system.

    Returns
    -------
    values : dict of str -> torch.Tensor
        Quantized parameters as float32, and what was left alone.
    """
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

    Arguments
    ---------
    model : torch.nn.Module
        Plain model, changed in place.
    plan : BitPlan
        Names the tensors of each cluster.
    prototypes : dict of int -> dict
        Bits -> values, as made by `load_prototype`.

    Example
    -------
    >>> from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
    >>> model = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU())
    >>> plan = BitPlan(
    ...     {
    ...         "0": ClusterBits(2, 1, ("0.weight",)),
    ...         "1": ClusterBits(4, 1, ("1.weight",)),
    ...     }
    ... )
    >>> two, four = torch.tensor([0.2]), torch.tensor([0.4])
    >>> inherit_(
    ...     model,
    ...     plan,
    ...     {
    ...         2: {"0.weight": two, "1.weight": two},
    ...         4: {"0.weight": four, "1.weight": four},
    ...     },
    ... )
    >>> round(model[0].weight.item(), 1), round(model[1].weight.item(), 1)
    (0.2, 0.4)
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
