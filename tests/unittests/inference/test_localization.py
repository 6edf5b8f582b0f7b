"""Talkers are found where plane waves come from."""

import math

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.inference.audio import AudioError
from speechbrain_mpq.inference.interfaces import SeparationInterface
from speechbrain_mpq.inference.localization import (
    DIRECTIONS,
    Localization,
    Localizer,
    Talker,
    direction_shares,
    find_talkers,
    onsets,
    steered_response,
)
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import (
    SPEED_OF_SOUND,
    SpatialFeatures,
    linear_array,
    planar_array,
)

POSITIONS = SpatialFeatures().positions


def bursts(seconds=3.0, seed=0, rate=16000):
    """Noise that begins and ends as syllables do, [samples]."""
    rng = np.random.default_rng(seed)
    steps = rng.random(int(8 * seconds)) < 0.5
    envelope = np.repeat(steps, rate // 8).astype(float)
    return 0.1 * rng.standard_normal(len(envelope)) * envelope


def plane_wave(signal, doa, positions=POSITIONS, rate=16000):
    """Delay a signal exactly, for every microphone: [samples, mics]."""
    frequencies = np.fft.rfftfreq(len(signal), 1 / rate)[:, None]
    advance = np.cos(np.radians(doa)) * np.asarray(positions) / SPEED_OF_SOUND
    turned = np.exp(2j * np.pi * frequencies * advance)
    spectrum = np.fft.rfft(signal)[:, None] * turned
    waves = np.fft.irfft(spectrum, len(signal), axis=0)
    return torch.from_numpy(waves).float()


def noise(samples, mics=7, level=1e-4):
    """Of the microphones themselves, [samples, mics]."""
    generator = torch.Generator().manual_seed(1)
    return level * torch.randn(samples, mics, generator=generator)


def located(waves, **options):
    """Directions that are found, the strongest first."""
    waves = waves + noise(*waves.shape)
    return [
        t.doa for t in Localizer(POSITIONS).locate(waves, **options).talkers
    ]


CIRCLE = [
    (5 * math.cos(turn), 5 * math.sin(turn))
    for turn in (k * math.pi / 3 for k in range(6))
]


def test_talkers_around_a_planar_array():
    """Two at once, also where the circle is closed; nobody is mirrored."""
    positions = planar_array(CIRCLE)
    for doas in ((358.5, 200.0), (90.0, 300.0), (3.0, 45.0)):
        waves = noise(48000, 6)
        for seed, doa in enumerate(doas):
            u = [math.cos(math.radians(doa)), math.sin(math.radians(doa))]
            # As on a line: doa 0 along the projected positions
            waves += plane_wave(bursts(seed=seed), 0, positions.numpy() @ u)
        found = Localizer(positions).locate(waves)
        assert len(found.curve) == 360
        assert sorted(t.doa for t in found.talkers) == [
            pytest.approx(doa, abs=1.5) for doa in sorted(doas)
        ]
        assert found.share_at(doas[0]) > 0.2
        assert found.share_at((doas[0] + 180) % 360) < 0.02
    quiet = torch.zeros(16000, 6)
    quiet[8000] = 1e-3
    assert len(Localizer(positions).locate(quiet).curve) == 360


@pytest.mark.parametrize("doa", [0, 20, 61, 90, 135.5, 160, 180])
def test_one_talker(doa):
    (found,) = located(plane_wave(bursts(), doa))
    # The curve of cosines is flat at the ends of the axis
    assert found == pytest.approx(doa, abs=1.0 if 15 < doa < 165 else 6.0)


@pytest.mark.parametrize("doas", [(60, 120), (30, 50), (75, 91), (10, 170)])
def test_two_talkers(doas):
    waves = sum(plane_wave(bursts(seed=i), d) for i, d in enumerate(doas))
    assert sorted(located(waves)) == pytest.approx(sorted(doas), abs=3.0)


def test_three_talkers_and_how_many_are_asked_for():
    doas = (40, 90, 130)
    waves = sum(plane_wave(bursts(seed=i), d) for i, d in enumerate(doas))
    assert sorted(located(waves)) == pytest.approx(doas, abs=3.0)
    assert len(located(waves, count=2)) == 2


def test_the_stronger_talker_comes_first():
    waves = plane_wave(bursts(seed=0), 60)
    waves = waves + 0.2 * plane_wave(bursts(seed=1), 120)
    found = Localizer(POSITIONS).locate(waves + noise(*waves.shape))
    first, second = found.talkers
    assert first.share > second.share
    assert first.doa == pytest.approx(60, abs=1)
    assert found.share_at(60) > 10 * found.share_at(20)
    assert found.curve.sum() <= 1.001


def test_independent_noise_has_no_direction():
    assert located(noise(48000, level=0.1)) == []


def test_silence():
    with pytest.raises(ValueError, match="silent: nobody talks there"):
        Localizer(POSITIONS).locate(torch.zeros(16000, 7))


def test_too_few_microphones():
    with pytest.raises(ValueError, match="take a model of 3 or more"):
        Localizer(linear_array((5,)))


def test_signals_of_a_window_or_less():
    assert located(plane_wave(bursts(0.5)[:200], 60)) == []


def test_pieces_give_what_the_whole_does():
    waves = plane_wave(bursts(6.0), 70)
    waves = waves + noise(*waves.shape)
    localizer = Localizer(POSITIONS)
    whole = localizer.locate(waves)
    pieces = localizer.locate_blocks(waves.split(16000), len(waves))
    assert pieces.talkers[0].doa == pytest.approx(whole.talkers[0].doa, abs=0.5)
    (one,), (other,) = whole.talkers, pieces.talkers
    assert one.share == pytest.approx(other.share, abs=0.1)


def test_the_response_is_the_mean_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    bins = torch.randn(4, 3, dtype=torch.complex64, generator=generator)
    positions = linear_array((3, 4, 6))
    frequencies = torch.tensor([500.0, 1500.0, 500.0])
    response = steered_response(bins, frequencies, positions)
    angles = bins.angle().double()
    for d, p in ((0, 0), (60, 1), (131, 2)):
        pairs = [
            math.cos(
                angles[m, p]
                - angles[n, p]
                - 2
                * math.pi
                * frequencies[p]
                * (positions[m] - positions[n])
                * math.cos(math.radians(d))
                / SPEED_OF_SOUND
            )
            for m in range(4)
            for n in range(m)
        ]
        assert response[d, p].item() == pytest.approx(np.mean(pairs), abs=1e-5)


def test_directions_are_those_of_speechbrain():
    """Its steering vectors, conjugates of the waves, give the same response."""
    multi_mic = pytest.importorskip("speechbrain.processing.multi_mic")
    angles = torch.deg2rad(DIRECTIONS)
    circle = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)
    mics = torch.zeros(len(POSITIONS), 3)
    mics[:, 0] = POSITIONS.float()
    taus = multi_mic.doas2taus(circle, mics, fs=16000, c=SPEED_OF_SOUND)
    steering = multi_mic.steering(taus, 257)  # [directions, bins, 2, mics]
    weights = torch.complex(steering[:, 32, 0], steering[:, 32, 1])
    bins = torch.randn(7, 1, dtype=torch.complex64)
    bins = bins / bins.abs()
    theirs = ((weights @ bins).abs().square() - 7) / 42
    ours = steered_response(bins, torch.tensor([1000.0]), POSITIONS)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_onsets_are_no_echoes():
    spectra = torch.zeros(1, 257, 12, dtype=torch.complex64)
    spectra[0, 100, [2, 4, 9]] = torch.tensor([1.0, 1.2, 3.0]).cfloat()
    spectra[0, 0, 5] = 2.0  # below the band
    # 1.44 after 1.0 is no threefold rise; 9.0 after 1.44 is
    assert onsets(spectra).nonzero().tolist() == [[100, 2], [100, 9]]


