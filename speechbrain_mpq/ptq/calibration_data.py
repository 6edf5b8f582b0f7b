"""Audio of a SpeechBrain manifest, as a pretrained interface wants it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from speechbrain.dataio.dataio import load_data_csv
from speechbrain.dataio.preprocess import AudioNormalizer
from tqdm import tqdm

from ..inference.audio import read_segment
from ..utils import read_text, scratch_folder, strict_json

TEXT_KEYS = "txt", "text", "words", "label", "char"  # in SpeechBrain's recipes


@dataclass
class Example:
    """One entry of a manifest with its audio."""

    key: str  # name of the entry
    content: object  # audio [time] at the interface's sampling rate, or text;
    entry: dict  # or a function that reads it. All that the manifest says
    normalize: object = None  # brings other audio of the entry to the same rate

    @property
    def audio(self):
        """Audio [time], or text; read anew where it is not kept."""
        return self.content() if callable(self.content) else self.content


def read_manifest(path, data_root=None):
    """The entries of a JSON or CSV manifest in SpeechBrain's format."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path}: no such manifest")
    replacements = {"data_root": str(data_root or path.parent)}
    try:
        entries = _entries(path, read_text(path), replacements)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no manifest in SpeechBrain's JSON or CSV format "
            f"({error!r})"
        ) from error
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise ValueError(
            f"{path} is no manifest in SpeechBrain's JSON format, which is "
            '{"id": {"wav": "a.wav", ...}, ...}'
        )
    if not entries:
        raise ValueError(f"{path} has no entries: calibration needs some audio")
    return entries


def _entries(path, text, replacements):
    """Entries as SpeechBrain reads them, without a byte order mark."""
    if path.suffix.lower() != ".csv":
        # SpeechBrain takes the last of two equal keys, and any brace in a
        # transcript for a place to put something
        return _replaced(strict_json(text), replacements)
    with scratch_folder() as scratch:
        plain = Path(scratch, path.name)
        plain.write_bytes(text.encode())
        return load_data_csv(plain, replacements)


def _replaced(content, replacements):
    """Content with {name} replaced in all of its strings."""
    if isinstance(content, str):
        for name, value in replacements.items():
            content = content.replace(f"{{{name}}}", value)
    elif isinstance(content, list):
        return [_replaced(inner, replacements) for inner in content]
    elif isinstance(content, dict):
        return {k: _replaced(v, replacements) for k, v in content.items()}
    return content


