"""The words of a recognizer: their numbers, and their phones in a lexicon."""

import hashlib
import re
from collections import Counter
from pathlib import Path

from ..utils import read_text, write_text

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)  # numbers 0 to 3
LARGEST = 2**20  # words; more is no vocabulary file


class Vocabulary:
    """Words of a language model and their numbers.

    Has what SpeechBrain's rescorers ask of a tokenizer: `encode_as_ids`.

    Arguments
    ---------
    words : sequence of str
        Without the four special symbols, which come before them.

    Example
    -------
    >>> vocabulary = Vocabulary(["the", "union"])
    >>> vocabulary.encode_as_ids("The state of the UNION")
    [4, 3, 3, 4, 5]
    >>> vocabulary.unknown("The state of the UNION")
    ['state', 'of']
    """

    pad_index, bos_index, eos_index, unk_index = range(4)

    def __init__(self, words):
        self.words = [*SPECIAL, *words]
        if len(self.words) == len(SPECIAL):
            raise ValueError("an empty vocabulary: give it at least one word")
        self.numbers = {word: i for i, word in enumerate(self.words)}
        if len(self.numbers) < len(self.words):
            twice = Counter(self.words).most_common(1)[0][0]
            raise ValueError(f"vocabulary: {twice!r} is there twice")
        for word in words:
            if word.split() != [word]:
                raise ValueError(f"vocabulary: {word!r} is not one word")
        # Recognizers write capitals that the training text may lack.
        self.upper = all(word == word.upper() for word in words)
        self.lower = all(word == word.lower() for word in words)

    def __len__(self):
        return len(self.words)

    @classmethod
    def from_counts(cls, counts, size):
        """The most frequent words.

        Arguments
        ---------
        counts : dict
            Word -> how often it occurs in the training text.
        size : int
            Words and special symbols together.

        Returns
        -------
        Vocabulary
            Most frequent words first, equally frequent ones in order of the
            alphabet.

        Example
        -------
        >>> Vocabulary.from_counts({"b": 2, "a": 2, "c": 1}, 6).words
        ['<pad>', '<s>', '</s>', '<unk>', 'a', 'b']
        """
        counts = {w: n for w, n in counts.items() if w not in SPECIAL}
        room = size - len(SPECIAL)
        if not 0 < room <= len(counts):
            raise ValueError(
                f"a vocabulary of {size} does not fit a text of {len(counts)} "
                f"different words: choose {len(SPECIAL) + 1} to "
                f"{len(counts) + len(SPECIAL)}"
            )
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words[:room])

    @classmethod
    def read(cls, path):
        """Vocabulary of a file that `write` made: a word on each line."""
        try:
            lines = read_text(path).splitlines()
        except ValueError as error:
            raise ValueError(f"{path} is no vocabulary ({error})") from error
        if lines[: len(SPECIAL)] != list(SPECIAL) or len(lines) > LARGEST:
            raise ValueError(
                f"{path} is no vocabulary: its first lines must be "
                f"{' '.join(SPECIAL)}, and one word must stand on each"
            )
        try:
            return cls(lines[len(SPECIAL) :])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def write(self, path):
        """Write a word on each line, in the order of the numbers."""
        write_text(path, "\n".join(self.words) + "\n")

    @property
    def sha256(self):
        """Checksum of the words in their order."""
        text = "\n".join(self.words).encode()
        return hashlib.sha256(text).hexdigest()

    def split(self, text):
        """Words of a text, in the vocabulary's case if it has only one."""
        if self.lower:
            text = text.lower()
        elif self.upper:
            text = text.upper()
        return text.split()

    def encode_as_ids(self, text):
        """Numbers of the words of a text, without begin and end.

        Arguments
        ---------
        text : str
            Words between white space.

        Returns
        -------
        list of int
            Unknown words have the number of <unk>.
        """
        words = self.split(text)
        numbers = [self.numbers.get(word, self.unk_index) for word in words]
        if min(numbers, default=self.unk_index) < self.unk_index:
            raise ValueError(
                f"{text!r} holds {words[numbers.index(min(numbers))]}, which "
                "is no word: leave out what marks beginning, end and padding"
            )
        return numbers

    def unknown(self, text):
        """Words of a text that are not in the vocabulary, <unk> among them."""
        number = self.numbers.get
        unk = self.unk_index
        return [word for word in self.split(text) if number(word, unk) == unk]


def _some(words, most=5):
    """The first words of a list, for a message of one line."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(map(repr, words[:most])) + more


def _text_of(path):
    """Content of a lexicon's file."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no lexicon {path}: name a file of `word phone phone ...` lines"
        )
    content = Path(path).read_bytes()
    try:
        text, wrong = content.decode("utf-8-sig"), content.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        form = "utf-16" if b"\0" in content else "latin1"
        raise ValueError(
            f"{path} is not UTF-8 (byte {wrong}): convert it, for example "
            f"with `iconv -f {form} -t utf-8`"
        )
    return text


_NOTICE = re.compile(r"(;;;.*\n)*")  # the comments at the start of a file
_ALTERNATIVE = re.compile(r"\(\d+\)$")  # CMUdict: read(2)
_STRESS = re.compile(r"(?<=[A-Z])[0-2]$")  # CMUdict: AH0


