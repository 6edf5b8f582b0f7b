"""Pieces give what the whole signal gives, and use no more than they say."""

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.inference.audio import BlockResampler
from speechbrain_mpq.inference.chunks import ChunkedSeparator
from speechbrain_mpq.inference.streaming import (
    FrameAnalysis,
    FrameSynthesis,
    StatefulNetwork,
    WindowedNetwork,
    context_frames,
    in_pieces,
    is_streamable,
)
from speechbrain_mpq.lobes.models.separator import Separator, match_level
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import (
    ConvBlock,
    fold_norms_,
    mask_network,
)

PIECES = (100, 1, 999, 5000, 256, 30000, 10**9)  # samples


def small_separator(hop=256, phase="steered", layers=3, **options):
    """A separator whose norms do something and that hears far."""
    torch.manual_seed(0)
    features = SpatialFeatures(hop=hop, phase=phase)
    separator = Separator(features, 8, 16, 3, 2, layers, **options).eval()
    for module in separator.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
        elif isinstance(module, ConvBlock):
            nn.init.normal_(module.d_conv.weight, std=2.0)
            nn.init.normal_(module.conv_1x1_out.weight, std=2.0)
    return separator


def cut(signal, sizes=PIECES):
    """Pieces of [batch, samples, ...], each with whether it is the last."""
    position, samples = 0, signal.shape[1]
    for size in sizes:
        end = min(position + size, samples)
        yield signal[:, position:end], end == samples
        position = end
        if end == samples:
            return


def in_chunks(separator, mixture, doa, network=None, lips=None):
    """The separator on pieces, brought to level."""
    level = mixture[0, :, 0].square().mean().sqrt().item()
    chunked = ChunkedSeparator(separator, doa, network, lips)
    pushed = [chunked.push(x, level, last) for x, last in cut(mixture)]
    estimate = torch.cat([piece for piece, _ in pushed], dim=2)
    reference = torch.cat([piece for _, piece in pushed], dim=1)
    assert torch.equal(reference, mixture[..., 0])
    return match_level(estimate, reference[:, None])


@pytest.mark.parametrize("samples", [512, 700, 24001])
@pytest.mark.parametrize("hop, phase", [(256, "steered"), (128, "ipd")])
@torch.no_grad()
def test_pieces_are_the_whole(samples, hop, phase):
    separator = small_separator(hop, phase)
    mixture, doa = torch.randn(1, samples, 7), torch.tensor([[10.0, 120.0]])
    expected = separator(mixture, doa)
    network = separator.mask_net
    for each in (
        StatefulNetwork(network),
        WindowedNetwork(network),
        WindowedNetwork(network, step=7),
    ):
        found = in_chunks(separator, mixture, doa, each)
        assert found.shape == expected.shape
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 3e-6 * scale


@torch.no_grad()
def test_too_little_context_is_noticed():
    """The test above would see a seam."""
    separator = small_separator()
    mixture, doa = torch.randn(1, 24001, 7), torch.tensor([[60.0]])
    expected = separator(mixture, doa)
    context = context_frames(separator.mask_net)
    short = WindowedNetwork(
        separator.mask_net, history=context - 1, look_ahead=context, step=7
    )
    found = in_chunks(separator, mixture, doa, short)
    assert (found - expected).abs().max() > 3e-6 * expected.abs().max()


@torch.no_grad()
def test_folded_norms_and_input_scales_are_carried():
    separator = small_separator(scale_inputs=True)
    nn.init.normal_(separator.mask_net.scale_in.weight)
    fold_norms_(separator)
    assert is_streamable(separator.mask_net)
    mixture, doa = torch.randn(1, 9000, 7), torch.tensor([[90.0]])
    expected = separator(mixture, doa)
    found = in_chunks(separator, mixture, doa)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_context_is_what_gradients_reach():
    """An output frame depends on so many frames to either side, no more."""
    torch.manual_seed(0)
    network = mask_network(3, 2, 4, 4, 3, blocks=2, layers=3).eval()
    context = context_frames(network)
    assert context == 2 * (1 + 2 + 4)
    inputs = torch.randn(1, 3, 41, requires_grad=True)
    network(inputs)[0, :, 20].sum().backward()
    reached = inputs.grad.abs().sum((0, 1)).nonzero().flatten()
    assert reached.min() == 20 - context and reached.max() == 20 + context


def test_context_of_other_engines():
    class Engine:
        context_frames = 5

    assert context_frames(Engine()) == 5
    with pytest.raises(ValueError, match="context_frames"):
        context_frames(lambda inputs: inputs)
    with pytest.raises(ValueError, match="context_frames"):
        context_frames(nn.Linear(1, 1))
    assert context_frames(nn.Sequential(nn.Conv1d(1, 1, 1))) == 0
    windowed = in_pieces(Engine())
    assert (windowed.history, windowed.look_ahead) == (5, 5)
    assert windowed.step == 30


def test_what_cannot_be_carried_is_windowed():
    chain = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), ConvBlock(4, 8))
    assert isinstance(in_pieces(chain), WindowedNetwork)
    assert isinstance(in_pieces(chain[1:]), StatefulNetwork)


