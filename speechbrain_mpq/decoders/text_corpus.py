"""Text corpora for language models: normalized, split by document.

A prepared folder holds `train.txt`, `valid.txt` and `test.txt`, a sentence on
each line, `vocab.txt` (see `Vocabulary`) and `documents.json`, which tells
what document went where. Words outside the vocabulary stay as they are in the
text; they become <unk> when they are encoded.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from ..utils import open_input, write_text
from .nbest import TOO_MANY
from .vocabulary import Vocabulary

SPLITS = ("train", "valid", "test")
LOOKED_AT = 1000  # sentences of a split, to see whether its words are known
LONG = 10  # words of a sentence that is not said twice by chance
TOO_ALIKE = 0.5  # share of such sentences that tells a copy
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"))
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_ABBREVIATIONS = {
    "mr.": "mister",
    "mrs.": "missus",
    "dr.": "doctor",
    "gen.": "general",
    "col.": "colonel",
    "hon.": "honorable",
    "messrs.": "messrs",
    "u.s.": "u s",
    "&": "and",
}
_NOISES = re.compile(r"[\[(]\s*(?:applause|laughter)[^\])]*[\])]", re.I)
_SENTENCE = re.compile(r"(?<=[.?!;])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z])")
# No sentence ends after an initial or a title.
_OPEN = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Dr|St|Gen|Col|Hon|Messrs|vs))\.$")
_MONEY = re.compile(
    r"\$\s?(\d[\d,]*(?:\.\d+)?)(\s+(?:thousand|million|billion|trillion))?",
    re.I,
)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:st|nd|rd|th)?\b|\d+")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "`": "'"})


def spell_number(text):
    """Words of a number as it stands in a text.

    Arguments
    ---------
    text : str
        Digits with or without commas, decimals or an ordinal ending. Four
        digits from 1100 to 2099 without a comma are read as a year.

    Returns
    -------
    str

    Example
    -------
    >>> spell_number("1,204"), spell_number("1861"), spell_number("2.5")
    ('one thousand two hundred four', 'eighteen sixty one', 'two point five')
    >>> spell_number("21st"), spell_number("1905"), spell_number("2000")
    ('twenty first', 'nineteen o five', 'two thousand')
    """
    text = text.lower()
    ordinal = text[-2:] in ("st", "nd", "rd", "th")
    digits = text[:-2] if ordinal else text
    whole, _, decimals = digits.replace(",", "").partition(".")
    if "," not in digits and not decimals and 1100 <= int(whole) <= 2099:
        words = _year(int(whole))
    elif len(whole) > 12:  # no quantity that anybody reads out as one
        words = [_ONES[int(digit)] for digit in whole]
    else:
        words = _cardinal(int(whole))
    if decimals:
        words += ["point", *(_ONES[int(digit)] for digit in decimals)]
    if ordinal:
        words[-1] = _ordinal(words[-1])
    return " ".join(words)


def _cardinal(number):
    """Words of a whole number."""
    for scale, name in _SCALES:
        if number >= scale:
            rest = _cardinal(number % scale) if number % scale else []
            return [*_cardinal(number // scale), name, *rest]
    if number >= 100:
        rest = _cardinal(number % 100) if number % 100 else []
        return [_ONES[number // 100], "hundred", *rest]
    if number >= 20:
        rest = [_ONES[number % 10]] if number % 10 else []
        return [_TENS[number // 10], *rest]
    return [_ONES[number]]


def _year(number):
    """Words of a year of four digits."""
    century, rest = divmod(number, 100)
    if number % 1000 < 10:
        return _cardinal(number)
    if rest == 0:
        return [*_cardinal(century), "hundred"]
    return [
        *_cardinal(century),
        *(["o"] if rest < 10 else []),
        *_cardinal(rest),
    ]


def _ordinal(word):
    """The ordinal of a number word."""
    if word in _ORDINALS:
        return _ORDINALS[word]
    return word[:-1] + "ieth" if word.endswith("y") else f"{word}th"


def sentences(text):
    """Sentences of running text, normalized.

    Arguments
    ---------
    text : str

    Returns
    -------
    list of str
        Lower-case words of a to z and apostrophes, one blank between them.

    Example
    -------
    >>> sentences("Mr. Speaker: I ask for $25 in 1861. (Applause.) Is it so?")
    ['mister speaker i ask for twenty five dollars in eighteen sixty one', \
'is it so']
    """
    text = _NOISES.sub(" ", text.translate(_APOSTROPHES))
    pieces = []
    for piece in _SENTENCE.split(text):
        if pieces and _OPEN.search(pieces[-1]):
            pieces[-1] += f" {piece}"
        else:
            pieces.append(piece)
    return [words for piece in pieces if (words := normalize(piece))]


def normalize(text):
    """Words of a text as they are spoken: no punctuation, no digits.

    Arguments
    ---------
    text : str

    Returns
    -------
    str

    Example
    -------
    >>> normalize("The Nation's 5% debt - $1.5 million - of the U.S. café")
    "the nation's five percent debt one point five million dollars of the u s \
cafe"
    """
    text = text.translate(_APOSTROPHES)
    text = _MONEY.sub(r"\1\2 dollars ", text)
    text = _NUMBER.sub(lambda m: f" {spell_number(m.group())} ", text)
    text = unicodedata.normalize("NFKD", text.lower())
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = text.replace("%", " percent ")
    words = [_ABBREVIATIONS.get(word, word) for word in text.split()]
    text = re.sub(r"[^a-z' ]", " ", " ".join(words))
    words = [word.strip("'") for word in text.split()]
    return " ".join(word for word in words if word)


def read_documents(folder):
    """Texts of a folder of .txt files.

    Arguments
    ---------
    folder : str or Path
        UTF-8 files; those of subfolders count, too.

    Returns
    -------
    dict of str -> str
        Path within the folder -> text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name one of .txt files")
    documents = {}
    for path in sorted(folder.rglob("*.txt")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            raise ValueError(f"{path} is no file: take it out of the corpus")
        try:
            documents[name] = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error}): convert it, for example "
                f"with iconv -f latin1 -t utf-8"
            ) from error
    if not documents:
        raise FileNotFoundError(f"{folder} holds no .txt files")
    return documents


