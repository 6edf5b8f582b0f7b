"""HQQ on the linear form, up to 64 weights with a scale and a zero point.

Its packing wants the number of groups to be a multiple of four at 2 bits: the
first layer has groups of 56, the last of 48. Scales and zero points are in
float16, HQQ's own default; three bits are packed ten to an int32.
"""

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from linear_form import to_linear_
from safetensors.torch import save_file
from stored import System, fill_, safetensors_bytes

POST_TRAINING = True
PACKAGES = ("hqq",)
LEAVES = "depthwise convolutions, norms, PReLUs, biases"
LARGEST_GROUP = 64
SETTINGS = {f"{bits} bit": {"bits": bits} for bits in (2, 3, 4, 8)}


def group_size(count):
    """The largest group that HQQ takes for a number of weights.

    Arguments
    ---------
    count : int
        Weights of a layer.

    Returns
    -------
    int

    Example
    -------
    >>> group_size(192 * 96), group_size(96 * 514)
    (64, 48)
    """
    sizes = range(LARGEST_GROUP, 0, -8)
    return next(size for size in sizes if count % (4 * size) == 0)


def build(bench, bits):
    """Quantize every linear layer, save its tensors, dequantize."""
    separator = bench.separator()
    plain, linear = separator.mask_net, bench.separator().mask_net
    tensors, values = dict(plain.state_dict()), {}
    for name in to_linear_(linear):
        plain_layer = linear.get_submodule(name)
        group = group_size(plain_layer.weight.numel())
        layer = HQQLinear(
            plain_layer,
            BaseQuantizeConfig(nbits=bits, group_size=group, axis=1),
            compute_dtype=torch.float16,
            device="cpu",
        )
        values[f"{name}.weight"] = layer.dequantize().float()
        del tensors[f"{name}.weight"]
        tensors[f"{name}.W_q"] = layer.W_q.data
        for key in ("scale", "zero"):
            tensors[f"{name}.{key}"] = layer.meta[key]
    path = bench.work / "hqq.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    fill_(plain, values)
    size = path.stat().st_size
    return System(separator, safetensors_bytes(path), size, "safetensors")
