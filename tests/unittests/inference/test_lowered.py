"""A lowered network is the packed one: integers, scales, edges."""

import copy

import numpy as np
import pytest
import torch
from helpers import FORMS, mask_inputs, packed, small_separator

from speechbrain_mpq import quantize_, save_packed
from speechbrain_mpq.inference.engines.engine import load_network
from speechbrain_mpq.inference.engines.lowered import decibels, lower, run
from speechbrain_mpq.lobes.models.tcn import mask_network
from speechbrain_mpq.quantization.packing import read_packed


@pytest.mark.parametrize("scale_inputs", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_computes_what_the_separator_computes(form, scale_inputs, tmp_path):
    model = packed(tmp_path, form, scale_inputs)
    inputs = mask_inputs(batch=2)
    with torch.no_grad():
        wanted = model.mask_net(inputs)
        given = run(lower(tmp_path), inputs)
    assert decibels(wanted, given) > 100
    # At the edges, where the depthwise convolutions pad, as elsewhere.
    assert torch.allclose(wanted[..., :4], given[..., :4], atol=1e-4)
    assert torch.allclose(wanted[..., -4:], given[..., -4:], atol=1e-4)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "float"])
def test_levels_are_the_stored_integers(form, tmp_path):
    packed(tmp_path, form)
    quantized, _ = read_packed(tmp_path)
    for layer in lower(tmp_path).convolutions():
        pieces = [
            quantized[name]
            for name in sorted(
                (n for n in quantized if n.startswith(f"{layer.name}.weight")),
                key=lambda name: int(name.partition("[")[2].split(":")[0] or 0)
                if "[" in name
                else 0,
            )
        ]
        stored = torch.cat([piece.integers for piece in pieces]).numpy()
        assert np.array_equal(layer.levels, stored)
        fits = np.abs(stored).max() <= 127
        assert layer.levels.dtype == (np.int8 if fits else np.int16)
        assert fits or layer.bits > 8
        values = torch.cat([p.integers * p.alpha for p in pieces]).numpy()
        assert np.array_equal(layer.values(), values)


def test_by_entropy_few_bits_may_not_fit_int8(tmp_path):
    model = small_separator()
    model.mask_net.conv_in.weight.data[0, 0] = 40.0  # far from all others
    packed(tmp_path, "entropy_6", model=model)
    layers = lower(tmp_path)
    assert layers.conv_in.bits == 6 and layers.conv_in.levels.max() > 127
    assert layers.conv_in.levels.dtype == np.int16 and layers.conv_out.is_int8
    inputs = mask_inputs()
    assert decibels(model.mask_net(inputs), run(layers, inputs)) > 100


def test_slices_have_scales_of_their_own(tmp_path):
    packed(tmp_path, "slices")
    scale = lower(tmp_path).blocks[0].conv_in.scale
    assert len(np.unique(scale)) == 4  # 16 rows, at most 5 each


def test_torch_engine_is_bit_identical(tmp_path):
    model = packed(tmp_path, "midrise_2", scale_inputs=True)
    inputs = mask_inputs()
    network = load_network(tmp_path)
    assert torch.equal(network(inputs), model.mask_net(inputs))


def test_unfolded_norms_are_refused(tmp_path):
    model = torch.nn.Module()
    model.mask_net = mask_network(4, 4, 4, 4, blocks=1, layers=1)
    save_packed(model, tmp_path)
    with pytest.raises(ValueError, match="engines do not know.*torch"):
        lower(tmp_path)


def test_other_models_are_refused(tmp_path):
    save_packed(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="no tensor mask_net.*fold_norms_"):
        lower(tmp_path)


def test_a_slope_for_each_channel_is_refused(tmp_path):
    model = small_separator()
    model.mask_net.tcn_0_0.prelu_in = torch.nn.PReLU(16)
    quantize_(model, 4)
    save_packed(model, tmp_path)
    with pytest.raises(ValueError, match="16 slopes.*torch"):
        lower(tmp_path)


def test_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="engine must be one of"):
        load_network(tmp_path, "magic")


@pytest.mark.parametrize("name", ["tcn_0_100000000000", "tcn_0_16", "tcn_64_0"])
def test_numbers_in_names_are_checked(tmp_path, name):
    """The number of a layer is a power of two: what it asks for is much."""
    model = small_separator()
    model.mask_net.add_module(name, copy.deepcopy(model.mask_net.tcn_1_1))
    save_packed(model, tmp_path)
    with pytest.raises(ValueError, match="tensors that the engines do not"):
        lower(tmp_path)


def test_blocks_between_others_must_be_there(tmp_path):
    model = small_separator()
    model.mask_net.add_module("tcn_0_9", copy.deepcopy(model.mask_net.tcn_1_1))
    save_packed(model, tmp_path)
    with pytest.raises(ValueError, match="lacks ConvBlocks between"):
        lower(tmp_path)
