"""Hyper-parameter files with what a command line changes in them.

A file may name another as its `base:` and hold only what is different; keys
of the first level are replaced one by one, before HyperPyYAML sees the text.
So are objects that the command line gives whole (`--scores "!new:..."`), which
HyperPyYAML would mix with those of the file.

Settings are the top-level keys with all references resolved and all overrides
applied. How they are written does not matter, nor do comments and where the
results lie.
"""

import pydoc
from functools import cache, cached_property, lru_cache
from io import StringIO
from pathlib import Path

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references

ROOT = Path(__file__).parents[2]  # the repository, where there is one
# Keys that say where or how fast, not what comes out.
PLACES = (
    *("output_folder", "results_folder", "data_folder", "workers"),
    "mix_on_device",  # the same but for rounding
)
# Keys of what is told about a result beside it: they change its report only.
REPORTED = ("against", "examples")
# Files and folders that may lie beside train.py, wherever it is called from.
FILES = (
    *("separator_file", "pretrained_separator", "asr_source", "prototypes"),
    "rescorer",
)
# What only a system with quantized weights reads,
_QUANTIZED = (
    *("scores", "quantize_include", "quantize_exclude", "min_bits"),
    *("granularity", "codebook", "rows", "calibration_mixtures", "prototypes"),
    *("estimator", "admm", "one_stage", "round_calibrated", "entropy_coded"),
)
# only one that is trained,
_TRAINED = (
    *("number_of_epochs", "patience", "batch_size", "lr", "warmup_steps"),
    *("total_steps", "compile_network", "train_loader", "valid_loader"),
    *("opt_class", "lr_schedule", "epoch_counter", "distillation"),
)
# and only one that looks at training mixtures.
_CALIBRATED = (
    *("calibration_mixtures", "chunk_seconds", "train_corpora", "augmentation"),
)
# Keys that there were not always, and what was done before.
_LATER = {
    **{"entropy_coded": False, "train_corpora": {}, "augmentation": None},
    **{"rescorer": None, "lm_weight": 0.5},
}
_YAML = "tag:yaml.org,2002:"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the faster one
_TYPED = {_YAML + kind for kind in ("null", "bool", "int", "float")}


def find_file(path):
    """A file or folder from here or, where there is none, beside train.py.

    Example
    -------
    >>> find_file("hparams/models/separator_mini.yaml").name
    'separator_mini.yaml'
    """
    path = Path(path)
    beside = ROOT / path
    return beside if beside.exists() and not path.exists() else path


def hparams_text(path):
    """Text of a hyper-parameter file, with that of its base."""
    path = find_file(path)
    text = path.read_text(encoding="utf-8")
    base = entries(text).get("base")
    if base is None:
        return text
    blocks = _blocks(text)
    del blocks["base"]
    return with_blocks(hparams_text(path.parent / base.value), blocks)


def with_blocks(text, blocks):
    """YAML text with some top-level keys, and all below them, replaced."""
    own = _blocks(text)
    head = text[: len(text) - sum(map(len, own.values()))]
    joined = {**own, **blocks}.items()
    return head + "".join(
        # Banners and blank lines belong to the base, which lays out the file.
        block.rstrip() + _tail(own.get(key, "\n"))
        for key, block in joined
    )


@lru_cache(maxsize=64)
def _composed(text):
    """The node of YAML text; nobody changes it."""
    return yaml.compose(text, _LOADER)


def entries(text):
    """Top-level keys of YAML text and their nodes, whatever the tags."""
    return {key.value: node for key, node in _composed(text or "{}").value}


def _blocks(text):
    """Top-level keys of YAML text and their lines, to the next key."""
    root = _composed(text)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ValueError("hyper-parameters must be `key: value` lines")
    starts = [key.start_mark.index for key, _ in root.value]
    ends = [*starts[1:], len(text)]
    return {
        key.value: text[start:end]
        for (key, _), start, end in zip(root.value, starts, ends)
    }


def _tail(block):
    """What follows a block: blank lines, and comments at a line's start."""
    lines = block.splitlines(keepends=True)
    count = len(lines)
    while count > 1 and (not lines[count - 1].strip() or _banner(lines, count)):
        count -= 1
    return "\n" + "".join(lines[count:])


def _banner(lines, count):
    """Whether a line is a comment that belongs to no value."""
    return lines[count - 1].startswith("#")


