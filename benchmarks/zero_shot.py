"""SI-SNR, PESQ and words of packed separators on a corpus they never saw.

> python benchmarks/zero_shot.py data/fsdd pretrained/separator_mini \
    pretrained/separator_mini_4bit --pesq --asr results/asr_fsdd/1234/published

Mixtures of the utterances of `test_speech.json` (or of --split valid) in the
rooms of that split, angle buckets in turn; as many as there are utterances are
train.py's own. --talkers names those to separate, from any of the others.
--noise 10 adds generated noise from a place of its own, 10 dB below the target,
--vary what else a training with `Augmentation` varies. Confusion is that of
metrics.json, the share of estimates below 0 dB, but for the closest bucket.
With --asr also word error rates: of the utterances as they are, and of mixture,
estimate and reverberant target. --save writes the scores of each.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechbrain_mpq import load_separator
from speechbrain_mpq.evaluation.signal_quality import pesq_many, si_snr
from speechbrain_mpq.evaluation.signal_tasks import SEPARATION
from speechbrain_mpq.evaluation.task import count_word_errors, markdown_table
from speechbrain_mpq.inference.speech_recognition import Recognizer
from speechbrain_mpq.simulation.augmentation import Augmentation
from speechbrain_mpq.simulation.mixtures import (
    BUCKETS,
    MixtureMaker,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms

SEED = 1234  # corpus_seed of hparams
NOTHING = dict.fromkeys(
    ("voice", "noise", "third_talker", "microphones", "doa"), 0
)


def targets_of(speech, talkers):
    """Utterances of some talkers (None: of all), in order."""
    there = {entry["speaker"] for entry in speech.values()}
    if talkers and not there.issuperset(talkers):
        raise SystemExit(f"--talkers: there are {sorted(there)}")
    wanted = talkers or there
    return sorted(key for key in speech if speech[key]["speaker"] in wanted)


def drawn_mixtures(maker, targets, count):
    """Mixtures of targets in turn, drawn anew in every round."""
    for number in range(count):
        maker.epoch, index = divmod(number, len(targets))
        yield maker.draw(targets[index], bucket=number % len(BUCKETS))


@torch.no_grad()
def score(separators, maker, drawn, recognize=None, pesq=False):
    """Score all systems on the same drawn mixtures.

    Returns
    -------
    items : dict
        System -> test items of the separation task.
    """
    items, pairs = {name: [] for name in ("mixture", *separators)}, []
    for mixed in tqdm(drawn, disable=None):
        signals = maker.render(mixed)
        mixture = torch.from_numpy(signals["mixture"])
        target = torch.from_numpy(signals["target"])
        doa = torch.tensor([[mixed["doa_given"]]])
        outputs = {"mixture": mixture[:, 0]}
        for name, separator in separators.items():
            outputs[name] = separator(mixture[None], doa)[0, 0]
        shared = {
            "angle": mixed["angle"],
            "si_snr_mixture": si_snr(mixture[:, 0], target).item(),
            "reference": maker.speech[mixed["target"]]["words"],
            "hypothesis_target": recognize(target) if recognize else None,
            "pesq": None,
        }
        for name, output in outputs.items():
            item = {
                **shared,
                "si_snr": si_snr(output, target).item(),
                "hypothesis": recognize(output) if recognize else "",
            }
            items[name].append(item)
            pairs.append((item, output.numpy(), target.numpy()))
    if pesq:
        waveforms = [pair for _, *pair in pairs]
        scores = pesq_many(waveforms, workers=1, skip_undefined=True)
        for (item, *_), value in zip(pairs, scores, strict=True):
            item["pesq"] = value
    return items


def table(items, recognize, pesq):
    """One line for each system: the four buckets, their mean, all else."""
    names = SEPARATION.conditions.names
    head = ["SI-SNR dB", *names, "avg.", "confusion %"]
    head += ["PESQ"] * pesq + ["WER %"] * bool(recognize)
    lines = []
    for system, scored in items.items():
        inside = {name: [] for name in names}
        for item in scored:
            inside[SEPARATION.conditions.of(item)].append(item)
        blocks = [SEPARATION.summarise(inside[name]) for name in names]
        means = [block["si_snr"] for block in blocks]
        confused = 100 * np.mean([b["confusions"] for b in blocks[1:]])
        line = [system[-40:], *means, np.mean(means), confused]
        if pesq:
            line.append(np.mean([block["pesq"] for block in blocks]))
        if recognize:
            line.append(count_word_errors(scored).rate)
        lines.append([line[0], *(f"{value:.2f}" for value in line[1:])])
    return markdown_table(head, lines)


def recognized_clean(speech, recognize):
    """Word error rate of the utterances as they were recorded."""
    items = [
        {
            "reference": entry["words"],
            "hypothesis": recognize(soundfile.read(entry["wav"])[0]),
        }
        for entry in speech.values()
    ]
    return count_word_errors(items).rate


def variation(vary, snr):
    """What is varied in the mixtures, and nothing else; None: nothing.

    A third talker, faulty microphones or another voice in every mixture;
    directions off as `Augmentation` has it; noise `snr` dB below the target.
    """
    if not vary and snr is None:
        return None
    shares = NOTHING | dict.fromkeys(vary, 1)
    if "doa" in vary:
        shares |= {"doa": 5.0, "doa_share": 1}
    if snr is not None:
        shares |= {"noise": 1, "snr": (snr, snr)}
    return Augmentation(**shares)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("packed", nargs="+", help="folders of separators")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--talkers", nargs="+", help="to separate")
    parser.add_argument("--asr", help="folder or hub name of an EncoderASR")
    parser.add_argument("--pesq", action="store_true")
    parser.add_argument("--mixtures", type=int, default=100)
    parser.add_argument("--rooms", type=int, default=100)
    parser.add_argument("--noise", type=float, help="dB below the target")
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        choices=sorted(NOTHING),
        help="in every mixture",
    )
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def main():
    """Score all and print the table."""
    options = arguments()
    torch.set_num_threads(1)
    separators = {name: load_separator(name) for name in options.packed}
    first = next(iter(separators.values()))
    folder, split = options.data_folder, options.split
    microphones = first.features.microphones
    prepare_rooms(folder, {split: options.rooms}, microphones, SEED)
    speech = load_speech(folder / f"{split}_speech.json", folder)
    recognize = Recognizer(options.asr) if options.asr else None
    maker = MixtureMaker(
        speech,
        RoomBank(folder, split, options.rooms),
        seed=SEED,
        augmentation=variation(options.vary, options.noise),
    )
    targets = targets_of(speech, options.talkers)
    drawn = list(drawn_mixtures(maker, targets, options.mixtures))
    items = score(separators, maker, drawn, recognize, options.pesq)
    print(table(items, recognize, options.pesq))
    if recognize:
        targets = count_word_errors(items["mixture"], "hypothesis_target")
        print(f"WER of reverberant targets {targets.rate:.2f} %")
        clean = recognized_clean(speech, recognize)
        print(f"WER of clean speech {clean:.2f} %")
    if options.save:
        options.save.write_text(json.dumps(items, indent=1))


if __name__ == "__main__":
    main()
