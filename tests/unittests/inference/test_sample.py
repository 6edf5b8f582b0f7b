"""Recordings to hear beside a card."""

import numpy as np
import pytest
import soundfile

from speechbrain_mpq import QuantizedSeparator, save_separator
from speechbrain_mpq.inference.folder import write_card
from speechbrain_mpq.inference.sample import read_sample, write_sample
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.separator import build_separator


@pytest.fixture
def folder(tmp_path):
    """A packed separator."""
    sizes = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}
    separator = build_separator("hparams/models/separator_mini.yaml", **sizes)
    return save_separator(separator.eval(), tmp_path / "packed")


def test_a_card_names_the_sample_that_lies_beside_it(folder):
    rng = np.random.default_rng(0)
    mixture = 0.05 * rng.standard_normal((64000, 7))
    mixture[20000:52000] *= 3
    write_sample(folder, mixture, 9 * mixture[:, 0], 72.5, "a talk", "MIT")
    sound, rate = soundfile.read(folder / "sample.flac")
    assert sound.shape == (40000, 7) and rate == 16000
    likeness = np.correlate(mixture[:, 3], sound[:, 3], "valid")
    first = np.argmax(likeness)  # has the loud part
    assert 12000 <= first <= 20000
    assert np.allclose(sound, mixture[first : first + 40000], atol=2**-15)
    alone, _ = soundfile.read(folder / "sample_separated.flac")
    assert alone.shape == (40000,)
    assert np.corrcoef(alone, sound[:, 0])[0, 1] > 0.9999
    assert np.abs(alone).max() <= np.abs(sound).max()  # nothing is clipped
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert 'separate_file("sample.flac", doa=72.5' in card
    assert "Licence of both: MIT." in card
    assert check_folder(folder) == []
    model = QuantizedSeparator.from_pretrained(folder)
    assert len(model.separate_file(folder / "sample.flac", 72.5)) == 40000
    saved = model.save_pretrained(folder.parent / "again")
    assert read_sample(saved) == read_sample(folder)
    assert check_folder(saved) == []


def test_samples_of_more_channels_than_flac_has(folder):
    sound = np.zeros((100, 9))
    assert not write_sample(folder, sound, sound[:, 0], 60, "silence")
    assert read_sample(folder) is None


def test_a_sample_that_is_none_is_found(folder):
    (folder / "sample_separated.flac").write_bytes(b"RIFF")
    (problem,) = check_folder(folder)
    assert "sample_separated.flac: no FLAC file" in problem