class HparamsSource:
    """A hyper-parameter file and overrides: what an experiment is asked.

    Arguments
    ---------
    path : str or Path
        The file.
    overrides : str
        YAML text of the overrides.

    Example
    -------
    >>> file = Path(getfixture("tmpdir")) / "x.yaml"
    >>> _ = file.write_text("bits: 4\\nscores: !new:A\\n    form: x\\n")
    >>> source = HparamsSource(file, "bits: 3\\nscores: !new:B {seed: 1}")
    >>> source.settings
    {'bits': 3, 'scores': {'!new:B': {'seed': 1}}}
    """

    def __init__(self, path, overrides=""):
        self.path = find_file(path)
        self.text = hparams_text(path)
        nodes = entries(overrides)
        # Whole objects: nodes are put in place, not mixed with the file's.
        whole = {
            key: _dumped({key: node})
            for key, node in nodes.items()
            if node.tag.startswith("!new:")
        }
        if whole:
            self.text = with_blocks(self.text, whole)
        kept = {k: node for k, node in nodes.items() if k not in whole}
        self.command = overrides  # all that the command line says
        self.overridden = set(nodes)
        self.overrides = _dumped(kept) if kept else ""

    def stream(self):
        """The text as HyperPyYAML reads a file."""
        return _stream(self.text, str(self.path))

    @cached_property
    def resolved(self):
        """The text with its references and overrides resolved."""
        return _resolved(self.text, str(self.path), self.overrides)

    @cached_property
    def settings(self):
        """What is asked for, JSON-ready (see `settings_of`)."""
        return settings_of(self.resolved)

    @property
    def output_folder(self):
        """Where the results are to lie."""
        return Path(entries(self.resolved)["output_folder"].value)

    def read(self, **places):
        """Load the hyper-parameters, with all their objects."""
        return load_hyperpyyaml(self.stream(), self._found(places))

    def written(self, **places):
        """The resolved text as it is left beside results."""
        overrides = self._found(places)
        return resolve_references(self.stream(), overrides).getvalue()

    def _found(self, places):
        """Overrides with values in place, and files where they are."""
        nodes = entries(self.overrides)
        values = entries(self.resolved)
        for key in FILES:
            value = values[key].value if key in values else None
            if value and str(find_file(value)) != value:
                places.setdefault(key, str(find_file(value)))
        for key, value in places.items():
            nodes[key] = scalar(str(value))
        return _dumped(nodes) if nodes else ""


def _stream(text, path):
    """Text as an open file, so that an !include is looked for beside it."""
    stream = StringIO(text)
    stream.name = path
    return stream


@lru_cache(maxsize=256)
def _resolved(text, path, overrides):
    """Text with its references and overrides resolved."""
    return resolve_references(_stream(text, path), overrides).getvalue()


def read_hparams(path, overrides=""):
    """Load a hyper-parameter file."""
    return HparamsSource(path, overrides).read()


def scalar(text):
    """A YAML node of a string."""
    return yaml.ScalarNode(_YAML + "str", text)


def _dumped(nodes):
    """YAML text of keys and their nodes: tags such as !name: come through."""
    pairs = [(scalar(key), node) for key, node in nodes.items()]
    root = yaml.MappingNode(_YAML + "map", pairs, flow_style=False)
    return yaml.serialize(root)


def overrides_text(nodes):
    """YAML text of keys and their nodes, in one form however given."""
    return _dumped(dict(sorted(nodes.items()))) if nodes else ""


def settings_of(text):
    """What a resolved file asks for, JSON-ready."""
    settings = {
        key.value: _plain(value) for key, value in _composed(text).value
    }
    folder = str(settings.get("output_folder") or "")
    settings = {k: v for k, v in settings.items() if k not in PLACES}
    return _without(folder, settings) if folder else settings


def unread(settings):
    """Keys that a run with these settings never reads.

    This is the one place that says what depends on what: two runs that differ
    in these only are one, and a baseline does not inherit them.
    """
    own = settings.get("admm"), settings.get("one_stage")
    keys = set()
    trained = settings.get("number_of_epochs") != 0
    if settings.get("bits") == 32:
        keys.update(_QUANTIZED)
        looks = trained
    else:
        trained = trained and (any(own) or _trains(settings.get("estimator")))
        scored = bool(settings.get("scores"))
        looks = trained or scored or settings.get("round_calibrated")
        if not (scored or any(own)):
            keys.add("min_bits")
        if not (scored or settings.get("round_calibrated")):
            keys.add("calibration_mixtures")
    if not trained:
        keys.update(_TRAINED)
    return keys if looks else keys | set(_CALIBRATED)


def differing(settings, others):
    """Keys whose values differ, or that one of both lacks; and are read."""
    settings, others = ({**_LATER, **each} for each in (settings, others))
    missing = object()
    ignored = unread(settings) & unread(others)
    return sorted(
        key
        for key in {*settings, *others} - ignored
        if settings.get(key, missing) != others.get(key, missing)
    )


def _trains(estimator):
    """Whether an estimator, as settings have it, is one of a training."""
    name = next(iter(estimator), "") if isinstance(estimator, dict) else ""
    loaded = pydoc.locate(name.removeprefix("!name:")) if name else None
    return getattr(loaded, "trains", True)


def _plain(node):
    """A YAML node as JSON has it, tags kept."""
    if isinstance(node, yaml.MappingNode):
        content = {key.value: _plain(value) for key, value in node.value}
    elif isinstance(node, yaml.SequenceNode):
        content = [_plain(value) for value in node.value]
    elif node.tag in _TYPED:
        return _typed(node.value)
    else:
        content = node.value
    return content if node.tag.startswith(_YAML) else {node.tag: content}


@cache
def _typed(text):
    """A number, a truth value or null."""
    return yaml.safe_load(text)


def _without(folder, value):
    """A value without the folder's name in it."""
    if isinstance(value, dict):
        return {key: _without(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(folder, item) for item in value]
    if isinstance(value, str) and f"{value}/".startswith(f"{folder}/"):
        return "<output_folder>" + value[len(folder) :]
    return value
