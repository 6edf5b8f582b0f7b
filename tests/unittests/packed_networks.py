"""Small packed separators in every stored form, for the tests of engines."""

import torch

from speechbrain_mpq import quantize_, save_packed
from speechbrain_mpq.separation.tcn import ChannelAffine, mask_network

INPUTS, OUTPUTS = 12, 10
FORMS = {
    "float": None,
    "midtread_4": {"plan_or_bits": 4},
    "midrise_2": {"plan_or_bits": 2, "codebook": "midrise"},
    "midrise_6": {"plan_or_bits": 6, "codebook": "midrise"},
    "ternary": {"plan_or_bits": 1.6},
    "one_bit": {"plan_or_bits": 1},
    "eight": {"plan_or_bits": 8},
    "twelve": {"plan_or_bits": 12},
    "sixteen": {"plan_or_bits": 16},
    "channels": {"plan_or_bits": 3, "granularity": "channel"},
    "slices": {"plan_or_bits": 4, "rows": 5, "codebook": "midrise"},
}


def small_separator(seed=0, scale_inputs=False):
    """A module with a `mask_net` of two blocks, norms folded and uneven."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.mask_net = mask_network(
        INPUTS,
        OUTPUTS,
        channels=8,
        hidden=16,
        blocks=2,
        layers=2,
        scale_inputs=scale_inputs,
    )
    for parent in list(model.mask_net.children()):
        for name in ("norm_in", "norm_out"):
            if hasattr(parent, name):
                affine = ChannelAffine(16)
                affine.weight.data.uniform_(0.5, 2.0)
                affine.bias.data.normal_(0.0, 0.5)
                setattr(parent, name, affine)
    if scale_inputs:
        model.mask_net.scale_in.weight.data[::2] = 8.0
    return model.eval().requires_grad_(False)


def packed(folder, form, scale_inputs=False, model=None):
    """Pack a small separator in one of the FORMS; the quantized module."""
    model = model or small_separator(scale_inputs=scale_inputs)
    if FORMS[form]:
        quantize_(model, **FORMS[form])
    save_packed(model, folder)
    return model


def features(batch=1, frames=40, seed=1):
    """What the mask network reads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, INPUTS, frames, generator=generator)
