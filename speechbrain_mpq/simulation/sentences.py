"""Sentences of a small closed grammar: names, digits, colours, places and
a few spoken letters that do not sound alike.

The grammar has no spelling that a recognizer could confuse by chance (the
letters of the rhyming sets b, c, d, e, ... and a, j, k are left out), so that
errors measure the acoustics and not the language.
"""

WORDS = {
    "name": "anna david helen marcus oliver sophia robert julia".split(),
    "verb": "brings finds moves sends counts shows lifts".split(),
    "command": "place paint switch open watch follow".split(),
    "digit": ("zero one two three four five six seven eight nine".split()),
    "colour": "red green blue yellow white purple orange".split(),
    "noun": "apples boxes candles lamps stones bottles tables papers".split(),
    "letter": "f h o q r w x".split(),
    "preposition": "near behind under with from".split(),
    "article": ["the"],
    "place": "garden kitchen river station market window harbour".split(),
    "adverb": "again today slowly please now".split(),
}

PATTERNS = [
    pattern.split()
    for pattern in (
        "name verb digit colour noun preposition article place adverb",
        "command article colour noun preposition letter digit adverb",
        "name verb letter digit digit preposition article place adverb",
    )
]


def vocabulary():
    """Every word of the grammar, sorted.

    Returns
    -------
    list of str

    Example
    -------
    >>> len(vocabulary())
    71
    """
    return sorted({word for words in WORDS.values() for word in words})


def sentence(rng):
    """One sentence of the grammar.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of the choices; the same state gives the same sentence.

    Returns
    -------
    str
        Eight or nine lower-case words.

    Example
    -------
    >>> import numpy as np
    >>> len(sentence(np.random.default_rng(0)).split()) in (8, 9)
    True
    """
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return " ".join(
        WORDS[kind][rng.integers(len(WORDS[kind]))] for kind in pattern
    )
