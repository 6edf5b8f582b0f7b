"""Mixtures: levels, overlap, repeatability, bad input."""

import json

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.augmentation import Augmentation
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


@pytest.mark.parametrize(
    "content, match",
    [
        ("[1]", "is no manifest"),
        ('{"a": 5}', "is no manifest"),
        ('{"a": {"wav": 5, "words": "", "speaker": ""}}', "no file's name"),
        (
            '{"a": {"wav": "a", "words": "", "speaker": "", "start": 1}}',
            "names a part of a file by start",
        ),
        (
            '{"a": {"wav": {"file": "a"}, "words": "", "speaker": ""}}',
            "names a part of a file by wav",
        ),
    ],
)
def test_manifests_that_cannot_be_mixed(content, match, tmp_path):
    path = tmp_path / "speech.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"speech.json.*{match}"):
        load_speech(path, tmp_path)


def test_one_speaker_cannot_make_a_mixture(speech):
    for entry in speech.values():
        entry["speaker"] = "same"
    with pytest.raises(ValueError, match="two speakers"):
        MixtureMaker(speech, Bank())


def with_corpora(speech, names):
    """The utterances as those of several corpora."""
    return {
        f"{name}/{key}": {**entry, "speaker": f"{name} {entry['speaker']}"}
        for name in names
        for key, entry in speech.items()
    }


def test_corpora_are_drawn_by_share(speech):
    both = with_corpora(speech, ["data/a", "data/b"])
    shares = {"data/a": 1, "data/b": 3}
    maker = MixtureMaker(both, Bank(), shares=shares)
    targets = [maker.draw_target(f"mixture_{i}") for i in range(2000)]
    share = np.mean([target.startswith("data/b/") for target in targets])
    assert share == pytest.approx(0.75, abs=0.03)
    interferers = [maker.draw("data/a/u0", key=str(i)) for i in range(400)]
    share = np.mean([d["interferer"][:6] == "data/b" for d in interferers])
    # five of the eight utterances of its own corpus are another speaker's
    assert share == pytest.approx(0.75 / (0.75 + 0.25 * 5 / 8), abs=0.05)
    # whose bucket does not depend on the corpus that was drawn
    buckets = {"data/a": [], "data/b": []}
    for i in range(2000):
        target = maker.draw_target(f"mixture_{i}")
        drawn = maker.draw(target, key=f"mixture_{i}")
        buckets[target[:6]].append(drawn["angle"] < 15)
    means = [np.mean(values) for values in buckets.values()]
    assert means[0] == pytest.approx(means[1], abs=0.06)


def test_scored_mixtures_of_corpora_are_listed_by_share(speech):
    both = with_corpora(speech, ["a", "b"])
    maker = MixtureMaker(both, Bank(), shares={"a": 0.25, "b": 0.75})
    listed = fixed_mixtures(maker, 8)
    corpora = [drawn["target"][0] for drawn in listed.values()]
    assert corpora == ["a"] * 2 + ["b"] * 6
    assert len({drawn["target"] for drawn in listed.values()}) == 8


def test_a_corpus_without_utterances_or_share_is_named(speech):
    both = with_corpora(speech, ["a", "b"])
    for shares in ({"a": 1, "c": 1}, {"a": 1, "b": 0}):
        with pytest.raises(ValueError, match=f"corpus {[*shares][1]}"):
            MixtureMaker(both, Bank(), shares=shares)


def test_an_augmented_mixture_is_repeated_exactly(speech):
    everything = Augmentation(voice=1, noise=1, third_talker=1, microphones=1)
    maker = MixtureMaker(speech, Bank(), augmentation=everything)
    drawn = json.loads(json.dumps(maker.draw("u0")))
    once, again = maker.render(drawn), maker.render(drawn)
    for name, signal in once.items():
        np.testing.assert_array_equal(signal, again[name])
        assert np.isfinite(signal).all() and signal.dtype == np.float32
    # two talkers are not all that is heard
    rest = once["mixture"][:, 0] - once["target"] - once["interferer"]
    assert np.abs(rest).max() > 0.01
    plain = MixtureMaker(speech, Bank()).draw("u0")
    same = {k: v for k, v in plain.items() if k[:3] != "doa"}
    assert {k: drawn[k] for k in same} == same  # the scene is the same one


def test_an_augmentation_of_nothing_changes_nothing(speech):
    nothing = Augmentation(0, 0, third_talker=0, microphones=0, doa=0)
    maker = MixtureMaker(speech, Bank(), augmentation=nothing)
    plain = MixtureMaker(speech, Bank())
    signals = maker.render(maker.draw("u3"))
    for name, signal in plain.render(plain.draw("u3")).items():
        np.testing.assert_allclose(signals[name], signal, atol=1e-6)


def test_further_sources_have_the_ratio_they_are_given():
    rng = np.random.default_rng(0)
    voices = rng.standard_normal((3, 4000)).astype(np.float32)
    rirs = rng.standard_normal((3, 2, 50)).astype(np.float32)
    two = mix(voices[:2], rirs[:2], 6.0)
    three = mix(voices, rirs, 6.0, [10.0])
    scale = np.abs(three["target"]).max() / np.abs(two["target"]).max()
    third = three["mixture"][:, 0] - scale * two["mixture"][:, 0]
    ratio = 10 * np.log10((three["target"] ** 2).sum() / (third**2).sum())
    assert ratio == pytest.approx(10, abs=0.01)


def test_a_dead_microphone_hears_nothing():
    rng = np.random.default_rng(0)
    voices = rng.standard_normal((2, 4000)).astype(np.float32)
    rirs = rng.standard_normal((2, 3, 50)).astype(np.float32)
    gains = np.array([1, 0.5j, 0], np.complex64)
    plain = mix(voices, rirs, 0.0)["mixture"]
    heard = mix(voices, rirs, 0.0, response=(gains, np.array([0, 0.01, 0])))[
        "mixture"
    ]
    assert not heard[:, 2].any()
    assert heard[:, 1].mean() == pytest.approx(0.01 * 0.9, rel=0.1)
    ratio = np.abs(heard[:, 0]).max() / np.abs(plain[:, 0]).max()
    np.testing.assert_allclose(heard[:, 0], ratio * plain[:, 0], atol=1e-5)


def test_noise_alone_has_its_ratio_to_the_target(speech):
    noisy = Augmentation(
        voice=0, noise=1, snr=(10, 10), third_talker=0, microphones=0, doa=0
    )
    maker = MixtureMaker(speech, Bank(), augmentation=noisy)
    for key in speech:
        signals = maker.render(maker.draw(key))
        target, interferer = signals["target"], signals["interferer"]
        noise = signals["mixture"][:, 0] - target - interferer
        ratio = 10 * np.log10((target**2).sum() / (noise**2).sum())
        assert ratio == pytest.approx(10, abs=0.01)
