"""Does the data keep up with the training? Steps a second, with and without.

> python benchmarks/loading.py --device=cuda:0 \
    --overrides "compile_network: True"

Tells how many items one process makes in a second of CPU time, mixed or as
voices; then trains the separator of an hparams file three times for a few
steps (`--steps 0`: not at all): on one batch that is there already, on mixtures
of the loader, and on mixtures made on the device from the loader's voices. The
aim is 60 % of the first rate at least.
Needs the corpus and the rooms of that file (`python train.py` makes them).
"""

import argparse
import json
import time
from itertools import chain, repeat
from pathlib import Path

import torch
from speechbrain.dataio.dataloader import make_dataloader

from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.inference.loading import build_separator
from speechbrain_mpq.simulation.dataio import (
    DeviceMixer,
    dataio_prep,
    mix_batch_,
)
from speechbrain_mpq.training.experiment import read_hparams

ITEMS = 60
WARM_UP = 8  # steps that are not counted: compiled and prefetched


class Training:
    """A separator, an optimizer and a step of training."""

    def __init__(self, hparams, device):
        self.device = device
        self.separator = build_separator(hparams["separator_file"]).to(device)
        if hparams["compile_network"]:
            self.separator.mask_net.compile(dynamic=False)
        self.optimizer = torch.optim.Adam(self.separator.parameters())

    def step(self, batch, mixer=None):
        """Forward, backward, update; bf16 where it may."""
        if mixer:
            mix_batch_(mixer, batch, self.device)
        mixture, targets, doa = (
            getattr(batch, name).data.to(self.device)
            for name in ("mixture", "targets", "doa")
        )
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16):
            estimates = self.separator(mixture, doa)
        loss = -si_snr(estimates.float(), targets.transpose(1, 2)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()  # waits for the device

    def rate(self, batches, steps, mixer=None):
        """Steps a second."""
        for count, batch in enumerate(batches, 1 - WARM_UP):
            self.step(batch, mixer)
            if count == 0:
                start = time.perf_counter()
            if count == steps:
                return steps / (time.perf_counter() - start)
        raise ValueError(f"fewer than {steps} batches: ask for fewer --steps")


def items_per_second(dataset):
    """Items that one process makes in a second of CPU time."""
    dataset[0]  # imports
    start = time.process_time()
    for index in range(1, ITEMS + 1):
        dataset[index]
    return ITEMS / (time.process_time() - start)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hparams", default="hparams/pretrain_large.yaml")
    parser.add_argument("--overrides", default="", help="YAML text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--loader_workers", type=int, default=1)
    parser.add_argument("--out", help="JSON file of the numbers")
    arguments = parser.parse_args()
    hparams = read_hparams(arguments.hparams, arguments.overrides)
    torch.set_num_threads(hparams["threads"])
    build = build_separator(hparams["separator_file"])
    hparams["microphones"] = build.features.microphones
    hparams["lips_size"] = build.lips_size
    datasets, maker = dataio_prep(hparams)
    options = {
        **hparams["train_loader"],
        "num_workers": arguments.loader_workers,
    }

    def loader(name):
        return make_dataloader(datasets[name], **options)

    for name, dataset in (("mixtures", "train"), ("voices", "voices")):
        rate = items_per_second(datasets[dataset])
        print(f"{name:14}{rate:8.0f} items/s in a loader process")
    if not arguments.steps:
        return
    training = Training(hparams, arguments.device)
    batch = next(iter(loader("train")))
    mixer = DeviceMixer(maker.rooms, hparams["chunk_seconds"])
    mixer = mixer.to(arguments.device)
    rates = {
        "no loading": training.rate(repeat(batch), arguments.steps),
        "loader mixes": training.rate(
            chain.from_iterable(loader("train") for _ in range(99)),
            arguments.steps,
        ),
        "device mixes": training.rate(
            chain.from_iterable(loader("voices") for _ in range(99)),
            arguments.steps,
            mixer,
        ),
    }
    for name, rate in rates.items():
        share = 100 * rate / rates["no loading"]
        print(f"{name:14}{rate:8.2f} steps/s {share:6.0f} %")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rates, indent=1) + "\n")


if __name__ == "__main__":
    main()
