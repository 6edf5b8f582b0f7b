"""What reports are made of, for the tests of pages, plots and verdicts."""

import numpy as np

from speechbrain_mpq.evaluation.bit_plots import SUBLAYERS
from speechbrain_mpq.evaluation.metrics import summarise
from speechbrain_mpq.evaluation.report import write_report

NASTY = "<script>alert('x & y')</script>"


def make_metrics(system, bits, errors, **more):
    """Metrics with `errors` wrong words of 10 in every item."""
    items = [
        {
            "id": f"{index}",
            "angle": (5, 30, 60, 120)[index % 4],
            "si_snr": 7.25 + index % 4,
            "si_snr_mixture": 0.5,
            "pesq": 2.125,
            "reference": " ".join("abcdefghij"),
            "hypothesis": " ".join("x" * errors + "abcdefghij"[errors:]),
        }
        for index in range(8)
    ]
    return {"system": system, "bits": bits, **summarise(items), **more}


def make_example(**more):
    rng = np.random.default_rng(0)
    signals = {
        name: rng.standard_normal(1600) for name in ("mixture", "target", "kl")
    }
    return {
        "id": "item-7",
        "doa_target": 40.0,
        "doa_interferer": 110.0,
        "angle": 70.0,
        "sample_rate": 16000,
        "reference": "set nine now",
        "signals": signals,
        "hypotheses": {"mixture": "", "kl": "set five now"},
        "si_snr": {"mixture": 0.5, "kl": 8.75},
        **more,
    }


def make_clusters(blocks=2):
    names = [
        f"mask_net.tcn_0_{block}.{sublayer}"
        for block in range(blocks)
        for sublayer in SUBLAYERS
    ]
    names = ["mask_net.conv_in", *names, "mask_net.conv_out"]
    return {name: {"bits": 4, "parameters": 10} for name in names}


def make_plan(clusters):
    return {"average_bits": 4.5, "bytes": 3000, "clusters": clusters}


def make_scores(clusters):
    row = {"2": 3.0, "4": 0.5, "8": 0.0}
    return {
        "method": "kl",
        "clusters": {name: {"scores": row} for name in clusters},
    }


def written(path, *arguments, **keywords):
    write_report(path, *arguments, **keywords)
    return path.read_text(encoding="utf-8")
