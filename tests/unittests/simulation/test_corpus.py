"""The synthetic corpus: its grammar, and its files on disk."""

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mpq.simulation import corpus
from speechbrain_mpq.simulation.corpus import WORDS, sentence

pytest.importorskip("espeakng_loader")


SIZES = {"train": 5, "valid": 2, "test": 2}
VOCABULARY = {word for words in WORDS.values() for word in words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    corpus.prepare_speech(folder, **SIZES, workers=1)
    return folder


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest(folder, split):
    return json.loads((folder / f"{split}_speech.json").read_text())


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    program = (
        "from speechbrain_mpq.simulation.corpus import prepare_speech\n"
        f"prepare_speech({str(tmp_path)!r}, **{SIZES!r}, workers=2)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert digests(tmp_path) == digests(folder)


def test_speechbrain_reads_the_manifest(folder):
    data = DynamicItemDataset.from_json(
        folder / "train_speech.json",
        replacements={"data_root": str(folder)},
        output_keys=["wav", "words", "speaker", "length"],
    )
    for item in data:
        samples, rate = soundfile.read(item["wav"])
        assert rate == 16000 and samples.ndim == 1
        assert len(samples) / rate == pytest.approx(item["length"])
        assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.05, rel=0.2)
        assert np.abs(samples).max() < 1
        assert len(item["words"].split()) in (8, 9)


def test_phoneme_times_increase_inside_the_utterance(folder):
    for entry in manifest(folder, "test").values():
        starts, ends, _ = zip(*entry["phonemes"])
        bounds = [time for pair in zip(starts, ends) for time in pair]
        assert bounds == sorted(bounds)
        assert bounds[0] >= 0 and bounds[-1] <= entry["length"]


def test_splits_share_no_speaker(folder):
    names = [
        {entry["speaker"] for entry in manifest(folder, split).values()}
        for split in SIZES
    ]
    assert sum(map(len, names)) == len(set.union(*names))


def test_partial_folder_is_completed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 2)
    corpus.prepare_speech(tmp_path, **SIZES, workers=1)
    whole = digests(tmp_path)
    missing = [
        "train_speech.json",
        "speech/train/entries_000002.json",
        "speech/train/train_000003.flac",
        "speech/train/train_000004.flac",
    ]
    for name in missing:
        (tmp_path / name).unlink()
    kept = tmp_path / "speech/train/train_000000.flac"
    os.utime(kept, (1, 1))
    corpus.prepare_speech(tmp_path, **SIZES, workers=1)
    assert digests(tmp_path) == whole
    assert kept.stat().st_mtime == 1


def test_killed_preparation_is_continued(folder, tmp_path):
    program = (
        "from speechbrain_mpq.simulation import corpus\n"
        f"corpus.prepare_speech({str(tmp_path)!r}, **{SIZES!r}, workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    while not any(tmp_path.rglob("*.flac")):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    (tmp_path / "speech/train").mkdir(exist_ok=True)
    half = tmp_path / "speech/train/train_000004.99.partial"
    half.write_bytes(b"fL")
    time.sleep(0.5)  # its workers end with the utterance at hand
    for half in tmp_path.rglob("*.partial"):
        os.utime(half, (0, 0))  # long ago
    assert not (tmp_path / "test_speech.json").exists()
    corpus.prepare_speech(tmp_path, **SIZES, workers=1)
    assert digests(tmp_path) == digests(folder)


def test_complete_folder_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(corpus, "synthesize", None)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.*")}
    corpus.prepare_speech(folder, **SIZES)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.*")} == before


def test_larger_corpus_extends_a_smaller_one(folder, tmp_path):
    small = {"train": 3, "valid": 1, "test": 1}
    corpus.prepare_speech(tmp_path, **small, workers=1)
    assert len(manifest(tmp_path, "train")) == 3
    corpus.prepare_speech(tmp_path, **SIZES, workers=1)
    assert digests(tmp_path) == digests(folder)


def test_another_seed_is_other_speech_and_another_folder(folder):
    first, _ = corpus.utterance("test", 0, seed=1234)
    second, _ = corpus.utterance("test", 0, seed=1235)
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="another data_folder"):
        corpus.prepare_speech(folder, **SIZES, seed=1235)


def test_same_generator_same_sentence():
    first = [sentence(np.random.default_rng(7)) for _ in range(2)]
    assert first[0] == first[1]
    assert sentence(np.random.default_rng(8)) != first[0]


def test_sentences_use_every_word_and_no_other():
    rng = np.random.default_rng(0)
    words = [word for _ in range(1500) for word in sentence(rng).split()]
    assert set(words) == VOCABULARY


