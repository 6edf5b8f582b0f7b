"""The folder of one experiment, and the experiments that another one needs.

A folder belongs to one set of settings. Starting the same again continues or
does nothing. Where a finished run with others is in it, the new one gets a
folder of its own beside it, so that no result can come from a mixture of two;
an unfinished one makes room.

Baselines and prototypes are run before the experiment, where they are missing,
with what they depend on of its overrides: sizes, data and weights are then the
same in all.
"""

import hashlib
import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from speechbrain.utils.logger import get_logger

from ..locks import IN_USE, folder_in_use, hold_folder
from ..utils import read_json, scratch_folder, write_json
from .hparams_source import (
    PLACES,
    REPORTED,
    HparamsSource,
    differing,
    entries,
    hparams_text,
    overrides_text,
    read_hparams,
    settings_of,
    unread,
)

__all__ = ["Experiment", "Step", "plan_steps", "read_hparams"]
logger = get_logger(__name__)
_LONGEST = 48  # letters of what a folder's name says of its settings
# ADMM has an estimator and an optimizer of its own, with another unit of lr.
ADMM_KEYS = {"estimator", "opt_class", "lr", "round_calibrated"}
# How weights are found after the bits are: what "estimation" means in tables.
ESTIMATION = ("estimator", "round_calibrated")


def digest(paths, begin=""):
    """One hash of the contents of some files."""
    hashed = hashlib.sha256(begin.encode())
    for path in map(Path, paths):
        if path.exists():
            hashed.update(path.read_bytes())
    return hashed.hexdigest()


def text_digest(text, paths):
    """The hash that runs left before they left their settings."""
    lines = [
        line
        for line in text.splitlines()
        if line.split(":")[0] not in PLACES and line[:1] != "#"
    ]
    return digest(paths, begin="\n".join(lines))


