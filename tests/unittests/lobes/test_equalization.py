"""Columns of the first layer brought to one size."""

import pytest
import torch

from speechbrain_mpq.lobes.models.equalization import (
    equalize_inputs_,
    power_of_two_sizes,
)
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.quantization.quant_api import quantize_


def make_separator(**options):
    torch.manual_seed(0)
    size = {"channels": 8, "hidden": 8, "blocks": 1, "layers": 1}
    return Separator(SpatialFeatures(), **size, **options).eval()


def uneven_separator():
    """Its columns differ by up to a factor of 30."""
    separator = make_separator()
    conv = separator.mask_net.conv_in
    conv.weight.data *= torch.logspace(-1.5, 0, conv.in_channels)[:, None]
    return separator


def test_the_network_computes_the_same():
    separator = uneven_separator()
    inputs = torch.randn(2, separator.features.inputs, 4)
    before = separator.mask_net(inputs)
    equalize_inputs_(separator)
    # Powers of two change no digit of a product.
    assert torch.equal(separator.mask_net(inputs), before)


def test_columns_are_of_one_size_afterwards():
    separator = uneven_separator()
    equalize_inputs_(separator)
    rms = separator.mask_net.conv_in.weight.square().mean((0, 2)).sqrt()
    assert rms.max() / rms.min() <= 2


def test_8_bits_hold_the_factors():
    separator = uneven_separator()
    equalize_inputs_(separator)
    exact = separator.mask_net.scale_in.weight.detach().clone()
    assert set(exact.tolist()) <= {2.0**k for k in range(7)}
    quantize_(separator, 8, include=["mask_net.scale_in.weight"])
    kept = separator.mask_net.scale_in.weight
    torch.testing.assert_close(kept, exact, rtol=0.01, atol=0)


def test_two_bits_harm_less():
    inputs = torch.randn(2, SpatialFeatures().inputs, 4)
    errors = []
    for equalize in (False, True):
        separator = uneven_separator()
        reference = separator.mask_net(inputs)
        if equalize:
            equalize_inputs_(separator)
        quantize_(separator, 2, include=["mask_net.conv_in.weight"])
        error = (separator.mask_net(inputs) - reference).square().sum()
        errors.append(error.item())
    assert errors[1] < 0.8 * errors[0]


def test_dead_columns_get_the_least_factor():
    weight = torch.ones(4, 3, 1)
    weight[:, 1] = 0
    assert power_of_two_sizes(weight, octaves=3).tolist() == [8, 1, 8]


def test_the_separator_can_be_built_in_this_form():
    equalized = uneven_separator()
    equalize_inputs_(equalized)
    fresh = make_separator(scale_inputs=True)
    fresh.load_state_dict(equalized.state_dict())
    mixture, doa = torch.randn(1, 8000, 7), torch.tensor([40.0])
    assert torch.equal(fresh(mixture, doa), equalized(mixture, doa))


def test_equalizing_twice_is_refused():
    separator = make_separator(scale_inputs=True)
    with pytest.raises(ValueError, match="scales its inputs already"):
        equalize_inputs_(separator)
