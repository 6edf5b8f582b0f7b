"""The classes that a packed file may ask for, and with what arguments.

A packed model says in JSON what to build: {"class": "Separator",
"arguments": {...}}. Only registered classes are built, only from plain
arguments of the right type and range; nothing is imported or executed by
name. Checks of an argument take a value from JSON and the place where it
stands; their ranges are wide enough for any model and narrow enough that a
forged file cannot ask for the memory of a data centre.

To share models of another class, call `register` in the file that defines it.
"""

import json
import math
import re
from dataclasses import dataclass, field
from importlib import import_module

import torch
import torch.nn as nn

from ..lobes.models.audio_visual import FRONT_ENDS
from ..lobes.models.separator import Separator
from ..lobes.models.spatial_features import PHASES, SpatialFeatures
from ..lobes.models.tcn import MAX_BLOCKS, MAX_LAYERS, ChannelAffine
from ..quantization.packing import stored_buffers
from ..quantization.tensors import named_tensors
from ..utils import SAMPLE_RATE
from .card import CARDS


def whole(low, high) -> callable:
    """Make a check for integers of a range.

    Arguments
    ---------
    low, high : int
        Smallest and largest.

    Example
    -------
    >>> whole(1, 8)(4, "layers")
    4
    >>> whole(1, 8)(9, "layers")
    Traceback (most recent call last):
    ...
    ValueError: layers must be an integer from 1 to 8, not 9
    """

    def check(value, place):
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"{place} must be an integer from {low} to {high}, not "
                f"{_short(value)}"
            )
        return value

    return check


def number(low, high) -> callable:
    """Make a check for finite numbers of a range.

    Arguments
    ---------
    low, high : float
        Smallest and largest.

    Example
    -------
    >>> number(0, 100)(2.5, "gap")
    2.5
    """

    def check(value, place):
        plain = type(value) in (int, float) and math.isfinite(value)
        if not plain or not low <= value <= high:
            raise ValueError(
                f"{place} must be a number from {low} to {high}, not "
                f"{_short(value)}"
            )
        return value

    return check


def choice(*values) -> callable:
    """Make a check for one of some values.

    Arguments
    ---------
    *values : str or int or bool
        What there is to choose from.

    Example
    -------
    >>> choice("ipd", "steered")("ipd", "phase")
    'ipd'
    """

    def check(value, place):
        if not any(type(value) is type(v) and value == v for v in values):
            raise ValueError(
                f"{place} must be one of {values}, not {_short(value)}"
            )
        return value

    return check


flag = choice(True, False)
_SHA256 = re.compile(r"(?:[0-9a-f]{64})?")


def checksum(value, place):
    """Check for a SHA-256 in hexadecimal, or an empty string.

    Arguments
    ---------
    value : object
    place : str
        Where it stands, for messages.

    Example
    -------
    >>> checksum("", "files_sha256[0]")
    ''
    """
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{place} must be a SHA-256 or empty")
    return value


def optional(check) -> callable:
    """Make a check that lets None pass.

    Arguments
    ---------
    check : callable
        For everything else.

    Example
    -------
    >>> optional(whole(1, 2))(None, "filters") is None
    True
    """
    return lambda value, place: None if value is None else check(value, place)


def several(check, least, most) -> callable:
    """Make a check for lists.

    Arguments
    ---------
    check : callable
        For every entry.
    least, most : int
        Length of the list.

    Example
    -------
    >>> several(whole(1, 9), 1, 3)([8, 1], "pair")
    [8, 1]
    """

    def check_all(value, place):
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(
                f"{place} must be a list of {least} to {most} entries, not "
                f"{_short(value)}"
            )
        return [check(entry, f"{place}[{i}]") for i, entry in enumerate(value)]

    return check_all


def _fields(checks, needed=()):
    """A check for objects with known keys."""

    def check(value, place):
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be an object, not {_short(value)}")
        for key in value:
            if key not in checks:
                raise ValueError(
                    f"{place} has no {key[:40]!r}, only {sorted(checks)}"
                )
        for key in needed:
            if key not in value:
                raise ValueError(f"{place} lacks {key!r}")
        return {k: checks[k](v, f"{place}.{k}") for k, v in value.items()}

    return check