def test_shares_of_bins():
    response = torch.zeros(181, 100)
    response[30, :50], response[120, 50:80] = 1.0, 1.0
    shares = direction_shares(response)
    assert shares[30].item() == pytest.approx(0.5, abs=0.01)
    assert shares[120].item() == pytest.approx(0.3, abs=0.01)
    assert shares.sum().item() == pytest.approx(0.8, abs=0.01)


def test_weak_peaks_are_nobody():
    curve = torch.zeros(181)
    curve[60], curve[120] = 0.5, 0.05
    assert find_talkers(curve) == (Talker(60.0, 0.5),)
    assert [t.doa for t in find_talkers(curve, 2)] == [60.0, 120.0]
    assert find_talkers(torch.zeros(181), 3) == ()
    assert Localization((), curve).share_at(118) == pytest.approx(0.05)


class Loaded(SeparationInterface):
    """A model without weights that mean anything."""

    device = "cpu"

    def __init__(self, pairs=((15, 1), (8, 1), (12, 4))):
        features = SpatialFeatures(pairs)
        self.separator = Separator(features, 4, 8, 3, 1, 2).eval()


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_files_of_other_rates(rate, tmp_path):
    path = tmp_path / "mix.wav"
    waves = plane_wave(bursts(3.0, rate=rate), 65, linear_array(), rate)
    soundfile.write(path, waves + noise(*waves.shape) + 0.1, rate)
    found = Loaded().locate_file(path)
    assert found.talkers[0].doa == pytest.approx(65, abs=1)


def test_parts_of_long_files(tmp_path):
    path = tmp_path / "mix.wav"
    waves = plane_wave(bursts(45.0), 65, linear_array())
    soundfile.write(path, waves + noise(*waves.shape), 16000)
    found = Loaded().locate_file(path, seconds=20)
    assert found.talkers[0].doa == pytest.approx(65, abs=1)


def test_files_that_tell_nothing(tmp_path):
    path = tmp_path / "mix.wav"
    soundfile.write(path, np.zeros((16000, 15)), 16000)
    with pytest.raises(AudioError, match="mix.wav: it is silent"):
        Loaded().locate_file(path)
    with pytest.raises(ValueError, match="2 microphones cannot tell"):
        Loaded([(15, 1)]).locate_file(path)
