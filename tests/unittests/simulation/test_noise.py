"""Noise: generated, mixed, and read from folders."""

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation import noise as noises
from speechbrain_mpq.simulation.noise import (
    DNS_CLEAN,
    NoiseFolder,
    NoiseMaker,
    active_level,
    dns_folder,
    mix_at_snr,
)

RATE = 16000
VOICES = [
    np.sin(np.arange(4000 + 900 * n) / (3 + n))
    * (np.arange(4000 + 900 * n) % 7)
    for n in range(3)
]


@pytest.fixture
def maker():
    """A maker of all types."""
    return NoiseMaker(VOICES)


@pytest.mark.parametrize("kind", [*noises.OF_VOICES, *noises.OF_NOTHING])
def test_types(kind, maker):
    first, name = maker.draw("a", 2 * RATE, kind=kind)
    again, _ = maker.draw("a", 2 * RATE, kind=kind)
    other, _ = maker.draw("b", 2 * RATE, kind=kind)
    later, _ = maker.draw("a", 2 * RATE, kind=kind, epoch=1)
    assert name == kind and first.shape == (2 * RATE,)
    assert np.isfinite(first).all()
    assert np.mean(first**2) == pytest.approx(1)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, later)
    assert maker.draw("a", 1, kind=kind)[0].shape == (1,)  # one sample


def test_one_type_is_held_out(maker):
    drawn = {maker.draw(f"{n}", 100)[1] for n in range(200)}
    assert drawn == {*noises.OF_VOICES, *noises.OF_NOTHING} - {"wind"}
    assert "babble" not in NoiseMaker().types  # nobody to speak
    assert "wind" in NoiseMaker(held_out="rain").types
    with pytest.raises(ValueError, match="no noise 'storm'"):
        NoiseMaker(held_out="storm")
    with pytest.raises(ValueError, match="no noise 'storm'"):
        maker.draw("a", 100, kind="storm")
    with pytest.raises(ValueError, match="needs voices"):
        NoiseMaker().draw("a", 100, kind="babble")


def test_spectra_are_what_the_names_say():
    rng = np.random.default_rng(0)

    def octave_db(waveform, low):
        power = np.abs(np.fft.rfft(waveform)) ** 2
        hz = np.fft.rfftfreq(len(waveform), 1 / RATE)
        bands = [power[(hz >= f) & (hz < 2 * f)].mean() for f in (low, 2 * low)]
        return 10 * np.log10(bands[1] / bands[0])

    for exponent, slope in ((0, 0), (1, -3), (2, -6)):
        colour = noises.coloured(rng, 8 * RATE, exponent=exponent)
        assert octave_db(colour, 1000) == pytest.approx(slope, abs=0.5)
    shaped = noises.speech_shaped(rng, 8 * RATE, [colour])  # of brown noise
    assert octave_db(shaped, 1000) == pytest.approx(-6, abs=1)
    # bursts: a few samples carry most of the energy
    typing = np.sort(noises._keyboard(rng, 4 * RATE) ** 2)[::-1]
    assert typing[: len(typing) // 10].sum() > 0.5 * typing.sum()


def test_mixing_leaves_pauses_out():
    rng = np.random.default_rng(0)
    speech = np.zeros(10 * RATE)
    speech[: 2 * RATE] = 0.1 * rng.standard_normal(2 * RATE)
    noise = rng.standard_normal(len(speech))
    assert active_level(speech) == pytest.approx(0.1, rel=0.02)
    noisy, clean = mix_at_snr(speech, noise, 10)
    assert np.array_equal(clean, speech)
    ratio = active_level(speech) / np.std(noisy - clean)
    assert 20 * np.log10(ratio) == pytest.approx(10, abs=0.01)


def test_mixtures_do_not_clip():
    rng = np.random.default_rng(0)
    speech, noise = 0.3 * rng.standard_normal((2, RATE))
    noisy, clean = mix_at_snr(speech, noise, -20)
    assert np.abs(noisy).max() == pytest.approx(0.99)
    assert np.corrcoef(clean, speech)[0, 1] == pytest.approx(1)
    ratio = active_level(clean) / np.sqrt(np.mean((noisy - clean) ** 2))
    assert 20 * np.log10(ratio) == pytest.approx(-20, abs=0.01)


@pytest.mark.parametrize(
    ("speech", "noise", "said"),
    [
        (np.zeros(9), np.ones(9), "speech is silent"),
        (np.ones(9), np.zeros(9), "noise is silent"),
        (np.ones(9), np.full(9, np.nan), "noise holds NaN"),
        (np.full(9, np.inf), np.ones(9), "speech holds NaN"),
        (np.ones(9), np.ones(8), "differ in length"),
        (np.ones((9, 2)), np.ones((9, 2)), r"must be \[samples\]"),
        (np.ones(0), np.ones(0), r"must be \[samples\]"),
    ],
)
def test_mixing_refuses(speech, noise, said):
    with pytest.raises(ValueError, match=said):
        mix_at_snr(speech, noise, 0)


def test_folder_in_the_challenge_layout(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("noise/fan.wav", "noise/deep/bus.flac", "clean/talk.wav"):
        path = tmp_path / "datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal((900, 2)), RATE)
    folder = NoiseFolder(tmp_path)
    names = {folder.draw(f"{n}", 2000)[1] for n in range(20)}
    assert names == {"fan.wav", "deep/bus.flac"}  # no speech among them
    noise, _ = folder.draw("a", 2000, kind="fan.wav")
    assert noise.shape == (2000,) and np.mean(noise**2) == pytest.approx(1)
    assert np.array_equal(noise[:1100], noise[900:])  # repeated
    assert dns_folder(tmp_path, DNS_CLEAN) == tmp_path / "datasets/clean"


def test_files_belong_to_one_split(tmp_path):
    for n in range(60):
        soundfile.write(tmp_path / f"{n}.wav", np.ones(20) / 2, RATE)
    splits = [
        {path.name for path in NoiseFolder(tmp_path, split).files}
        for split in ("train", "valid", "test")
    ]
    assert sum(map(len, splits)) == 60 == len(set.union(*splits))
    assert len(splits[0]) > 40 and splits[1] and splits[2]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        NoiseFolder(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("nothing to hear")
    with pytest.raises(ValueError, match="holds no audio"):
        NoiseFolder(tmp_path)
    for name, waveform, rate, said in (
        ("zero", np.zeros(100), RATE, "is silent"),
        ("nan", np.full(100, np.nan), RATE, "holds NaN"),
        ("high", np.ones(400) / 2, 48000, "pass resample=True"),
        ("low", np.ones(400) / 2, 8000, "has 8000 Hz"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        soundfile.write(folder / "a.wav", waveform, rate, "FLOAT")
        with pytest.raises(ValueError, match=said):
            NoiseFolder(folder).draw("a", 100)
    high = NoiseFolder(tmp_path / "high", resample=True)
    assert high.draw("a", 100)[0].shape == (100,)
    with pytest.raises(ValueError, match="has 8000 Hz"):
        NoiseFolder(tmp_path / "low", resample=True).draw("a", 100)
    with pytest.raises(ValueError, match="too few files for a valid split"):
        NoiseFolder(tmp_path / "high", "valid")
