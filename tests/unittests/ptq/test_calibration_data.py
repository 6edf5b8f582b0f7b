"""Manifests in SpeechBrain's own forms, and references in them."""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq import quantize_pretrained
from speechbrain_mpq.commands.quantize import _significance
from speechbrain_mpq.ptq import task_metrics
from speechbrain_mpq.ptq.calibration_data import (
    Example,
    check_files,
    read_items,
    read_manifest,
)
from speechbrain_mpq.ptq.pretrained import _empty_folder, _move
from speechbrain_mpq.ptq.task_metrics import (
    ErrorRate,
    Quality,
    SourceSISNR,
    WordErrorRate,
)
from speechbrain_mpq.utils import _SCRATCH

NAME = "{data_root}/long.wav"
ENTRIES = {
    "file": {"wav": {"file": NAME, "start": 100, "stop": 300}},
    "files": {"wav": {"files": [NAME, NAME], "start": 100, "stop": 300}},
    "beside": {"wav": NAME, "start": 100, "stop": 300},
    "rest": {"wav": {"file": NAME, "start": 100}},
}


@pytest.fixture
def audio(tmp_path):
    """A file of 400 samples."""
    samples = np.random.default_rng(0).standard_normal(400) / 9
    soundfile.write(tmp_path / "long.wav", samples, 16000)
    return samples


def items(folder, entries, suffix="json"):
    """What is read of a manifest."""
    path = folder / f"manifest.{suffix}"
    text = entries if suffix == "csv" else json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return read_items(read_manifest(path), 16000)


@pytest.mark.parametrize("form", ENTRIES)
def test_segments_are_those_of_speechbrain(form, audio, tmp_path):
    (item,) = items(tmp_path, {"a": ENTRIES[form]})
    wanted = audio[100:] if form == "rest" else audio[100:300]
    assert np.allclose(item.audio, wanted, atol=1e-4)


def test_audio_that_is_not_kept_is_read_where_it_is_asked_for(audio, tmp_path):
    path = tmp_path / "long.wav"
    entries = {"a": {"wav": str(path)}}
    (item,) = read_items(entries, 16000, keep=False)
    assert torch.equal(item.audio, read_items(entries, 16000)[0].audio)
    path.unlink()
    with pytest.raises(ValueError, match="manifest entry 'a'"):
        item.audio  # noqa: B018
    with pytest.raises(ValueError, match="manifest entry 'a'"):  # at once
        read_items(entries, 16000, keep=False)


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_manifests_that_an_editor_has_written(suffix, audio, tmp_path):
    text = json.dumps({"a": {"wav": NAME}})
    rows = "ID,duration,wav\na,1.0,$data_root/long.wav\n"
    path = tmp_path / f"manifest.{suffix}"
    path.write_text(text if suffix == "json" else rows, encoding="utf-8-sig")
    (item,) = read_items(read_manifest(path), 16000)
    assert item.key == "a" and len(item.audio) == 400


def test_manifests_that_readers_would_differ_on(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"a": {"wav": "a.wav"}, "a": {"wav": "b.wav"}}')
    with pytest.raises(ValueError, match="the key 'a' twice"):
        read_manifest(path)


@pytest.mark.parametrize("text", ["[1]", '{"a": 5}', '{"a": ["b.wav"]}', '"a"'])
def test_what_is_no_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is no manifest"):
        read_manifest(tmp_path / "manifest.json")


def test_braces_of_a_transcript_are_no_places(audio, tmp_path):
    said = "{noise} so {data_root:>999999999999} {"
    (item,) = items(tmp_path, {"a": {"wav": NAME, "words": said}})
    assert item.entry["words"] == said and len(item.audio) == 400


def test_a_manifest_from_a_pipe(audio, tmp_path):
    pipe, entry = tmp_path / "pipe", {"a": {"wav": NAME}}
    os.mkfifo(pipe)
    text = json.dumps(entry)
    writer = threading.Thread(target=pipe.write_text, args=[text])
    writer.start()
    (item,) = read_items(read_manifest(pipe), 16000)
    writer.join()
    assert len(item.audio) == 400


def test_audio_whose_header_lies_is_read_whole(audio, tmp_path):
    path = tmp_path / "long.wav"
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = (80).to_bytes(4, "little")
    path.write_bytes(content)
    (item,) = items(tmp_path, {"a": {"wav": NAME}})
    assert np.allclose(item.audio, audio, atol=1e-4)


def test_files_of_one_recording_have_one_rate(audio, tmp_path):
    soundfile.write(tmp_path / "other.wav", np.zeros(400), 8000)
    files = [NAME, "{data_root}/other.wav"]
    with pytest.raises(ValueError, match=r"sampled at \[8000, 16000\] Hz"):
        items(tmp_path, {"a": {"wav": {"files": files}}})


