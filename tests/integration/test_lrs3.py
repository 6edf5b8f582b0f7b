"""LRS3-TED from its videos to a scored separator, on a tiny corpus.

The corpus has LRS3's layout and is made of drawn faces and synthetic voices.
"""

import doctest
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import ROOT, call, experiment

from speechbrain_mpq.simulation.corpus import utterance
from speechbrain_mpq.simulation.recordings import (
    ffmpeg_program,
    write_manifests,
)

for needed in ("espeakng_loader", "pyroomacoustics", "pesq"):
    pytest.importorskip(needed)
try:
    ffmpeg_program()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

sys.path.insert(0, str(ROOT / "recipes/LRS3"))
prepare, tiny = (
    importlib.import_module(name) for name in ("lrs3_prepare", "tiny_corpus")
)
CLIPS = 5
OPTIONS = {"valid_hours": 0.0015, "pretrain_hours": 0.006, "speakers": 0}


@pytest.fixture(scope="module")
def lrs3(tmp_path_factory):
    """A few clips of each part."""
    folder = tmp_path_factory.mktemp("lrs3")
    tiny.write_corpus(folder, clips=CLIPS, pixels=48)
    return folder


@pytest.fixture(scope="module")
def data(lrs3, tmp_path_factory):
    """What the recipe makes of them."""
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare_lrs3(lrs3, folder, **OPTIONS, workers=2)
    return folder


def manifests(data):
    """Split -> entries."""
    return {
        split: json.loads((data / f"{split}_speech.json").read_text())
        for split in ("train", "valid", "test")
    }


def test_splits_share_no_speaker(data):
    splits = manifests(data)
    people = {
        split: {entry["speaker"] for entry in entries.values()}
        for split, entries in splits.items()
    }
    assert not people["train"] & people["valid"]
    assert not (people["train"] | people["valid"]) & people["test"]
    assert len(splits["test"]) == CLIPS
    assert len(splits["valid"]) + sum(
        key.startswith("trainval") for key in splits["train"]
    ) == (CLIPS)
    seconds = sum(
        entry["length"]
        for key, entry in splits["train"].items()
        if key.startswith("pretrain")
    )
    assert 0 < seconds - 3600 * OPTIONS["pretrain_hours"] < 12


def original(entry):
    """The samples and words that a manifest entry was made of."""
    video = Path(entry["video"])
    part = ("pretrain", "trainval", "test").index(video.parts[-3])
    first = (part * CLIPS + int(video.stem) - 50001) * tiny.SENTENCES
    begin, split = 0.0, "test" if part == 2 else "train"
    for n in range(tiny.SENTENCES):
        samples, spoken = utterance(split, first + n)
        if begin >= entry["video_start"] - 0.5:
            return samples, spoken["words"], begin - entry["video_start"]
        begin += spoken["length"] + tiny.PAUSE
    raise AssertionError(f"nothing begins at {entry['video_start']} s")


def test_audio_and_words_are_those_of_the_videos(data):
    """Sample by sample, but for the loss of the sound's compression."""
    checked = 0
    for entries in manifests(data).values():
        for entry in entries.values():
            samples, words, begin = original(entry)
            assert entry["words"] == words
            path = entry["wav"].replace("{data_root}", str(data))
            stored, rate = soundfile.read(path, dtype="int16")
            assert rate == 16000
            stored = stored[round(begin * rate) :][: len(samples)]
            samples = samples[: len(stored)]
            similar = np.corrcoef(stored, samples)[0, 1]
            assert similar > 0.9, (entry["video"], similar)
            checked += entry["video_start"] > 0
    assert checked >= 2  # pieces from within a clip


def test_videos_play(data):
    cv2 = pytest.importorskip("cv2")
    from speechbrain_mpq.vision.video import Video

    assert cv2
    entry = next(iter(manifests(data)["test"].values()))
    video = Video(entry["video"])
    frames = sum(1 for _ in video)
    assert (video.fps, video.width) == (25, 48)
    assert frames == pytest.approx(25 * entry["length"], abs=2)


def test_again_makes_only_what_is_missing(lrs3, data):
    before = manifests(data)
    files = sorted(data.rglob("*.flac"))
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    files[1].write_bytes(b"fLaC")  # cut short
    prepare.prepare_lrs3(lrs3, data, **OPTIONS, workers=2)
    assert manifests(data) == before
    changed = {p for p in files if p.stat().st_mtime_ns != stamps[p]}
    assert changed == set(files[:2])


