"""From recordings to the ranges that int8 engines need.

A calibration set is a JSON manifest of multichannel recordings with the
directions of a talker: {"id": {"wav": "mix.flac", "doa": 60}}. Relative paths
begin at the manifest; `{data_root}` in them, as in SpeechBrain's manifests,
is the manifest's folder too.

Exporting: a packed folder that engines can run, and files of their own.
"""

import os
import tempfile
from pathlib import Path

import torch

from ..lobes.models.spatial_features import check_doa
from ..quantization.container import strict_json
from ..quantization.packing import read_model
from ..utils import SAMPLE_RATE
from .audio import AudioFile
from .engines.activations import calibrate, read_ranges, write_ranges
from .engines.engine import MIN_DECIBELS, import_engine
from .engines.lowered import equalize_hidden, lower
from .engines.reference import decibels, run
from .folder import copy_folder
from .loading import load_checked

MAX_SECONDS = 120.0  # of all recordings together
MAX_EACH = 10.0  # seconds from the beginning of each


def read_manifest(path):
    """The recordings of a calibration set.

    Returns
    -------
    recordings : list of (Path, float)
        File and DOA in degrees.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    recordings = []
    try:
        for entry in strict_json(text).values():
            name = entry["wav"].replace("{data_root}", str(path.parent))
            doa = float(entry["doa"])
            check_doa(torch.tensor([doa]))
            recordings.append((path.parent / name, doa))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no calibration manifest ({error!r}): write "
            '{"id": {"wav": "mix.flac", "doa": 60}, ...}'
        ) from error
    if not recordings:
        raise ValueError(f"{path} names no recording: name some of your own")
    return recordings


def _calibration_features(separator, recordings):
    """What the mask network reads of some recordings."""
    front, batches, seconds = separator.features, [], 0.0
    for path, doa in recordings:
        audio = AudioFile(
            path, front.microphones, front.array_size, min_samples=front.n_fft
        )
        length = min(MAX_EACH, MAX_SECONDS - seconds, audio.seconds)
        if length * SAMPLE_RATE < front.n_fft:
            break
        block = next(audio.blocks(int(length * audio.rate)))
        with torch.no_grad():
            inputs, _ = separator.analyse(block[None], torch.tensor([doa]))
        batches.append(inputs)
        seconds += length
    return batches, seconds


def engine_ranges(network, batches):
    """All ranges that the engines need, by the names of `reference.run`.

    What convolutions read is measured in the network itself. What they give,
    which only ONNX Runtime rounds, is measured in the network that it runs,
    see `equalize_hidden`.
    """
    ranges = calibrate(network, batches)
    equalized = equalize_hidden(network, ranges)
    return {**calibrate(equalized, batches, outputs=True), **ranges}


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
        batches, seconds = _calibration_features(
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