class Lexicon:
    """Pronunciations of words, and the numbers of the phones.

    Arguments
    ---------
    pronunciations : dict
        Word -> list of pronunciations, each a list of phone symbols.
    silence : str
        Symbol of silence, phone 0. The others follow in sorted order, so that
        the same lexicon always gives the same numbers.
    phones : list of str, optional
        All symbols in the order of their numbers, where a trained network has
        fixed them.
    notice : str
        What its files begin with, as comments: the licence of its source.

    Example
    -------
    >>> lexicon = Lexicon({"a": [["ah"], ["ey"]], "bee": [["b", "iy"]]})
    >>> lexicon.phones
    ['sil', 'ah', 'b', 'ey', 'iy']
    >>> lexicon.encode(["bee", "a"])
    [[[2, 4]], [[1], [3]]]
    >>> lexicon.encode(["sea"], utterance="u7")
    Traceback (most recent call last):
        ...
    ValueError: utterance u7: no pronunciation of 'sea': add it to the ...
    """

    def __init__(self, pronunciations, silence="sil", phones=None, notice=""):
        if not pronunciations:
            raise ValueError("an empty lexicon: give it at least one word")
        for word, alternatives in pronunciations.items():
            if not alternatives or not all(alternatives):
                raise ValueError(
                    f"lexicon: {word!r} has a pronunciation without phones: "
                    "give it some, or remove the word"
                )
        spoken = {
            phone
            for alternatives in pronunciations.values()
            for alternative in alternatives
            for phone in alternative
        }
        if phones is None:
            phones = [silence, *sorted(spoken - {silence})]
        unknown = sorted(spoken - set(phones))
        if unknown or silence not in phones:
            raise ValueError(
                f"phones that are not in the phone set: {unknown or silence}; "
                "take the lexicon that the network was trained with"
            )
        self.pronunciations, self.notice = pronunciations, notice
        self.phones = list(phones)
        self.numbers = {phone: i for i, phone in enumerate(self.phones)}
        self.silence = self.numbers[silence]

    @classmethod
    def read(
        cls, path, silence="sil", stress=False, phones=None, fold=str
    ) -> "Lexicon":
        """Lexicon of a text file in the form of Kaldi or CMUdict.

        Arguments
        ---------
        path : str or path
            UTF-8 text, `word phone phone ...` on each line; a word that comes
            again, or as `word(2)`, has alternatives. Lines that begin with
            ;;; are comments, the first of them the notice; so is what
            follows ` #`.
        silence : str
            Symbol of silence.
        stress : bool
            Whether to keep the digits of stress, as in AH0.
        phones : list of str, optional
            See Lexicon; where they have stress, it is kept.
        fold : callable
            What the words are brought to, as str.lower.

        Example
        -------
        >>> path = getfixture("tmp_path") / "lexicon.txt"
        >>> _ = path.write_text("read R EH1 D\\nread(2) R IY1 D\\n")
        >>> Lexicon.read(path).pronunciations
        {'read': [['R', 'EH', 'D'], ['R', 'IY', 'D']]}
        """
        text = _text_of(path)
        notice = _NOTICE.match(text)[0].replace(";;; ", "").replace(";;;", "")
        stress = stress or any(map(_STRESS.search, phones or ()))
        pronunciations = {}
        for number, line in enumerate(text.splitlines(), start=1):
            fields = line.split(" #")[0].split()
            if not fields or line.startswith(";;;"):
                continue
            if len(fields) == 1:
                raise ValueError(
                    f"{path}, line {number}: {fields[0]!r} has no phones"
                )
            word, *pronunciation = fields
            word = fold(_ALTERNATIVE.sub("", word))
            if not stress:
                pronunciation = [
                    _STRESS.sub("", phone) for phone in pronunciation
                ]
            variants = pronunciations.setdefault(
                fold(_ALTERNATIVE.sub("", word)), []
            )
            # without stress, some are the same
            if pronunciation not in variants:
                variants.append(pronunciation)
        try:
            return cls(pronunciations, silence, phones, notice.rstrip("\n"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def covers(self, text):
        """Whether all words of a text have a pronunciation."""
        return all(word in self.pronunciations for word in text.split())

    def write(self, path):
        """Write a file that `read` takes, an alternative on each line.

        Arguments
        ---------
        path : str or path
        """
        lines = [
            f"{word} {' '.join(alternative)}"
            for word, alternatives in sorted(self.pronunciations.items())
            for alternative in alternatives
        ]
        notice = [f";;; {line}".rstrip() for line in self.notice.splitlines()]
        write_text(path, "\n".join([*notice, *lines]) + "\n")

    def of(self, words):
        """The pronunciations of some words alone, with the same phones.

        Arguments
        ---------
        words : sequence of str

        Returns
        -------
        Lexicon
        """
        return Lexicon(
            {word: self.pronunciations[word] for word in words},
            self.phones[self.silence],
            self.phones,
            self.notice,
        )

    def check_vocabulary(self, words):
        """Refuse the vocabulary of an n-gram with words that are not here.

        Arguments
        ---------
        words : sequence of str
        """
        missing = sorted({w for w in words if w not in self.pronunciations})
        if missing:
            raise ValueError(
                f"the n-gram has {len(missing)} words without pronunciation, "
                f"{_some(missing)}: add them to the lexicon, or take the "
                "n-gram that belongs to it"
            )

    def encode(self, words, utterance="?"):
        """Phone numbers of the words of a transcript.

        Arguments
        ---------
        words : list of str
            The transcript.
        utterance : str
            Its name, for errors.

        Returns
        -------
        alternatives : list
            For each word its pronunciations, each a list of phone numbers.
        """
        if isinstance(words, str):
            raise TypeError("give the words as a list: transcript.split()")
        missing = sorted({w for w in words if w not in self.pronunciations})
        if missing:
            raise ValueError(
                f"utterance {utterance}: no pronunciation of "
                f"{_some(missing)}: add it to the lexicon, or remove the "
                "utterance"
            )
        return [
            [
                [self.numbers[phone] for phone in alternative]
                for alternative in self.pronunciations[word]
            ]
            for word in words
        ]