class Experiment:
    """Output folder of one experiment.

    Arguments
    ---------
    source : HparamsSource
        What it is asked; its `output_folder`, or one beside that, is used.
    inputs : sequence of str or Path
        Files that the result depends on too, such as the weights to start
        from; what is missing is left out.
    """

    def __init__(self, source, inputs=()):
        self.source = source
        self.request = {"settings": source.settings, "inputs": digest(inputs)}
        self.variant = ""  # what tells it from the run in the usual folder
        self.note = ""  # where it is, where that is not the usual folder
        self.makes_room = False  # an unfinished other run
        self.report_differs = []
        self.folder = source.output_folder
        self._inputs = inputs
        self._lock = None
        keys = self._differing()
        if not keys:
            return
        if not self.finished and not folder_in_use(self.folder):
            self.makes_room = True
            return
        if "output_folder" in source.overridden:
            raise ValueError(
                f"{self.folder} holds a run with other "
                f"{', '.join(self._roots(keys))}: "
                "leave out --output_folder, or name another"
            )
        self._move(keys)

    @property
    def finished(self):
        """Whether its metrics are there."""
        return (self.folder / "metrics.json").exists()

    @property
    def state(self):
        """What there is to say of it before it runs; or nothing."""
        notes = [self.note] if self.note else []
        if self.finished:
            notes.append(f"{self.folder} is finished already")
        elif (self.folder / "settings.json").exists() and not self.makes_room:
            notes.append(f"goes on with what is in {self.folder}")
        if self.finished and self.report_differs:
            notes.append(
                f"its report was made with another "
                f"{' and '.join(self.report_differs)}: delete its "
                "metrics.json to have it scored and written again"
            )
        return "; ".join(notes)

    def start(self):
        """Make the folder and note whose it is."""
        self._hold()
        if self.makes_room:
            _put_aside(self.folder)
            self._hold()
        write_json(self.folder / "settings.json", self.request)

    def _hold(self):
        """Keep other processes out of the folder, which is made if needed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # An earlier run of this process may not have been collected yet.
        self._lock = hold_folder(self.folder, again=True)

    def read(self):
        """Load the hyper-parameters and their objects for this folder."""
        hparams = self.source.read(**self._places())
        hparams["variant"] = self.variant
        return hparams

    def write_hyperparams(self):
        """Leave the resolved hyper-parameters in the folder."""
        text = self.source.written(**self._places())
        head = f"# Resolved from:\n# {self.source.path}\n# yamllint disable\n"
        path = self.folder / "hyperparams.yaml"
        path.write_text(head + text, encoding="utf-8")

    def _places(self):
        """The folder, where it is not the one that the file names."""
        usual = self.folder == self.source.output_folder
        return {} if usual else {"output_folder": str(self.folder)}

    def _move(self, keys):
        """Take a folder whose name says what is different."""
        words = {key: self._word(key) for key in self._roots(keys)}
        name = "-".join(words.values())
        exact = digest([], json.dumps(self.request, sort_keys=True))[:8]
        first = self.folder
        for suffix in (name[:_LONGEST].rstrip("-_."), exact):
            parent = f"{first.parent.name}-{suffix}"
            self.folder = first.parent.with_name(parent) / first.name
            self.makes_room = bool(self._differing())
            taken = self.finished or folder_in_use(self.folder)
            if not (self.makes_room and taken):
                break
        shown = [word for key, word in words.items() if key != "estimator"]
        self.variant = ", ".join(shown).replace("_", " ")
        self.note = (
            f"{first} holds a run with other {', '.join(words)}: this one is "
            f"in {self.folder}"
        )

    def _roots(self, keys):
        """Of differing keys those that others do not merely follow."""
        values = entries(self.source.text)
        free = [
            key
            for key in keys
            if key in values and "!ref" not in yaml.serialize(values[key])
        ]
        return free or keys

    def _word(self, key):
        """A key with its value, as a part of a folder's name."""
        value = self.request["settings"].get(key)
        if key not in self.request["settings"]:
            return f"weights_{self.request['inputs'][:6]}"
        if isinstance(value, dict) and len(value) == 1 and key == "estimator":
            return next(iter(value)).rpartition(".")[2]
        if isinstance(value, dict | list):
            return f"{key}_{digest([], json.dumps(value))[:6]}"
        word = Path(value).stem if isinstance(value, str) else value
        return re.sub(r"[^\w.+-]+", "_", f"{key}_{word}")

    def _differing(self):
        """In what a run in the folder differs; nothing where there is none."""
        stored = self._stored()
        if stored is None:
            return []
        keys = differing(stored["settings"], self.request["settings"])
        self.report_differs = [key for key in keys if key in REPORTED]
        keys = [key for key in keys if key not in REPORTED]
        if stored["inputs"] != self.request["inputs"]:
            keys.append("weights or architecture to start from")
        return keys

    def _stored(self):
        """What the folder's run was asked; None without one."""
        path = self.folder / "settings.json"
        if not path.exists():
            if self.finished:
                raise self._refusal("settings, or none: no settings.json")
            return None
        stored = read_json(path, broken="name another output_folder")
        if "settings" in stored:
            return stored
        # An older run left a hash: of these settings, or of those it saved?
        saved = self.folder / "hyperparams.yaml"
        texts = [self.source.resolved]
        if saved.exists():
            texts.append(saved.read_text(encoding="utf-8"))
        for candidate in texts:
            if text_digest(candidate, self._inputs) == stored["sha256"]:
                settings = settings_of(candidate)
                return {"settings": settings, "inputs": digest(self._inputs)}
        raise self._refusal("settings or weights (see its hyperparams.yaml)")

    def _refusal(self, difference):
        """An error for a folder of which nobody knows what is in it."""
        return ValueError(
            f"{self.folder} holds a run with other {difference}. Delete it, "
            "or choose another place with --results_folder"
        )


def _put_aside(folder):
    """Removes an unfinished run, or keeps what took time under a new name."""
    if not any(folder.glob("scores.json")) and not any(folder.glob("save/C*")):
        shutil.rmtree(folder)
        return
    names = (
        f"{folder.name}_unfinished_{count}" for count in itertools.count(1)
    )
    aside = next(
        path for path in map(folder.with_name, names) if not path.exists()
    )
    folder.rename(aside)
    (aside / IN_USE).unlink(missing_ok=True)  # our own
    logger.warning(
        f"{folder} held an unfinished run with other settings: it is {aside} "
        "now, and may be deleted"
    )


