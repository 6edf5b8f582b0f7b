"""Ranges of the activations, from a calibration set: what int8 inputs mean.

An activation x is executed as the integer round(x / scale) + zero_point, cut
to 0..255. Scale and zero point are those with the least squared error over a
histogram of what the layer read on the calibration set. Depthwise
convolutions have a range for each channel: their products never meet.

activations.json holds them beside a packed model's weights, with the SHA-256
of the weights that they are of and one of its own content. What it says is
checked in full before it is used.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...quantization.container import PackedModelError
from ...quantization.packing import MODEL_FILE
from ...utils import check_numbers, read_text, strict_json, write_text
from .lowered import SIGNED, run

RANGES_FILE = "activations.json"
VERSION = 2
UNSEALED = 1  # a version without a checksum of its own
MAX_BYTES = 2**24
FIX = "run `speechbrain-mpq export` with calibration recordings again"
STEPS = 255  # of eight bits
BINS = 512  # of a histogram
SHARES = np.linspace(1.0, 0.2, 25)  # of the range seen that are tried


@dataclass(frozen=True)
class ActivationRange:
    """What the integers of an activation stand for.

    Example
    -------
    >>> unit = ActivationRange(np.float32(0.5), np.int64(128))
    >>> float(unit.low), float(unit.high)
    (-64.0, 63.5)
    """

    scale: np.ndarray  # [] or [channels], float32
    # [] or [channels], int64, 0 to 255: the integer of 0.0
    zero_point: np.ndarray

    @property
    def low(self):
        """The least value."""
        return (self.scale * -self.zero_point).astype(np.float32)

    @property
    def high(self):
        """The largest value."""
        steps = STEPS - self.zero_point
        return (self.scale * steps).astype(np.float32)


def calibrate(network, batches, outputs=False):
    """Calibrate the activation ranges of a mask network.

    Arguments
    ---------
    batches : sequence of torch.Tensor
        Features [batch, inputs, frames] of the calibration set.
    """
    depthwise = {x.name for x in network.convolutions() if x.groups > 1}
    seen = {}

    def watch(method):
        def hook(name, x):
            if outputs or ":" not in name:
                first = _RangeObserver(name, name in depthwise)
                getattr(seen.setdefault(name, first), method)(x)
            return x

        return hook

    with torch.no_grad():
        for method in ("see_extremes", "see_values"):
            for batch in batches:
                run(network, batch, watch(method))
    return {name: what.best() for name, what in seen.items()}


class _RangeObserver:
    """The values that one layer has read: extremes first, then histograms."""

    def __init__(self, name, per_channel):
        self.name = name
        self.per_channel = per_channel
        # A signed range needs no correction for its zero point and is as
        # good, but where PReLU has left little below zero.
        self.signed = not name.endswith(("conv_1x1_out", ":prelu"))
        self.low = self.high = self.counts = None

    def _rows(self, x):
        """[rows, values]: a row for each range."""
        if self.per_channel:
            return x.transpose(0, 1).flatten(1)
        return x.reshape(1, -1)

    def see_extremes(self, x):
        """Update the extremes."""
        low, high = self._rows(x).aminmax(dim=1)
        if not torch.isfinite(high - low).all():
            raise ValueError(
                f"{self.name} reads NaN or infinite values: mend the weights, "
                "or the recordings that it is calibrated with"
            )
        low, high = low.clamp_max(0), high.clamp_min(0)
        first = self.low is None
        self.low = low if first else torch.minimum(self.low, low)
        self.high = high if first else torch.maximum(self.high, high)

    def see_values(self, x):
        """Update the histogram of every row."""
        rows = self._rows(x)
        width = (self.high - self.low).clamp_min(1e-30)[:, None]
        index = ((rows - self.low[:, None]) / width * BINS).long()
        index = index.clamp_(0, BINS - 1)
        index += BINS * torch.arange(len(rows))[:, None]
        counts = torch.bincount(index.flatten(), minlength=BINS * len(rows))
        counts = counts.view(len(rows), BINS)
        self.counts = counts if self.counts is None else self.counts + counts

    def best(self):
        """Choose the range of least squared error."""
        low, high = self.low.double().numpy(), self.high.double().numpy()
        centers = (np.arange(BINS) + 0.5) / BINS
        values = low[:, None] + (high - low)[:, None] * centers
        counts = self.counts.double().numpy()
        scale, zero_point = search_ranges(values, counts, self.signed)
        if not self.per_channel:
            scale, zero_point = scale[0], zero_point[0]
        return ActivationRange(np.float32(scale), np.int64(zero_point))


def search_ranges(values, counts, signed=False):
    """Search the scale and zero point of least squared error.

    Arguments
    ---------
    values : np.ndarray
        [rows, values], the values that occur.
    counts : np.ndarray
        [rows, values], how often.

    Returns
    -------
    scale : np.ndarray
        [rows]; 1 where all values are zero.
    zero_point : np.ndarray
        [rows], whole numbers.
    """
    low = np.minimum(values.min(1), 0.0)
    high = np.maximum(values.max(1), 0.0)
    if signed:
        high = np.maximum(high, -low)
        low = -high
    empty = high <= low
    high = np.where(empty, 1.0, high)
    tried = [(share, share) for share in SHARES]
    if not signed:
        tried = [(a, b) for a in SHARES[::2] for b in SHARES[::2]]
    best = np.full(len(values), np.inf)
    scale, zero_point = np.ones(len(values)), np.full(len(values), SIGNED)
    for share_low, share_high in tried:
        s, z = _grid(low * share_low, high * share_high, signed)
        error = _squared_error(values, counts, s, z)
        better = error < best
        best = np.where(better, error, best)
        scale = np.where(better, s, scale)
        zero_point = np.where(better, z, zero_point)
    return np.where(empty, 1.0, scale), zero_point.astype(np.int64)


def _grid(low, high, signed):
    """Scale and whole zero point that cover low to high."""
    if signed:
        return high / (SIGNED - 1), np.full(len(high), SIGNED)
    scale = (high - low) / STEPS
    return scale, np.round(-low / scale)


def _squared_error(values, counts, scale, zero_point):
    """Summed squared error of rounding to a grid, [rows]."""
    scale, zero_point = scale[:, None], zero_point[:, None]
    index = np.clip(np.round(values / scale) + zero_point, 0, STEPS)
    error = (index - zero_point) * scale - values
    return (counts * error**2).sum(1)


def write_ranges(folder, ranges, seconds):
    """Write the ranges of a packed model.

    Arguments
    ---------
    seconds : float
        Audio of the calibration set.
    """
    content = {
        "version": VERSION,
        "weights_sha256": file_digest(Path(folder) / MODEL_FILE),
        "calibration_seconds": round(seconds, 1),
        "layers": {
            name: {
                "scale": _plain(unit.scale),
                "zero_point": unit.zero_point.tolist(),
            }
            for name, unit in ranges.items()
        },
    }
    content["sha256"] = content_digest(content)
    path = Path(folder) / RANGES_FILE
    text = json.dumps(content, separators=(",", ":")) + "\n"
    write_text(path, text)
    return path


def read_ranges(folder, network):
    """Read and check the ranges of a packed model."""
    path = Path(folder) / RANGES_FILE
    if not path.is_file():
        raise PackedModelError(
            path,
            "no activation ranges, which an int8 engine needs",
            f"run `speechbrain-mpq export {folder} --calibration "
            'manifest.json`, or choose engine="torch"',
        )
    try:
        content = strict_json(read_text(path, MAX_BYTES))
        version = check_numbers(content["version"], "version")
        if version not in (VERSION, UNSEALED):
            raise ValueError(f"version {version!r}")
        if version == VERSION:
            sealed = content.pop("sha256")
            if sealed != content_digest(content):
                raise ValueError("damaged, its SHA-256 does not match")
        if content["weights_sha256"] != file_digest(Path(folder) / MODEL_FILE):
            raise ValueError(f"made for another {MODEL_FILE}")
        return _checked(content["layers"], network)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise PackedModelError(path, f"unusable ({error!r})", FIX) from error


def _checked(layers, network):
    """Ranges of exactly the network's points."""
    groups = points(network)
    if set(layers) != set(groups):
        raise ValueError("other layers than the model's")
    ranges = {}
    for name, count in groups.items():
        own = {
            key: check_numbers(layers[name][key], f"{name}: {key}")
            for key in ("scale", "zero_point")
        }
        scale = np.asarray(own["scale"], np.float32)
        zero_point = np.asarray(own["zero_point"])
        shape = (count,) if count > 1 else ()
        if scale.shape != shape or zero_point.shape != shape:
            raise ValueError(f"{name}: not of shape {shape}")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{name}: a scale is not positive")
        if (
            zero_point.dtype != np.int64
            or not ((zero_point >= 0) & (zero_point <= STEPS)).all()
        ):
            raise ValueError(f"{name}: a zero point is not in 0..{STEPS}")
        ranges[name] = ActivationRange(scale, zero_point)
    return ranges


def points(network):
    """Count the ranges at every point of `reference.run`.

    Arguments
    ---------
    network : lowered.MaskNetwork

    Returns
    -------
    points : dict of str -> int
    """
    convolutions = list(network.convolutions())
    counts = {layer.name: layer.groups for layer in convolutions}
    counts |= {f"{layer.name}:out": 1 for layer in convolutions}
    followed = [b.conv_in for b in network.blocks]
    followed += [b.d_conv for b in network.blocks]
    return counts | {f"{layer.name}:prelu": 1 for layer in followed}


def file_digest(path):
    """Compute the SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def content_digest(content):
    """Compute the SHA-256 of JSON content, whatever its layout."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(scale):
    """Decimal digits that give the same float32 again."""
    if scale.ndim:
        return [_plain(value) for value in scale]
    return float(str(np.float32(scale)))