def test_columns_of_a_csv(audio, tmp_path):
    rows = "a,1.0,$data_root/long.wav,0,7\nb,1.0,$data_root/long.wav,9,400\n"
    found = items(tmp_path, f"ID,duration,wav,start,stop\n{rows}", "csv")
    assert [len(item.audio) for item in found] == [7, 391]


TIMES = {
    "Libriheavy": {"wav": NAME, "start": 0.00625, "duration": "0.0125"},
    "GigaSpeech": {"wav": NAME, "begin_time": "0.00625", "end_time": 0.01875},
    "no limits": {"wav": NAME, "start": "", "stop": None, "duration": 1.5},
}


@pytest.mark.parametrize("form", TIMES)
def test_times_are_those_of_speechbrains_recipes(form, audio, tmp_path):
    (item,) = items(tmp_path, {"a": TIMES[form]})
    wanted = audio if form == "no limits" else audio[100:300]
    assert np.allclose(item.audio, wanted, atol=1e-4)


def test_a_channel_is_that_of_switchboard(tmp_path):
    """It is no mean of both sides of a telephone call."""
    sides = np.random.default_rng(0).standard_normal((400, 2)) / 9
    soundfile.write(tmp_path / "long.wav", sides, 16000)
    entries = {
        side: {"wav": NAME, "start": 0, "stop": 400, "channel": side}
        for side in "AB"
    }
    for item, side in zip(items(tmp_path, entries), sides.T, strict=True):
        assert np.allclose(item.audio, side, atol=1e-4)
    with pytest.raises(ValueError, match="channel is 1, of .* with its 2"):
        items(tmp_path, {"a": {"wav": NAME, "channel": 1}})


@pytest.mark.parametrize(
    "entry, match",
    [
        ({"wav": NAME, "start": 0, "duration": -1}, "duration is -1, not a nu"),
        ({"wav": NAME, "start": 0, "duration": "0"}, "stop 0.0 is not behind"),
        ({"wav": NAME, "start": 9, "duration": 2}, "has no samples 144000 to"),
        ({"wav": NAME, "begin_time": 0}, "end_time is None, not a number"),
        ({"wav": NAME, "offset": 1, "duration": 2}, "'offset' is not known"),
        ({"wav": NAME, "start_time": 0, "end_time": 1}, "'start_time' is not"),
        ({"wav": NAME, "wav_opts": "start:9 stop:99"}, "make columns start an"),
        ({"wav": NAME, "stop": "1e999"}, "stop is '1e999', not a number of s"),
        ({"wav": NAME, "start": 300, "stop": 500}, "has no samples 300 to 500"),
        ({"wav": NAME, "start": 3, "stop": 3}, "stop 3 is not behind start 3"),
        ({"wav": NAME, "start": 0.5}, "start is 0.5, not a number of samples"),
        ({"wav": {"path": NAME}}, "'wav' is {'path'"),
        ({"wav": []}, "not the name of a file"),
    ],
)
def test_segments_that_are_none(entry, match, audio, tmp_path):
    with pytest.raises(ValueError, match=match):
        items(tmp_path, {"a": entry})


@pytest.mark.parametrize(
    "durations, told",
    [
        ([0.025, "0.025", "unknown"], ""),
        ([0.025, 1.5, 0.01], r"2 of 3 recordings .*\(1: 0.03 s, not 1.5\)"),
    ],
)
def test_other_lengths_than_the_manifest_means_are_told(
    durations, told, audio, tmp_path, caplog
):
    """As where keys that nobody reads name a part of each file."""
    rows = enumerate(durations)
    items(tmp_path, {str(i): {"wav": NAME, "duration": d} for i, d in rows})
    assert re.search(told, caplog.text) and bool(told) == bool(caplog.text)


def test_missing_audio_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="entry 'a': no file gone.wav"):
        check_files({"a": {"wav": "gone.wav"}})


def words(*said):
    """Items with these references."""
    return [
        SimpleNamespace(key=str(i), entry={"words": w, "label": w})
        for i, w in enumerate(said)
    ]


def test_lists_are_words_and_missing_references_do_not_count():
    given = words(["place", "it"], None, "here")
    heard = ["place it", "noise", "there"]
    quality = WordErrorRate().aggregate(given, heard)
    assert (quality.count, round(quality.value, 2)) == (2, 33.33)
    assert ErrorRate().aggregate(words(5, None), ["5", "x"]).value == 0


