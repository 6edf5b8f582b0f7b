"""Pronunciation lexica and what may be wrong with them."""

import pytest

from speechbrain_mpq.decoders.lexicon import Lexicon

TEXT = """;;; a comment
the DH AH0
the(2) DH IY1
read R EH1 D # past
read(1) R IY1 D
record R EH1 K ER0 D
record(1) R EH0 K ER2 D
"""


def test_cmudict_form(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text(TEXT, encoding="utf-8")
    lexicon = Lexicon.read(path)
    assert lexicon.pronunciations["the"] == [["DH", "AH"], ["DH", "IY"]]
    assert len(lexicon.pronunciations["record"]) == 1  # differ in stress
    assert lexicon.phones[0] == "sil" and lexicon.silence == 0
    assert len(Lexicon.read(path, stress=True).pronunciations["record"]) == 2
    assert len(lexicon.encode(["read", "the"])) == 2


def test_phones_of_a_trained_network(tmp_path):
    words = {"a": [["x"]]}
    lexicon = Lexicon(words, phones=["y", "sil", "x"])
    assert lexicon.encode(["a"]) == [[[2]]]
    assert lexicon.silence == 1
    with pytest.raises(ValueError, match="not in the phone set: .'x'"):
        Lexicon(words, phones=["sil", "y"])
    with pytest.raises(ValueError, match="not in the phone set: sil"):
        Lexicon(words, phones=["x"])


def test_bad_files(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9 K AE F EY\n".encode("latin1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 .*iconv"):
        Lexicon.read(path)
    path.write_text("one W AH N\ntwo\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: 'two' has no phones"):
        Lexicon.read(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="an empty lexicon"):
        Lexicon.read(path)
    path.write_text("\ufeffone W AH N\n", encoding="utf-8")  # Windows
    assert list(Lexicon.read(path).pronunciations) == ["one"]


def test_words_without_pronunciation():
    lexicon = Lexicon({"one": [["w"]]})
    with pytest.raises(ValueError, match="utterance u5: .* 'three', 'two'"):
        lexicon.encode(["two", "one", "three"], "u5")
    with pytest.raises(TypeError, match="transcript.split"):
        lexicon.encode("one one")
    with pytest.raises(ValueError, match="'two' has a pronunciation without"):
        Lexicon({"two": [[]]})