def test_words_are_lower_case_letters_without_the_rhyming_ones():
    words = VOCABULARY
    assert 60 <= len(words) <= 80
    assert all(word.isalpha() and word.islower() for word in words)
    letters = {word for word in words if len(word) == 1}
    assert letters
    assert not letters & set("bcdegptvzajk")


def test_mean_length_is_eight_to_nine_words():
    rng = np.random.default_rng(0)
    lengths = [len(sentence(rng).split()) for _ in range(500)]
    assert set(lengths) == {8, 9}


ANNA = corpus.Speaker("anna", "en-us", "f1", 50, 50, 150, 1.0)


@pytest.fixture
def engine():
    return pytest.importorskip("espeakng_loader")


def test_splits_share_no_speaker_and_no_variant():
    people = {split: corpus.speakers(split) for split in corpus.SPEAKERS}
    assert {s: len(p) for s, p in people.items()} == corpus.SPEAKERS
    for key in ("name", "variant"):
        sets = [{getattr(s, key) for s in p} for p in people.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))


def test_speakers_follow_the_seed():
    assert corpus.speakers("train", 1) == corpus.speakers("train", 1)
    assert corpus.speakers("train", 1) != corpus.speakers("train", 2)


def test_every_test_and_validation_speaker_has_its_own_variant():
    for split in ("valid", "test"):
        variants = [s.variant for s in corpus.speakers(split)]
        assert len(set(variants)) == len(variants)


def test_noisy_variants_are_left_out():
    listed = [v for pair in corpus.VARIANTS.values() for v in sum(pair, [])]
    noisy = "Alicia Demonic f2 f3 f5 sandro victor whisper whisperf".split()
    assert not set(noisy) & set(listed)


def test_speaking_twice_gives_the_same_samples(engine):
    first, phonemes = corpus.synthesize("open the window", ANNA)
    corpus.synthesize("something else", ANNA)
    second, again = corpus.synthesize("open the window", ANNA)
    assert np.array_equal(first, second) and phonemes == again


def test_phoneme_times_increase_inside_the_waveform(engine):
    waveform, phonemes = corpus.synthesize("open the window", ANNA)
    starts, ends, symbols = zip(*phonemes)
    assert starts[0] >= 0
    assert ends[-1] <= len(waveform) / corpus.SAMPLE_RATE
    assert all(start < end for start, end in zip(starts, ends))
    assert all(end <= start for end, start in zip(ends, starts[1:]))
    assert all(symbols) and len(symbols) >= 10


def test_warp_raises_frequencies_and_keeps_the_duration(engine):
    low = corpus.dataclasses.replace(ANNA, warp=0.88)
    high = corpus.dataclasses.replace(ANNA, warp=1.13)
    centres, lengths = [], []
    for speaker in (low, high):
        waveform, _ = corpus.synthesize("seven green lamps", speaker)
        power = np.abs(np.fft.rfft(waveform)) ** 2
        centres.append(np.average(np.arange(len(power)), weights=power))
        centres[-1] /= len(waveform)
        lengths.append(len(waveform))
    assert centres[1] > 1.1 * centres[0]
    assert 0.85 < lengths[1] / lengths[0] < 1.15


def test_unknown_voice_is_refused(engine, capfd):
    nobody = corpus.dataclasses.replace(ANNA, voice="nowhere")
    with pytest.raises(RuntimeError, match="check the voice"):
        corpus.synthesize("seven", nobody)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    corpus.library.cache_clear()
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[simulate\]"):
        corpus.synthesize("seven", ANNA)


def test_sentences_of_ones_own(tmp_path):
    texts = {
        split: [f"{word} is spoken", "so be it"]
        for split, word in (("train", "one"), ("valid", "two"), ("test", "six"))
    }
    sizes = {"train": 2, "valid": 1, "test": 1, "workers": 1}
    corpus.prepare_speech(tmp_path, **sizes, sentences=texts)
    said = [e["words"] for e in manifest(tmp_path, "train").values()]
    assert said == ["one is spoken", "so be it"]
    assert manifest(tmp_path, "test").popitem()[1]["words"] == "six is spoken"
    with pytest.raises(ValueError, match="3 utterances of train and 2 sent"):
        corpus.prepare_speech(
            tmp_path, **{**sizes, "train": 3}, sentences=texts
        )
    texts["valid"][0] = "two  blanks"
    with pytest.raises(ValueError, match="'two  blanks' is no sentence"):
        corpus.prepare_speech(tmp_path, **sizes, sentences=texts)
    texts["valid"][0] = "another one"
    with pytest.raises(ValueError, match="another corpus"):
        corpus.prepare_speech(tmp_path, **sizes, sentences=texts)
