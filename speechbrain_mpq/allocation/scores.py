"""Scorers, and the table that they make: how much each cluster's bits matter.

A score is the harm that quantizing one cluster to some bits does while all
others stay in full precision: 0 is harmless, more is worse. Scores of one
table share a unit; those of two methods do not.
"""

import copy
import json
import math
from dataclasses import dataclass, field

from ..quantization.codebook import check_bits, check_codebook
from ..quantization.plan import Scheme, Selection, scheme_of
from ..utils import check_numbers, read_text, strict_json, write_text

VERSION = 1


def check_candidates(candidate_bits):
    """Candidate bits in ascending order."""
    try:
        candidates = sorted(check_bits(bits) for bits in candidate_bits)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"candidate bits {candidate_bits!r}: {error}; give a list such as "
            "[2, 4, 8, 16]"
        ) from error
    if not candidates:
        raise ValueError(
            "candidate bits are empty; give a list such as [2, 4, 8, 16]"
        )
    if len(set(candidates)) < len(candidates):
        raise ValueError(
            f"candidate bits {list(candidate_bits)} name some bits twice"
        )
    return tuple(candidates)


@dataclass
class ScoreTable:
    """Scores of every cluster at every candidate, and what a plan needs more.

    Arguments
    ---------
    scores : dict
        scores[cluster][bits], floats; the same bits for every cluster.
    tensors : dict
        tensors[cluster][tensor name] is the tensor's number of parameters; a
        slice counts as a tensor.
    scales : dict
        scales[cluster] is the number of its scales; one a tensor if missing.
    rest_parameters : int
        Parameters in no cluster, that stay in full precision.
    method : str
        How the scores were made.
    signed : bool
        Whether the method can score below zero.
    details : dict
        Whatever else describes the scores (seconds, items, ...), for JSON.
    codebook : str
        Kind of quantization table that was scored, and that plans then name.

    Example
    -------
    >>> table = ScoreTable(
    ...     {"conv": {2: 0.5, 4: 0.1}}, {"conv": {"conv.weight": 12}}
    ... )
    >>> table.candidate_bits, table.parameters, table.scales
    ((2, 4), {'conv': 12}, {'conv': 1})
    >>> ScoreTable({"conv": {2: float("nan")}}, {"conv": {"conv.weight": 12}})
    Traceback (most recent call last):
    ...
    ValueError: the score of conv at 2 bits is nan: ...
    """

    scores: dict
    tensors: dict
    scales: dict = field(default_factory=dict)
    rest_parameters: int = 0
    method: str = ""
    signed: bool = False
    details: dict = field(default_factory=dict)
    codebook: str = "midtread"

    def __post_init__(self):
        check_codebook(self.codebook)
        if not self.scores:
            raise ValueError("a score table needs at least one cluster")
        if set(self.scores) != set(self.tensors):
            odd = sorted(set(self.scores) ^ set(self.tensors))
            raise ValueError(f"clusters with scores or tensors only: {odd}")
        sizes = [n for row in self.tensors.values() for n in row.values()]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("a tensor's parameters must be a positive integer")
        one_each = {name: len(row) for name, row in self.tensors.items()}
        self.scales = one_each | self.scales
        candidates = set(self.candidate_bits)
        for cluster, row in self.scores.items():
            self._check_row(cluster, row, candidates)

    def _check_row(self, cluster, row, candidates):
        """Refuses what no solver should see, naming the cluster."""
        missing = sorted(candidates - set(row))
        if missing:
            raise ValueError(
                f"{cluster} has no score at {missing} bits, others have; "
                "score all clusters with the same candidate bits"
            )
        for bits, score in row.items():
            if not math.isfinite(score) or (score < 0 and not self.signed):
                raise ValueError(
                    f"the score of {cluster} at {bits} bits is {score}: "
                    "scores must be finite and not negative; look for NaN or "
                    "infinity in its weights and in the scoring data"
                )

    @property
    def candidate_bits(self):
        """All bits that were tried, ascending."""
        return check_candidates(
            {b for row in self.scores.values() for b in row}
        )

    @property
    def parameters(self):
        """Number of parameters of each cluster."""
        return {name: sum(row.values()) for name, row in self.tensors.items()}

    def save(self, path):
        """Write `scores.json`; a reader never sees half a file."""
        kind = {"codebook": self.codebook}
        content = {
            "version": VERSION,
            **(kind if self.codebook != "midtread" else {}),
            "method": self.method,
            "signed": self.signed,
            "candidate_bits": list(self.candidate_bits),
            "rest_parameters": self.rest_parameters,
            "details": self.details,
            "clusters": {
                cluster: {
                    "parameters": self.parameters[cluster],
                    "scales": self.scales[cluster],
                    "tensors": self.tensors[cluster],
                    "scores": {str(bits): row[bits] for bits in sorted(row)},
                }
                for cluster, row in self.scores.items()
            },
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        write_text(path, f"{text}\n")

    @classmethod
    def load(cls, path):
        """Read and check what `save` has written."""
        try:
            return cls._from_content(strict_json(read_text(path)))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no usable score table ({error!r}); delete it and "
                "score again"
            ) from error

    @classmethod
    def _from_content(cls, content):
        """The table from parsed JSON, whose keys are all strings."""
        if content["version"] != VERSION:
            raise ValueError(
                f"version {content['version']}, this program reads {VERSION}"
            )
        clusters = content["clusters"]
        _check_kinds(content, _KINDS)
        for name, row in clusters.items():
            _check_kinds(row, {"scales": int}, f" of {name}")
            sizes = [*row["scores"].values(), *row["tensors"].values()]
            check_numbers(sizes, name)
        return cls(
            scores={
                cluster: {_bits(key): x for key, x in row["scores"].items()}
                for cluster, row in clusters.items()
            },
            tensors={name: row["tensors"] for name, row in clusters.items()},
            scales={name: row["scales"] for name, row in clusters.items()},
            rest_parameters=content["rest_parameters"],
            method=content["method"],
            signed=content["signed"],
            details=content["details"],
            codebook=content.get("codebook", "midtread"),
        )


