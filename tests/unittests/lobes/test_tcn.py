"""The TCN: structure, published sizes, folding, equalized inputs."""

import pytest
import torch

from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import (
    ConvBlock,
    equalize_inputs_,
    fold_norms_,
    mask_network,
    power_of_two_sizes,
)
from speechbrain_mpq.quantization.quant_api import quantize_

MIB = 2**20


@pytest.fixture(scope="module")
def paper_network():
    return build_separator("hparams/models/separator_paper.yaml").mask_net


def paper_size(network, bits):
    """Size in MiB as the paper counts it: its TCN blocks at some bits, with
    their running statistics, the layers around them at 32."""
    blocks = rest = 0
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith("tcn_"):
            blocks += tensor.numel()
        else:
            rest += tensor.numel()
    return (blocks * bits + rest * 32) / 8 / MIB


@pytest.mark.parametrize(
    "bits, published", [(2, 4.6), (4, 6.6), (8, 10.7), (16, 18.9), (32, 35.2)]
)
def test_paper_model_has_the_published_sizes(paper_network, bits, published):
    assert round(paper_size(paper_network, bits), 1) == published


def test_paper_model_has_32_blocks_of_seven_sublayers(paper_network):
    assert paper_network.conv_in.in_channels == 2056
    assert paper_network.conv_out.out_channels == 514
    blocks = [b for b in paper_network if isinstance(b, ConvBlock)]
    assert [len(list(block.children())) for block in blocks] == [7] * 32
    dilations = [block.d_conv.dilation[0] for block in blocks]
    assert dilations == [1, 2, 4, 8, 16, 32, 64, 128] * 4


def test_folded_network_computes_the_same():
    torch.manual_seed(0)
    network = mask_network(6, 4, channels=8, hidden=16, blocks=2, layers=3)
    x = torch.randn(4, 6, 50)
    for _ in range(3):  # move the running statistics away from 0 and 1
        network(2 * x + 1)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    network.eval()
    before = network(x)
    assert fold_norms_(network) == 12
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5)
    assert fold_norms_(network) == 0
    assert not list(network.buffers())


def test_block_keeps_length_and_adds_to_its_input():
    block = ConvBlock(4, 8, dilation=4)
    block.conv_1x1_out.weight.data.zero_()
    x = torch.randn(2, 4, 30)
    assert torch.equal(block(x), x)


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