def _short(value):
    """A value from a stranger, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


MAX_CONV_BLOCKS = 256  # the paper's separator has 32
_MICROPHONE = whole(1, 1024)
_SIZES = {  # of a TCN; the mask network's and the lip stream's
    "channels": whole(1, 2**14),
    "hidden": whole(1, 2**14),
    "kernel_size": choice(*range(1, 64, 2)),
    "blocks": whole(1, MAX_BLOCKS),
}


_VISUAL = {
    **_SIZES,
    "front_end": choice(*FRONT_ENDS),
    "height": whole(1, 1024),
    "width": whole(1, 1024),
    "filters": optional(whole(1, 1024)),
    "after": whole(1, 64),
    "factors": whole(1, 1024),
    "residual": flag,
}


@dataclass(frozen=True)
class Part:
    """A class that files may name."""

    kind: type  # the class
    build: callable  # takes the arguments and returns a module
    settings: callable  # takes a module and returns the arguments that build it
    # dict of str -> callable: checks of all arguments; each must be given, but
    # those that `may_lack` names
    arguments: dict
    is_model: bool = True  # whether it may be the whole of a packed model
    # takes a module and returns its output for some input: what `check_folder`
    # wants to be finite
    probe: callable = None
    # file beside the weights that it cannot do without -> what raises
    # ValueError or OSError on a folder and a model that do not fit together
    needed_files: dict = field(default_factory=dict)
    may_lack: tuple = ()  # what files leave out where it has its default


REGISTRY = {}  # class name -> Part
# Modules that register classes of their own when a file first names one: what
# they import takes time.
_HOMES = {
    "TiedRNNLM": ".language_model",
    "TiedTransformerLM": ".language_model",
    "DNSMOS": ".quality_estimation",
    "BinaryDNSMOS": ".quality_estimation",
    "TDNNF": ".speech_recognition",
    "NsNet2": ".enhancement",
    "EarlyExitNsNet2": ".enhancement",
}


def register(
    kind,
    arguments,
    build=None,
    settings=None,
    card=None,
    probe=None,
    needed_files=(),
    may_lack=(),
):
    """Register a class that packed files may name and `load` builds.

    Whoever loads such a file has imported the module that calls this.
    """
    name = kind.__name__
    if name in REGISTRY and _path(REGISTRY[name].kind) != _path(kind):
        raise ValueError(
            f"there is another {name}, {_path(REGISTRY[name].kind)}: rename "
            "yours"
        )
    REGISTRY[name] = Part(
        kind,
        build or (lambda **settings: _build_on_meta(kind, settings)),
        settings or (lambda module: dict(module.settings)),
        arguments,
        probe=probe,
        needed_files=dict(needed_files),
        may_lack=tuple(may_lack),
    )
    if card is not None:
        CARDS[name] = card


def registered(name) -> Part:
    """Find a registered class; KeyError where there is none."""
    if name in _HOMES and name not in REGISTRY:
        import_module(_HOMES[name], __package__)
    return REGISTRY[name]


def build(architecture, name="Separator") -> torch.nn.Module:
    """Build what a file describes, trained tensors on the meta device.

    Memory for the weights is reserved later, when the file is known to hold
    them all.

    Arguments
    ---------
    architecture : dict
        From a file.
    name : str or None
        The class that is expected; None: any registered model.

    Example
    -------
    >>> separator = Separator(SpatialFeatures(), channels=16, hidden=32)
    >>> built = build(describe(separator))
    >>> built.mask_net.conv_in, built.mask_net.conv_in.weight.device.type
    (Conv1d(3598, 16, kernel_size=(1,), stride=(1,)), 'meta')
    >>> build({"class": "os.system", "arguments": {}})
    Traceback (most recent call last):
    ...
    ValueError: architecture must be of class 'Separator', not 'os.system'
    """
    if name is None:
        name = "Separator"
        requested = None
        if _is_object(architecture):
            requested = architecture["class"]
        models = [n for n, entry in REGISTRY.items() if entry.is_model]
        name = requested if requested in [*models, *_HOMES] else name
    return part(name)(architecture, "architecture")


def describe(module):
    """Describe a module as `build` needs it."""
    architecture = json.loads(json.dumps(_described(module)))
    name = architecture["class"]
    if _shapes(build(architecture, name)) != _shapes(module):
        raise ValueError(
            f"this {name} was changed after it was built, so that its "
            "arguments do not describe it: build it with the arguments that "
            "it has now"
        )
    return architecture


def part(name) -> callable:
    """Make a check that builds a registered class.

    Arguments
    ---------
    name : str
        Of the class.
    """

    def check(value, place):
        entry = registered(name)
        checks = {"class": lambda kind, _: kind, "arguments": lambda a, _: a}
        _fields(checks, checks)(value, place)
        if value["class"] != name:
            raise ValueError(
                f"{place} must be of class {name!r}, not "
                f"{str(value['class'])[:80]!r}"
            )
        needed = [a for a in entry.arguments if a not in entry.may_lack]
        checked = _fields(entry.arguments, needed)
        try:
            return entry.build(**checked(value["arguments"], place))
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"{place} cannot be built: {error}") from error

    return check


def _path(kind):
    """Where a class is defined; the same after a module is loaded again."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_object(value):
    """Whether JSON has an object here, with a class that may be one."""
    return isinstance(value, dict) and isinstance(value.get("class"), str)


