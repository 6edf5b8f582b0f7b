"""What is quantized, how, and in how many bits: selection, scheme, bit plan.

A bit plan knows the bits of each cluster, and what that makes of a size.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field, fields

from ..utils import read_text, strict_json, write_text
from .codebook import TERNARY_BITS, check_bits, check_codebook, scale_shape
from .groups import count_slices, slice_name, split_name
from .tensors import ROOT, named_tensors, near_misses

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
    names = [field.name for field in fields(Scheme)]
    for name in options:
        if name not in names:
            raise TypeError(
                f"a quantization scheme has no option {name!r}"
                f"{near_misses(name, names)}: choose from {', '.join(names)}"
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


VERSION = 1
SCALE_BYTES = 4  # a scale is stored as float32
FLOAT_BYTES = 4  # and so is a parameter that is left alone


def packed_bytes(parameters, bits, scales):
    """Bytes of integers packed without gaps, rounded up, and their scales.

    At 1.6 bits five integers share a byte.

    Example
    -------
    >>> packed_bytes(parameters=131072, bits=4, scales=1)
    65540
    >>> packed_bytes(parameters=1, bits=2, scales=1)
    5
    >>> packed_bytes(parameters=11, bits=1.6, scales=0)
    3
    """
    if bits == TERNARY_BITS:
        return math.ceil(parameters / 5) + SCALE_BYTES * scales
    return math.ceil(parameters * bits / 8) + SCALE_BYTES * scales


def mean_bits(sizes):
    """Compute the bits of a value on average.

    Arguments
    ---------
    sizes : iterable of tuple
        (bits, number of values).

    Example
    -------
    >>> mean_bits([(4, 3), (2, 1)]), mean_bits([(1.6, 7), (1.6, 5)])
    (3.5, 1.6)
    """
    # Integer tenths, so that 1.6 bits everywhere are exactly 1.6.
    sizes = [(round(10 * bits), count) for bits, count in sizes]
    stored = sum(tenths * count for tenths, count in sizes)
    return stored / (10 * sum(count for _, count in sizes))


@dataclass(frozen=True)
class ClusterBits:
    """What a plan says of one cluster.

    Example
    -------
    >>> ClusterBits(4, 192, ("norm.weight", "norm.bias")).bytes
    104
    """

    bits: int | float  # bits of every value in the cluster, 1 to 16, or 1.6
    parameters: int  # number of values
    # tuple of str: names of the cluster's parameter tensors, with their rows
    # where a tensor is cut: "conv.weight[0:32]"
    tensors: tuple = ()
    # number of scales where a tensor has several; None: one each
    scales: int = None

    @classmethod
    def of(cls, tensors, scales, bits):
        """A cluster of tensors {name: values} with so many scales."""
        return cls(bits, sum(tensors.values()), tuple(tensors), scales)

    def __post_init__(self):
        object.__setattr__(self, "bits", check_bits(self.bits))
        object.__setattr__(self, "parameters", int(self.parameters))
        object.__setattr__(self, "tensors", tuple(self.tensors))
        if self.scales is None:
            object.__setattr__(self, "scales", len(self.tensors))
        if self.parameters < 1:
            raise ValueError("a cluster needs at least one parameter")

    @property
    def bytes(self):
        """Size of the packed cluster. Tensors whose integers do not fill
        their last byte can take up to a byte each more."""
        return packed_bytes(self.parameters, self.bits, self.scales)


@dataclass(frozen=True)
class BitPlan:
    """Bits of every cluster, and what that makes of the model's size.

    Arguments
    ---------
    clusters : dict
        Cluster name -> ClusterBits.
    rest_parameters : int
        Parameters that stay in float32.
    codebook : str
        Kind of all quantization tables, "midtread" or "midrise".

    Example
    -------
    >>> plan = BitPlan(
    ...     {
    ...         "conv": ClusterBits(2, 3000, ("conv.weight",)),
    ...         "prelu": ClusterBits(16, 1, ("prelu.weight",)),
    ...     },
    ...     rest_parameters=10,
    ... )
    >>> plan.bytes, round(plan.average_bits, 3)
    (800, 2.005)
    """

    clusters: dict = field(default_factory=dict)
    rest_parameters: int = 0
    codebook: str = "midtread"

    def __post_init__(self):
        check_codebook(self.codebook)
        if not self.clusters:
            raise ValueError("a bit plan needs at least one cluster")
        if self.rest_parameters < 0:
            raise ValueError("rest_parameters must not be negative")

    @classmethod
    def uniform(cls, clusters, bits, rest_parameters=0, codebook="midtread"):
        """The plan that gives every cluster the same bits."""
        same = {
            name: ClusterBits(bits, old.parameters, old.tensors, old.scales)
            for name, old in clusters.items()
        }
        return cls(same, rest_parameters, codebook)

    @property
    def tensors(self):
        """Names of all tensors and slices in the plan."""
        return [name for c in self.clusters.values() for name in c.tensors]

    @property
    def gated(self):
        """Names of the tensors whose slices are gates, by their clusters."""
        names = set()
        for cluster, entry in self.clusters.items():
            for name, rows in map(split_name, entry.tensors):
                module = name.rpartition(".")[0] or ROOT
                if rows is not ... and cluster != slice_name(module, rows):
                    names.add(name)
        return names

    @property
    def average_bits(self):
        """Mean bits of a quantized parameter."""
        return mean_bits((c.bits, c.parameters) for c in self.clusters.values())

    @property
    def bytes(self):
        """Size of the packed integers, the scales and the float rest."""
        packed = sum(cluster.bytes for cluster in self.clusters.values())
        return packed + FLOAT_BYTES * self.rest_parameters

    def to_dict(self):
        """The content of plan.json; the codebook only where not Eq. 7's."""
        kind = {"codebook": self.codebook}
        return {
            "version": VERSION,
            **(kind if self.codebook != "midtread" else {}),
            "average_bits": self.average_bits,
            "bytes": self.bytes,
            "rest_parameters": self.rest_parameters,
            "clusters": {
                name: _cluster_to_dict(cluster)
                for name, cluster in self.clusters.items()
            },
        }

    @classmethod
    def from_dict(cls, content):
        """The plan of a plan.json's content; ValueError where it is wrong."""
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise ValueError(f"plan version {version!r} is not {VERSION}")
        clusters = content.get("clusters")
        if not isinstance(clusters, dict):
            raise ValueError('"clusters" must map cluster names to their bits')
        read = {}
        for name, entry in clusters.items():
            try:
                read[name] = _cluster_from_dict(entry)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"cluster {name!r}: {error!r}") from error
        rest = content.get("rest_parameters", 0)
        if type(rest) is not int:
            raise ValueError('"rest_parameters" must be a number of values')
        plan = cls(read, rest, content.get("codebook", "midtread"))
        if content.get("bytes", plan.bytes) != plan.bytes:
            raise ValueError(
                f'"bytes" says {content["bytes"]}, its clusters {plan.bytes}'
            )
        return plan

    def save(self, path):
        """Writes plan.json, all of it or nothing."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Reads plan.json; ValueError names the file and what is wrong."""
        try:
            content = strict_json(read_text(path))
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(
                f"{path} is no bit plan ({error}); delete it and allocate "
                "again, or correct it by hand"
            ) from error


