"""SI-SNR of packed separators on a corpus that they have never seen.

> python benchmarks/zero_shot.py data/fsdd pretrained/separator_mini \
    pretrained/separator_mini_4bit --asr pretrained/asr_mini

Mixtures of the utterances of `test_speech.json` in the rooms of the test
split, angle buckets in turn; as many as there are utterances are train.py's
own. With --asr also word error rates: of the utterances as they are, and of
mixture, estimate and reverberant target. --noise 10 adds generated noise from
a place of its own, 10 dB below the target. --save writes the scores of each.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechbrain_mpq import load_separator
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.evaluation.wer import word_errors
from speechbrain_mpq.inference.speech_recognition import Recognizer
from speechbrain_mpq.simulation.augmentation import Augmentation
from speechbrain_mpq.simulation.mixtures import (
    BUCKETS,
    MixtureMaker,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms

SEED = 1234  # corpus_seed of hparams


def drawn_mixtures(maker, count):
    """Mixtures of all targets in turn, drawn anew in every round."""
    targets = sorted(maker.speech)
    for number in range(count):
        maker.epoch, index = divmod(number, len(targets))
        yield maker.draw(targets[index], bucket=number % len(BUCKETS))


@torch.no_grad()
def score(separators, maker, count, recognize):
    """One dict for each mixture: SI-SNR and words by system."""
    rows = []
    for drawn in tqdm(drawn_mixtures(maker, count), total=count, disable=None):
        signals = maker.render(drawn)
        mixture = torch.from_numpy(signals["mixture"])
        target = torch.from_numpy(signals["target"])
        doa = torch.tensor([[drawn["doa_given"]]])
        signals = {"mixture": mixture[:, 0]}
        for name, separator in separators.items():
            signals[name] = separator(mixture[None], doa)[0, 0]
        row = {
            "bucket": [low <= drawn["angle"] < high for low, high in BUCKETS],
            "si_snr": {n: si_snr(s, target).item() for n, s in signals.items()},
            "said": maker.speech[drawn["target"]]["words"],
        }
        if recognize:
            signals["target"] = target
            row["heard"] = {n: recognize(s) for n, s in signals.items()}
        rows.append(row)
    return rows


def word_error_rate(pairs):
    """Of (reference, hypothesis) pairs, in percent."""
    counts = [word_errors(*pair) for pair in pairs]
    return 100 * sum(c.errors for c in counts) / sum(c.words for c in counts)


def table(rows, recognize):
    """One line for each system, the four buckets and all."""
    inside = np.array([row["bucket"] for row in rows])  # [mixtures, 4]
    heads = [f"{low}-{high}" for low, high in BUCKETS]
    lines = [f"{'SI-SNR dB':32s}" + "".join(f"{h:>9s}" for h in heads)]
    lines[0] += f"{'avg.':>9s}" + (f"{'WER %':>9s}" if recognize else "")
    for name in rows[0]["si_snr"]:
        values = np.array([row["si_snr"][name] for row in rows])
        means = [values[column].mean() for column in inside.T]
        cells = [*means, np.mean(means)]
        if recognize:
            pairs = [(row["said"], row["heard"][name]) for row in rows]
            cells.append(word_error_rate(pairs))
        lines.append(f"{name[-32:]:32s}" + "".join(f"{c:9.2f}" for c in cells))
    return "\n".join(lines)


def recognized_clean(speech, recognize):
    """Word error rate of the utterances as they were recorded."""
    return word_error_rate(
        [
            (entry["words"], recognize(soundfile.read(entry["wav"])[0]))
            for entry in speech.values()
        ]
    )


def only_noise(snr):
    """What puts noise into every mixture, and changes nothing else."""
    if snr is None:
        return None
    return Augmentation(
        voice=0, noise=1, snr=(snr, snr), third_talker=0, microphones=0, doa=0
    )


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("packed", nargs="+", help="folders of separators")
    parser.add_argument("--asr", help="folder or hub name of an EncoderASR")
    parser.add_argument("--mixtures", type=int, default=100)
    parser.add_argument("--rooms", type=int, default=100)
    parser.add_argument("--noise", type=float, help="dB below the target")
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def main():
    """Score all and print the table."""
    options = arguments()
    torch.set_num_threads(1)
    separators = {name: load_separator(name) for name in options.packed}
    first = next(iter(separators.values()))
    microphones = first.features.microphones
    folder, counts = options.data_folder, {"test": options.rooms}
    prepare_rooms(folder, counts, microphones, SEED)
    speech = load_speech(folder / "test_speech.json", folder)
    rooms = RoomBank(folder, "test", options.rooms)
    recognize = Recognizer(options.asr) if options.asr else None
    maker = MixtureMaker(
        speech, rooms, seed=SEED, augmentation=only_noise(options.noise)
    )
    rows = score(separators, maker, options.mixtures, recognize)
    print(table(rows, recognize))
    if recognize:
        pairs = [(row["said"], row["heard"]["target"]) for row in rows]
        print(f"WER of reverberant targets {word_error_rate(pairs):.2f} %")
        print(
            f"WER of clean speech {recognized_clean(speech, recognize):.2f} %"
        )
    if options.save:
        options.save.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