def split_documents(names, valid=0.05, test=0.05, seed=1234):
    """Which document is in which split, at random.

    Arguments
    ---------
    names : sequence of str
        Of the documents.
    valid, test : float
        Shares of the documents, at least one each.
    seed : int

    Returns
    -------
    dict of str -> list of str
        Split -> names.

    Example
    -------
    >>> split_documents(["a", "b", "c", "d"], seed=1)
    {'train': ['c', 'd'], 'valid': ['a'], 'test': ['b']}
    """
    names = sorted(names)
    counts = [max(1, round(share * len(names))) for share in (valid, test)]
    if len(names) <= sum(counts):
        raise ValueError(
            f"{len(names)} documents cannot be split into training, "
            "validation and test: give at least three"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = [names[i] for i in order]
    ends = [counts[0], sum(counts)]
    return {
        "train": sorted(shuffled[ends[1] :]),
        "valid": sorted(shuffled[: ends[0]]),
        "test": sorted(shuffled[ends[0] : ends[1]]),
    }


def write_corpus(folder, documents, splits, size):
    """Write a prepared folder.

    Arguments
    ---------
    folder : str or Path
        Made if it is not there.
    documents : dict of str -> list of str
        Document -> its sentences, normalized.
    splits : dict of str -> list of str
        Split -> documents.
    size : int or None
        Words of the vocabulary with the special symbols, the most frequent
        ones of training; None: all of them.

    Returns
    -------
    dict
        The content of documents.json: for each split its documents,
        sentences, words and words outside the vocabulary.
    """
    _check_splits(documents, splits)
    lines = {
        split: [line for name in names for line in documents[name]]
        for split, names in splits.items()
    }
    for split in SPLITS:
        if not lines.get(split):
            raise ValueError(f"an empty corpus: {split} has no words")
    counts = Counter(word for line in lines["train"] for word in line.split())
    if size is None:
        size = len(set(counts) - {"<unk>"}) + 4
    vocabulary = Vocabulary.from_counts(counts, size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {}
    for split in SPLITS:
        own = Counter(w for line in lines[split] for w in line.split())
        outside = sum(n for w, n in own.items() if w not in vocabulary.numbers)
        description[split] = {
            "documents": splits[split],
            "sentences": len(lines[split]),
            "words": own.total(),
            "unknown_words": outside + own["<unk>"],
        }
        write_text(folder / f"{split}.txt", "\n".join(lines[split]) + "\n")
    vocabulary.write(folder / "vocab.txt")
    write_text(
        folder / "documents.json", json.dumps(description, indent=1) + "\n"
    )
    return description


def read_corpus(folder):
    """Sentences of a prepared folder, whoever prepared it.

    Arguments
    ---------
    folder : str or Path

    Returns
    -------
    corpus : dict of str -> list of str
        Split -> sentences, which may be empty lines.
    vocabulary : Vocabulary

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> documents = {"a": ["so be it"], "b": ["it is"], "c": ["be it so"]}
    >>> splits = {"train": ["a"], "valid": ["b"], "test": ["c"]}
    >>> _ = write_corpus(folder, documents, splits, None)
    >>> corpus, vocabulary = read_corpus(folder)
    >>> corpus["test"], len(vocabulary)
    (['be it so'], 7)
    """
    vocabulary = Vocabulary.read(Path(folder) / "vocab.txt")
    corpus = {}
    for split in SPLITS:
        path = Path(folder) / f"{split}.txt"
        try:
            with open_input(path) as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error}): convert it, for example "
                "with iconv -f latin1 -t utf-8"
            ) from error
        if not text.strip():
            raise ValueError(f"an empty corpus: {path} has no words")
        corpus[split] = text.splitlines()
        words = " ".join(corpus[split][:LOOKED_AT])
        unknown = len(vocabulary.unknown(words))
        if unknown > TOO_MANY * len(words.split()):
            raise ValueError(
                f"{unknown} of the first {len(words.split())} words of {path} "
                f"are not in {folder}/vocab.txt: prepare the text with a "
                "vocabulary of its own"
            )
    trained = _long(corpus["train"])
    for split in SPLITS[1:]:
        own = _long(corpus[split])
        share = len(own & trained) / max(len(own), 1)
        if share > TOO_ALIKE:
            raise ValueError(
                f"{share:.0%} of the sentences of {LONG} words or more in "
                f"{split}.txt of {folder} are in its train.txt, too: split "
                "the corpus by document"
            )
    return corpus, vocabulary


def _long(lines):
    """The long ones of some sentences."""
    return {line for line in lines if line.count(" ") >= LONG - 1}


def _check_splits(documents, splits):
    """Refuse a document that is in two splits, by name or by its words."""
    where, digests = {}, {}
    for split, names in splits.items():
        for name in names:
            words = "\n".join(documents[name])
            digest = hashlib.sha256(words.encode()).hexdigest()
            for key, owners in ((name, where), (digest, digests)):
                other = owners.setdefault(key, (split, name))
                if other[0] != split and words:
                    raise ValueError(
                        f"{other[1]} of {other[0]} and {name} of {split} are "
                        "the same document: remove one of them"
                    )
