"""Synthesize a small single-channel corpus: FLAC files and manifests.

Sentences follow a closed grammar of names, digits, colours, places and a few
letters. No spelling could be confused by chance (the letters of the rhyming
sets b, c, d, e, ... and a, j, k are left out), so that errors measure the
acoustics and not the language. Utterance i of a split depends on (seed, split,
i) alone: a larger corpus extends a smaller one, and an interrupted preparation
continues.
"""

import functools
import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from ..utils import (
    SAMPLE_RATE,
    atomic_write,
    read_json,
    remove_partial,
    write_text,
)
from .voices import library, speakers, synthesize, vary

WORDS = {
    "name": "anna david helen marcus oliver sophia robert julia".split(),
    "verb": "brings finds moves sends counts shows lifts".split(),
    "command": "place paint switch open watch follow".split(),
    "digit": ("zero one two three four five six seven eight nine".split()),
    "colour": "red green blue yellow white purple orange".split(),
    "noun": "apples boxes candles lamps stones bottles tables papers".split(),
    "letter": "f h o q r w x".split(),
    "preposition": "near behind under with from".split(),
    "article": ["the"],
    "place": "garden kitchen river station market window harbour".split(),
    "adverb": "again today slowly please now".split(),
}


PATTERNS = [
    pattern.split()
    for pattern in (
        "name verb digit colour noun preposition article place adverb",
        "command article colour noun preposition letter digit adverb",
        "name verb letter digit digit preposition article place adverb",
    )
]
SPLITS = ("train", "valid", "test")
RMS = 0.05  # level of every utterance
PEAK = 0.95  # highest sample allowed
CHUNK = 50  # utterances written between two marks of progress


def vocabulary():
    """List all words that a sentence can have.

    Example
    -------
    >>> len(vocabulary())
    71
    """
    return sorted({word for words in WORDS.values() for word in words})


def sentence(rng):
    """Draw one sentence of the grammar.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of the choices; the same state gives the same sentence.

    Returns
    -------
    str
        Eight or nine lower-case words.

    Example
    -------
    >>> import numpy as np
    >>> len(sentence(np.random.default_rng(0)).split()) in (8, 9)
    True
    """
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return " ".join(
        WORDS[kind][rng.integers(len(WORDS[kind]))] for kind in pattern
    )


def prepare_speech(
    data_folder,
    train=4000,
    valid=200,
    test=400,
    seed=1234,
    workers=2,
    progress=None,
):
    """Synthesize the corpus into `data_folder`, or what is missing of it.

    Writes ``speech/<split>/*.flac`` (16 kHz, mono, 16 bits) and
    ``<split>_speech.json``.

    Arguments
    ---------
    data_folder : str or Path
        Where to write; it may hold a part of the same corpus.
    train, valid, test : int
        Utterances per split.
    seed : int
        Another seed gives other speakers and sentences.
    workers : int
        Processes to use.
    progress : bool or None
        Show a progress bar; None shows it on terminals only.

    Example
    -------
    >>> prepare_speech("data/embedded", train=4000)  # doctest: +SKIP
    """
    data_folder = Path(data_folder)
    _check_parameters(data_folder / "speech" / "parameters.json", seed)
    counts = dict(zip(SPLITS, (train, valid, test)))
    todo = [
        (split, start, min(start + CHUNK, count))
        for split, count in counts.items()
        for start in range(0, count, CHUNK)
        if not _is_complete(data_folder, split, start, count)
    ]
    speak = functools.partial(_speak_chunk, data_folder, seed)
    if todo:
        library()  # a missing library is reported before any work
        remove_partial(data_folder)
        hidden = None if progress is None else not progress
        with (
            multiprocessing.get_context("fork").Pool(workers) as pool,
            tqdm(
                total=sum(stop - start for _, start, stop in todo),
                desc="Synthesizing speech",
                unit="utt",
                disable=hidden,
            ) as bar,
        ):
            for spoken in pool.imap(speak, todo):
                bar.update(spoken)
    for split, count in counts.items():
        _write_manifest(data_folder, split, count)


