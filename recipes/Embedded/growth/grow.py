"""Grow a trained separator into a larger one that computes the same.

To run this recipe:

> python recipes/Embedded/growth/grow.py pretrained/separator_mini \
    hparams/models/separator_large.yaml -o results/grown

The folder is what hparams/pretrain_large.yaml starts from. A few training
mixtures of the embedded corpus, which is made where it is missing, set the
levels of the new units.
"""

import argparse
import sys
from pathlib import Path

import torch

from speechbrain_mpq import load_separator
from speechbrain_mpq.evaluation.si_snr import si_snr
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.quantization.packing import read_packed
from speechbrain_mpq.separation.growth import check_growth, grow_
from speechbrain_mpq.separation.loading import build_separator
from speechbrain_mpq.simulation.bank import RoomBank, prepare_rooms
from speechbrain_mpq.simulation.corpus import prepare_speech
from speechbrain_mpq.simulation.datasets import training_mixtures
from speechbrain_mpq.simulation.mixtures import MixtureMaker, load_speech

MIXTURES = 16
ROOMS = 25
SECONDS = 3.0


def training_batch(folder, microphones, seed):
    """Mixtures [batch, samples, mics], targets [batch, samples, 2], DOAs."""
    show = sys.stderr.isatty()
    if not (folder / "train_speech.json").exists():
        prepare_speech(folder, 1600, 100, 400, seed=seed, progress=show)
    prepare_rooms(folder, {"train": ROOMS}, microphones, seed, progress=show)
    maker = MixtureMaker(
        load_speech(folder / "train_speech.json", folder),
        RoomBank(folder, "train", ROOMS),
        seed=seed,
    )
    dataset = training_mixtures(maker, SECONDS, MIXTURES)
    items = [dataset[i] for i in range(MIXTURES)]
    return [
        torch.stack([item[name] for item in items])
        for name in ("mixture", "targets", "doa")
    ]


@torch.no_grad()
def quality(separator, mixtures, targets, doa):
    """Mean SI-SNR in dB."""
    return si_snr(separator(mixtures, doa), targets.transpose(1, 2)).mean()


def main():
    """Grow, say how well it went, and pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("smaller", help="packed folder, full precision")
    parser.add_argument("model", help="YAML file of the larger separator")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--data_folder", type=Path, default=Path("data/embedded")
    )
    parser.add_argument("--seed", type=int, default=1234)
    asked = parser.parse_args()
    smaller = load_separator(asked.smaller)
    if read_packed(asked.smaller)[0]:
        raise SystemExit(
            f"{asked.smaller} is quantized: grow the full-precision weights "
            "that it was made from"
        )
    torch.manual_seed(asked.seed)
    separator = build_separator(asked.model).eval()
    check_growth(separator, smaller)  # before any data is made
    microphones = separator.features.microphones
    mixtures, targets, doa = training_batch(
        asked.data_folder, microphones, asked.seed
    )
    grow_(separator, smaller, mixtures, doa)
    for name, model in {"smaller": smaller, "grown": separator}.items():
        size = sum(p.numel() for p in model.parameters()) / 1e6
        decibels = quality(model, mixtures, targets, doa)
        print(f"{name}: {size:.2f} M parameters, {decibels:.2f} dB SI-SNR")
    save_separator(separator, asked.output, {"system": "grown"})
    print(
        "Train on: python train.py hparams/pretrain_large.yaml "
        f"--pretrained_separator {asked.output} --separator_file {asked.model}"
    )


if __name__ == "__main__":
    main()
