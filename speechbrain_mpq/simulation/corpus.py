"""Synthesize a small single-channel corpus by espeak-ng: FLAC and manifests.

A speaker is an accent, a timbre ("variant"), pitch, range and rate, and the
length of the vocal tract, changed by resampling. espeak-ng carries state from
call to call, so each utterance is spoken by a forked child of a process that
has initialised the library and never spoken: the same arguments then give the
same bytes in any process. The library comes with the wheel `espeakng-loader`
(GPL, hence an extra: ``pip install speechbrain_mpq[simulate]``).

Sentences follow a closed grammar of names, digits, colours, places and a few
letters. No spelling could be confused by chance (the letters of the rhyming
sets b, c, d, e, ... and a, j, k are left out), so that errors measure the
acoustics and not the language. Utterance i of a split depends on (seed, split,
i) alone: a larger corpus extends a smaller one, and an interrupted preparation
continues. Other sentences than the grammar's can be given.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

from ..locks import one_at_a_time
from ..signals import worker_pool
from ..utils import (
    SAMPLE_RATE,
    atomic_write,
    read_json,
    remove_partial,
    write_text,
)

ESPEAK_RATE = 22050  # Hz, what the library speaks at


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_short),
    ctypes.c_int,
    ctypes.POINTER(_Event),
)


_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT, _UTF8 = 2, 0x0001, 0x8000, 1


_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER


_LIST_END, _PHONEME = 0, 7  # espeak_EVENT_TYPE


def speak(text, voice, rate, pitch, range):
    """Speak a text by espeak-ng.

    Example
    -------
    >>> samples, events = speak("seven", "en-us", 150, 50, 50)  # doctest: +SKIP
    >>> [symbol for _, symbol in events]  # doctest: +SKIP
    ['s', "'E", 'v', '@', 'n', '_:']
    """
    values = {_RATE: rate, _PITCH: pitch, _RANGE: range}
    samples, events = _in_child(_speak, text, voice, values)
    if not samples.any():
        raise RuntimeError(
            f"espeak-ng spoke only silence for {text!r} with the voice "
            f"{voice}: choose another voice"
        )
    return samples, events


def _in_child(function, *arguments):
    """Result of a function that runs in a forked child of this process."""
    library()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(function(*arguments), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(
            f"espeak-ng failed with {arguments}: check the voice and variant"
        )
    return pickle.loads(result)


@functools.cache
def library():
    """Initialise the library, once per process.

    Example
    -------
    >>> espeak = library()  # doctest: +SKIP
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "Synthetic voices need espeak-ng: "
            "pip install speechbrain_mpq[simulate]"
        ) from error
    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = espeak.espeak_Initialize(
        _SYNCHRONOUS,
        0,
        str(espeakng_loader.get_data_path()).encode(),
        _PHONEME_EVENTS | _DONT_EXIT,
    )
    if rate != ESPEAK_RATE:
        raise RuntimeError(
            f"espeak-ng started with {rate} instead of {ESPEAK_RATE} Hz; "
            "reinstall it: pip install --force-reinstall espeakng-loader"
        )
    return espeak


def _speak(text, voice, values):
    """Samples and events; spoils the process for another call."""
    espeak, chunks, events = library(), [], []

    def collect(samples, count, event):
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while event[i].type != _LIST_END:
            if event[i].type == _PHONEME:
                symbol = event[i].string.decode("utf-8", "replace")
                events.append((event[i].sample, symbol))
            i += 1
        return 0

    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice}")
    callback = _CALLBACK(collect)
    espeak.espeak_SetSynthCallback(callback)
    for parameter, value in values.items():
        espeak.espeak_SetParameter(parameter, int(value), 0)
    spoken = text.encode() + b"\0"
    espeak.espeak_Synth(spoken, len(spoken), 0, 0, 0, _UTF8, None, None)
    return np.concatenate(chunks), events


UP, DOWN = 320, 441  # 16000 / 22050


MARGIN = 0.03  # seconds of near-silence kept at both ends
SPEAKERS = {"train": 320, "valid": 6, "test": 12}
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-scotland")


