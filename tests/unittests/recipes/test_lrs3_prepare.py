"""Transcripts, cuts and selection of the LRS3 recipe, without any video."""

import doctest
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[3] / "recipes/LRS3"


sys.path.insert(0, str(FOLDER))


layout, prepare, selection, transcripts = (
    importlib.import_module(f"lrs3_{name}")
    for name in ("layout", "prepare", "selection", "transcripts")
)


PRETRAIN = """Text:  WE {NS} DON'T KNOW
Conf:  4
Ref:  0Fi83BHQsMA

FRAME X Y W H
000245 0.430 0.215 0.147 0.261
000246 0.431 0.215 0.147 0.261

WORD START END ASDSCORE
WE 0.10 0.30 5.1
{NS} 0.30 0.45 1.0
DON'T 0.50 0.90 4.2
KNOW 1.40 1.90 6.0
"""


@pytest.mark.parametrize("module", [selection, transcripts])
def test_examples(module):
    failed, tried = doctest.testmod(
        module, extraglobs={"np": np}, optionflags=doctest.ELLIPSIS
    )
    assert tried and not failed


def test_transcript_with_face_boxes_and_noises(tmp_path):
    path = tmp_path / "50001.txt"
    path.write_text(PRETRAIN, encoding="utf-8-sig")
    words, times = transcripts.read_transcript(path)
    assert words == "we don't know"
    assert [word for word, _, _ in times] == ["WE", "{NS}", "DON'T", "KNOW"]
    assert times[-1][1:] == (1.4, 1.9)
    assert transcripts.cut(times, 1.0) == [
        ("we don't", 0.0, 1.15),
        ("know", 1.15, 2.15),
    ]


