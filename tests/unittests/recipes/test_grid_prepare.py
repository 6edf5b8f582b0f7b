"""Sentences and splits of the GRID recipe."""

import doctest
import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[3] / "recipes/GRID/grid_prepare.py"


spec = importlib.util.spec_from_file_location("grid_prepare", SCRIPT)
grid = importlib.util.module_from_spec(spec)


spec.loader.exec_module(grid)


def test_examples():
    failed, tried = doctest.testmod(grid)
    assert tried and not failed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bbaf2n", "bin blue at f two now"),
        ("pgizzs", "place green in z zero soon"),  # z: letter and zero
        ("lrwp9a", "lay red with p nine again"),
        ("sgbx1p", "set green by x one please"),
    ],
)
def test_names_spell_sentences(name, words):
    assert grid.words_of(name) == words


@pytest.mark.parametrize("name", ["bbaf2", "bbaf0n", "xbaf2n", "bbaw2n"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} spells no sentence"):
        grid.words_of(name)


def test_speaker_is_a_folder():
    clip = Path("/corpora/grid/s12/video/mpg_6000/bbaf2n.mpg")
    assert grid.speaker_of(clip) == "s12"
    with pytest.raises(ValueError, match="--test_only"):
        grid.speaker_of(Path("/clips/bbaf2n.mpg"))


def test_splits_share_no_speaker():
    entries = {
        f"s{n}_{i}": {"speaker": f"s{n}"} for n in range(9) for i in "ab"
    }
    splits = grid.split_speakers(entries, 2, np.random.default_rng(0))
    people = [
        {entry["speaker"] for entry in split.values()}
        for split in splits.values()
    ]
    assert [len(group) for group in people] == [5, 2, 2]
    assert len(set.union(*people)) == 9
    assert sum(map(len, splits.values())) == len(entries)


@pytest.mark.parametrize("held_out", [0, 2, 3])
def test_too_few_speakers_for_three_splits(held_out):
    entries = {f"s{n}": {"speaker": f"s{n}"} for n in range(4)}
    with pytest.raises(ValueError, match=f"of 4 speakers, {held_out} each"):
        grid.split_speakers(entries, held_out, np.random.default_rng(0))


def test_clips_of_one_name_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "ffmpeg_program", lambda: None)
    for speaker in ("s1", "s2"):
        (tmp_path / speaker).mkdir()
        (tmp_path / speaker / "bbaf2n.mpg").touch()
    with pytest.raises(ValueError, match="s1/bbaf2n.mpg and .*s2/bbaf2n.mpg"):
        grid.prepare_grid(tmp_path, tmp_path / "data", test_only=True)
    assert not (tmp_path / "data").exists()