def _cluster_to_dict(cluster):
    """One cluster of plan.json; the scales only where they are several."""
    entry = {
        "bits": cluster.bits,
        "parameters": cluster.parameters,
        "tensors": list(cluster.tensors),
    }
    if cluster.scales != len(cluster.tensors):
        entry["scales"] = cluster.scales
    return entry


def _cluster_from_dict(entry):
    """ClusterBits of one cluster of plan.json."""
    tensors = entry["tensors"]
    is_list = isinstance(tensors, list)
    if not is_list or not all(isinstance(name, str) for name in tensors):
        raise TypeError('"tensors" must be a list of names')
    if type(entry["parameters"]) is not int:
        raise TypeError('"parameters" must be a number of values')
    return ClusterBits(
        entry["bits"], entry["parameters"], tensors, entry.get("scales")
    )


def bit_plan(model):
    """Reads the plan that a quantized model follows."""
    grouped, rest = defaultdict(list), 0
    for tensor in named_tensors(model).values():
        if tensor.fake_quantize:
            grouped[tensor.cluster].append(tensor)
        else:
            parts = tensor.parts.values() or [tensor.parameter]
            rest += sum(p.numel() for p in parts)
    if not grouped:
        raise ValueError(
            "the model has no quantized parameter: call quantize_ first"
        )
    entries, codebooks = {}, set()
    for cluster, members in grouped.items():
        codebooks.update(m.fake_quantize.codebook for m in members)
        entries[cluster] = ClusterBits(
            bits=members[0].fake_quantize.stored_bits,
            parameters=sum(m.weight.numel() for m in members),
            tensors=tuple(m.name for m in members),
            scales=sum(m.fake_quantize.alpha.numel() for m in members),
        )
    if len(codebooks) > 1:
        raise ValueError(
            f"the model mixes the codebooks {sorted(codebooks)}: quantize all "
            "of it with one"
        )
    return BitPlan(entries, rest, codebooks.pop())


def bits_of_plan(plan, tensors, chosen):
    """Bits of every tensor, for a plan that must fit the model.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.tensors import named_tensors
    >>> tensors = named_tensors(torch.nn.Linear(4, 2))
    >>> plan = BitPlan({".": ClusterBits(3, 8, ("weight",))})
    >>> bits_of_plan(plan, tensors, list(tensors.values()))
    {'weight': 3}
    """
    members = defaultdict(list)
    for tensor in chosen:
        members[tensor.cluster].append(tensor.name)
    known = [tensor.name for tensor in chosen]
    bits = {}
    for cluster, entry in plan.clusters.items():
        present = members.get(cluster, ())
        names = entry.tensors or present
        missing = [name for name in names if name not in present]
        if missing or not names:
            missing = missing[0] if missing else cluster
            raise ValueError(
                f"the plan's cluster {cluster!r} needs {missing!r}, which the "
                "model lacks there or the patterns leave out"
                f"{near_misses(missing, known)}"
            )
        count = sum(tensors[name].weight.numel() for name in names)
        if count != entry.parameters:
            raise ValueError(
                f"the plan's cluster {cluster!r} has {entry.parameters} "
                f"parameters, the model's {count}: make a plan for this model"
            )
        bits.update(dict.fromkeys(names, entry.bits))
    return bits