def test_a_talker_who_moves_in_pieces():
    separator = small_separator()
    mixture = torch.randn(2, 20000, 7)
    doa = 180 * torch.rand(2, 2, 20000 // 256 + 1)
    with torch.no_grad():
        torch.testing.assert_close(
            in_chunks(separator, mixture, doa),
            separator(mixture, doa),
            rtol=1e-3,
            atol=1e-4,
        )


LIPS = {"front_end": "light", "height": 8, "width": 8, "channels": 8}


def watching_separator(hop=256, **visual):
    """One whose lip stream has a say."""
    visual = {**LIPS, "hidden": 8, "blocks": 2, "filters": 2, **visual}
    separator = small_separator(hop, visual=visual)
    for name, parameter in separator.mask_net.named_parameters():
        if name.startswith(("visual", "fusion")):
            nn.init.normal_(parameter, std=0.5)
    return separator


@pytest.mark.parametrize(
    "hop, visual",
    [
        (256, {}),
        (256, {"blocks": 3, "kernel_size": 5}),
        (160, {}),
        (256, {"front_end": "resnet18", "height": 32, "width": 32}),
    ],
)
def test_lips_in_pieces(hop, visual):
    separator = watching_separator(hop, **visual)
    mixture, doa = torch.randn(1, 48000, 7), torch.tensor([[60.0, 100.0]])
    lips = torch.rand(1, 2, 76, *separator.lips_size)
    lips[:, 0, 20:24] = 0  # none on view
    network = separator.mask_net
    windows = WindowedNetwork(network, step=7)  # made 10, or 8
    assert windows.step % network.period == 0
    with torch.no_grad():
        whole = separator(mixture, doa, lips)
        blind = separator(mixture, doa)
        found = in_chunks(separator, mixture, doa, windows, lips)
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
        again = WindowedNetwork(network, step=7)
        found = in_chunks(separator, mixture, doa, again)
        torch.testing.assert_close(found, blind, rtol=1e-3, atol=1e-4)
    assert (whole - blind).std() > 0.1 * whole.std()


def test_a_picture_changes_what_is_in_reach():
    separator = watching_separator().double()
    network = separator.mask_net
    inputs = torch.randn(1, separator.features.inputs, 200).double()
    lips = torch.rand(1, 80, 8, 8).double()
    other = lips.clone()
    other[:, 40] = torch.rand(8, 8)
    with torch.no_grad():
        seen = network.visual(lips) != network.visual(other)
        changed = network(inputs, lips) != network(inputs, other)
    field = network.visual.receptive_field
    pictures = seen.any(1)[0].nonzero()[:, 0]
    assert pictures.tolist() == list(range(40 - field, 41 + field))
    frames = changed.any(1)[0].nonzero()[:, 0]
    context = network.context_frames
    # Picture 40 is on view at the frames 100, 101 and 102
    assert 100 - context <= frames.min() and frames.max() <= 102 + context


@pytest.mark.parametrize("make", [StatefulNetwork, WindowedNetwork])
@torch.no_grad()
def test_memory_does_not_grow(make):
    """What is kept after many pieces is what is kept after some."""
    network = mask_network(3, 2, 4, 4, 3, blocks=1, layers=3).eval()
    pieces = make(network)

    def kept():
        tensors, todo = 0, [pieces]
        while todo:
            item = todo.pop()
            if isinstance(item, torch.Tensor):
                tensors += item.untyped_storage().nbytes()
            elif isinstance(item, list):
                todo += item
            elif hasattr(item, "__dict__") and not isinstance(item, nn.Module):
                todo += vars(item).values()
        return tensors

    sizes = []
    for _ in range(60):
        pieces.push(torch.randn(1, 3, 50))
        sizes.append(kept())
    assert max(sizes[30:]) <= max(sizes[10:30]) and max(sizes) > 0


@pytest.mark.parametrize("hop", [128, 256])
def test_stft_and_inverse_in_pieces(hop):
    torch.manual_seed(0)
    features = SpatialFeatures(hop=hop)
    signal = torch.randn(2, 7003, 7)
    expected = features.stft(signal)
    analysis = FrameAnalysis(features)
    spectra = [analysis.push(x, last) for x, last in cut(signal)]
    assert torch.equal(torch.cat(spectra, dim=3), expected)
    synthesis = FrameSynthesis(features)
    pieces = [synthesis.push(x[:, 0]) for x in spectra]
    waveform = torch.cat([*pieces, synthesis.finish(7003)], dim=1)
    inverse = features.istft(expected[:, 0], 7003)
    assert torch.allclose(waveform, inverse, atol=2e-6)
    assert torch.allclose(waveform, signal[..., 0], atol=1e-4)


@pytest.mark.parametrize(
    "rate, size", [(44100, 37), (48000, 1000), (17000, 1000), (44100, 60000)]
)
def test_resampling_in_pieces(rate, size):
    resample = pytest.importorskip("torchaudio.functional").resample
    torch.manual_seed(0)
    signal = torch.randn(20011, 2)
    resampler = BlockResampler(rate, 16000)
    pieces = list(cut(signal[None], [size] * 1000))
    found = torch.cat([resampler.push(x[0], last) for x, last in pieces])
    expected = resample(signal.T, rate, 16000).T
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)
