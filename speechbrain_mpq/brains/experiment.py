"""The folder of one experiment: what it was asked, whether it is finished.

A folder belongs to one set of hyper-parameters. Starting the same again
continues or does nothing; starting another in it is refused, so that no
result can come from a mixture of two.
"""

import hashlib
import json
import math
from pathlib import Path

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references

from .files import write_whole

# Keys that say where or how fast, not what comes out.
NOT_SETTINGS = ("output_folder", "results_folder", "data_folder", "workers")


def read_hparams(path, overrides=""):
    """Load a hyper-parameter file.

    Arguments
    ---------
    path : str
        HyperPyYAML file.
    overrides : str
        YAML text of what to change.

    Returns
    -------
    hparams : dict
    """
    with open(path, encoding="utf-8") as source:
        return load_hyperpyyaml(source, overrides)


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
    with open(path, encoding="utf-8") as source:
        known = _entries(resolve_references(source).getvalue())
    own = {
        *("system", "scores", "output_folder", "against", "prototypes", "bits"),
        *("one_stage", "admm"),
    }
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


class Experiment:
    """Output folder of one experiment.

    Arguments
    ---------
    hparams : dict
        Loaded hyper-parameters; `output_folder` is used.
    hparams_file : str
        Where they come from.
    overrides : str
        YAML text of the overrides.
    inputs : sequence of str or Path
        Files that the result depends on too, such as the weights to start
        from; what is missing is left out.
    """

    def __init__(self, hparams, hparams_file, overrides="", inputs=()):
        self.folder = Path(hparams["output_folder"])
        self.settings = _fingerprint(hparams_file, overrides, inputs)
        self._check_folder()

    @property
    def finished(self):
        """Whether its metrics are there."""
        return (self.folder / "metrics.json").exists()

    def start(self):
        """Make the folder and note whose it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"sha256": self.settings}
        write_whole(self.folder / "settings.json", settings)

    def _check_folder(self):
        """Refuse a folder that belongs to other settings."""
        path = self.folder / "settings.json"
        if not path.exists():
            return
        if json.loads(path.read_text())["sha256"] != self.settings:
            raise ValueError(
                f"{self.folder} holds a run with other settings or weights "
                "(see its hyperparams.yaml): delete it, or choose another "
                "place with --results_folder"
            )


def _fingerprint(hparams_file, overrides, inputs):
    """Hash of everything that can change the result."""
    if overrides:  # in one form, however they are written
        overrides = yaml.serialize(yaml.compose(overrides))
    with open(hparams_file, encoding="utf-8") as source:
        text = resolve_references(source, overrides).getvalue()
    lines = [
        line
        for line in text.splitlines()
        if line.split(":")[0] not in NOT_SETTINGS and line[:1] != "#"
    ]
    digest = hashlib.sha256("\n".join(lines).encode())
    for path in map(Path, inputs):
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()
