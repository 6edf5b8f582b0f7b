"""From recordings to the ranges that int8 engines need.

A calibration set is a JSON manifest of multichannel recordings with the
directions of a talker: {"id": {"wav": "mix.flac", "doa": 60}}. Relative paths
begin at the manifest; `{data_root}` in them, as in SpeechBrain's manifests,
is the manifest's folder too.
"""

from pathlib import Path

import torch

from ..engines.activations import calibrate
from ..engines.equalize_hidden import equalize_hidden
from ..quantization.checked_header import strict_json
from ..separation.array import check_doa
from ..separation.features import SAMPLE_RATE
from .audio import AudioFile

MAX_SECONDS = 120.0  # of all recordings together
MAX_EACH = 10.0  # seconds from the beginning of each


def read_manifest(path):
    """The recordings of a calibration set.

    Arguments
    ---------
    path : str or Path
        JSON file.

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


def calibration_features(separator, recordings):
    """What the mask network reads of some recordings.

    Arguments
    ---------
    separator : Separator
    recordings : list of (Path, float)
        From `read_manifest`; those beyond two minutes are left out.

    Returns
    -------
    batches : list of torch.Tensor
        [1, inputs, frames] each.
    seconds : float
        Of audio in them.
    """
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

    Arguments
    ---------
    network : lowered.MaskNetwork
    batches : sequence of torch.Tensor
        From `calibration_features`.

    Returns
    -------
    ranges : dict of str -> ActivationRange
    """
    ranges = calibrate(network, batches)
    equalized = equalize_hidden(network, ranges)
    return {**calibrate(equalized, batches, outputs=True), **ranges}
