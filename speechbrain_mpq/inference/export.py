"""Exporting: a packed folder that engines can run, and files of their own."""

import os
import tempfile
from pathlib import Path

import torch

from ..engines.loading import MIN_DECIBELS, import_engine
from ..engines.lowering import lower
from ..engines.range_file import read_ranges, write_ranges
from ..engines.reference import decibels, run
from ..quantization.unpacking import read_model
from .calibration import calibration_features, engine_ranges, read_manifest
from .checked import load_checked
from .folder import copy_folder

COMPARED = 4  # recordings on which engine and PyTorch are compared


def export(folder, out=None, engine="openvino", calibration=None):
    """Make a packed folder ready for an engine.

    Arguments
    ---------
    folder : str or Path
        Packed folder of a separator.
    out : str or Path or None
        Folder to write; None: the same one.
    engine : str
        "openvino" or "onnx".
    calibration : str or Path or None
        Manifest, see `calibration.read_manifest`; None: the ranges are there
        already.

    Returns
    -------
    report : dict
        "files" written, "decibels" of the engine's mask against PyTorch's on
        the calibration set (None without one), "seconds" of it.
    """
    module = import_engine(engine)
    network = lower(folder)
    if calibration is None:
        ranges, batches, seconds = read_ranges(folder, network), [], 0.0
    else:
        batches, seconds = calibration_features(
            load_checked(folder), read_manifest(calibration)
        )
        ranges = engine_ranges(network, batches)
    snr = _compare(network, module.compiled(network, ranges), batches)
    out = Path(folder if out is None else out)
    if out.resolve() != Path(folder).resolve():
        copy_folder(read_model(folder), out)
    if batches:
        write_ranges(out, ranges, seconds)
    files = _write_whole(
        out, lambda to: module.write_files(network, ranges, to)
    )
    return {"files": files, "decibels": snr, "seconds": seconds}


def _compare(network, engine, batches):
    """Signal-to-noise ratio of an engine's mask, in dB."""
    if not batches:
        return None
    with torch.no_grad():
        wanted = [run(network, batch) for batch in batches[:COMPARED]]
    given = [engine(batch) for batch in batches[:COMPARED]]
    snr = decibels(
        torch.cat([mask.flatten() for mask in wanted]),
        torch.cat([mask.flatten() for mask in given]),
    )
    if not snr > MIN_DECIBELS:
        raise ValueError(
            f"the engine's mask is {snr:.1f} dB from PyTorch's on the "
            "calibration set: calibrate with recordings like those it is for, "
            'or choose engine="torch"'
        )
    return snr


def _write_whole(out, write):
    """Let `write` fill a temporary folder, and move its files to `out`."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".export") as temporary:
        write(Path(temporary))
        paths = sorted(Path(temporary).iterdir())
        for path in paths:
            os.replace(path, out / path.name)
    return [out / path.name for path in paths]
