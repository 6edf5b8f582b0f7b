"""Vocabulary of a word language model: words and their numbers."""

import hashlib
from collections import Counter

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
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from error
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
        return [self.numbers.get(word, self.unk_index) for word in words]

    def unknown(self, text):
        """Words of a text that are not in the vocabulary."""
        return [w for w in self.split(text) if w not in self.numbers]
