"""NNCodec, the coder of ISO/IEC 15938-17: trellis-coded quantization and CABAC.

Its extension is called tensor by tensor, with dependent quantization. "one
step" gives all tensors the same step. "our bits" gives each the finest step at
which it takes no more bytes than `best` by entropy allows it, on equalized
inputs. Nothing is fitted to data beside.
"""

import importlib.util
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from stored import System, fill_
from workbench import ROOT

from peers import ours
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.quantization.quant_api import clusters

PLANS = ROOT / "benchmarks/results/entropy"
POST_TRAINING = True
PACKAGES = ("nncodec",)
LEAVES = "the biases of the first and last convolution"
DENSITY = 5  # 32 steps between powers of two
RANGE = (-16 << DENSITY, 3 << DENSITY)  # of steps
UNARY = 11  # levels with a context of their own: NNCodec's own number
LENGTH = 3  # bytes that tell how long a stream is
OVERHEAD = LENGTH + 6  # bytes of a stream of one value: not in our plan
SETTINGS = {
    f"{kind} {bits} bit": {"bits": bits, "allocated": kind == "our bits"}
    for kind in ("one step", "our bits")
    for bits in (2, 3, 4)
}


@cache
def extension():
    """NNCodec's coder without the package around it, which needs NumPy 1."""
    (folder,) = importlib.util.find_spec("nncodec").submodule_search_locations
    (path,) = Path(folder, "extensions").glob("deepCABAC*.so")
    spec = importlib.util.spec_from_file_location("deepCABAC", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encoded(weight, step):
    """The stream of a weight.

    Arguments
    ---------
    weight : numpy.ndarray
        float32, one dimension or more.
    step : int
        Its logarithm, 32 to a power of two.

    Returns
    -------
    numpy.ndarray
        uint8.
    """
    coder = extension()
    encoder, levels = coder.Encoder(), np.zeros(weight.shape, np.int32)
    step = encoder.quantLayer(
        weight, levels, 1, DENSITY, step, 0.0, UNARY - 1, 0, 0
    )
    encoder.iae_v(6 + DENSITY, step)
    encoder.initCtxModels(UNARY, 0)
    rows = np.zeros(len(levels), np.int32)
    off = coder.HdspMode.AlwaysOff, np.zeros(2, np.int8)
    encoder.encodeLayer(levels, 1, 0, 0, 0, 0, rows, *off, 0, 0)
    return encoder.finish()


def decoded(stream, shape):
    """The weight in a stream.

    Arguments
    ---------
    stream : numpy.ndarray
        uint8.
    shape : tuple of int

    Returns
    -------
    numpy.ndarray
        float32.
    """
    coder = extension()
    decoder = coder.Decoder()
    levels, values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    decoder.setStream(stream)
    step = decoder.iae_v(6 + DENSITY)
    decoder.initCtxModels(UNARY)
    off = coder.HdspMode.AlwaysOff, np.zeros(2, np.int8)
    decoder.decodeLayer(levels, 1, 0, 0, 0, *off, 0, 0)
    decoder.finish()
    decoder.dequantLayer(values, levels, DENSITY, step, 0)
    return values


def finest(size, budget):
    """The finest step within a budget, by halving.

    Arguments
    ---------
    size : callable
        Bytes at a step.
    budget : float

    Returns
    -------
    step : int
    """
    low, high = RANGE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) <= budget else (middle, high)
    return high


def build(bench, bits, allocated):
    """Find steps, encode, decode."""
    separator = bench.separator(
        ours.hparams_of(bench, "best", True) if allocated else None
    )
    given = bench.hparams
    names = clusters(
        separator, given["quantize_include"], given["quantize_exclude"]
    )
    parameters = {
        name: separator.get_parameter(name).detach().numpy()
        for row in names.values()
        for name in row
    }
    # Without rows a weight is a column to the coder.
    weights = {
        n: w if w.ndim > 1 else w.reshape(-1, 1) for n, w in parameters.items()
    }
    find = _own_steps if allocated else _shared_step
    steps = find(bench, bits, weights)
    streams = {n: encoded(w, steps[n]) for n, w in weights.items()}
    path = bench.work / "nncodec.bin"
    path.write_bytes(
        b"".join(
            len(s).to_bytes(LENGTH, "little") + s.tobytes()
            for s in streams.values()
        )
    )
    fill_(
        separator,
        {
            n: torch.from_numpy(decoded(s, weights[n].shape))
            for n, s in streams.items()
        },
    )
    size = path.stat().st_size
    return System(separator, size, size, "its streams and their lengths")


def _shared_step(bench, bits, weights):
    """The one step at which all weights have some bits on average."""
    values = sum(w.size for w in weights.values())
    step = finest(
        lambda step: sum(_size(w, step) for w in weights.values()),
        values * bits / 8,
    )
    return dict.fromkeys(weights, step)


def _own_steps(bench, bits, weights):
    """Steps at which tensors take what our plan by entropy allows them."""
    (path,) = PLANS.glob(f"best*_{bits}bit/1234/plan.json")
    return {
        name: finest(
            partial(_size, weights[name]),
            weights[name].size * cluster.bits / 8 + OVERHEAD,
        )
        for cluster in BitPlan.load(path).clusters.values()
        for name in cluster.tensors
    }


def _size(weight, step):
    """Bytes of a weight at a step."""
    return len(encoded(weight, step)) + LENGTH
