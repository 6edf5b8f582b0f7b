"""Audio of a SpeechBrain manifest, as a pretrained interface wants it."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from speechbrain.dataio.dataio import load_data_csv
from speechbrain.dataio.preprocess import AudioNormalizer
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..inference.audio import check_rates, read_segment
from ..utils import read_text, scratch_folder, strict_json

logger = get_logger(__name__)
# What other tools name a part of a file by
FOREIGN_KEYS = (
    *("offset", "frame_offset", "num_frames", "begin", "end"),
    "start_time",
)
LENGTH_ERROR = 0.1  # of a duration, from where on something else was read
TIME_ERROR = 0.02  # seconds that a time in a manifest may be wrong by
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
    items, seconds = [], {}
    for name, entry in tqdm(
        entries.items(), "reading", disable=not progress, leave=False
    ):
        read = partial(read_audio, name, entry, key, normalize)
        audio = read()
        seconds[name] = len(audio) / sample_rate
        items.append(Example(name, audio if keep else read, entry, normalize))
    _compare_durations(entries, seconds)
    return items


def _compare_durations(entries, seconds):
    """Warn where a manifest means other parts of files than those read."""
    wrong = []
    for name, entry in entries.items():
        try:
            declared = float(entry["duration"])
        except (KeyError, TypeError, ValueError):
            continue
        if abs(declared - seconds[name]) > LENGTH_ERROR * declared:
            wrong.append(f"{name}: {seconds[name]:.2f} s, not {declared:g}")
    if wrong:
        logger.warning(
            f"{len(wrong)} of {len(entries)} recordings are not as long as "
            f"their 'duration' says ({wrong[0]}): parts of files are given by "
            "start and stop, in samples"
        )


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
    part = _part_of(name, entry, key)
    try:
        start, stop = part.samples()
        parts = [read_segment(path, start, stop) for path in part.files]
        rates = sorted({rate for _, rate in parts})
        if len(rates) > 1:
            raise ValueError(f"its files are sampled at {rates} Hz: resample")
        check_rates(rates[0], normalize.sample_rate, part.files[0])
        channels = np.concatenate([samples for samples, _ in parts], 1)
        channels = part.channels(channels)
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest entry {name!r}: {error}") from error
    audio, rate = torch.from_numpy(channels), rates[0]
    # Times are rounded somewhere: a few samples more than there are are no lie
    spare = round(TIME_ERROR * rate) if part.seconds else 0
    if stop is not None and len(audio) < stop - start - spare:
        raise ValueError(
            f"manifest entry {name!r}: {part.files[0]} has no samples {start} "
            f"to {stop}, it ends at {start + len(audio)}"
        )
    audio = normalize(audio, rate)
    if not len(audio) or not torch.isfinite(audio).all():
        raise ValueError(
            f"{part.files[0]} (manifest entry {name!r}) is empty or has NaN or "
            "infinite samples: leave it out"
        )
    return audio


@dataclass(frozen=True)
class _Part:
    """The part of a recording that an entry names."""

    files: list  # of paths, side by side
    start: float  # in samples or seconds
    stop: float | None  # None: the end
    seconds: bool
    channel: object  # what the entry says of channels; None: nothing

    def samples(self):
        """First sample and the one behind the last."""
        if not self.seconds:
            return self.start, self.stop
        _, rate = read_segment(self.files[0], 0, 1)
        return int(self.start * rate), int(self.stop * rate)

    def channels(self, samples):
        """Those of [samples, channels] that are meant, as recipes take them."""
        count = samples.shape[1]
        if self.channel in (None, count) or count == 1:
            return samples
        if self.channel not in ("A", "B"):
            raise ValueError(
                f"channel is {self.channel!r}, of {self.files[0]} with its "
                f"{count}: SpeechBrain's recipes know A and B"
            )
        return samples[:, "AB".index(self.channel)][:, None]


def _part_of(name, entry, key):
    """What an entry means, in any form of SpeechBrain's recipes."""
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
    limits = {k: v for k, v in limits.items() if v not in (None, "")}
    options = str(limits.get(f"{key}_opts", ""))
    if "start" in options or "stop" in options:
        raise ValueError(
            f"manifest entry {name!r}: {key}_opts is {options!r}, which "
            "SpeechBrain does not read: make columns start and stop of it"
        )
    try:
        start, stop, seconds = _limits(limits)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"manifest entry {name!r}: {error}") from error
    if stop is not None and stop <= start:
        raise ValueError(
            f"manifest entry {name!r}: stop {stop} is not behind start {start}"
        )
    channel = limits.get("channel", limits.get("channels"))
    return _Part(files, start, stop, seconds, channel)


def _limits(entry):
    """Start, stop (or None), and whether they are seconds."""
    unknown = [key for key in FOREIGN_KEYS if key in entry]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not known to SpeechBrain: parts of files are "
            "given by start and stop, in samples"
        )
    if "begin_time" in entry or "end_time" in entry:  # as in GigaSpeech
        names = "begin_time", "end_time"
        return *(_number(entry, key) for key in names), True
    if "start" in entry and "duration" in entry and "stop" not in entry:
        start = _number(entry, "start")  # as in Libriheavy
        return start, start + _number(entry, "duration"), True
    stop = _number(entry, "stop", whole=True) if "stop" in entry else None
    return _number({"start": 0, **entry}, "start", whole=True), stop, False


def _number(entry, key, whole=False):
    """A number of samples or seconds."""
    value = entry.get(key)
    what = "number of samples" if whole else "number of seconds"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError(f"{key} is {value!r}, not a {what}")
    if whole and number != int(number):
        raise ValueError(f"{key} is {value!r}, not a {what}")
    return int(number) if whole else number


def check_files(entries, key="wav"):
    """Refuse entries whose audio is not there, before any work."""
    for name, entry in entries.items():
        for path in _part_of(name, entry, key).files:
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