def _build_on_meta(kind, arguments):
    """A module without memory for what a file will fill."""
    with torch.device("meta"):
        module = kind(**arguments).eval()
    stored = module.state_dict()
    lost = [n for n, _ in module.named_buffers() if n not in stored]
    if lost:
        raise ValueError(
            f"{kind.__name__} has {lost[0]}, which no file holds: register "
            "it with a `build` that makes it"
        )
    return module


def _described(module):
    """Class and arguments of a module and its parts."""
    for name, entry in REGISTRY.items():
        if type(module) is entry.kind:
            return {"class": name, "arguments": entry.settings(module)}
    raise ValueError(
        f"files cannot name a {type(module).__name__}, only {list(REGISTRY)}: "
        "let inference.registry.register know the class, or save its weights "
        "alone with save_packed and load them with load_packed_"
    )


def _shapes(module):
    """Name -> shape of all that is stored of a module."""
    tensors = {n: t.weight for n, t in named_tensors(module).items()}
    shapes = {}
    for name, tensor in {**tensors, **stored_buffers(module)}.items():
        name, _, rows = name.partition("[")
        size = list(tensor.shape)
        if rows:
            size[0] += shapes.get(name, [0])[0]
        shapes[name] = size
    return shapes


def _build_separator(features, folded, **sizes):
    """A separator without memory for its weights."""
    if features.hop > features.n_fft:
        raise ValueError("features leave gaps between their windows")
    if sizes["blocks"] * sizes["layers"] > MAX_CONV_BLOCKS:
        raise ValueError(f"more than {MAX_CONV_BLOCKS} ConvBlocks")
    with torch.device("meta"):
        separator = Separator(features, **sizes)
        if folded:
            _place_affines(separator)
    return separator.eval()


def _place_affines(model):
    """The layers of `fold_norms_` without its arithmetic, for the loader."""
    # The first sum on the meta device makes PyTorch import its compiler:
    # two seconds and 120 MiB
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                setattr(parent, name, ChannelAffine(child.num_features))


def _separator_settings(separator):
    """Arguments of `_build_separator`."""
    norms = any(isinstance(m, nn.BatchNorm1d) for m in separator.modules())
    return {
        "features": _described(separator.features),
        **separator.settings,
        "scale_inputs": hasattr(separator.mask_net, "scale_in"),
        "folded": not norms,
    }


def _probe_separator(separator):
    """What a separator makes of a second of noise."""
    generator = torch.Generator().manual_seed(0)
    mics = len(separator.features.microphones)
    samples = max(SAMPLE_RATE, separator.features.n_fft)
    shape = (1, samples, mics)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return separator(noise / 10, torch.tensor([90.0], dtype=torch.float32))


REGISTRY["SpatialFeatures"] = Part(
    SpatialFeatures,
    SpatialFeatures,
    lambda features: features.settings,
    {
        "pairs": several(several(_MICROPHONE, 2, 2), 1, 256),
        "phase": choice(*PHASES),
        "n_fft": whole(16, 2**14),
        "hop": whole(1, 2**14),
        "spacings_cm": optional(several(number(0, 10000), 1, 1023)),
        "positions_cm": several(several(number(-1e4, 1e4), 2, 2), 3, 1024),
    },
    is_model=False,
    may_lack=("positions_cm",),  # linear arrays do
)
register(
    Separator,
    {
        "features": part("SpatialFeatures"),
        **_SIZES,
        "layers": whole(1, MAX_LAYERS),
        "visual": optional(_fields(_VISUAL)),
        "scale_inputs": flag,
        "folded": flag,
    },
    build=_build_separator,
    settings=_separator_settings,
    probe=_probe_separator,
)