# Variants of espeak-ng by split: (high voices, low voices). Left out are the
# nine whose noise source is not repeatable, robots, whispers and echoes.
VARIANTS = {
    "train": (
        "Andrea anika aunty steph steph2 steph3 grandma zac".split(),
        (
            "Alex AnxiousAndy Denis Gene Gene2 Henrique Hugo Jacky Michael "
            "Mike Nguyen Storm Tweaky adam antonio benjamin boris david ed "
            "edward edward2 grandpa gustave ian iven iven2 iven3 iven4 john "
            "klatt klatt2 klatt3 m1 m5 m6 m8 max michel miguel mike2 norbert "
            "pablo pedro quincy rob travis"
        ).split(),
    ),
    "valid": (["f1", "belinda"], "m2 Lee Marco robert".split()),
    "test": (
        "Annie f4 linda shelby".split(),
        "Andy Diogo Mario m3 m4 m7 marcelo paul".split(),
    ),
}


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A synthetic speaker.

    Example
    -------
    >>> Speaker("anna", "en-us", "f1", 50, 50, 160, 1.0).rate
    160
    """

    name: str  # unique name
    # accent, e.g. "en-us"
    voice: str
    variant: str  # espeak-ng's name of the timbre, e.g. "m3"
    pitch: int  # 0 to 99, 50 is the variant's own pitch
    range: int  # liveliness of the intonation, 0 to 99
    rate: int  # words per minute
    warp: float  # factor on all frequencies, as of a shorter (> 1) vocal tract


def speakers(split, seed=1234):
    """List the speakers of a split; no two splits share a variant.

    Arguments
    ---------
    split : str
        "train", "valid" or "test".
    seed : int
        Draws accent, pitch, range, rate and vocal tract.

    Returns
    -------
    list of Speaker

    Example
    -------
    >>> [len(speakers(split)) for split in ("train", "valid", "test")]
    [320, 6, 12]
    >>> speakers("test")[0].variant
    'Annie'
    """
    index = list(SPEAKERS).index(split)
    rng = np.random.default_rng([seed, index])
    high, low = VARIANTS[split]
    if split == "train":  # two low voices for every high one
        variants = [
            (high, low, low)[i % 3][i // 3 % len((high, low, low)[i % 3])]
            for i in range(SPEAKERS[split])
        ]
    else:
        variants = high + low
    return [
        Speaker(
            name=f"{split}_{i:03d}_{variant}",
            voice=ACCENTS[rng.integers(len(ACCENTS))],
            variant=variant,
            pitch=int(rng.integers(35, 66)),
            range=int(rng.integers(35, 76)),
            rate=int(rng.integers(126, 155)),
            warp=round(float(rng.uniform(0.86, 1.15)), 3),
        )
        for i, variant in enumerate(variants)
    ]


def vary(speaker, rng):
    """Change a speaker to the mood of one utterance.

    Example
    -------
    >>> anna = Speaker("anna", "en-us", "f1", 50, 50, 160, 1.0)
    >>> 147 <= vary(anna, np.random.default_rng(0)).rate <= 173
    True
    """
    return dataclasses.replace(
        speaker,
        pitch=speaker.pitch + int(rng.integers(-4, 5)),
        range=speaker.range + int(rng.integers(-10, 11)),
        rate=round(speaker.rate * rng.uniform(0.92, 1.08)),
    )


def synthesize(text, speaker):
    """Synthesize a text with a speaker's voice.

    Returns
    -------
    phonemes : list of tuple
        (start, end, symbol) in seconds, in espeak-ng's alphabet.

    Example
    -------
    >>> anna = Speaker("anna", "en-us", "f1", 50, 50, 160, 1.0)
    >>> waveform, phonemes = synthesize("seven", anna)  # doctest: +SKIP
    >>> [symbol for _, _, symbol in phonemes]  # doctest: +SKIP
    ['s', "'E", 'v', '@', 'n']
    """
    samples, events = speak(
        text,
        f"{speaker.voice}+{speaker.variant}",
        # warping speeds the speech up: ask for slower speech
        rate=round(speaker.rate / speaker.warp),
        pitch=speaker.pitch,
        range=speaker.range,
    )
    down = round(DOWN * speaker.warp)
    waveform = resample_poly(samples.astype(np.float64) / 2**15, UP, down)
    waveform, offset = _trim(waveform)
    starts = [first * (UP / down) / SAMPLE_RATE - offset for first, _ in events]
    symbols = [symbol for _, symbol in events]
    duration = len(waveform) / SAMPLE_RATE
    return waveform.astype(np.float32), _intervals(starts, symbols, duration)


def _trim(waveform):
    """Cut both ends to `MARGIN`; returns samples and the cut in seconds."""
    loud = np.flatnonzero(np.abs(waveform) > 0.01 * np.abs(waveform).max())
    margin = round(MARGIN * SAMPLE_RATE)
    start = max(loud[0] - margin, 0)
    return waveform[start : loud[-1] + margin], start / SAMPLE_RATE


def _intervals(starts, symbols, duration):
    """Increasing (start, end, symbol) inside the trimmed waveform."""
    bounds = np.clip(np.array(starts + [np.inf]), 0, duration)
    bounds = np.maximum.accumulate(bounds).round(4)
    # rounding must not lead out of the waveform
    bounds = np.minimum(bounds, np.floor(duration * 1e4) / 1e4)
    return [
        (float(start), float(end), symbol)
        for start, end, symbol in zip(bounds[:-1], bounds[1:], symbols)
        if end > start and symbol
    ]


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


@one_at_a_time
def prepare_speech(
    data_folder,
    train=4000,
    valid=200,
    test=400,
    seed=1234,
    workers=2,
    progress=None,
    sentences=None,
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
    sentences : dict or None
        Split -> sentences to speak, one for each utterance and more; None: the
        grammar's.

    Example
    -------
    >>> prepare_speech("data/embedded", train=4000)  # doctest: +SKIP
    """
    data_folder = Path(data_folder)
    counts = dict(zip(SPLITS, (train, valid, test)))
    if sentences is not None:
        _check_sentences(sentences, counts)
    parameters = data_folder / "speech" / "parameters.json"
    _check_parameters(parameters, seed, sentences)
    todo = [
        (split, start, min(start + CHUNK, count))
        for split, count in counts.items()
        for start in range(0, count, CHUNK)
        if not _is_complete(data_folder, split, start, count)
    ]
    speak = functools.partial(_speak_chunk, data_folder, seed, sentences)
    if todo:
        library()  # a missing library is reported before any work
        remove_partial(data_folder)
        hidden = None if progress is None else not progress
        with (
            worker_pool(workers) as pool,
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


def utterance(split, index, seed=1234, sentences=None):
    """Synthesize one utterance of the corpus, without any file.

    Arguments
    ---------
    split : str
        "train", "valid" or "test".
    index : int
        Number of the utterance.
    seed : int
        Seed of the corpus.
    sentences : dict or None
        As `prepare_speech` has them.

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
    words = sentences[split][index] if sentences else sentence(rng)
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


def _check_sentences(sentences, counts):
    """Refuse fewer sentences than utterances, and what is no sentence."""
    for split, count in counts.items():
        texts = sentences.get(split, [])
        if len(texts) < count:
            raise ValueError(
                f"{count} utterances of {split} and {len(texts)} sentences: "
                "ask for fewer, or give more text"
            )
        for text in texts[:count]:
            if not text or text.split() != text.split(" "):
                raise ValueError(
                    f"{split}: {text!r} is no sentence of words with one "
                    "blank between them"
                )


def _check_parameters(path, seed, sentences):
    """Write what the folder is made of, or refuse another corpus."""
    made_of = [
        *([WORDS, PATTERNS] if sentences is None else [sentences]),
        [speakers(split, seed) for split in SPLITS],
        [RMS, PEAK, CHUNK],
    ]
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
    parameters = {"seed": seed, "sha256": digest}
    if path.exists():
        present = read_json(path)
        if present != parameters:
            raise ValueError(
                f"{path} belongs to another corpus (seed {present['seed']}, "
                f"asked: {seed}, other sentences, or another version of the "
                "generator); "
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


def _speak_chunk(data_folder, seed, sentences, chunk):
    """Speak a chunk of a split; its entries are written last."""
    split, start, stop = chunk
    entries = {}
    for index in range(start, stop):
        key = f"{split}_{index:06d}"
        samples, entries[key] = utterance(split, index, seed, sentences)
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
