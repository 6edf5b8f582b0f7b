"""Writes the golden packed folders: python tests/data/make_golden.py

All values are whole multiples of powers of two, so that every machine has the
same ones, and follow from a formula, so that tests need no second copy.
tests/data/packed/1 and 2 were written by the first version that had their
format; what is written today must be the same bytes.
"""

from pathlib import Path

import torch

from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.codebook import has_zero, largest_level
from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import named_tensors, quantize_

FOLDER = Path(__file__).parent / "packed"
SETTINGS = {
    1: {"bits": (4, 2, 8, 1, 16, 3), "codebook": "midtread", "rows": None},
    2: {"bits": (4, 1.6, 2, 8, 5), "codebook": "midrise", "rows": 2},
}
SETTINGS[3] = SETTINGS[5] = SETTINGS[2]


def toy():
    """A separator of 700 weights, without weights worth having."""
    features = SpatialFeatures([(8, 1)], n_fft=16, hop=8)
    separator = Separator(features, 4, 6, 3, 1, 2).eval()
    fold_norms_(separator)
    return separator


def levels(count, bits, codebook, peaked=False):
    """Integers that run through a table, most of them small if peaked."""
    largest = largest_level(bits, codebook)
    steps = torch.arange(count) * 7 + 3
    if has_zero(bits, codebook):
        integers, small = steps % (2 * largest + 1) - largest, 0
    else:
        integers, small = 2 * (steps % (largest + 1)) - largest, 1
    often = (torch.arange(count) % 4 > 0) & peaked
    return torch.where(often, small, integers)


def golden(version):
    """The quantized toy of a format version."""
    settings = SETTINGS[version]
    codebook, rows = settings["codebook"], settings["rows"]
    model, exclude = toy(), ["mask_net.conv_*.bias"]
    for name, tensor in named_tensors(model).items():
        values = torch.arange(tensor.parameter.numel()) % 5 / 8 - len(name) / 4
        tensor.parameter.data.copy_(values.reshape(tensor.parameter.shape))
    options = {"exclude": exclude, "codebook": codebook, "rows": rows}
    uniform = quantize_(toy(), 4, **options)
    clusters = {
        name: ClusterBits(
            settings["bits"][i % len(settings["bits"])],
            cluster.parameters,
            cluster.tensors,
        )
        for i, (name, cluster) in enumerate(sorted(uniform.clusters.items()))
    }
    plan = BitPlan(clusters, uniform.rest_parameters, codebook)
    quantize_(model, plan, exclude=exclude)
    for i, tensor in enumerate(named_tensors(model).values()):
        if tensor.fake_quantize:
            bits, alpha = tensor.fake_quantize.stored_bits, 2.0 ** (-i % 7)
            count = tensor.weight.numel()
            integers = levels(count, bits, codebook, peaked=version == 5)
            tensor.weight.copy_(alpha * integers.reshape(tensor.weight.shape))
            tensor.fake_quantize.set_scale(torch.tensor(alpha))
    return model


def write(version, folder):
    """Write a packed folder of a format version."""
    if version < 3:
        return save_packed(golden(version), folder)
    from speechbrain_mpq.inference.folder import save_separator

    options = {"entropy_coded": True} if version == 5 else {}
    return save_separator(golden(version), folder, **options)


if __name__ == "__main__":
    import sys

    for number in map(int, sys.argv[1:] or SETTINGS):
        write(number, FOLDER / str(number))
