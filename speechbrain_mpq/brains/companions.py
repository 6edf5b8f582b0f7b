"""Experiments that another one needs: its baselines and its prototypes.

They are run before it, where they are missing, with what they share of its
overrides: sizes, data and weights are then the same in all.
"""

import math

import yaml

from .experiment import read_hparams
from .settings import resolved_text

# ADMM has an estimator and an optimizer of its own, with another unit of lr.
ADMM_KEYS = {"estimator", "opt_class", "lr", "round_calibrated"}


def run_baselines(run, hparams, overrides):
    """Run the experiments that one is compared with.

    Arguments
    ---------
    run : callable
        `run(file, overrides)` runs an experiment where it is missing and
        returns its folder.
    hparams : dict
        Of the experiment; `against` and `bits` are used.
    overrides : str
        YAML text of the experiment's overrides.

    Returns
    -------
    folders : list of Path
    """
    folders = []
    for file in hparams["against"]:
        own_bits = read_hparams(file)["bits"]
        for bits in baseline_bits(own_bits, hparams["bits"]):
            folders.append(run(file, overrides_for(file, overrides, bits)))
    return folders


def run_prototypes(run, hparams, overrides):
    """Run the uniform systems that one inherits its weights from.

    Arguments
    ---------
    run : callable
        As for `run_baselines`.
    hparams : dict
        Of the experiment; `prototypes` and `scores` are used.
    overrides : str
        YAML text of the experiment's overrides.

    Returns
    -------
    folders : dict of int -> Path
        Bits -> packed folder.
    """
    file = hparams["prototypes"]
    if file is None:
        return {}
    if hparams["scores"] is None:
        raise ValueError(
            "prototypes are what clusters of different bits inherit from, and "
            "no scores decide on such bits here: set prototypes to null, or "
            "name a file with scores such as hparams/kl_4bit.yaml"
        )
    return {
        bits: run(file, overrides_for(file, overrides, bits)) / "packed"
        for bits in hparams["scores"].candidate_bits
    }


def overrides_for(path, overrides, bits):
    """What of an experiment's overrides its baseline shares.

    Arguments
    ---------
    path : str
        The baseline's hyper-parameter file.
    overrides : str
        YAML text of the experiment's overrides.
    bits : int
        Bits of the baseline.

    Returns
    -------
    overrides : str
        Those that the baseline's file knows too, with these bits.

    Example
    -------
    >>> overrides_for("hparams/fp32.yaml", "seed: 7\\nscores: null", 32)
    'seed: 7\\nbits: 32\\n'
    """
    known = _entries(resolved_text(path))
    own = {
        *("system", "scores", "output_folder", "against", "prototypes", "bits"),
        *("one_stage", "admm"),
    }
    if "admm" in known and known["admm"].tag != "tag:yaml.org,2002:null":
        own |= ADMM_KEYS
    if bits == 32:
        own.add("number_of_epochs")  # shipped as it is, unless asked itself
    # Nodes, not values: tags such as !name: must come through.
    shared = {
        key: node
        for key, node in _entries(overrides).items()
        if key in known and key not in own
    }
    pairs = [(_scalar(key), node) for key, node in sorted(shared.items())]
    pairs.append((_scalar("bits"), yaml.compose(str(bits))))
    mapping = yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
    return yaml.serialize(mapping)


def _entries(text):
    """Top-level keys of YAML text and their nodes, whatever the tags."""
    root = yaml.compose(text or "{}")
    return {key.value: node for key, node in root.value}


def _scalar(text):
    """A YAML node of a string."""
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def baseline_bits(own, asked):
    """Bits at which a baseline is run beside an experiment.

    Arguments
    ---------
    own : int
        Bits in the baseline's file.
    asked : float
        Average bits of the experiment.

    Returns
    -------
    bits : list of int
        32 for full precision; else the whole numbers around `asked`.

    Example
    -------
    >>> baseline_bits(32, 4), baseline_bits(4, 3), baseline_bits(4, 2.5)
    ([32], [3], [2, 3])
    """
    if own == 32:
        return [32]
    return sorted({math.floor(asked), math.ceil(asked)})
