"""Vocabularies of language models."""

import pytest

from speechbrain_mpq.decoders.vocabulary import SPECIAL, Vocabulary


def test_numbers_begin_with_the_special_symbols(tmp_path):
    vocabulary = Vocabulary(["so", "be"])
    assert vocabulary.words == [*SPECIAL, "so", "be"]
    assert vocabulary.encode_as_ids("be  so it") == [5, 4, 3]
    assert vocabulary.encode_as_ids("") == []
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
    with pytest.raises(ValueError, match="is not UTF-8"):
        Vocabulary.read(path)
