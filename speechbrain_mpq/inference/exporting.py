"""Exporting: a packed folder that int8 engines can run, and their own files.

A calibration set tells the ranges of the activations. It is a JSON manifest of
multichannel recordings with the directions of a talker: {"id": {"wav":
"mix.flac", "doa": 60}}. Relative paths begin at the manifest; `{data_root}` in
them, as in SpeechBrain's manifests, is the manifest's folder too.

Models of OpenVINO and ONNX beside the weights are run by other programs, which
know nothing of where they come from. exports.json keeps their SHA-256, with
that of the weights and of the activation ranges that they were made with.
"""

import os
from pathlib import Path

import torch

from ..lobes.models.separator import MIN_RMS
from ..lobes.models.spatial_features import check_doa
from ..locks import alone_in, check_folder
from ..quantization.packing import MODEL_FILE, read_model
from ..utils import (
    SAMPLE_RATE,
    check_numbers,
    read_json,
    refuse_parts,
    scratch_folder,
    write_json,
)
from .audio import AudioError, AudioFile
from .engines.activations import (
    RANGES_FILE,
    calibrate,
    file_digest,
    read_ranges,
    write_ranges,
)
from .engines.engine import MIN_DECIBELS, import_engine
from .engines.lowered import decibels, equalize_hidden, lower, run
from .folder import copy_folder
from .loading import load

MAX_SECONDS = 120.0  # of all recordings together
MAX_EACH = 10.0  # seconds from the beginning of each
COMPARED = 4  # recordings on which engine and PyTorch are compared
EXPORTS_FILE = "exports.json"
EXPORTED = (".onnx", ".xml", ".bin")  # endings of engines' files
EXPORTED_STEM = "mask_network"  # beginning of their names
VERSION = 1
_FIX = "run `speechbrain-mpq export` again"


def read_manifest(path, planar=False):
    """Read the manifest of a calibration set.

    Returns
    -------
    recordings : list of (Path, float)
        File and DOA in degrees.
    """
    path = Path(path)
    form = 'write {"id": {"wav": "mix.flac", "doa": 60}, ...}'
    content = read_json(path, missing=form, broken=form)
    recordings = []
    root = path.parent.resolve()
    try:
        for key, entry in content.items():
            refuse_parts(key, entry)
            name = entry["wav"].replace("{data_root}", str(root))
            doa = float(check_numbers(entry["doa"], "doa"))
            check_doa(torch.tensor([doa]), planar)
            recordings.append((root / name, doa))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no calibration manifest ({error!r}): {form}"
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
        block = block - block.mean(0)  # a constant offset is no speech
        if not block[:, 0].square().mean().sqrt() > MIN_RMS:
            raise AudioError(
                path,
                f"silent for the first {length:.1f} s",
                "calibrate with speech that begins at once",
            )
        with torch.no_grad():
            inputs, _ = separator.analyse(block[None], torch.tensor([doa]))
        batches.append(inputs)
        seconds += length
    return batches, seconds


def engine_ranges(network, batches):
    """Calibrate all ranges that the engines need.

    What convolutions read is measured in the network itself. What they give,
    which only ONNX Runtime rounds, is measured in the network that it runs,
    see `equalize_hidden`.
    """
    ranges = calibrate(network, batches)
    equalized = equalize_hidden(network, ranges)
    return {**calibrate(equalized, batches, outputs=True), **ranges}


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
        Manifest, see `read_manifest`; None: the ranges are there
        already.

    Returns
    -------
    report : dict
        "files" written, "decibels" of the engine's mask against PyTorch's on
        the calibration set (None without one), "seconds" of it.
    """
    module = import_engine(engine)
    network = lower(folder)  # what cannot be exported needs no place to go
    out = check_folder(folder if out is None else out)
    with alone_in(out):
        if calibration is None:
            ranges, batches, seconds = read_ranges(folder, network), [], 0.0
        else:
            batches, seconds = _calibration_features(
                load(folder), read_manifest(calibration)
            )
            ranges = engine_ranges(network, batches)
        snr = _compare(network, module.compiled(network, ranges), batches)
        if out.resolve() != Path(folder).resolve():
            copy_folder(read_model(folder), out)
        if batches:
            write_ranges(out, ranges, seconds)
        files = _write_whole(
            out, lambda to: module.write_files(network, ranges, to)
        )
        write_exports(out, files)
    return {"files": files, "decibels": snr, "seconds": seconds}


def _compare(network, engine, batches):
    """Signal-to-noise ratio of an engine's mask, in dB."""
    if not batches:
        return None
    with torch.no_grad():
        exact = [run(network, batch) for batch in batches[:COMPARED]]
    estimates = [engine(batch) for batch in batches[:COMPARED]]
    snr = decibels(
        torch.cat([mask.flatten() for mask in exact]),
        torch.cat([mask.flatten() for mask in estimates]),
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
    with scratch_folder(out) as scratch:
        temporary = scratch / "files"
        temporary.mkdir()
        write(temporary)
        paths = sorted(temporary.iterdir())
        for path in paths:
            os.replace(path, out / path.name)
    return [out / path.name for path in paths]


def write_exports(folder, files):
    """Write the SHA-256s of what an export has made."""
    folder = Path(folder)
    try:
        before = _read(folder)
    except (OSError, KeyError, ValueError):
        before = {}
    sources = _sources(folder)
    if before.get("sources") != sources:  # those are of other weights
        before = {}
    made = {path.name: file_digest(path) for path in files}
    content = {
        "version": VERSION,
        "sources": sources,
        "files": {**before.get("files", {}), **made},
    }
    write_json(folder / EXPORTS_FILE, content)
    return folder / EXPORTS_FILE


def exported_names(folder):
    """List the files that exports.json names."""
    try:
        return set(filter(_is_export, _read(Path(folder))["files"]))
    except (OSError, KeyError, TypeError, ValueError):
        return set()


def export_problems(folder):
    """List the exports that are not of the weights beside them."""
    folder = Path(folder)
    path = folder / EXPORTS_FILE
    if not path.exists():
        return []
    try:
        content = _read(folder)
        sources, files = content["sources"], content["files"].items()
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"{path}: not readable ({error}): {_FIX}"]
    problems = []
    if sources != _sources(folder):
        problems.append(
            f"{path}: its files were made of other weights or activation "
            f"ranges: {_FIX}"
        )
    for name, digest in files:
        file = folder / name
        if not _is_export(name):
            problems.append(f"{path}: {name!r} is no engine's file")
        elif not file.is_file():
            problems.append(f"{file}: gone, though {EXPORTS_FILE} has it")
        elif file_digest(file) != digest:
            problems.append(f"{file}: was changed since the export: {_FIX}")
    return problems


def _is_export(name):
    """Whether a name is one that engines' files have."""
    path = Path(name)
    own = path.name == name and name.startswith(EXPORTED_STEM)
    return own and path.suffix in EXPORTED


def _read(folder):
    """The content of exports.json."""
    content = read_json(folder / EXPORTS_FILE, _FIX, _FIX)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError("of another version")
    if not all(isinstance(content[key], dict) for key in ("sources", "files")):
        raise ValueError("its sources or files are no objects")
    return content


def _sources(folder):
    """SHA-256 of what exports are made of."""
    return {
        name: file_digest(folder / name)
        for name in (MODEL_FILE, RANGES_FILE)
        if (folder / name).is_file()
    }
