"""Streams: what comes out, how late, and what it depends on."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.inference.chunks import SeparationStream
from speechbrain_mpq.inference.output import RunningGain, RunningLevel
from speechbrain_mpq.lobes.models.separator import Separator, match_level
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import ConvBlock

RATE = 16000
MODES = [
    {},
    {"look_ahead": 0.0, "step": 0.0},
    {"look_ahead": 0.1, "step": 0.1},
    {"look_ahead": 0.05, "step": 0.05, "history": 0.1},
    {"look_ahead": 60.0, "step": 0.1},
]


@pytest.fixture(scope="module")
def separator():
    """Small, and it hears far."""
    torch.manual_seed(0)
    separator = Separator(SpatialFeatures(), 8, 16, 3, 2, 3).eval()
    for module in separator.modules():
        if isinstance(module, ConvBlock):
            nn.init.normal_(module.d_conv.weight)
            nn.init.normal_(module.conv_1x1_out.weight)
    return separator


def run(stream, mixture, block):
    """Everything that comes out, and after how many samples what came."""
    pieces, given = [], []
    for position in range(0, len(mixture), block):
        pieces.append(stream.push(mixture[position : position + block]))
        coming = min(position + block, len(mixture))
        given.append((coming, sum(p.shape[1] for p in pieces)))
    pieces.append(stream.finish())
    return torch.cat(pieces, dim=1), given


@pytest.mark.parametrize("block", [160, 5000])
def test_full_look_ahead_is_the_whole_signal(separator, block):
    mixture = torch.randn(16001, 7)
    level = mixture[:, 0].square().mean().sqrt().item()
    stream = SeparationStream(
        separator, [30, 120], level=level, gain=1.0, remove_offset=False
    )
    found, _ = run(stream, mixture, block)
    with torch.no_grad():
        expected = separator(mixture[None], torch.tensor([[30.0, 120.0]]))[0]
    found = match_level(found, mixture[:, 0])
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert torch.equal(stream.gain, torch.ones(2))


@pytest.mark.parametrize("mode", MODES)
def test_delay_is_what_it_says(separator, mode):
    mixture = torch.randn(12000, 7)
    stream = SeparationStream(separator, 60.0, **mode)
    delay = round(stream.delay * RATE)
    separated, given = run(stream, mixture, block=64)
    lags = [coming - out for coming, out in given if coming > delay]
    assert max(lags) <= delay, "no later than stated"
    assert max(lags) >= delay - 256 - 64, "and not much earlier"
    assert separated.shape == (1, 12000)


@pytest.mark.parametrize("mode", MODES[:4])
def test_future_beyond_the_delay_is_not_used(separator, mode):
    torch.manual_seed(0)
    mixture, position = torch.randn(16000, 7), 11000
    changed = mixture.clone()
    changed[position:] = torch.randn(5000, 7)
    outputs = []
    for signal in (mixture, changed):
        stream = SeparationStream(separator, 60.0, level=1.0, **mode)
        pieces = [stream.push(x) for x in signal.split(500)]
        outputs.append(torch.cat([*pieces, stream.finish()], dim=1)[0])
    same = position - round(stream.delay * RATE)
    # Up to the block whose running gain saw the change
    assert torch.equal(outputs[0][: same - 500], outputs[1][: same - 500])
    assert not torch.allclose(outputs[0][position:], outputs[1][position:])


def test_limits_of_what_can_be_asked(separator):
    stream = SeparationStream(separator, 60.0, level=0.1, gain=1.0)
    assert stream.work == 1
    context = 14 * 256 / RATE
    assert stream.delay == pytest.approx(context + 512 / RATE)
    stream = SeparationStream(separator, 60.0)  # level and gain change
    assert stream.work == 1
    steps = 9 * 256 / RATE
    assert stream.delay == pytest.approx(context + steps + 512 / RATE)
    short = SeparationStream(separator, 60.0, look_ahead=0.032, step=0.064)
    assert short.delay == pytest.approx((2 + 3) * 256 / RATE + 512 / RATE)
    assert short.work == (14 + 4 + 2) / 4
    with pytest.raises(ValueError, match="both or neither"):
        SeparationStream(separator, 60.0, history=1.0)
    with pytest.raises(ValueError, match="0 or more"):
        SeparationStream(separator, 60.0, look_ahead=-1.0)
    with pytest.raises(ValueError, match="DOA must lie"):
        SeparationStream(separator, 181.0)


def test_bad_blocks_change_nothing(separator):
    torch.manual_seed(0)
    mixture = torch.randn(9000, 7)
    expected, _ = run(SeparationStream(separator, 60.0), mixture, 4000)
    stream = SeparationStream(separator, 60.0)
    first = stream.push(mixture[:4000])
    for bad, message in (
        (torch.randn(100), "samples, mics"),
        (torch.randn(100, 6), "6 channels"),
        (torch.full((100, 7), float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.push(bad)
    pieces = [stream.push(mixture[4000:8000]), stream.push(mixture[8000:])]
    found = torch.cat([first, *pieces, stream.finish()], dim=1)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="has ended"):
        stream.push(mixture)
    with pytest.raises(ValueError, match="nothing was pushed"):
        SeparationStream(separator, 60.0).finish()


@pytest.mark.parametrize("mode", MODES[:4])
def test_blocks_of_any_size_give_the_same(separator, mode):
    """Level and gain follow the frames, not the blocks."""
    torch.manual_seed(0)
    mixture = torch.rand(20, 1).repeat_interleave(800, 0) * torch.randn(
        16000, 7
    )
    wanted, _ = run(SeparationStream(separator, 60.0, **mode), mixture, 2560)
    for block in (100, 1024, 16000):
        stream = SeparationStream(separator, 60.0, **mode)
        found, _ = run(stream, mixture, block)
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("mode", [{}, {"look_ahead": 0.1}])
def test_constant_offsets_are_taken_off(separator, mode):
    torch.manual_seed(0)
    mixture = 0.1 * torch.randn(16000, 7)
    wanted, _ = run(SeparationStream(separator, 60.0, **mode), mixture, 999)
    mixture = mixture + torch.linspace(-0.2, 0.5, 7)
    found, _ = run(SeparationStream(separator, 60.0, **mode), mixture, 999)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_the_filter_of_offsets_changes_little(separator):
    torch.manual_seed(0)
    mixture, found = 0.1 * torch.randn(32000, 7), []
    for remove in (False, True):
        stream = SeparationStream(
            separator, 60.0, level=0.1, gain=1.0, remove_offset=remove
        )
        found.append(run(stream, mixture, 4000)[0])
    assert (found[1] - found[0]).norm() < 0.15 * found[0].norm()


def test_arrays_are_taken(separator):
    torch.manual_seed(0)
    whole = (3000 * torch.randn(9000, 7)).short().numpy()
    wanted, _ = run(
        SeparationStream(separator, 60.0),
        torch.from_numpy(whole / np.float32(32768)),
        4000,
    )
    for block in (whole, whole / 32768, whole.astype(np.float32) / 32768):
        found, _ = run(SeparationStream(separator, 60.0), block, 4000)
        assert torch.allclose(found, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="samples of type torch.bool"):
        SeparationStream(separator, 60.0).push(whole > 0)


def test_what_is_not_finite_is_an_error(separator):
    broken = copy.deepcopy(separator)
    broken.mask_net.conv_out.bias.data[3] = torch.inf
    stream = SeparationStream(broken, 60.0)
    with pytest.raises(ValueError, match="NaN or infinity at 0.000 s"):
        run(stream, torch.randn(9000, 7), 999)


def test_silence_gives_silence(separator):
    found, _ = run(
        SeparationStream(separator, 60.0), torch.zeros(9000, 15), 999
    )
    assert found.shape == (1, 9000) and not found.any()


def test_an_empty_first_block_changes_nothing(separator):
    torch.manual_seed(0)
    mixture = torch.randn(9000, 7)
    expected, _ = run(SeparationStream(separator, 60.0), mixture, 4000)
    stream = SeparationStream(separator, 60.0)
    assert stream.push(torch.zeros(0, 7)).shape == (1, 0)
    found, _ = run(stream, mixture, 4000)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("doas", [[60.0], [60.0, 120.0]])
def test_the_gain_of_an_earlier_stream(separator, doas):
    torch.manual_seed(0)
    mixture = torch.randn(9000, 7)
    earlier = SeparationStream(separator, doas)
    run(earlier, mixture, 4000)
    known = {"level": earlier.level, "gain": earlier.gain}
    later = SeparationStream(separator, doas, **known)
    found, _ = run(later, mixture, 4000)
    plain, _ = run(
        SeparationStream(separator, doas, level=earlier.level, gain=1.0),
        mixture,
        4000,
    )
    assert torch.equal(later.gain, earlier.gain)
    assert torch.allclose(found, earlier.gain[:, None] * plain)


def test_running_level_forgets():
    level = RunningLevel()
    for _ in range(60):
        level.update(torch.full((RATE,), 0.5))
    for _ in range(60):
        level.update(torch.full((RATE,), 0.1))
    assert level.rms == pytest.approx(0.1, rel=0.05)


def test_running_gain_is_match_level_and_glides():
    torch.manual_seed(0)
    estimate, mixture = torch.randn(2, 4000), torch.randn(4000)
    mixture = mixture + 0.3 * estimate.sum(0)
    found = RunningGain(2).apply(estimate, mixture)
    assert torch.allclose(found, match_level(estimate, mixture), atol=1e-5)
    gain = RunningGain(1)
    flat = [
        gain.apply(torch.ones(1, 400), torch.full((400,), x))
        for x in (1.0, 2.0)
    ]
    steps = torch.cat(flat, dim=1).diff().abs().max()
    assert steps < 0.02, "no jump where the level changes"
