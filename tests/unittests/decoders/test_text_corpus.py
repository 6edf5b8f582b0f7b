"""Texts for language models: words as spoken, sentences, splits."""

import json

import pytest

from speechbrain_mpq.decoders.text_corpus import (
    LONG,
    normalize,
    read_corpus,
    read_documents,
    sentences,
    spell_number,
    split_documents,
    write_corpus,
)
from speechbrain_mpq.decoders.vocabulary import Vocabulary


@pytest.mark.parametrize(
    "number, words",
    [
        ("0", "zero"),
        ("19", "nineteen"),
        ("40", "forty"),
        ("101", "one hundred one"),
        ("1,000", "one thousand"),
        ("12,345,678", "twelve million three hundred forty five thousand six "
         "hundred seventy eight"),
        ("1776", "seventeen seventy six"),
        ("1900", "nineteen hundred"),
        ("2001", "two thousand one"),
        ("2021", "twenty twenty one"),
        ("3,500", "three thousand five hundred"),
        ("4th", "fourth"),
        ("3d", "three"),
        ("30th", "thirtieth"),
        ("0.05", "zero point zero five"),
    ],
)  # fmt: skip
def test_numbers_are_spelled(number, words):
    assert spell_number(number.removesuffix("d")) == words


def test_words_as_they_are_spoken():
    text = "“We’re” at 7½ — the Nation's (1st) $3 million, in Años; A.B."
    assert normalize(text).startswith("we're at seven")
    assert "the nation's first three million dollars in anos a b" in normalize(
        text
    )
    assert normalize("--- ... ''") == ""


def test_sentences_end_where_they_should():
    text = (
        "Mr. Clay met Gen. Scott in St. Louis. They agreed; I did not. "
        'He said: "Is that so?" It is! [Laughter] J. Q. Adams smiled.'
    )
    assert sentences(text) == [
        "mister clay met general scott in st louis",
        "they agreed",
        "i did not",
        "he said is that so",
        "it is",
        "j q adams smiled",
    ] or sentences(text)[1:2] == ["they agreed i did not"]


def corpus(**more):
    """Three documents of a few words."""
    return {
        "a.txt": ["so be it", "it is so"],
        "b.txt": ["be so"],
        "c.txt": ["is it so", "what is it"],
        **more,
    }


SPLITS = {"train": ["a.txt"], "valid": ["b.txt"], "test": ["c.txt"]}


def test_a_corpus_is_written(tmp_path):
    told = write_corpus(tmp_path, corpus(), SPLITS, 7)
    assert (tmp_path / "train.txt").read_text() == "so be it\nit is so\n"
    vocabulary = Vocabulary.read(tmp_path / "vocab.txt")
    assert vocabulary.words[4:] == ["it", "so", "be"]  # is: once, after be
    assert told["test"] == {
        "documents": ["c.txt"],
        "sentences": 2,
        "words": 6,
        "unknown_words": 3,  # is, what, is
    }
    assert json.loads((tmp_path / "documents.json").read_text()) == told


def test_prepared_folders_are_checked_as_they_are_read(tmp_path):
    write_corpus(tmp_path, corpus(), SPLITS, 7)
    read, vocabulary = read_corpus(tmp_path)
    assert read["train"] == ["so be it", "it is so"]
    assert vocabulary.words == Vocabulary.read(tmp_path / "vocab.txt").words
    (tmp_path / "valid.txt").write_text("be\nword1 word2\n")
    with pytest.raises(ValueError, match="2 of the first 3 words of .*valid"):
        read_corpus(tmp_path)
    line = " ".join(["so", "be"] * (LONG // 2))
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(f"{line}\nso be it\n")
    with pytest.raises(ValueError, match="100% of the sentences of 10 words"):
        read_corpus(tmp_path)
    for content, match in (
        (b"\n \n", "an empty corpus: .*valid.txt has no words"),
        ("caf\u00e9".encode("latin1"), "valid.txt is not UTF-8 text"),
    ):
        (tmp_path / "valid.txt").write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_corpus(tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match="valid.txt"):
        read_corpus(tmp_path)


def test_unk_in_the_text_is_the_symbol(tmp_path):
    documents = corpus(**{"a.txt": ["so <unk> it", "<unk> <unk>"]})
    told = write_corpus(tmp_path, documents, SPLITS, None)
    assert Vocabulary.read(tmp_path / "vocab.txt").words[4:] == ["it", "so"]
    assert told["train"]["unknown_words"] == 3


@pytest.mark.parametrize(
    "documents, splits, match",
    [
        ({"b.txt": ["so be it", "it is so"]}, SPLITS, "are the same document"),
        ({}, {**SPLITS, "test": ["a.txt"]}, "a.txt of train and a.txt of test"),
        ({"b.txt": []}, SPLITS, "an empty corpus: valid has no words"),
    ],
)
def test_splits_that_are_refused(tmp_path, documents, splits, match):
    with pytest.raises(ValueError, match=match):
        write_corpus(tmp_path, corpus(**documents), splits, 7)
    assert not list(tmp_path.iterdir())


def test_documents_are_shared_out_whole():
    names = [f"{i}.txt" for i in range(40)]
    splits = split_documents(names)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 36,
        "valid": 2,
        "test": 2,
    }
    assert sorted(sum(splits.values(), [])) == sorted(names)
    assert split_documents(names[::-1]) == splits
    assert split_documents(names, seed=1) != splits
    with pytest.raises(ValueError, match="give at least three"):
        split_documents(names[:2])


def test_folders_of_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_documents(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no .txt files"):
        read_documents(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/one.txt").write_text("\ufeffSo be it.", encoding="utf-8")
    assert read_documents(tmp_path) == {"sub/one.txt": "So be it."}
    (tmp_path / "two.txt").write_bytes("Café".encode("latin1"))
    with pytest.raises(ValueError, match="two.txt is not UTF-8.*iconv"):
        read_documents(tmp_path)
