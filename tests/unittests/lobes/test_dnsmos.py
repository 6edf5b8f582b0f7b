"""The quality predictor: its size, and bits against the training graph."""

import tracemalloc

import pytest
import torch
from torch.nn.utils import parametrize

from speechbrain_mpq.lobes.models.dnsmos import (
    DNSMOS,
    PAPER,
    RELEASED,
    BinaryDNSMOS,
    BitDNSMOS,
    LogMel,
    memory,
)

SMALL = ((8, True), (8, False), (16, False))


def parameters(network):
    """How many values it learns."""
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("shape", "count"), [(PAPER, 45_697), (RELEASED, 54_945)]
)
def test_published_sizes(shape, count):
    assert parameters(DNSMOS(shape)) == count
    assert parameters(BinaryDNSMOS(shape=shape)) == count


def test_memory_by_four_counts():
    counts = memory(DNSMOS())
    large, small, ratio = counts["all maps"]
    assert large == 4 * (956_160 + 238_080 + 59_520 + 29_760 + 45_697)
    assert small == (956_160 + 238_080 + 59_520 + 29_760) / 8 + 45_697
    assert ratio == pytest.approx(25.8, abs=0.05)
    ratios = [round(ratio, 1) for _, _, ratio in counts.values()]
    assert ratios == [25.8, 24.3, 16.7, 23.0]
    assert memory(DNSMOS(), weight_bits=4)["all maps"][2] > 29
    assert memory(DNSMOS(), weight_bits=32, map_bits=32)["all maps"][2] == 1
    assert memory(DNSMOS(), 900)["all maps"][2] == pytest.approx(30, abs=0.1)


def test_features_are_those_of_the_paper():
    torch.manual_seed(0)
    waveform = torch.randn(2, 16000)
    features = LogMel(shift=0, scale=1)(waveform)
    assert features.shape == (2, 49, 120)
    frame = waveform[1, 320:960] * torch.hann_window(640)
    power = torch.fft.rfft(frame).abs() ** 2
    band = LogMel().bands[:, 60]
    expected = (power * band).sum().add(1e-9).log()
    assert torch.allclose(features[1, 1, 60], expected)
    normal = LogMel()(0.05 * waveform)
    assert normal.abs().max() < 1.3 and normal.std() > 0.05


def settle(network):
    """Thresholds so that maps have ones and zeros, the last maximum too."""
    torch.manual_seed(1)
    x = network._input(torch.randn(1, 1, 30, 24) / 2)
    for conv, (_, pooled) in zip(network.convs, network.shape):
        sums = conv(x).detach()
        conv.bias.data -= sums.flatten(2).quantile(0.6, dim=-1)[0]
        last = conv is network.convs[-1]
        if last:
            conv.bias.data -= conv(x).detach().amax((0, 2, 3)) - 0.05
        x = network.activation(conv(x))
        x = torch.nn.functional.max_pool2d(x, 2) if pooled else x


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("binary_weights", [False, True])
def test_bits_give_the_same_scores(signed, binary_weights):
    torch.manual_seed(0)
    network = BinaryDNSMOS(
        signed, binary_weights=binary_weights, shape=SMALL, dense=(8, 8)
    )
    settle(network.eval())
    small = BitDNSMOS(network)
    scores = set()
    for frames in (8, 21, 40):
        features = torch.randn(frames, 24) / 2
        with torch.no_grad():
            expected = network(features[None])[0].numpy()
        assert small(features) == expected
        assert BitDNSMOS(network, rows=16)(features) == expected
        scores.add(float(expected))
    assert len(scores) == 3


class Grid(torch.nn.Module):
    """A quantizer of any kind, as others attach it."""

    def forward(self, weight):
        """Weights on 15 levels for each output."""
        step = weight.abs().flatten(1).amax(1) / 7
        step = step.reshape(-1, *(weight.ndim - 1) * [1])
        return (weight / step).round() * step


def test_quantizers_on_the_weights_keep_it_exact():
    torch.manual_seed(0)
    network = BinaryDNSMOS(shape=SMALL, dense=(8, 8)).eval()
    before = BitDNSMOS(network).nbytes
    for layer in [*network.convs, *network.dense]:
        parametrize.register_parametrization(layer, "weight", Grid())
    small = BitDNSMOS(network)
    features = torch.randn(40, 24) / 2
    with torch.no_grad():
        assert small(features) == network(features[None])[0].numpy()
    assert small.nbytes < before


def test_bits_do_not_change_with_the_network():
    torch.manual_seed(0)
    network = BinaryDNSMOS(shape=SMALL, dense=(8, 8)).eval()
    small, features = BitDNSMOS(network), torch.randn(40, 24) / 2
    before = small(features)
    for parameter in network.parameters():
        parameter.data.add_(1)
    assert small(features) == before


def test_bytes_that_are_kept():
    network = BinaryDNSMOS(binary_weights=True).eval()
    convs = BitDNSMOS(network).convs
    taps = 9 * 32 * (32 + 32 + 64)
    thresholds = 4 * (32 + 32 + 64)
    assert sum(conv.nbytes for conv in convs[1:]) == taps / 8 + thresholds


def test_working_memory_is_far_below_one_float_map():
    small = BitDNSMOS(BinaryDNSMOS().eval(), rows=2)
    features = torch.randn(249, 120) / 4
    small(features)
    tracemalloc.start()
    small(features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 120 * 249 < peak < 4 * 956_160 / 8  # of its first map


def test_training_moves_every_layer():
    torch.manual_seed(0)
    network = BinaryDNSMOS(shape=SMALL, dense=(8, 8), dropout=0.0)
    features = torch.randn(4, 16, 16)
    (network(features) - 3).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_float_network_loads_into_the_binary_one():
    torch.manual_seed(0)
    network = DNSMOS()
    BinaryDNSMOS().load_state_dict(network.state_dict())


def test_too_little_to_pool():
    with pytest.raises(ValueError, match="are too small"):
        DNSMOS(SMALL, dense=(8, 8))(torch.ones(1, 7, 120))