@pytest.mark.parametrize(
    "said, match",
    [
        (["", " "], "no reference under 'words' has a word"),
        ([None], "no entry of the manifest has a reference"),
        ([{"a": 1}], "which is no text"),
        ([[1, 2]], "which is no text"),
    ],
)
def test_references_that_say_nothing(said, match):
    with pytest.raises(ValueError, match=match):
        WordErrorRate().check(words(*said))
    with pytest.raises(ValueError):
        quality = Quality("WER, %", 0.0, 1, {"a": ("", "")})
        assert not _significance({"source": quality, "packed": quality})
        WordErrorRate().aggregate(words(*said), ["x"] * len(said))


def test_labels_that_a_csv_lacks_are_not_wrong():
    given = words("a", "", None, "b")
    assert ErrorRate().aggregate(given, ["a", "b", "b", "b"]).value == 0
    assert len(ErrorRate().measured(given)) == 2
    with pytest.raises(ValueError, match="no entry of the manifest has"):
        ErrorRate().check(words("", ""))


@pytest.mark.parametrize("measure", [WordErrorRate(), ErrorRate()])
def test_references_that_are_written_otherwise_are_told(measure):
    quality = measure.aggregate(words("", "PLACE", "BLUE"), ["", "place", "x"])
    assert quality.unmet == ("PLACE", "place")
    assert not _significance({"source": quality, "packed": quality})
    quality = measure.aggregate(words("PLACE", "BLUE"), ["place", "BLUE"])
    assert quality.unmet is None


@pytest.mark.parametrize(
    "gain, length, match",
    [
        (0.0, 8000, "'s2_wav' is silent"),
        (1.0, 800, "'s2_wav' has 800 samples, its mixture 8000"),
        (1.0, 16000, "'s2_wav' has 16000 samples, its mixture 8000"),
        (1.0, 8100, ""),
    ],
)
def test_sources_of_no_use_are_refused(gain, length, match, tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(tmp_path / "s1.wav", noise[:8000], 16000)
    soundfile.write(tmp_path / "s2.wav", gain * noise[:length], 16000)
    entry = {f"{k}_wav": str(tmp_path / f"{k}.wav") for k in ("s1", "s2")}
    entries = {"a": {**entry, "wav": entry["s1_wav"]}}
    items = read_items(entries, 16000)
    if not match:
        SourceSISNR().check_audio(items)
        return
    with pytest.raises(ValueError, match=match):
        SourceSISNR().check_audio(items)


@pytest.mark.parametrize("kind", ["link", "dangling link", "empty", "new"])
def test_outputs_of_every_kind_take_the_result(kind, tmp_path):
    result, real = tmp_path / "result", tmp_path / "real"
    result.mkdir()
    (result / "card.md").write_text("done")
    output = tmp_path / "output"
    if "link" in kind:
        output.symlink_to(real)
    if kind == "link":
        real.mkdir()
    if kind == "empty":
        output.mkdir()
    _move(result, _empty_folder(output))
    assert (output / "card.md").read_text() == "done"
    assert output.is_symlink() == ("link" in kind)


def test_what_cannot_be_written_is_told_before_the_source_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nothing can be written to"):
        quantize_pretrained(
            "nowhere", "EncoderASR", "m.json", 4, tmp_path / "file/deep/out"
        )


def test_the_cost_of_measuring_is_told(monkeypatch):
    """Two looks at each item that has a reference, as long as one took."""
    seconds = iter([10.0, 70.0])
    monkeypatch.setattr(
        task_metrics.time, "perf_counter", lambda: next(seconds)
    )
    items = [
        Example(key, torch.zeros(8), {"words": words})
        for key, words in {"a": "x", "b": None, "c": "y", "d": "z"}.items()
    ]
    asked = []

    class Words(WordErrorRate):
        """Whose interface answers nothing."""

        def predict(self, interface, item, wavs, lengths):
            asked.append((item.key, tuple(wavs.shape)))

    told = Words().cost(None, items)
    assert asked == [("c", (1, 8))]
    assert told.startswith("3 items are measured before and after, about 6 min")


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = tmp_path / f"{_SCRATCH}left"
    left.mkdir()
    (left / "lock").touch()  # which nobody holds
    _empty_folder(tmp_path / "out")
    assert not left.exists()


def test_a_part_of_a_result_is_no_model(tmp_path, monkeypatch):
    """Moved file by file into a folder that is there; the disk is full."""
    result, output = tmp_path / "result", tmp_path / "out"
    result.mkdir()
    output.mkdir()
    for name in ("z.ckpt", "hyperparams.yaml", "a.ckpt"):
        (result / name).touch()
    moved, plain = [], shutil.move

    def move(source, target):
        if len(moved) == 2:
            raise OSError("no space left")
        moved.append(Path(plain(source, target)).name)

    monkeypatch.setattr(shutil, "move", move)
    with pytest.raises(OSError, match="no space"):
        _move(result, output)
    assert moved == ["a.ckpt", "z.ckpt"] or moved == ["z.ckpt", "a.ckpt"]
