"""What is quantized and how: two objects that go through all calls as one."""

from dataclasses import dataclass, fields

from .codebook import check_codebook, scale_shape
from .groups import count_slices
from .tensors import near_misses

MATRIX = (1, 1)  # the shape of something that every option applies to


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme: how the values of a tensor are represented.

    Arguments
    ---------
    granularity : str
        "tensor": one scale a tensor. "channel": one for each output channel
        of matrices and filters.
    codebook : str
        "midtread" (Eq. 7), "midrise" (no zero, one level more) or "entropy"
        (levels without end, entropy-coded; one scale a tensor).
    rows : int or None
        Most output channels that share one bit width: larger matrices and
        filters are cut into groups of them. None: whole tensors.
    gates : bool
        Each gate of each layer of an LSTM or GRU has a bit width, and tables,
        of its own.

    Example
    -------
    >>> Scheme(rows=32).codebook
    'midtread'
    >>> Scheme(codebook="midrize")
    Traceback (most recent call last):
    ...
    ValueError: codebook must be one of ('midtread', ...), not 'midrize'
    """

    granularity: str = "tensor"
    codebook: str = "midtread"
    rows: int | None = None
    gates: bool = False

    def __post_init__(self):
        scale_shape(MATRIX, self.granularity)
        check_codebook(self.codebook)
        if self.codebook == "entropy" and self.granularity != "tensor":
            raise ValueError(
                "the entropy codebook has one scale a tensor, for weights of "
                'one step cost least: leave granularity at "tensor"'
            )
        count_slices(MATRIX, self.rows)
        if not isinstance(self.gates, bool):
            raise ValueError(f"gates must be true or false, not {self.gates!r}")


def scheme_of(scheme=None, **options):
    """A scheme given as an object, by single options, or not at all.

    Example
    -------
    >>> scheme_of(codebook="midrise").codebook
    'midrise'
    >>> scheme_of(Scheme(rows=8), granularity="channel").rows
    8
    >>> scheme_of(row=8)
    Traceback (most recent call last):
    ...
    TypeError: a quantization scheme has no option 'row'; near misses: rows...
    """
    if not options:
        return scheme
    known = [field.name for field in fields(Scheme)]
    for name in options:
        if name not in known:
            raise TypeError(
                f"a quantization scheme has no option {name!r}"
                f"{near_misses(name, known)}: choose from {', '.join(known)}"
            )
    return Scheme(**{**(vars(scheme) if scheme else {}), **options})


@dataclass(frozen=True)
class Selection:
    """Which parameters of a model are quantized, by fnmatch patterns.

    Arguments
    ---------
    include : sequence of str
        Patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.
    prefix : str
        Name of a network in its model: parameter and cluster names begin
        with it.

    Example
    -------
    >>> Selection(exclude="*.bias")
    Selection(include=('*',), exclude=('*.bias',), prefix='')
    """

    include: tuple = ("*",)
    exclude: tuple = ()
    prefix: str = ""

    def __post_init__(self):
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            one = isinstance(patterns, str)
            patterns = (patterns,) if one else tuple(patterns)
            object.__setattr__(self, name, patterns)

    @property
    def patterns(self):
        """Include and exclude as keyword arguments."""
        return {"include": self.include, "exclude": self.exclude}