def utterance(split, index, seed=1234):
    """Synthesize one utterance of the corpus, without any file.

    Arguments
    ---------
    split : str
        "train", "valid" or "test".
    index : int
        Number of the utterance.
    seed : int
        Seed of the corpus.

    Returns
    -------
    samples : numpy.ndarray
        int16 at 16 kHz.
    entry : dict
        length (s), words, speaker and phonemes.

    Example
    -------
    >>> samples, entry = utterance("test", 0)  # doctest: +SKIP
    >>> samples.dtype, entry["speaker"]  # doctest: +SKIP
    (dtype('int16'), 'test_010_marcelo')
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    people = speakers(split, seed)
    speaker = vary(people[rng.integers(len(people))], rng)
    words = sentence(rng)
    waveform, phonemes = synthesize(words, speaker)
    waveform = waveform.astype(np.float64)
    level = np.sqrt(np.mean(waveform**2))
    gain = min(RMS / level, PEAK / np.abs(waveform).max())
    samples = np.round(waveform * gain * 2**15).astype(np.int16)
    return samples, {
        "length": len(samples) / SAMPLE_RATE,
        "words": words,
        "speaker": speaker.name,
        "phonemes": [list(phoneme) for phoneme in phonemes],
    }


def _check_parameters(path, seed):
    """Write what the folder is made of, or refuse another corpus."""
    made_of = [
        WORDS,
        PATTERNS,
        [speakers(split, seed) for split in SPLITS],
        [RMS, PEAK, CHUNK],
    ]
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
    parameters = {"seed": seed, "sha256": digest}
    if path.exists():
        found = read_json(path)
        if found != parameters:
            raise ValueError(
                f"{path} belongs to another corpus (seed {found['seed']}, "
                f"asked: {seed}, or another version of the generator); "
                "choose another data_folder or delete its speech folder."
            )
    else:
        _write(path, json.dumps(parameters))


def _chunk_file(data_folder, split, start):
    """Where the entries of a chunk are kept."""
    return data_folder / "speech" / split / f"entries_{start:06d}.json"


def _audio_file(data_folder, key):
    """Where the audio of an utterance is kept."""
    split = key.split("_")[0]
    return data_folder / "speech" / split / f"{key}.flac"


def _is_complete(data_folder, split, start, count):
    """Whether a chunk has been spoken as far as it is asked for."""
    path = _chunk_file(data_folder, split, start)
    if not path.exists():
        return False
    keys = read_json(path)
    return len(keys) >= min(CHUNK, count - start) and all(
        _audio_file(data_folder, key).exists() for key in keys
    )


def _speak_chunk(data_folder, seed, chunk):
    """Speak a chunk of a split; its entries are written last."""
    split, start, stop = chunk
    entries = {}
    for index in range(start, stop):
        key = f"{split}_{index:06d}"
        samples, entries[key] = utterance(split, index, seed)
        path = _audio_file(data_folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            soundfile.write(part, samples, SAMPLE_RATE, "PCM_16", format="FLAC")
    _write(_chunk_file(data_folder, split, start), json.dumps(entries))
    return stop - start


def _write_manifest(data_folder, split, count):
    """Collect the entries of a split, one utterance per line."""
    lines = []
    for start in range(0, count, CHUNK):
        entries = read_json(_chunk_file(data_folder, split, start))
        for key in sorted(entries)[: count - start]:
            wav = f"{{data_root}}/speech/{split}/{key}.flac"
            entry = json.dumps({"wav": wav, **entries[key]})
            lines.append(f'"{key}": {entry}')
    path = data_folder / f"{split}_speech.json"
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if not path.exists() or path.read_text() != text:
        _write(path, text)


def _write(path, text):
    """Write a text file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
