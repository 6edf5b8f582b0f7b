"""activations.json: the activation ranges beside a packed model's weights.

They are of use for these very weights only, so the file holds the SHA-256 of
model.safetensors. What it says is checked in full before it is used.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from ..quantization.checked_header import strict_json
from ..quantization.container import PackedModelError
from ..quantization.unpacking import MODEL_FILE
from ..whole_files import write_text
from .activations import STEPS, ActivationRange

RANGES_FILE = "activations.json"
VERSION = 1
MAX_BYTES = 2**24
FIX = "run `speechbrain-mpq export` with calibration recordings again"


def write_ranges(folder, ranges, seconds):
    """Write the ranges of a packed model.

    Arguments
    ---------
    folder : str or Path
        Its folder.
    ranges : dict of str -> ActivationRange
        From `calibration.engine_ranges`.
    seconds : float
        Audio of the calibration set.

    Returns
    -------
    path : Path
    """
    content = {
        "version": VERSION,
        "weights_sha256": _digest(folder),
        "calibration_seconds": round(seconds, 1),
        "layers": {
            name: {
                "scale": _plain(unit.scale),
                "zero_point": unit.zero_point.tolist(),
            }
            for name, unit in ranges.items()
        },
    }
    path = Path(folder) / RANGES_FILE
    text = json.dumps(content, separators=(",", ":")) + "\n"
    write_text(path, text)
    return path


def read_ranges(folder, network):
    """The ranges of a packed model, checked.

    Arguments
    ---------
    folder : str or Path
        Its folder.
    network : lowered.MaskNetwork
        What they must be for.

    Returns
    -------
    ranges : dict of str -> ActivationRange
    """
    path = Path(folder) / RANGES_FILE
    if not path.is_file():
        raise PackedModelError(
            path,
            "no activation ranges, which an int8 engine needs",
            f"run `speechbrain-mpq export {folder} --calibration "
            'manifest.json`, or choose engine="torch"',
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        content = strict_json(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}")
        if content["weights_sha256"] != _digest(folder):
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
        scale = np.asarray(layers[name]["scale"], np.float32)
        zero_point = np.asarray(layers[name]["zero_point"])
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
    """Where ranges are, and how many: see `reference.run`.

    Arguments
    ---------
    network : lowered.MaskNetwork

    Returns
    -------
    points : dict of str -> int
    """
    convolutions = list(network.convolutions())
    found = {layer.name: layer.groups for layer in convolutions}
    found |= {f"{layer.name}:out": 1 for layer in convolutions}
    followed = [b.conv_in for b in network.blocks]
    followed += [b.d_conv for b in network.blocks]
    return found | {f"{layer.name}:prelu": 1 for layer in followed}


def _digest(folder):
    """SHA-256 of the weights' file."""
    content = (Path(folder) / MODEL_FILE).read_bytes()
    return hashlib.sha256(content).hexdigest()


def _plain(scale):
    """Decimal digits that give the same float32 again."""
    if scale.ndim:
        return [_plain(value) for value in scale]
    return float(str(np.float32(scale)))