def test_transcript_of_two_lines(tmp_path):
    path = tmp_path / "00007.txt"
    path.write_text("Text:  THAT'S ALL\nConf:  3\n")
    assert transcripts.read_transcript(path) == ("that's all", [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Text:", "Texte:", "no line that begins with 'Text:'"),
        ("WE {NS} DON'T KNOW", "{NS}", "has no words"),
        ("DON'T 0.50", "DON'T 0.5O", "line 12: expected a word"),
        ("KNOW 1.40", "KNOW 0.40", "line 13: KNOW from 0.4"),
        ("KNOW 1.40 1.90 6.0", "KNOW", "line 13: expected a word"),
    ],
)
def test_broken_transcripts_name_file_and_line(tmp_path, old, new, said):
    path = tmp_path / "50001.txt"
    path.write_text(PRETRAIN.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as error:
        transcripts.read_transcript(path)
    assert str(path) in str(error.value)


def drawn_times(rng, count):
    """Word times with pauses between some of the words."""
    lengths = rng.uniform(0.1, 0.6, count)
    pauses = rng.exponential(0.2, count) * rng.integers(0, 2, count)
    ends = np.cumsum(lengths + pauses)
    return [
        (f"W{n}", end - length, end)
        for n, (end, length) in enumerate(zip(ends, lengths))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_hold_all_words_once_and_are_short(seed):
    rng = np.random.default_rng(seed)
    times = drawn_times(rng, int(rng.integers(1, 120)))
    longest = rng.uniform(0.3, 8)
    pieces = transcripts.cut(times, longest)
    spoken = " ".join(words for words, _, _ in pieces).split()
    assert spoken == [word.lower() for word, _, _ in times]
    by_word = {word.lower(): (start, end) for word, start, end in times}
    last = 0.0
    for words, start, end in pieces:
        first_word, last_word = (by_word[words.split()[i]] for i in (0, -1))
        single = len(words.split()) == 1
        assert single or last_word[1] - first_word[0] <= longest
        # Pieces follow each other, and no word is cut (to half a millisecond)
        assert last <= start <= first_word[0] + 6e-4
        assert end >= last_word[1] - 6e-4
        last = end - 1e-3


def test_cuts_are_made_in_the_longest_pause_of_the_middle():
    times = [("A", 0.0, 1.0), ("B", 3.0, 4.0), ("C", 4.5, 6.0)]
    times += [("D", 6.2, 8.0), ("E", 8.1, 10.0)]
    pieces = transcripts.cut(times, 6.5)
    assert [words for words, _, _ in pieces] == ["a b", "c d e"]


def drawn_clips(rng, speakers, clips):
    """(speaker, clip) -> seconds."""
    return {
        (f"s{rng.integers(speakers):04d}", f"{n:05d}"): rng.uniform(2, 20)
        for n in range(clips)
    }


def test_selection_has_the_hours_and_the_speakers():
    rng = np.random.default_rng(0)
    seconds = drawn_clips(rng, speakers=5000, clips=12000)
    known = {f"s{n:04d}" for n in range(3700)}
    chosen = selection.draw_clips(
        seconds, 20, known, 4320, np.random.default_rng(1)
    )
    total = sum(seconds[clip] for clip in chosen)
    assert 0 <= total - 20 * 3600 < 20
    assert len(known | {speaker for speaker, _ in chosen}) == 4320
    assert len(set(chosen)) == len(chosen)
    again = selection.draw_clips(
        dict(reversed(seconds.items())),
        *(20, known, 4320, np.random.default_rng(1)),
    )
    assert again == chosen


def test_selection_takes_known_speakers_alone_where_they_suffice():
    seconds = drawn_clips(np.random.default_rng(0), speakers=50, clips=500)
    known = {f"s{n:04d}" for n in range(20)}
    rng = np.random.default_rng(1)
    chosen = selection.draw_clips(seconds, 0.2, known, 15, rng)
    assert {speaker for speaker, _ in chosen} <= known


@pytest.mark.parametrize(
    ("hours", "count", "option"),
    [(1000, 0, "--pretrain_hours"), (0.1, 60, "--speakers")],
)
def test_too_little_names_the_option(hours, count, option):
    rng = np.random.default_rng(0)
    seconds = drawn_clips(rng, speakers=50, clips=100)
    with pytest.raises(ValueError, match=option):
        selection.draw_clips(seconds, hours, set(), count, rng)


def test_validation_speakers_are_as_few_as_needed():
    seconds = {f"s{n}": 360.0 for n in range(40)}
    rng = np.random.default_rng(0)
    assert len(selection.draw_speakers(seconds, 2, rng)) == 20
    with pytest.raises(ValueError, match="--valid_hours"):
        selection.draw_speakers(seconds, 5, rng)


def touch(folder, *names):
    """Empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_clips_of_lrs3(tmp_path):
    touch(tmp_path, "test/a/1.mp4", "test/a/1.txt", "test/b/2.mp4")
    touch(tmp_path, "test/b/3.txt", "trainval/a/1.mp4", "trainval/a/1.txt")
    clips, missing = layout.find_clips(tmp_path, "lrs3", ["trainval", "test"])
    assert [clip.key for clip in clips] == ["trainval_a_1", "test_a_1"]
    assert sorted(Path(told[3:]).name for told in missing.values()) == [
        *("2.txt", "3.mp4"),
    ]
    with pytest.raises(FileNotFoundError, match="LRS3: pretrain/, trainval/"):
        layout.find_clips(tmp_path, "lrs3", ["pretrain"])


@pytest.mark.parametrize("place", ["corpus", "."])
def test_clips_of_lrs2(tmp_path, place):
    corpus = tmp_path / "corpus"
    touch(corpus, "main/p1/00001.mp4", "main/p1/00001.txt")
    (tmp_path / place / "test.txt").write_text("p1/00001 NF\np1/00002 MV\n\n")
    clips, missing = layout.find_clips(corpus, "lrs2", ["test"])
    assert [clip.key for clip in clips] == ["test_p1_00001"]
    assert len(missing) == 1
    with pytest.raises(FileNotFoundError, match="no list .*val.txt"):
        layout.find_clips(corpus, "lrs2", ["valid"])


def test_broken_clips_are_refused_or_listed(tmp_path):
    path = tmp_path / "data/broken.txt"
    told = {n: f"clip {n}" for n in range(7)}
    with pytest.raises(ValueError, match="7 clips(.|\n)*--skip_broken"):
        prepare.Failures(path, skip=False).add(told)
    failures = prepare.Failures(path, skip=True)
    assert not path.exists()
    failures.add(told)
    failures.add({})
    assert len(path.read_text().splitlines()) == 7


def test_pretrain_clip_without_word_times_is_broken(tmp_path):
    path = tmp_path / "50001.txt"
    path.write_text("Text:  HELLO\nConf:  4\n")
    clip = layout.Clip("pretrain", "a", "50001", tmp_path / "50001.mp4", path)
    utterances, broken = prepare.read_transcripts([clip], 6.0)
    assert not utterances and "no word times" in broken[clip]
