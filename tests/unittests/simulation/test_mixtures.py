"""Mixtures: levels, overlap, repeatability, bad input."""

import json

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.dataio import listed_mixtures, training_mixtures
from speechbrain_mpq.simulation.mixtures import (
    BUCKETS,
    SIRS,
    MixtureMaker,
    _at_offsets,
    fixed_mixtures,
    load_speech,
    mix,
)


class Bank:
    """Stands in for a RoomBank: two rooms with talkers all around."""

    def __init__(self):
        angles = np.array([5.0, 15.0, 45.0, 100.0, 175.0])
        self.doa = [angles, angles + 2]
        rng = np.random.default_rng(0)
        decay = np.exp(-np.arange(400) / 60)
        self._rirs = rng.standard_normal((2, 5, 3, 400)) * decay

    def __len__(self):
        return 2

    def rirs(self, room, talkers):
        return self._rirs[room][list(talkers)].astype(np.float32)

    def pairs(self, bucket):
        doa = self.doa[0]
        return [
            (room, a, b)
            for room in range(2)
            for a in range(5)
            for b in range(5)
            if a != b and bucket[0] <= abs(doa[a] - doa[b]) < bucket[1]
        ]


@pytest.fixture
def speech(tmp_path):
    rng = np.random.default_rng(1)
    entries = {}
    for i in range(8):
        path = tmp_path / f"u{i}.flac"
        voice = rng.standard_normal(16000 + 4000 * i) * 0.05
        soundfile.write(path, voice, 16000)
        entries[f"u{i}"] = {
            "wav": str(path),
            "words": f"word {i}",
            "speaker": f"s{i % 3}",
        }
    return entries


def test_ratio_sum_and_peak(speech):
    maker = MixtureMaker(speech, Bank())
    for key in speech:
        drawn = maker.draw(key)
        signals = maker.render(drawn)
        target, interferer = signals["target"], signals["interferer"]
        ratio = 10 * np.log10((target**2).sum() / (interferer**2).sum())
        assert ratio == pytest.approx(drawn["sir"], abs=0.01)
        np.testing.assert_allclose(
            target + interferer, signals["mixture"][:, 0], atol=1e-5
        )
        assert np.abs(signals["mixture"]).max() == pytest.approx(0.9, abs=1e-4)


def test_convolution_against_the_slow_one():
    rng = np.random.default_rng(0)
    voices = [rng.standard_normal(n).astype(np.float32) for n in (50, 30)]
    rirs = rng.standard_normal((2, 2, 9)).astype(np.float32)
    signals = mix(_at_offsets(voices, (0, 35)), rirs, sir=3.0)
    first = np.zeros(65)
    first[:58] = np.convolve(voices[0], rirs[0, 0])
    peak = np.abs(first).argmax()
    scale = signals["target"][peak] / first[peak]
    np.testing.assert_allclose(signals["target"], scale * first, atol=1e-5)


def test_draws_follow_seed_and_epoch_alone(speech):
    a, b = (MixtureMaker(speech, Bank(), seed=5) for _ in range(2))
    assert a.draw("u1") == b.draw("u1")
    b.epoch = 1
    assert a.draw("u1") != b.draw("u1")
    b.epoch = 0
    assert a.draw("u1") == b.draw("u1")
    assert a.draw("u1") != MixtureMaker(speech, Bank(), seed=6).draw("u1")


def test_draws_cover_what_the_paper_says(speech):
    maker = MixtureMaker(speech, Bank(), mirror=True)
    drawn = []
    for maker.epoch in range(60):
        drawn += [maker.draw(key) for key in speech]
    assert {d["sir"] for d in drawn} == set(SIRS)
    assert all(0.6 <= d["overlap"] <= 1 for d in drawn)
    assert {d["mirrored"] for d in drawn} == {True, False}
    counts = [
        sum(low <= d["angle"] < high for d in drawn) for low, high in BUCKETS
    ]
    assert min(counts) > 0.7 * len(drawn) / 4
    for d in drawn:
        assert (
            speech[d["target"]]["speaker"]
            != (speech[d["interferer"]]["speaker"])
        )
        assert d["doa_given"] == d["doa"]


