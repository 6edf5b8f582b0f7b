"""Seconds and memory of Hessian scores, by probe.

> python benchmarks/hessian.py
> python benchmarks/hessian.py --probes 2 --overrides "{separator_file: \
    hparams/models/separator_large.yaml, pretrained_separator: results/grown}"

Scores the clusters as hparams/hes_4bit.yaml does, on the loss of 16 training
mixtures. Options in --overrides are those of train.py. Needs the corpus, which
`make demo` makes.
"""

import argparse
import resource
import time

import torch

from speechbrain_mpq.experiments.talker_separation import (
    Separation,
    starting_separator,
)
from speechbrain_mpq.simulation.dataio import dataio_prep
from speechbrain_mpq.training.experiment import read_hparams

HPARAMS = "hparams/hes_4bit.yaml"


def peak_gib():
    """Most memory that the process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--overrides", default="", help="YAML text")
    options = parser.parse_args()
    hparams = read_hparams(HPARAMS, options.overrides)
    torch.set_num_threads(hparams["threads"])
    separator = starting_separator(hparams).eval()
    hparams["microphones"] = separator.features.microphones
    hparams["lips_size"] = separator.lips_size
    brain = Separation({"separator": separator}, None, hparams, {})
    datasets, _ = dataio_prep(hparams)
    calibration = brain.calibration(datasets["train"], 16)
    scorer = hparams["scores"]
    scorer.probes = options.probes
    before, start = peak_gib(), time.process_time()
    table = scorer(
        separator.mask_net,
        calibration["inputs"],
        calibration["loss"],
        include=hparams["quantize_include"],
        exclude=hparams["quantize_exclude"],
    )
    seconds = time.process_time() - start
    print(
        f"{len(table.scores)} clusters, {options.probes} probes: "
        f"{seconds:.0f} s of CPU, {seconds / options.probes:.2f} s a probe; "
        "peak memory "
        f"{peak_gib():.2f} GiB, {before:.2f} before it"
    )


if __name__ == "__main__":
    main()