_KINDS = {"rest_parameters": int, "method": str, "signed": bool}


def _check_kinds(content, kinds, of=""):
    """Raise ValueError where JSON holds something of another kind."""
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise ValueError(f"{key}{of} is {content[key]!r}")


def _bits(key):
    """Bits from a key of a JSON object: "2" or "1.6"."""
    return check_bits(float(key) if "." in key else int(key))


class Scorer:
    """What all scorers have in common.

    A subclass says in `needs` which calibration values it takes, and in
    `score` what it makes of them. Which parameters are scored, and at which
    quantization scheme, is told from outside: the scheme is that of the model
    (`with_scheme`), so that no scorer can score another.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    scheme : Scheme or None
        What is scored; None: that of the model, or the default one.
    **options : dict
        Single fields of it: granularity, codebook, rows.

    Example
    -------
    >>> Scorer((4, 2), codebook="midrise").with_scheme(Scheme("channel"))
    Traceback (most recent call last):
    ...
    ValueError: Scorer scores codebook 'midrise', the model gets 'midtread': ...
    """

    method = ""  # how the scores are made, for the table
    signed = False  # whether a score can be below zero
    additive = True  # whether scores of clusters add up to that of a plan
    needs = ()  # of a calibration: inputs, weights, loss, prototypes
    shared = True  # whether processes can share the work
    measure = None  # or a method: the error of a whole plan, in their unit

    def __init__(self, candidate_bits=(2, 4, 8, 16), scheme=None, **options):
        self.candidate_bits = check_candidates(candidate_bits)
        self._asked = {**(vars(scheme) if scheme else {}), **options}
        self.scheme = scheme_of(scheme, **options) or Scheme()

    @property
    def base(self):
        """The scores that these refine, or themselves."""
        return self

    def with_scheme(self, scheme):
        """A copy that scores a model's scheme; refused where it has another."""
        for key, own in self._asked.items():
            value = getattr(scheme, key)
            if own != value:
                raise ValueError(
                    f"{type(self).__name__} scores {key} {own!r}, the model "
                    f"gets {value!r}: give both the same, or leave {key} to "
                    "the model"
                )
        scorer = copy.copy(self)
        scorer.scheme = scheme
        return scorer

    def one_by_one(self):
        """A copy that passes single items, as those of other shapes need."""
        return copy.copy(self)

    def score(self, network, values, selection, progress=True, folder=None):
        """Score a network, all processes together where it is `shared`.

        Arguments
        ---------
        network : torch.nn.Module
        values : dict
            What `needs` names; the same in all processes.
        selection : Selection
        progress : bool
            Shows a progress bar.
        folder : str or Path or None
            Where finished parts are kept for the next start after a kill.

        Returns
        -------
        ScoreTable
        """
        raise NotImplementedError(f"{type(self).__name__} scores nothing")

    def __call__(
        self, network, *values, include=("*",), exclude=(), prefix="", **more
    ):
        """Score a network by the values of `needs`, in their order."""
        selection = Selection(include, exclude, prefix)
        return self.score(
            network, dict(zip(self.needs, values)), selection, **more
        )


class DerivedScores(Scorer):
    """Scores that are made of another scorer's.

    A subclass sets `base`, the other scorer, whose needs and scheme are its
    own, and says in `score` what becomes of its table.
    """

    base = None

    @property
    def needs(self):
        """What a calibration has to provide."""
        return self.base.needs

    @property
    def shared(self):
        """Whether processes can share the work."""
        return self.base.shared

    @property
    def candidate_bits(self):
        """Those of the other scorer."""
        return self.base.candidate_bits

    @property
    def scheme(self):
        """What is scored."""
        return self.base.scheme

    def with_scheme(self, scheme):
        """A copy that scores a model's scheme, see `Scorer.with_scheme`."""
        return self._of(self.base.with_scheme(scheme))

    def one_by_one(self):
        """A copy that passes single items."""
        return self._of(self.base.one_by_one())

    def _of(self, base):
        """A copy that is made of other scores."""
        scorer = copy.copy(self)
        scorer.base = base
        return scorer