def test_mirrored_scene_has_its_channels_reversed(speech):
    maker = MixtureMaker(speech, Bank())
    drawn = {**maker.draw("u2"), "sir": 200.0}  # the target alone
    plain = maker.render(drawn)["mixture"]
    other = maker.render({**drawn, "mirrored": True})["mixture"]
    np.testing.assert_allclose(plain, other[:, ::-1], atol=1e-4)


def test_camera_error_has_its_standard_deviation(speech):
    maker = MixtureMaker(speech, Bank(), doa_error=4.0)
    errors = []
    for maker.epoch in range(100):
        drawn = [maker.draw(key) for key in speech]
        errors += [d["doa_given"] - d["doa"] for d in drawn]
        assert all(0 <= d["doa_given"] <= 180 for d in drawn)
    assert 2.5 < np.std(errors) < 4.5


def test_training_set_crops_and_pads(speech):
    maker = MixtureMaker(speech, Bank())
    for seconds in (0.5, 4.0):
        item = training_mixtures(maker, seconds, count=4)[3]
        assert item["mixture"].shape == (int(16000 * seconds), 3)
        assert item["targets"].shape == (int(16000 * seconds), 2)
        assert item["doa"].shape == (2,)
    with pytest.raises(ValueError, match="8 utterances"):
        training_mixtures(maker, 1.0, count=9)


def test_test_set_is_fixed_and_takes_turns(speech):
    maker = MixtureMaker(speech, Bank())
    mixtures = fixed_mixtures(maker, 8)
    assert mixtures == fixed_mixtures(MixtureMaker(speech, Bank()), 8)
    assert json.loads(json.dumps(mixtures)) == mixtures
    for i, mixture in enumerate(mixtures.values()):
        low, high = BUCKETS[i % 4]
        assert low <= mixture["angle"] < high
    item = listed_mixtures(maker, mixtures)[0]
    assert item["targets"].shape == (len(item["mixture"]), 1)
    with pytest.raises(ValueError, match="9 mixtures"):
        fixed_mixtures(maker, 9)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: np.zeros(16000), "silent or holds NaN"),
        (lambda: np.full(16000, np.nan), "silent or holds NaN"),
        (lambda: np.ones((16000, 2)) * 0.1, "expected mono 16000 Hz"),
        (lambda: np.zeros(0), "less than one window"),
        (lambda: np.ones(511) * 0.1, "less than one window"),
    ],
)
def test_bad_audio_names_the_file(speech, tmp_path, make, message):
    path = tmp_path / "bad.wav"
    soundfile.write(path, make(), 16000, subtype="FLOAT")
    speech["u1"]["wav"] = str(path)
    maker = MixtureMaker(speech, Bank())
    with pytest.raises(ValueError, match=f"bad.wav.*{message}"):
        maker.render(maker.draw("u1"))


def test_wrong_rate_and_truncated_audio_name_the_file(speech, tmp_path):
    maker = MixtureMaker(speech, Bank())
    path = tmp_path / "rate.wav"
    soundfile.write(path, np.ones(800) * 0.1, 8000)
    speech["u1"]["wav"] = str(path)
    with pytest.raises(ValueError, match="rate.wav.*8000 Hz"):
        maker.render(maker.draw("u1"))
    broken = tmp_path / "broken.flac"
    broken.write_bytes(b"fLaC")
    speech["u1"]["wav"] = str(broken)
    with pytest.raises(ValueError, match="broken.flac.*cannot be read"):
        maker.render(maker.draw("u1"))


def test_manifest_with_a_missing_key(tmp_path):
    path = tmp_path / "speech.json"
    path.write_text('{"a": {"wav": "{data_root}/a.flac", "words": "x"}}')
    with pytest.raises(ValueError, match="speech.json: a has no.*speaker"):
        load_speech(path, tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="speech.json is no JSON"):
        load_speech(path, tmp_path)
    with pytest.raises(FileNotFoundError, match="none.json"):
        load_speech(tmp_path / "none.json", tmp_path)


def test_one_speaker_cannot_make_a_mixture(speech):
    for entry in speech.values():
        entry["speaker"] = "same"
    with pytest.raises(ValueError, match="two speakers"):
        MixtureMaker(speech, Bank())
