"""Clips of the embedded corpus in noise, labelled by PESQ and DNSMOS.

A clip depends on (seed, split, index) alone: a larger set extends a smaller
one, and an interrupted preparation continues.
"""

import functools
import json
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import istft, stft
from tqdm import tqdm

from speechbrain_mpq.evaluation.signal_quality import P808, wideband_pesq
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.signals import worker_pool
from speechbrain_mpq.simulation.augmentation import NoisySpeech, Voices
from speechbrain_mpq.simulation.noise import NoiseFolder, NoiseMaker, draw_by
from speechbrain_mpq.utils import write_json

SPEECH_OF = {"test_unseen": "test"}  # the same voices in other noise
RMS = 0.05  # level of every clip
CHUNK = 50  # clips between two marks of progress
ATTEMPTS = 20  # PESQ finds no utterance in some clips


@one_at_a_time
def prepare_quality(
    data_folder,
    clips,
    seconds=5,
    snr=(0, 45),
    denoised_share=1 / 3,
    noise_folder=None,
    with_p808=False,
    seed=1234,
    workers=2,
):
    """Write the clips and `<split>_quality.json`, or what is missing.

    Arguments
    ---------
    data_folder : str or Path
        With the speech of `prepare_speech`; `quality/` is written to it.
    clips : dict
        Split -> how many; "test_unseen" has noise that is held out.
    seconds : float
        Length of a clip.
    snr : sequence of float
        dB, drawn evenly.
    denoised_share : float
        Of the clips that go through a spectral gate, whose damage is another
        one than noise.
    noise_folder : str or None
        Recordings for "test_unseen".
    with_p808 : bool
        Label by DNSMOS P.808 too.
    seed : int
    workers : int
        Processes.
    """
    data_folder = Path(data_folder)
    parameters = {
        "seconds": seconds,
        "snr": list(snr),
        "denoised_share": denoised_share,
        "noise_folder": noise_folder and str(noise_folder),
        "with_p808": with_p808,
        "seed": seed,
    }
    _check_parameters(data_folder / "quality/parameters.json", parameters)
    chunks = [
        (split, start, min(start + CHUNK, count))
        for split, count in clips.items()
        for start in range(0, count, CHUNK)
    ]
    todo = [chunk for chunk in chunks if not _is_complete(data_folder, chunk)]
    if todo:
        if with_p808:
            P808()  # a missing package is reported before any work
        work = functools.partial(_write_chunk, data_folder, parameters)
        with worker_pool(workers) as pool:
            made = pool.imap(work, todo)
            list(tqdm(made, total=len(todo), desc="Labels", disable=None))
    for split, count in clips.items():
        entries = {}
        for chunk in chunks:
            if chunk[0] == split:
                entries |= json.loads(
                    _chunk_file(data_folder, chunk).read_text()
                )
        kept = {key: entries[key] for key in sorted(entries)[:count]}
        path = data_folder / f"{split}_quality.json"
        write_json(path, kept)


def spectral_gate(noisy, strength):
    """Take away what the quietest fifth of each bin's frames has.

    Arguments
    ---------
    noisy : numpy.ndarray
        [samples].
    strength : float
        Factor on the floor: 1 to 3 leave musical noise and cut speech.

    Returns
    -------
    numpy.ndarray
        [samples].
    """
    _, _, spectrum = stft(noisy, nperseg=512)
    size = np.abs(spectrum)  # [bins, frames]
    floor = np.quantile(size, 0.2, axis=-1, keepdims=True)
    gain = np.maximum(1 - strength * floor / np.maximum(size, 1e-9), 0.05)
    _, cleaned = istft(gain * spectrum, nperseg=512)
    return cleaned[: len(noisy)]


def _write_chunk(data_folder, parameters, chunk):
    """Write some clips; their entries are written last."""
    split, start, stop = chunk
    spoken = SPEECH_OF.get(split, split)
    text = (data_folder / f"{spoken}_speech.json").read_text()
    speech = json.loads(text.replace("{data_root}", str(data_folder)))
    seed, folder = parameters["seed"], parameters["noise_folder"]
    unseen = split == "test_unseen"
    if unseen and folder:
        noise, kind = NoiseFolder(folder, seed=seed, resample=True), None
    else:
        noise = NoiseMaker(Voices(speech), seed=seed)
        kind = noise.held_out if unseen else None
    clips = NoisySpeech(
        speech, noise, parameters["seconds"], parameters["snr"], seed=seed
    )
    p808 = P808() if parameters["with_p808"] else None
    entries = {}
    for index in range(start, stop):
        key = f"{split}_{index:06d}"
        share = parameters["denoised_share"]
        waveform, entry = _labelled(clips, key, kind, share, p808)
        path = data_folder / f"quality/{split}/{key}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waveform, 16000, "PCM_16")
        wav = f"{{data_root}}/quality/{split}/{key}.flac"
        entries[key] = {"wav": wav, **entry}
    write_json(_chunk_file(data_folder, chunk), entries)


def _labelled(clips, key, kind, denoised_share, p808):
    """One clip and what is known about it."""
    names = sorted(clips.speech)
    for attempt in range(ATTEMPTS):
        rng = draw_by(clips.seed, attempt, key)
        # epochs of an utterance: no two clips of it are alike
        epoch = int(rng.integers(2**31))
        name = names[rng.integers(len(names))]
        waveform, clean, drawn = clips.draw(name, epoch, kind)
        gated = bool(rng.random() < denoised_share)
        if gated:
            waveform = spectral_gate(waveform, rng.uniform(1, 3))
        waveform = waveform * (RMS / np.sqrt(np.mean(np.square(waveform))))
        waveform = waveform.clip(-1, 1 - 2**-15)
        try:
            score = wideband_pesq(waveform, clean)
        except ValueError:
            continue
        entry = {**drawn, "denoised": gated, "utterance": name, "pesq": score}
        if p808:
            entry["p808"] = p808(waveform)
        return waveform, entry
    raise ValueError(f"{key}: PESQ is undefined in {ATTEMPTS} attempts")


def _chunk_file(data_folder, chunk):
    """Where the entries of a chunk are kept."""
    split, start, _ = chunk
    return data_folder / f"quality/{split}/entries_{start:06d}.json"


def _is_complete(data_folder, chunk):
    """Whether a chunk has as many clips as it is asked for."""
    path = _chunk_file(data_folder, chunk)
    _, start, stop = chunk
    return path.exists() and len(json.loads(path.read_text())) >= stop - start


def _check_parameters(path, parameters):
    """Write what the clips are made of, or refuse other ones."""
    if path.exists():
        present = json.loads(path.read_text())
        if present != parameters:
            raise ValueError(
                f"{path.parent} has clips of {present}, asked: {parameters}; "
                "delete it or choose another data_folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, parameters)
