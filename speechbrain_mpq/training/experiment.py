"""What an experiment was asked, and whether two were asked the same.

Settings are the top-level keys of a hyper-parameter file with all references
resolved and all overrides applied. How they are written does not matter, nor
do comments and where the results lie.

The folder of one experiment: what it was asked, whether it is finished.

A folder belongs to one set of hyper-parameters. Starting the same again
continues or does nothing; starting another in it is refused, so that no
result can come from a mixture of two.

Experiments that another one needs: its baselines and its prototypes.

They are run before it, where they are missing, with what they share of its
overrides: sizes, data and weights are then the same in all.
"""

import hashlib
import json
import math
from pathlib import Path

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.logger import get_logger

from ..utils import write_json

# Keys that say where or how fast, not what comes out.
PLACES = (
    *("output_folder", "results_folder", "data_folder", "workers"),
    "mix_on_device",  # the same but for rounding
)


# Keys of what is told about a result beside it: they change its report only.
REPORTED = ("against", "examples")
_YAML = "tag:yaml.org,2002:"
_TYPED = {_YAML + kind for kind in ("null", "bool", "int", "float")}


def resolved_text(path, overrides=""):
    """A hyper-parameter file with its references and overrides resolved."""
    if overrides:  # in one form, however they are written
        overrides = yaml.serialize(yaml.compose(overrides))
    with open(path, encoding="utf-8") as source:
        return resolve_references(source, overrides).getvalue()


def settings_of(text):
    """What a resolved file asks for, JSON-ready."""
    settings = {
        key.value: _plain(value) for key, value in yaml.compose(text).value
    }
    folder = str(settings.get("output_folder") or "")
    settings = {k: v for k, v in settings.items() if k not in PLACES}
    return _without(folder, settings) if folder else settings


def _differing(settings, others):
    """Keys whose values differ, or that one of both lacks."""
    missing = object()
    return sorted(
        key
        for key in {*settings, *others}
        if settings.get(key, missing) != others.get(key, missing)
    )


def digest(paths, begin=""):
    """One hash of the contents of some files."""
    found = hashlib.sha256(begin.encode())
    for path in map(Path, paths):
        if path.exists():
            found.update(path.read_bytes())
    return found.hexdigest()


def text_digest(text, paths):
    """The hash that runs left before they left their settings."""
    lines = [
        line
        for line in text.splitlines()
        if line.split(":")[0] not in PLACES and line[:1] != "#"
    ]
    return digest(paths, begin="\n".join(lines))


def _plain(node):
    """A YAML node as JSON has it, tags kept."""
    if isinstance(node, yaml.MappingNode):
        content = {key.value: _plain(value) for key, value in node.value}
    elif isinstance(node, yaml.SequenceNode):
        content = [_plain(value) for value in node.value]
    elif node.tag in _TYPED:
        return yaml.safe_load(node.value)
    else:
        content = node.value
    return content if node.tag.startswith(_YAML) else {node.tag: content}


def _without(folder, value):
    """A value without the folder's name in it."""
    if isinstance(value, dict):
        return {key: _without(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(folder, item) for item in value]
    if isinstance(value, str) and f"{value}/".startswith(f"{folder}/"):
        return "<output_folder>" + value[len(folder) :]
    return value


logger = get_logger(__name__)


def read_hparams(path, overrides=""):
    """Load a hyper-parameter file."""
    with open(path, encoding="utf-8") as source:
        return load_hyperpyyaml(source, overrides)


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
        text = resolved_text(hparams_file, overrides)
        self.asked = {"settings": settings_of(text), "inputs": digest(inputs)}
        stored = self._stored(text, inputs) or self.asked
        keys = _differing(stored["settings"], self.asked["settings"])
        self.report_differs = [key for key in keys if key in REPORTED]
        keys = [key for key in keys if key not in REPORTED]
        if stored["inputs"] != self.asked["inputs"]:
            keys.append("weights or architecture to start from")
        if keys:
            raise self._refusal(f"settings: {', '.join(keys)}")

    @property
    def finished(self):
        """Whether its metrics are there."""
        return (self.folder / "metrics.json").exists()

    @property
    def state(self):
        """One sentence on a finished experiment."""
        said = f"{self.folder} is finished already"
        if self.report_differs:
            said += (
                f"; its report was made with another "
                f"{' and '.join(self.report_differs)}: delete its "
                "metrics.json to have it scored and written again"
            )
        return said

    def log_finished(self):
        """Log so; a warning, which is seen, where its report is another."""
        log = logger.warning if self.report_differs else logger.info
        log(self.state)

    def start(self):
        """Make the folder and note whose it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", self.asked)

    def _stored(self, text, inputs):
        """What the folder's run was asked; None without one."""
        path = self.folder / "settings.json"
        if not path.exists():
            if self.finished:
                raise self._refusal("settings, or none: no settings.json")
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "settings" in stored:
            return stored
        # An older run left a hash: of these settings, or of those it saved?
        saved = self.folder / "hyperparams.yaml"
        texts = [text]
        if saved.exists():
            texts.append(saved.read_text(encoding="utf-8"))
        for candidate in texts:
            if text_digest(candidate, inputs) == stored["sha256"]:
                settings = settings_of(candidate)
                return {"settings": settings, "inputs": digest(inputs)}
        raise self._refusal("settings or weights (see its hyperparams.yaml)")

    def _refusal(self, difference):
        """An error for a folder that belongs to another experiment."""
        return ValueError(
            f"{self.folder} holds a run with other {difference}. Delete it, "
            "or choose another place with --results_folder"
        )


# ADMM has an estimator and an optimizer of its own, with another unit of lr.
ADMM_KEYS = {"estimator", "opt_class", "lr", "round_calibrated"}


def run_baselines(run, hparams, overrides):
    """Run the experiments that one is compared with."""
    folders = []
    for file in hparams["against"]:
        own_bits = read_hparams(file)["bits"]
        for bits in _baseline_bits(own_bits, hparams["bits"]):
            folders.append(run(file, overrides_for(file, overrides, bits)))
    return folders


def run_prototypes(run, hparams, overrides):
    """Run the uniform systems that one inherits its weights from."""
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
    """What of an experiment's overrides its baseline shares."""
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


def _baseline_bits(own, asked):
    """Bits at which a baseline is run beside an experiment."""
    if own == 32:
        return [32]
    return sorted({math.floor(asked), math.ceil(asked)})
