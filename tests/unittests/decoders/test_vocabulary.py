"""Vocabularies of language models."""

import pytest

from speechbrain_mpq.decoders.vocabulary import SPECIAL, Lexicon, Vocabulary


def test_numbers_begin_with_the_special_symbols(tmp_path):
    vocabulary = Vocabulary(["so", "be"])
    assert vocabulary.words == [*SPECIAL, "so", "be"]
    assert vocabulary.encode_as_ids("be  so it") == [5, 4, 3]
    assert vocabulary.encode_as_ids("") == []
    assert vocabulary.unknown("so <unk> it") == ["<unk>", "it"]
    for symbol in ("<pad>", "<s>", "</s>"):
        with pytest.raises(ValueError, match=f"{symbol}, which is no word"):
            vocabulary.encode_as_ids(f"so {symbol} be")
    vocabulary.write(tmp_path / "vocab.txt")
    again = Vocabulary.read(tmp_path / "vocab.txt")
    assert again.words == vocabulary.words
    assert again.sha256 == vocabulary.sha256
    assert Vocabulary(["be", "so"]).sha256 != vocabulary.sha256


@pytest.mark.parametrize(
    "words, text", [(["so", "be"], "SO Be"), (["SO", "BE"], "so Be")]
)
def test_a_vocabulary_of_one_case_takes_both(words, text):
    assert Vocabulary(words).encode_as_ids(text) == [4, 5]


def test_a_vocabulary_of_both_cases_tells_them_apart():
    assert Vocabulary(["may", "May"]).encode_as_ids("May may MAY") == [5, 4, 3]


def test_most_frequent_words_first():
    counts = {"a": 1, "b": 3, "<unk>": 9, "c": 1}
    assert Vocabulary.from_counts(counts, 6).words[4:] == ["b", "a"]
    with pytest.raises(ValueError, match="choose 5 to 7"):
        Vocabulary.from_counts(counts, 8)
    with pytest.raises(ValueError, match="choose 5 to 7"):
        Vocabulary.from_counts(counts, 4)


@pytest.mark.parametrize(
    "content, match",
    [
        ("so\nbe\n", "its first lines must be <pad> <s> </s> <unk>"),
        ("<pad>\n<s>\n</s>\n<unk>\n", "an empty vocabulary"),
        ("<pad>\n<s>\n</s>\n<unk>\nso\nbe\nso\n", "'so' is there twice"),
        ("<pad>\n<s>\n</s>\n<unk>\nso be\n", "'so be' is not one word"),
        ("<pad>\n<s>\n</s>\n<unk>\n\nso\n", "'' is not one word"),
    ],
)
def test_files_that_are_none(tmp_path, content, match):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        Vocabulary.read(path)
    assert str(path) in str(error.value)


def test_another_encoding(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("<pad>\n<s>\n</s>\n<unk>\ncafé\n".encode("latin1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        Vocabulary.read(path)


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
    path.write_bytes("one W AH N\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 .*utf-16"):
        Lexicon.read(path)
    with pytest.raises(FileNotFoundError, match="no lexicon .*word phone"):
        Lexicon.read(tmp_path / "nowhere.txt")
    path.write_text("one W AH N\n", encoding="utf-8")
    with pytest.raises(ValueError, match="latin.txt: phones .*'AH', 'N', 'W'"):
        Lexicon.read(path, phones=["sil", "ae"])


def test_words_without_pronunciation():
    lexicon = Lexicon({"one": [["w"]]})
    with pytest.raises(ValueError, match="utterance u5: .* 'three', 'two'"):
        lexicon.encode(["two", "one", "three"], "u5")
    several = [f"w{i}" for i in range(9)]
    with pytest.raises(ValueError, match="'w4' and 4 more: add it"):
        lexicon.encode(several)
    lexicon.check_vocabulary(["one"])
    more = Lexicon({"one": [["w"]], "two": [["t"]]}).of(["one"])
    assert list(more.pronunciations) == ["one"]
    assert more.phones == ["sil", "t", "w"] and more.silence == 0
    with pytest.raises(ValueError, match="n-gram has 1 words .*'two'.*belongs"):
        lexicon.check_vocabulary(["two", "one"])
    with pytest.raises(TypeError, match="transcript.split"):
        lexicon.encode("one one")
    with pytest.raises(ValueError, match="'two' has a pronunciation without"):
        Lexicon({"two": [[]]})


def test_a_notice_goes_with_the_pronunciations(tmp_path):
    path = tmp_path / "lexicon.txt"
    text = ";;; All rights\n;;;\n;;; reserved.\na AH\n"
    path.write_text(text + ";;; of b\nb B IY\n")
    lexicon = Lexicon.read(path)
    assert lexicon.notice == "All rights\n\nreserved."
    lexicon.of(["a"]).write(path)
    assert path.read_text() == text