@dataclass(eq=False)
class Step:
    """One experiment of those that a command line asks for.

    Example
    -------
    >>> Step(None, {"system": "kl", "bits": 4}).hparams["bits"]
    4
    """

    source: HparamsSource  # what it is asked
    # loaded, to look at: its folder is another
    hparams: dict
    # list of Step: what it is compared with
    baselines: list = field(default_factory=list)
    # bits -> the uniform system of these bits that it inherits from
    prototypes: dict = field(default_factory=dict)
    experiment: Experiment | None = None

    def begin(self, input_files):
        """Find the folder, after those that it needs have run."""
        inputs = input_files(self.hparams, self.packed_prototypes)
        self.experiment = Experiment(self.source, inputs)
        return self.experiment

    @property
    def folder(self):
        """Where its results are; known when it has begun."""
        return self.experiment.folder

    @property
    def packed_prototypes(self):
        """Bits -> packed folder."""
        return {
            bits: step.folder / "packed"
            for bits, step in self.prototypes.items()
        }


def plan_steps(source):
    """List the experiments of a command line in the order of their needs.

    Nothing is run, and no folder is made.
    """
    steps = {}

    def add(source):
        key = json.dumps(
            [source.settings, str(source.output_folder)], sort_keys=True
        )
        if key not in steps:
            step = Step(source, _look(source))
            for needed in _baselines_of(source, step.hparams):
                baseline = add(HparamsSource(*needed))
                if baseline not in step.baselines:
                    step.baselines.append(baseline)
            step.prototypes = {
                bits: add(HparamsSource(*needed))
                for bits, needed in prototypes_of(source, step.hparams).items()
            }
            steps[key] = step
        return steps[key]

    add(source)
    return list(steps.values())


def _look(source):
    """Loaded hyper-parameters, without a trace in the folder of results."""
    with scratch_folder() as folder:
        hparams = source.read(output_folder=folder)
    return {**hparams, "output_folder": str(source.output_folder)}


def _baselines_of(source, hparams):
    """File and overrides of each experiment that one is compared with."""
    needed = []
    for file in hparams["against"]:
        own_bits = yaml.safe_load(entries(hparams_text(file))["bits"].value)
        for bits in _baseline_bits(own_bits, hparams["bits"]):
            needed += [
                (file, overrides_for(file, overrides, bits))
                for overrides in _estimations(source, own_bits)
            ]
    return needed


def prototypes_of(source, hparams):
    """Bits -> file and overrides of a uniform system to inherit from."""
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
        bits: (file, overrides_for(file, source.command, bits))
        for bits in hparams["scores"].candidate_bits
    }


def _estimations(source, own_bits):
    """Overrides for a baseline: as they are, and with its own estimation."""
    estimations = [source.command]
    values = entries(source.resolved)
    special = any(
        key in values and _is_set(values[key]) for key in ("admm", "one_stage")
    )
    if own_bits != 32 and not special and set(ESTIMATION) <= set(values):
        own = {key: values[key] for key in ESTIMATION}
        estimations.append(overrides_text({**entries(source.command), **own}))
    return estimations


def _is_set(node):
    """Whether a YAML node is not null."""
    return node.tag != "tag:yaml.org,2002:null"


def overrides_for(path, overrides, bits):
    """What of an experiment's overrides its baseline depends on."""
    text = hparams_text(path)
    values = entries(text)
    own = {
        *("system", "scores", "output_folder", "against", "prototypes", "bits"),
        *("one_stage", "admm"),
    }
    if "admm" in values and _is_set(values["admm"]):
        own |= ADMM_KEYS
    if bits == 32:
        own.add("number_of_epochs")  # shipped as it is, unless asked itself
    shared = {
        key: node
        for key, node in entries(overrides).items()
        if key in values and key not in own
    }
    shared["bits"] = yaml.compose(str(bits))
    settings = HparamsSource(path, overrides_text(shared)).settings
    ignored = unread(settings) - {"bits"}
    # What its file already says need not be said, in whatever words.
    plain = settings_of(_resolved(path))
    return overrides_text(
        {
            key: node
            for key, node in shared.items()
            if key not in ignored
            and (key in PLACES or key == "bits" or plain[key] != settings[key])
        }
    )


def _resolved(path):
    """A file's own text, resolved."""
    return HparamsSource(path).resolved


def _baseline_bits(own, bits):
    """Bits at which a baseline is run beside an experiment."""
    if own == 32:
        return [32]
    return sorted({math.floor(bits), math.ceil(bits)})