def evenly_spaced(entries, count):
    """Some entries of a manifest, evenly spread over it.

    Example
    -------
    >>> list(evenly_spaced(dict.fromkeys("abcdef"), 3))
    ['a', 'c', 'e']
    """
    if count is None or count >= len(entries):
        return dict(entries)
    if count < 1:
        raise ValueError(f"the number of items is {count}: take at least one")
    keys = list(entries)
    chosen = [keys[i * len(keys) // count] for i in range(count)]
    return {key: entries[key] for key in chosen}


def sample_rate_of(interface):
    """The sampling rate that an interface expects.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> hparams = SimpleNamespace(sample_rate=8000)
    >>> sample_rate_of(SimpleNamespace(hparams=hparams))
    8000
    """
    own = getattr(interface.hparams, "audio_normalizer", None)
    if own is not None:
        return own.sample_rate
    return getattr(interface.hparams, "sample_rate", 16000)


def read_items(entries, sample_rate, key="wav", keep=True, progress=False):
    """Load the audio of entries, one channel at a given sampling rate.

    Arguments
    ---------
    keep : bool
        Else audio is read once to see whether it can be, and again where it is
        asked for: there may be more of it than memory.
    """
    normalize = AudioNormalizer(sample_rate=sample_rate)
    items = []
    for name, entry in tqdm(
        entries.items(), "reading", disable=not progress, leave=False
    ):
        read = partial(read_audio, name, entry, key, normalize)
        audio = read()
        items.append(Example(name, audio if keep else read, entry, normalize))
    return items


def read_texts(entries, key=None):
    """The texts of entries, for interfaces that read.

    Example
    -------
    >>> read_texts({"a": {"wav": "a.wav", "label": "place blue"}})[0].audio
    'place blue'
    """
    return [
        Example(name, _text_of(name, entry, key), entry)
        for name, entry in entries.items()
    ]


def _text_of(name, entry, key):
    """The text that an entry has under a key, or a usual one."""
    keys = [key] if key else TEXT_KEYS
    present = [k for k in keys if isinstance(entry.get(k), str)]
    if not present or not entry[present[0]].strip():
        raise ValueError(
            f"manifest entry {name!r} has no text under {' or '.join(keys)}, "
            f"only {sorted(entry)}: name its key by --text-key"
        )
    return entry[present[0]]


def read_audio(name, entry, key, normalize):
    """Audio that an entry names under a key, in any form of SpeechBrain's.

    Arguments
    ---------
    normalize : callable
        ``normalize(audio, sample_rate)`` for audio [time, channels].

    Returns
    -------
    torch.Tensor
        [time].
    """
    files, start, stop = _segment_of(name, entry, key)
    try:
        parts = [read_segment(path, start, stop) for path in files]
        rates = sorted({rate for _, rate in parts})
        if len(rates) > 1:
            raise ValueError(f"its files are sampled at {rates} Hz: resample")
        channels = np.concatenate([part for part, _ in parts], 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest entry {name!r}: {error}") from error
    audio, rate = torch.from_numpy(channels), rates[0]
    if stop is not None and len(audio) != stop - start:
        raise ValueError(
            f"manifest entry {name!r}: {files[0]} has no samples {start} to "
            f"{stop}, it ends at {start + len(audio)}"
        )
    audio = normalize(audio, rate)
    if not len(audio) or not torch.isfinite(audio).all():
        raise ValueError(
            f"{files[0]} (manifest entry {name!r}) is empty or has NaN or "
            "infinite samples: leave it out"
        )
    return audio


def _segment_of(name, entry, key):
    """Files, first sample and the one behind the last, of an entry."""
    if key not in entry:
        raise ValueError(
            f"manifest entry {name!r} has no key {key!r} that names its audio "
            f"file, only {sorted(entry)}"
        )
    value, limits = entry[key], entry
    if isinstance(value, dict):
        limits, value = value, value.get("file", value.get("files"))
    files = value if isinstance(value, list) else [value]
    if not files or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"manifest entry {name!r}: {key!r} is {entry[key]!r}, not the name "
            'of a file or {"file": name, "start": samples, "stop": samples}'
        )
    start = _samples(name, limits, "start") or 0
    stop = _samples(name, limits, "stop")
    if stop is not None and stop <= start:
        raise ValueError(
            f"manifest entry {name!r}: stop {stop} is not behind start {start}"
        )
    return files, start, stop


def _samples(name, limits, key):
    """A number of samples, or None where there is none."""
    value = limits.get(key)
    if value is None or value == "":
        return None
    try:
        samples = float(value)
        if isinstance(value, bool) or samples != int(samples) or samples < 0:
            raise ValueError("no whole number of samples")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"manifest entry {name!r}: {key} is {value!r}, not a number of "
            "samples"
        ) from error
    return int(samples)


def check_files(entries, key="wav"):
    """Refuse entries whose audio is not there, before any work."""
    for name, entry in entries.items():
        for path in _segment_of(name, entry, key)[0]:
            if not Path(path).is_file():
                raise ValueError(
                    f"manifest entry {name!r}: no file {path}. What stands for "
                    "{data_root} can be said by --data-root"
                )


def batch_of(audio):
    """Waveforms side by side, padded with zeros.

    Arguments
    ---------
    audio : list of torch.Tensor
        [time] each.

    Returns
    -------
    wavs : torch.Tensor
        [items, time].
    lengths : torch.Tensor
        [items], relative to the longest.

    Example
    -------
    >>> wavs, lengths = batch_of([torch.ones(4), torch.ones(3)])
    >>> wavs[1], lengths
    (tensor([1., 1., 1., 0.]), tensor([1.0000, 0.7500]))
    """
    wavs = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)
    lengths = torch.tensor([len(a) / wavs.shape[1] for a in audio])
    return wavs, lengths
