"""The quantization tables: how many bits mean which levels.

Equations are those of "Mixed precision DNN quantization for overlapped speech
separation and recognition" (ICASSP 2022). There are two kinds of table, both
of whole multiples of a scale alpha, so that the stored integers are exact:

* "midtread" (Eq. 7): n bits mean {0, +-1, ..., +-(2^(n-1) - 1)} alpha, one
  level less than n bits can name.
* "midrise": n bits mean all 2^n odd multiples {+-1, +-3, ..., +-(2^n - 1)}
  alpha; alpha is half a step here and there is no zero. For normal weights
  the level gained is worth 2.0 dB of noise at 2 bits, 1.0 at 3, 0.5 at 4 and
  0.1 at 6. From 7 bits on it is worth less than 0.1 dB and the table is that
  of Eq. 7, so that all integers up to 8 bits fit int8.

With one bit both are {+-alpha}. 1.6 bits are the three levels of Eq. 7's
2-bit table, which take five to a byte (3^5 = 243).
"""

import numbers

MAX_BITS = 16
TERNARY_BITS = 1.6
CODEBOOKS = ("midtread", "midrise")
MIDRISE_BITS = (2, 3, 4, 5, 6)  # where midrise differs from midtread


def check_bits(bits):
    """Refuses everything but an integer from 1 to 16, or 1.6.

    Arguments
    ---------
    bits : int or float
        Bits of one value; numpy numbers are fine, bools and other floats are
        not.

    Returns
    -------
    int or float
        A float only for 1.6.

    Example
    -------
    >>> check_bits(4), check_bits(1.6)
    (4, 1.6)
    >>> check_bits(4.0)
    Traceback (most recent call last):
    ...
    ValueError: bits must be an integer from 1 to 16 or 1.6, not 4.0
    """
    if isinstance(bits, float) and bits == TERNARY_BITS:
        return TERNARY_BITS
    is_integer = isinstance(bits, numbers.Integral)
    if not is_integer or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"bits must be an integer from 1 to {MAX_BITS} or {TERNARY_BITS}, "
            f"not {bits!r}"
        )
    return int(bits)


def table_bits(bits):
    """Bits of the table that a value is from: those stored, 2 for 1.6.

    Arguments
    ---------
    bits : int or float
        Stored bits of one value.

    Returns
    -------
    int

    Example
    -------
    >>> table_bits(1.6), table_bits(3)
    (2, 3)
    """
    bits = check_bits(bits)
    return 2 if bits == TERNARY_BITS else bits


def check_codebook(codebook):
    """Refuses an unknown kind of codebook.

    Arguments
    ---------
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    str

    Example
    -------
    >>> check_codebook("midrise")
    'midrise'
    """
    if codebook not in CODEBOOKS:
        raise ValueError(
            f"codebook must be one of {CODEBOOKS}, not {codebook!r}"
        )
    return codebook


def has_zero(bits, codebook="midtread"):
    """Whether a table has a zero; without one its levels are odd.

    Arguments
    ---------
    bits : int or float
        Bits of one value.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    bool

    Example
    -------
    >>> [has_zero(bits, "midrise") for bits in (1, 1.6, 2, 6, 7)]
    [False, True, False, False, True]
    """
    midrise = check_codebook(codebook) == "midrise"
    return bits != 1 and not (midrise and bits in MIDRISE_BITS)


def largest_level(bits, codebook="midtread"):
    """The largest integer of a table: 2^(n-1) - 1, or 2^n - 1 without zero.

    Arguments
    ---------
    bits : int or float
        Bits of one value.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    int

    Example
    -------
    >>> [largest_level(bits) for bits in (1, 1.6, 2, 4, 8)]
    [1, 1, 1, 7, 127]
    >>> [largest_level(bits, "midrise") for bits in (1, 1.6, 2, 4, 8)]
    [1, 1, 3, 15, 127]
    """
    if has_zero(bits, codebook):
        return 2 ** (table_bits(bits) - 1) - 1
    return 2 ** check_bits(bits) - 1
