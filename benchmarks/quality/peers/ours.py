"""speechbrain_mpq without training: what our YAML files say, up to there.

`best` has tables of 2^n levels here, but for `best entropy`. `rounded` systems
are rounded layer by layer to the outputs that the
full-precision network has (`round_calibrated_`), as in
`train.py ... --estimator "!name:speechbrain_mpq.PostTraining"
--round_calibrated True`.
"""

from functools import cache

from stored import System, safetensors_bytes

from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.training.experiment import read_hparams
from speechbrain_mpq.training.rounding import round_calibrated_

POST_TRAINING = True
PACKAGES = ("speechbrain_mpq",)
LEAVES = "the biases of the first and last convolution"
BUDGETS = {
    "best entropy rounded": (2, 3, 4),
    "best rounded": (2, 3, 4, 6, 2.5, 5),
    "best": (2, 3, 4, 6),
    "mask_error": (3, 4, 6),
    "kl": (3, 4, 6),
    "uniform": (2, 3, 4, 6, 8),
}
SETTINGS = {
    f"{system} {bits}": {
        "name": system.split()[0],
        "bits": bits,
        "rounded": system.endswith("rounded"),
        "entropy": "entropy" in system,
    }
    for system, budgets in BUDGETS.items()
    for bits in budgets
}


def build(bench, name, bits, rounded, entropy=False):
    """Score, allocate, quantize, pack, and load what was packed."""
    hparams = hparams_of(bench, name, entropy)
    separator = bench.separator(hparams)
    chosen = bits
    if hparams["scores"] is not None:
        chosen = allocate_bits(
            table_of(bench, name, entropy),
            average_bits=bits,
            min_bits=hparams["min_bits"],
        )
    uniform = chosen is bits
    plan = quantize_(
        separator,
        chosen,
        hparams["quantize_include"],
        hparams["quantize_exclude"],
        granularity=hparams["granularity"],
        codebook=hparams["codebook"] if uniform else None,
        rows=hparams["rows"],
    )
    if rounded:
        inputs = bench.calibration["inputs"]
        round_calibrated_(separator, "mask_net", inputs, progress=False)
    path = save_packed(separator, bench.work / "ours")
    return System(
        load_packed_(bench.separator(hparams), path.parent),
        safetensors_bytes(path),
        path.stat().st_size,
        "our packed model.safetensors",
        {"average_bits": plan.average_bits},
    )


@cache
def hparams_of(bench, name, entropy):
    """The settings of one of our systems.

    Arguments
    ---------
    bench : Workbench
    name : str
        Of its file.
    entropy : bool
        Whether `best` has levels by entropy.

    Returns
    -------
    hparams : dict
    """
    overrides = f"results_folder: {bench.work / 'hparams'}"
    if name == "best" and not entropy:
        overrides += "\ncodebook: midrise"
    return read_hparams(f"hparams/{name}_4bit.yaml", overrides)


@cache
def table_of(bench, name, entropy):
    """Scores of every cluster, once for all budgets.

    Arguments
    ---------
    bench : Workbench
    name : str
        Of its file.
    entropy : bool
        Whether `best` has levels by entropy.

    Returns
    -------
    ScoreTable
    """
    hparams = hparams_of(bench, name, entropy)
    calibration = bench.calibration
    scorer = hparams["scores"]
    return scorer(
        bench.separator(hparams).mask_net,
        *(calibration[need] for need in scorer.needs),
        include=hparams["quantize_include"],
        exclude=hparams["quantize_exclude"],
        prefix="mask_net",
        progress=False,
    )