@pytest.fixture
def damaged(lrs3, tmp_path):
    """The corpus with one video cut short, and one transcript missing."""
    folder = tmp_path / "lrs3"
    for source in lrs3.rglob("*.*"):
        path = folder / source.relative_to(lrs3)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)
    videos = sorted((folder / "test").rglob("*.mp4"))
    content = videos[0].read_bytes()
    videos[0].unlink()
    videos[0].write_bytes(content[: len(content) // 2])
    videos[1].with_suffix(".txt").unlink()
    return folder, videos


def test_broken_files_are_named_and_nothing_is_written(damaged, tmp_path):
    folder, videos = damaged
    data = tmp_path / "data"
    with pytest.raises(ValueError, match=f"no .*{videos[1].stem}.txt"):
        prepare.prepare_lrs3(folder, data, **OPTIONS)
    assert not list(data.glob("*.json"))
    prepare.prepare_lrs3(folder, data, **OPTIONS, skip_broken=True)
    assert len(manifests(data)["test"]) == CLIPS - 2
    told = (data / "broken.txt").read_text().splitlines()
    assert len(told) == 2 and "cannot be decoded whole" in told[1]
    videos[1].with_suffix(".txt").write_text("Text:  HELLO\n")
    with pytest.raises(ValueError, match=str(videos[0])):
        prepare.prepare_lrs3(folder, tmp_path / "other", **OPTIONS)


def test_lrs2_by_one_option(tmp_path):
    tiny.write_corpus(tmp_path / "lrs2", layout="lrs2", clips=2, pixels=32)
    prepare.prepare_lrs3(
        tmp_path / "lrs2", tmp_path / "data", "lrs2", pretrain_hours=0.003
    )
    splits = manifests(tmp_path / "data")
    assert len(splits["valid"]) == len(splits["test"]) == 2
    assert sum(key.startswith("train_") for key in splits["train"]) == 2
    assert any(key.startswith("pretrain_") for key in splits["train"])


def test_the_experiment_runs_on_it(data, folder):
    """The README's command, at tiny size."""
    # The embedded corpus's rooms: the microphones are the same
    shutil.copytree(folder / "data/rooms", data / "rooms")
    options = {
        "data_folder": data,
        "corpus": "lrs3",
        "skip_prep": True,
        "mixtures": {"train": 4, "valid": 2, "test": 4},
        "number_of_epochs": 1,
    }
    line = experiment(folder, "pretrain.yaml", **options)
    place = "recipes/LRS3/separation"
    call(f"{place}/train.py", *line, folder=ROOT / place)
    results = folder / "results/pretrain_32bit/1234"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["corpus"] == "lrs3"
    assert sum(b["n"] for b in metrics["buckets"].values()) == 4


@pytest.fixture
def close_ups(tmp_path):
    """Two videos with their manifest, and the faces drawn in them."""
    drawn, entries = {}, {}
    for index in range(2):
        samples, entry = utterance("test", index)
        sentence = (samples[:24000], {**entry, "length": 1.5})
        stem = tmp_path / f"test/s{index}/50001"
        tiny.write_clip(stem, [sentence], 96)
        start = 0.4 * index
        entries[f"clip{index}"] = {
            "wav": "a.flac",
            "words": entry["words"],
            "speaker": f"s{index}",
            "length": 1.5 - start,
            "video": str(stem.with_suffix(".mp4")),
            "video_start": start,
        }
        drawn[f"clip{index}"] = tiny.draw_frames(
            entry["phonemes"], len(sentence[0]), 96, f"s{index}"
        )[round(25 * start) :]
    write_manifests(tmp_path, {"test": entries})
    return tmp_path, drawn


def test_lips_are_cut_out_of_the_videos(close_ups):
    pytest.importorskip("cv2")
    lips = importlib.import_module("lrs3_lips")
    from speechbrain_mpq.vision.video import mouth_pictures

    assert not doctest.testmod(lips, extraglobs={"np": np}).failed
    data, drawn = close_ups
    lips.prepare_lips(data, (24, 32), workers=1)
    entries = json.loads((data / "test_speech.json").read_text())
    for key, entry in entries.items():
        found = np.load(entry["lips"])
        assert found.shape == (int(np.ceil(25 * entry["length"])), 24, 32)
        # The drawn face box fills two thirds of the picture
        boxes = np.tile([16.0, 16, 64, 64], (len(drawn[key]), 1))
        expected = mouth_pictures(drawn[key], boxes, (24, 32))
        count = min(len(found), len(expected)) - 1
        # Open mouths are darker: a picture early or late would give 0.8
        light = [x[:count].mean((1, 2)) for x in (found, expected)]
        assert np.corrcoef(*light)[0, 1] > 0.9, key
    tiny.write_video(
        Path(entries["clip0"]["video"]),
        np.full((25, 96, 96), 128, np.uint8),
        np.ones(16000, np.int16),
    )
    with pytest.raises(ValueError, match="no lips in 1 videos(.|\n)*--blank"):
        lips.prepare_lips(data, (8, 8), workers=1)
    lips.prepare_lips(data, (8, 8), workers=1, blank=True)
    entries = json.loads((data / "test_speech.json").read_text())
    assert not np.load(entries["clip0"]["lips"]).any()
    found = np.load(entries["clip1"]["lips"]).any(axis=(1, 2))
    assert found[:-1].all()  # the video may be a part of a picture shorter
