"""Lips of mixtures: in time, repeatable, their controls, bad manifests."""

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.simulation.dataio import listed_mixtures, training_mixtures
from speechbrain_mpq.simulation.lip_videos import (
    PERFECT,
    SHOWN,
    TRAINING,
    LipVideos,
)
from speechbrain_mpq.simulation.mixtures import MixtureMaker, fixed_mixtures

SIZE = (12, 16)
MIXTURE = {
    "target": "u0",
    "interferer": "u1",
    "overlap": 1.0,
    "target_first": True,
}


class Bank:
    """Stands in for a RoomBank: one room, an echo, talkers all around."""

    doa = [np.array([5.0, 15.0, 45.0, 100.0, 175.0])]

    def __len__(self):
        return 1

    def rirs(self, room, talkers):
        rirs = np.zeros((len(talkers), 2, 50), np.float32)
        rirs[..., 3] = 1
        return rirs

    def pairs(self, bucket):
        angle = np.abs(self.doa[0][:, None] - self.doa[0])
        inside = (angle >= bucket[0]) & (angle < bucket[1])
        np.fill_diagonal(inside, False)
        return [(0, int(a), int(b)) for a, b in np.argwhere(inside)]


@pytest.fixture
def speech(tmp_path):
    """Four utterances, open for a vowel in the second half."""
    entries = {}
    for i in range(4):
        path = tmp_path / f"u{i}.flac"
        samples = 32000 + 1600 * i
        voice = np.random.default_rng(i).standard_normal(samples) * 0.05
        soundfile.write(path, voice, 16000)
        middle, end = samples / 32000, samples / 16000
        entries[f"u{i}"] = {
            "wav": str(path),
            "words": "a",
            "speaker": f"s{i % 2}",
            "length": end,
            "phonemes": [[0.0, middle, "_:"], [middle, end, "A:"]],
        }
    return entries


@pytest.fixture
def maker(speech):
    return MixtureMaker(speech, Bank())


def darkness(clip):
    """Darkest pixel in the middle of every picture."""
    return clip[:, 3:-3, 5:-5].min((1, 2)).astype(int)


def test_lips_open_when_the_voice_begins(maker):
    videos = LipVideos(maker, SIZE, PERFECT)
    target, interferer = videos.render(MIXTURE)
    # u1 is longer and all of u0 is overlapped: u0 begins at 0, u1 too
    for clip, middle in ((target, 1.0), (interferer, 1.05)):
        dark = darkness(clip)
        assert dark[round(25 * middle) + 6 :][:15].max() < 40
        assert dark[: round(25 * middle) - 8].min() > 60


def test_a_shift_of_the_speech_shifts_the_lips(maker):
    videos = LipVideos(maker, SIZE, PERFECT)
    late = {**MIXTURE, "overlap": 0.6}
    shift = 2.0 - 0.6 * 2.0  # seconds by which u1 begins later
    early, later = (videos.render(m)[1] for m in (MIXTURE, late))
    pictures = round(25 * shift)
    assert len(later) - len(early) == pictures
    assert (later[pictures:] == early).all()


def test_a_cut_shows_what_the_whole_does(maker):
    videos = LipVideos(maker, SIZE, PERFECT)
    whole = videos.render(MIXTURE)
    part = videos.render(MIXTURE, start=640 * 10, samples=16000)
    assert part.shape == (2, 25, *SIZE)
    assert (part == whole[:, 10:35]).all()


def test_drawn_anew_in_every_epoch_and_again_the_same(maker):
    videos = LipVideos(maker, SIZE, TRAINING)
    first = videos.render(MIXTURE)
    assert (videos.render(MIXTURE) == first).all()
    maker.epoch = 1
    assert (videos.render(MIXTURE) != first).any()


def test_lips_do_not_change_what_is_heard(maker):
    drawn = maker.draw("u0")
    heard = maker.render(drawn)
    LipVideos(maker, SIZE, TRAINING).render(drawn)
    assert maker.draw("u0") == drawn
    assert (maker.render(drawn)["mixture"] == heard["mixture"]).all()


def test_controls(maker):
    clips = {
        shown: LipVideos(maker, SIZE, PERFECT, shown).render(MIXTURE)
        for shown in SHOWN
    }
    assert not clips["none"].any()
    assert (clips["frozen"] == clips["frozen"][:, :1]).all()
    assert (clips["interferer"] == clips["own"][::-1]).all()
    assert clips["other"].shape == clips["own"].shape
    with pytest.raises(ValueError, match="shown must be"):
        LipVideos(maker, SIZE, shown="nothing")


