"""Synthetic speakers."""

import sys

import numpy as np
import pytest

from speechbrain_mpq.simulation import voices

ANNA = voices.Speaker("anna", "en-us", "f1", 50, 50, 150, 1.0)


@pytest.fixture
def engine():
    return pytest.importorskip("espeakng_loader")


def test_splits_share_no_speaker_and_no_variant():
    people = {split: voices.speakers(split) for split in voices.SPEAKERS}
    assert {s: len(p) for s, p in people.items()} == voices.SPEAKERS
    for key in ("name", "variant"):
        sets = [{getattr(s, key) for s in p} for p in people.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))


def test_speakers_follow_the_seed():
    assert voices.speakers("train", 1) == voices.speakers("train", 1)
    assert voices.speakers("train", 1) != voices.speakers("train", 2)


def test_every_test_and_validation_speaker_has_its_own_variant():
    for split in ("valid", "test"):
        variants = [s.variant for s in voices.speakers(split)]
        assert len(set(variants)) == len(variants)


def test_noisy_variants_are_left_out():
    listed = [v for pair in voices.VARIANTS.values() for v in sum(pair, [])]
    noisy = "Alicia Demonic f2 f3 f5 sandro victor whisper whisperf".split()
    assert not set(noisy) & set(listed)


def test_speaking_twice_gives_the_same_samples(engine):
    first, phonemes = voices.synthesize("open the window", ANNA)
    voices.synthesize("something else", ANNA)
    second, again = voices.synthesize("open the window", ANNA)
    assert np.array_equal(first, second) and phonemes == again


def test_phoneme_times_increase_inside_the_waveform(engine):
    waveform, phonemes = voices.synthesize("open the window", ANNA)
    starts, ends, symbols = zip(*phonemes)
    assert starts[0] >= 0
    assert ends[-1] <= len(waveform) / voices.SAMPLE_RATE
    assert all(start < end for start, end in zip(starts, ends))
    assert all(end <= start for end, start in zip(ends, starts[1:]))
    assert all(symbols) and len(symbols) >= 10


def test_warp_raises_frequencies_and_keeps_the_duration(engine):
    low = voices.dataclasses.replace(ANNA, warp=0.88)
    high = voices.dataclasses.replace(ANNA, warp=1.13)
    centres, lengths = [], []
    for speaker in (low, high):
        waveform, _ = voices.synthesize("seven green lamps", speaker)
        power = np.abs(np.fft.rfft(waveform)) ** 2
        centres.append(np.average(np.arange(len(power)), weights=power))
        centres[-1] /= len(waveform)
        lengths.append(len(waveform))
    assert centres[1] > 1.1 * centres[0]
    assert 0.85 < lengths[1] / lengths[0] < 1.15


def test_unknown_voice_is_refused(engine, capfd):
    nobody = voices.dataclasses.replace(ANNA, voice="nowhere")
    with pytest.raises(RuntimeError, match="check the voice"):
        voices.synthesize("seven", nobody)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    voices.library.cache_clear()
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[simulate\]"):
        voices.synthesize("seven", ANNA)
