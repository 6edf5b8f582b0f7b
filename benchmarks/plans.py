"""Post-training comparison of bit plans at equal bytes, without training.

> python benchmarks/plans.py --bits 3 4 --out plans.json --plot plans.png

Each score decides on a plan for each budget, the full-precision separator is
rounded to it, and the SI-SNR of its estimates is averaged over test or
validation mixtures. 20 random plans say what a score has to beat. Scores are
named by class, with their settings behind a colon:

> python benchmarks/plans.py --scores KLScores:form=one_sided HessianScores

What is in the output file already is not measured again. Options that are not
known here override the hyper-parameters, as those of train.py.
"""

import argparse
import copy
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import fmean

import speechbrain as sb
import torch
import yaml
from plans_table import RANDOM, UNIFORM, plot, table

import speechbrain_mpq
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.experiments.talker_separation import (
    Separation,
    starting_separator,
)
from speechbrain_mpq.lobes.models.separator import apply_mask
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.simulation.dataio import dataio_prep, prepare_data
from speechbrain_mpq.training.experiment import read_hparams
from speechbrain_mpq.utils import read_json, write_json

SCORES = (
    "SizeScores:largest_first=true",
    "SizeScores:largest_first=false",
    "WeightErrorScores",
    "KLScores",
    "MaskErrorScores",
    "HessianScores",
    "LossScores",
)


def make_scores(text, candidate_bits):
    """A score from its name and settings.

    Arguments
    ---------
    text : str
        `Name` or `Name:key=value,key=value`; the name is one of
        `speechbrain_mpq`, or dotted: `module.Class`.
    candidate_bits : sequence of int
        Bits to choose from.

    Returns
    -------
    scores : callable
    """
    name, _, settings = text.partition(":")
    module, _, attribute = name.rpartition(".")
    try:
        home = import_module(module) if module else speechbrain_mpq
        made = getattr(home, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"there are no scores {name!r}: name a class of speechbrain_mpq, "
            "or one with its module"
        ) from error
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    values = {key: yaml.safe_load(value) for key, _, value in pairs}
    return made(candidate_bits, **values)


class Bench:
    """A full-precision separator, what scores need, and mixtures to test on.

    Arguments
    ---------
    hparams : dict
        Loaded hyper-parameters of a quantization experiment.
    run_opts : dict
        SpeechBrain's run options.
    split : str
        "test" or "valid".
    """

    def __init__(self, hparams, run_opts, split):
        torch.set_num_threads(hparams["threads"])
        separator = starting_separator(hparams).eval()
        hparams["microphones"] = separator.features.microphones
        prepare_data(hparams)
        datasets, _ = dataio_prep(hparams)
        modules = {"separator": separator}
        brain = Separation(modules, None, hparams, run_opts)
        self.separator = brain.modules.separator
        self.patterns = hparams["quantize_include"], hparams["quantize_exclude"]
        self.granularity = hparams["granularity"]
        count = hparams["calibration_mixtures"]
        self.calibration = brain.calibration(datasets["train"], count)
        self.items = [
            self._analysed(item, brain.device) for item in datasets[split]
        ]

    def _analysed(self, item, device):
        """Inputs of the mask network, spectrum and target of a mixture."""
        with torch.no_grad():
            mixture, doa = item["mixture"][None], item["doa"][None]
            inputs, reference = self.separator.analyse(
                mixture.to(device), doa.to(device)
            )
        return inputs, reference, item["targets"][:, 0].to(device)

    def score(self, scores):
        """Score table of the mask network."""
        missing = sorted(set(scores.needs) - set(self.calibration))
        if missing:
            raise ValueError(
                f"{type(scores).__name__} needs {', '.join(missing)}, which "
                "only a run of train.py makes: leave it out here"
            )
        include, exclude = self.patterns
        return scores(
            self.separator.mask_net,
            *(self.calibration[name] for name in scores.needs),
            include=include,
            exclude=exclude,
            prefix="mask_net",
            progress=sys.stderr.isatty(),
        )

    def measure(self, plan_or_bits):
        """Bytes, average bits and mean SI-SNR in dB of a plan."""
        separator = copy.deepcopy(self.separator)
        plan = quantize_(
            separator,
            plan_or_bits,
            *self.patterns,
            granularity=self.granularity,
        )
        return {
            "bytes": plan.bytes,
            "average_bits": plan.average_bits,
            "si_snr": self.si_snr(separator),
        }

    @torch.no_grad()
    def si_snr(self, separator):
        """Mean SI-SNR in dB over the mixtures."""
        values = []
        for inputs, reference, target in self.items:
            spectrum = apply_mask(separator.mask_net(inputs), reference)
            estimate = separator.features.istft(spectrum, len(target))
            values.append(si_snr(estimate[0], target).item())
        return fmean(values)


def measure_all(bench, options, points, save):
    """Measure what is missing among the points.

    Arguments
    ---------
    bench : Bench
    options : argparse.Namespace
        With `scores`, `bits`, `draws` and `candidate_bits`.
    points : list of dict
        Measured already; new ones are appended.
    save : callable
        Called after every score.
    """
    known = {(point["scores"], point["bits"]) for point in points}
    random = [f"{RANDOM}:seed={seed}" for seed in range(options.draws)]
    for text in (UNIFORM, *random, *options.scores):
        budgets = [bits for bits in options.bits if (text, bits) not in known]
        if text == UNIFORM:  # has whole bits only
            plans = {bits: int(bits) for bits in budgets if bits % 1 == 0}
            seconds = 0.0
        elif budgets:
            scores = make_scores(text, options.candidate_bits)
            started = time.perf_counter()
            table = bench.score(scores)
            seconds = time.perf_counter() - started
            plans = {b: allocate_bits(table, average_bits=b) for b in budgets}
        else:
            continue
        for bits, plan in plans.items():
            measured = bench.measure(plan)
            head = {"scores": text, "bits": bits, "seconds": seconds}
            points.append(head | measured)
        save()


def read_options(arguments=None):
    """Options of this script, and overrides of the hyper-parameters."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--hparams", default="hparams/kl_4bit.yaml")
    parser.add_argument("--bits", nargs="+", type=float, default=[3, 4])
    parser.add_argument("--scores", nargs="*", default=list(SCORES))
    parser.add_argument("--draws", type=int, default=20, help="random plans")
    parser.add_argument(
        "--candidate_bits",
        nargs="+",
        type=yaml.safe_load,
        default=[2, 3, 4, 6, 8, 16],
    )
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--out", default="plans.json")
    parser.add_argument("--plot", help="also draw to this file")
    return parser.parse_known_args(arguments)


def main(arguments=None):
    """Measure what the command line asks for and print the table."""
    options, extra = read_options(arguments)
    out = Path(options.out)
    path, run_opts, overrides = sb.parse_arguments([options.hparams, *extra])
    settings = {
        "hparams": path,
        "overrides": overrides,
        "candidate_bits": options.candidate_bits,
        "split": options.split,
    }
    kept = read_json(out) if out.exists() else {"settings": settings}
    if kept.get("settings") != settings:
        raise ValueError(
            f"{out} holds plans of other settings: delete it, or choose "
            "another file with --out"
        )
    bench = Bench(read_hparams(path, overrides), run_opts, options.split)
    full = kept.setdefault("full_precision", bench.si_snr(bench.separator))
    points = kept.setdefault("points", [])
    measure_all(bench, options, points, lambda: write_json(out, kept))
    print(table(points, options.bits, full))
    if options.plot:
        plot(options.plot, points, full)


if __name__ == "__main__":
    main()