def test_swapped_lips_are_those_of_another_utterance(maker):
    for key in ("u0", "u1"):  # nobody opens the mouth in these two
        maker.speech[key]["phonemes"] = [[0.0, 2.0, "_"]]
    silent = LipVideos(maker, SIZE, PERFECT).render(MIXTURE)
    assert darkness(silent[0]).min() > 60
    for epoch in range(20):
        maker.epoch = epoch
        other = LipVideos(maker, SIZE, PERFECT, "other").render(MIXTURE)
        if darkness(other[0]).min() < 40:
            return
    raise AssertionError("other lips never showed another utterance")


def test_other_lips_are_never_the_own_ones(maker, monkeypatch):
    shown = []

    def drawn(self, key, speaker, times, rng):
        shown.append(key)
        return np.zeros((len(times), *SIZE), np.float32)

    monkeypatch.setattr(LipVideos, "_drawn", drawn)
    videos = LipVideos(maker, SIZE, PERFECT, "other")
    for maker.epoch in range(30):
        videos.render(MIXTURE, samples=1)
    targets, interferers = set(shown[::2]), set(shown[1::2])
    assert targets == {"u1", "u2", "u3"}
    assert interferers == {"u0", "u2", "u3"}


def test_files_of_pictures_are_shown_in_time(maker, tmp_path):
    stored = np.arange(1, 51, dtype=np.uint8)[:, None, None]
    stored = np.broadcast_to(stored, (50, *SIZE))
    np.save(tmp_path / "u0.npy", stored)
    maker.speech["u0"]["lips"] = str(tmp_path / "u0.npy")
    clip = LipVideos(maker, SIZE, PERFECT).render(MIXTURE, start=640 * 3)[0]
    assert clip[:10, 0, 0].tolist() == list(range(4, 14))
    assert (clip[-1] == 50).all()  # the last one is held
    np.save(tmp_path / "u0.npy", stored[:, 1:])
    with pytest.raises(ValueError, match="crop it again"):
        LipVideos(maker, SIZE).render(MIXTURE)


def test_files_of_pictures_that_are_no_good_are_named(maker, tmp_path):
    path = tmp_path / "u0.npy"
    maker.speech["u0"]["lips"] = str(path)
    whole = np.zeros((50, *SIZE), np.uint8)

    def refused(match):
        with pytest.raises(ValueError, match=f"u0.npy {match}"):
            LipVideos(maker, SIZE).render(MIXTURE)

    refused("cannot be read")  # missing
    path.write_bytes(b"")
    refused("cannot be read")
    np.save(path, whole)
    path.write_bytes(path.read_bytes()[:-100])
    refused("cannot be read")
    for pictures, late in ((0, 2.0), (35, 0.6)):
        np.save(path, whole[:pictures])
        refused(f"ends {late} s before the sound of u0")
    np.save(path, whole[:40])  # its last picture is held
    assert LipVideos(maker, SIZE).render(MIXTURE).shape[2:] == SIZE


def test_a_manifest_without_phonemes_is_refused(maker):
    del maker.speech["u2"]["phonemes"]
    with pytest.raises(ValueError, match="u2 needs a length"):
        LipVideos(maker, SIZE)


def test_datasets_have_lips_only_with_videos(maker):
    videos = LipVideos(maker, SIZE, TRAINING)
    plain, with_lips = (
        training_mixtures(maker, 1.0, None, v)[0] for v in (None, videos)
    )
    assert "lips" not in plain and with_lips["lips"].dtype == torch.uint8
    assert with_lips["lips"].shape == (2, 25, *SIZE)
    assert torch.equal(plain["mixture"], with_lips["mixture"])
    fixed = fixed_mixtures(maker, 4)
    for key, item in zip(fixed, listed_mixtures(maker, fixed, videos)):
        assert item["id"] == key
        pictures = -(-len(item["mixture"]) // 640)
        assert item["lips"].shape == (1, pictures, *SIZE)


def test_the_cut_of_the_training_is_that_of_the_sound(maker):
    perfect = LipVideos(maker, SIZE, PERFECT)
    drawn = maker.draw("u3")
    item = training_mixtures(maker, 1.0, None, perfect)[3]
    start = round(drawn["cut"] * (perfect.samples(drawn) - 16000))
    signals = maker.render(drawn)
    assert len(signals["mixture"]) == perfect.samples(drawn)
    np.testing.assert_array_equal(
        item["mixture"], signals["mixture"][start : start + 16000]
    )
    np.testing.assert_array_equal(
        item["lips"], perfect.render(drawn, start, 16000)
    )


def test_a_talker_alone_shows_what_the_mixture_does(maker):
    videos = LipVideos(maker, SIZE, PERFECT)
    mixed = videos.render(MIXTURE)[0]  # u0 begins with the mixture
    alone = videos.utterance("u0")
    assert len(alone) == 50 and (alone == mixed[:50]).all()
    assert (videos.utterance("u0", 640 * 4, 9) == mixed[4:13]).all()
