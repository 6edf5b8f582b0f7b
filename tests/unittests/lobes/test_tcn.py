"""The TCN: structure, published sizes, folding."""

import pytest
import torch

from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import (
    ConvBlock,
    fold_norms_,
    mask_network,
)

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
