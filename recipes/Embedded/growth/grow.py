"""Grow a trained separator into a larger one that computes the same.

To run this recipe:

> python recipes/Embedded/growth/grow.py pretrained/separator_mini \
    hparams/models/separator_large.yaml -o results/grown

The folder is what hparams/pretrain_large.yaml starts from. A few training
mixtures of the embedded corpus, which is made where it is missing, set the
levels of the new units. Features of other microphones or another kind need
`--refit 256`: on so many mixtures, from as many rooms, the first layer is
fitted to what it used to compute.
"""

import argparse
import sys
from pathlib import Path

import torch

from speechbrain_mpq import load_separator
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.lobes.models.growth import (
    channels_of,
    check_growth,
    check_refit,
    grow_,
    refit,
)
from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import read_packed
from speechbrain_mpq.simulation.corpus import prepare_speech
from speechbrain_mpq.simulation.dataio import training_mixtures
from speechbrain_mpq.simulation.mixtures import MixtureMaker, load_speech
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms

MIXTURES = 16  # for the levels
ROOMS = 25
BATCH = 8
SECONDS = 3.0


def training_items(folder, microphones, seed, count):
    """Training mixtures; the corpus and the rooms are made where missing."""
    show = sys.stderr.isatty()
    if not (folder / "train_speech.json").exists():
        prepare_speech(folder, 1600, 100, 400, seed=seed, progress=show)
    speech = load_speech(folder / "train_speech.json", folder)
    if len(speech) < MIXTURES + count:
        raise SystemExit(
            f"{folder} has {len(speech)} utterances to train with, --refit "
            f"{count} takes {MIXTURES + count}"
        )
    rooms = max(ROOMS, count)
    prepare_rooms(folder, {"train": rooms}, microphones, seed, progress=show)
    maker = MixtureMaker(speech, RoomBank(folder, "train", rooms), seed=seed)
    return training_mixtures(maker, SECONDS, MIXTURES + count)


def batches(dataset, start, end):
    """Mixtures [batch, samples, mics], targets [.., 2] and DOAs of items."""
    for first in range(start, end, BATCH):
        items = [dataset[i] for i in range(first, min(first + BATCH, end))]
        yield [
            torch.stack([item[name] for item in items])
            for name in ("mixture", "targets", "doa")
        ]


def check(separator, smaller, refitted):
    """Raise ValueError on two that do not fit, before any data is made."""
    if refitted:
        check_refit(smaller, separator.features)
        smaller = Separator(separator.features, **smaller.settings)
        fold_norms_(smaller)
    check_growth(separator, smaller)


@torch.no_grad()
def quality(separator, mixtures, targets, doa):
    """Mean SI-SNR in dB."""
    return si_snr(separator(mixtures, doa), targets.transpose(1, 2)).mean()


def _count(text):
    """A number of mixtures."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} mixtures are too few")
    return int(text)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("smaller", help="packed folder, full precision")
    parser.add_argument("model", help="YAML file of the larger separator")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--data_folder", type=Path, default=Path("data/embedded")
    )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--refit",
        type=_count,
        default=0,
        metavar="MIXTURES",
        help="fit the first layer to other features, on so many mixtures",
    )
    return parser.parse_args()


def main():
    """Grow, say how well it went, and pack."""
    options = arguments()
    smaller = load_separator(options.smaller)
    if read_packed(options.smaller)[0]:
        raise SystemExit(
            f"{options.smaller} is quantized: grow the full-precision weights "
            "that it was made from"
        )
    torch.manual_seed(options.seed)
    separator = build_separator(options.model).eval()
    models = {"smaller": smaller, "grown": separator}
    check(separator, smaller, options.refit)
    used = [model.features.microphones for model in models.values()]
    microphones = sorted(set().union(*used))
    dataset = training_items(
        options.data_folder, microphones, options.seed, options.refit
    )
    if options.refit:
        count = MIXTURES + options.refit
        to_fit = (
            (mixtures, doa)
            for mixtures, _, doa in batches(dataset, MIXTURES, count)
        )
        smaller = refit(smaller, separator.features, to_fit, microphones)
        models = {"smaller": models["smaller"], "refitted": smaller, **models}
    levels = batches(dataset, 0, MIXTURES)
    mixtures, targets, doa = map(torch.cat, zip(*levels, strict=True))

    def channels(model):
        return channels_of(mixtures, microphones, model.features.microphones)

    grow_(separator, smaller, channels(separator), doa)
    for name, model in models.items():
        size = sum(p.numel() for p in model.parameters()) / 1e6
        decibels = quality(model, channels(model), targets, doa)
        print(f"{name}: {size:.2f} M parameters, {decibels:.2f} dB SI-SNR")
    save_separator(separator, options.output, {"system": "grown"})
    print(f"Train on with --pretrained_separator {options.output}")


if __name__ == "__main__":
    main()
