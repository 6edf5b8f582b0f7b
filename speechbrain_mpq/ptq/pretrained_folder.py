"""Folders that SpeechBrain's own ``from_hparams`` loads: found, and packed.

`from_hparams` takes whatever is no folder for a name on the Hugging Face hub,
whose client repeats its attempts for minutes where it has no connection. One
question first, so that a mistyped folder is told at once.

A source folder names what is loaded, and from where, in the `pretrainer` of
its hyperparams.yaml. In the packed folder each quantized loadable is a packed
model under the name that the Pretrainer looks for, <name>.ckpt, and a custom
hook reads it; all else stays as it was. Beside it stands what is said of it: a
table of what quantization did, and a model card.
"""

import importlib
import inspect
import io
import json
import logging
import pkgutil
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import speechbrain.inference
import yaml as pyyaml
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.checkpoints import (
    get_default_hook,
    torch_parameter_transfer,
)
from speechbrain.utils.fetching import fetch
from speechbrain.utils.parameter_transfer import DEFAULT_TRANSFER_HOOKS

from ..inference.card import markdown_table, size_word, write_card
from ..quantization.packing import CONFIG_FILE, save_packed
from ..quantization.tensors import named_tensors, near_misses
from ..utils import read_json, read_text, scratch_folder, write_text
from .interface_outputs import task_of

logger = logging.getLogger(__name__)
HPARAMS_FILE = "hyperparams.yaml"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class SourceNotFoundError(FileNotFoundError):
    """There is no pretrained model where one was named."""


def check_source(source):
    """Refuses what is neither a model's folder nor one on the hub."""
    folder = Path(source)
    if folder.is_file():
        raise SourceNotFoundError(
            f"{source} is a file: name the folder that it is in"
        )
    if folder.is_dir():
        if not (folder / HPARAMS_FILE).is_file():
            raise SourceNotFoundError(
                f"{source} has no {HPARAMS_FILE}: name a folder that "
                f"from_hparams loads{_near_folders(folder)}"
            )
    elif HUB_NAME.fullmatch(str(source)):
        _ask_hub(str(source), _near_folders(folder))
    else:
        raise SourceNotFoundError(
            f"{source}: no such folder, and no name on the Hugging Face hub, "
            "which would be user/name: check the folder's name"
            f"{_near_folders(folder)}"
        )


def _near_folders(folder):
    """The end of a message: models beside a folder that is none."""
    models = folder.parent.glob(f"*/{HPARAMS_FILE}")
    return near_misses(str(folder), [str(path.parent) for path in models])


def _ask_hub(name, near):
    """Refuse a name that the hub does not know; it may be in the cache."""
    if isinstance(try_to_load_from_cache(name, HPARAMS_FILE), str):
        return
    try:
        # SpeechBrain uses no token either, and downloads public models only.
        get_hf_file_metadata(hf_hub_url(name, HPARAMS_FILE), token=False)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise SourceNotFoundError(
            f"{name}: no such folder here, and no public model of this name "
            f"with a {HPARAMS_FILE} on the Hugging Face hub: check the name"
            f"{near}"
        ) from error
    except Exception as error:  # of whichever HTTP library the client has
        raise SourceNotFoundError(
            f"{name}: no such folder here, and the Hugging Face hub, which "
            f"may have it, cannot be reached ({_first_line(error)}): check "
            f"the folder's name or the connection{near}"
        ) from error


def _first_line(error):
    """What went wrong, in few words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def find_class(name):
    """The interface class of a name."""
    module, _, own = name.rpartition(".")
    if module:
        try:
            interface = getattr(importlib.import_module(module), own)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no class {name!r}: {error}") from error
    else:
        classes = _interface_classes()
        if name not in classes:
            raise ValueError(
                f"no class {name!r} in speechbrain.inference"
                f"{near_misses(name, classes)}"
            )
        interface = classes[name]
    task_of(interface)  # is it one that is served?
    return interface


def load_interface(cls, source, device="cpu"):
    """An interface, and where its hyperparams.yaml is."""
    source = str(source)
    check_source(source)
    interface = cls.from_hparams(source=source, run_opts={"device": device})
    if not hasattr(interface.hparams, "pretrainer"):
        raise ValueError(f"{source}: its {HPARAMS_FILE} has no pretrainer")
    hooks = interface.hparams.pretrainer.custom_hooks.values()
    if any(getattr(h, "func", h).__name__ == "load_packed_" for h in hooks):
        raise ValueError(
            f"{source} is quantized already: quantize the model that it was "
            "made from"
        )
    return interface, Path(fetch(HPARAMS_FILE, source))


def _interface_classes():
    """Name -> class, of all modules in speechbrain.inference that import."""
    classes = {}
    for entry in pkgutil.iter_modules(speechbrain.inference.__path__):
        try:
            module = importlib.import_module(
                f"speechbrain.inference.{entry.name}"
            )
        except ImportError:  # its optional packages are not here
            continue
        for name, member in vars(module).items():
            if inspect.isclass(member) and issubclass(member, Pretrained):
                classes[name] = member
    del classes["Pretrained"]
    return classes


CARD_FILE = "README.md"


@dataclass
class PTQReport:
    """What became of an interface."""

    folder: Path  # packed
    source: str  # folder or hub name that it was made from
    cls: type  # loads both
    budget: str
    plan: object  # BitPlan of its clusters
    bytes: dict  # "source" and "packed": of the files that were packed
    divergence: float  # of the packed one's outputs on the calibration items
    unit: str  # of the divergence
    quality: dict  # "source" and "packed": Quality; empty without a reference
    left_alone: list  # rows of the coverage table for what stays in float
    reasons: dict  # loadable that is no packed model -> why
    card: dict = field(default_factory=dict)  # the source's front matter


def _outcome_rows(outcome):
    """The before/after table: name, source, packed."""
    before, after = outcome.bytes["source"], outcome.bytes["packed"]
    rows = [
        ("", "source", "packed"),
        ("files with weights, bytes", f"{before}", f"{after}"),
        (
            "average bits of a quantized weight",
            "32",
            f"{outcome.plan.average_bits:.2f}",
        ),
        (outcome.unit, "0", f"{outcome.divergence:.4g}"),
    ]
    if outcome.quality:
        source, packed = outcome.quality["source"], outcome.quality["packed"]
        name = f"{source.name} ({source.count} items)"
        rows.append((name, f"{source.value:.2f}", f"{packed.value:.2f}"))
    return rows


def outcome_table(outcome):
    """The table as text, with what else there is to say below it."""
    rows = _outcome_rows(outcome)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:{widths[0]}}  {source:>{widths[1]}}  {packed:>{widths[2]}}"
        for name, source, packed in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 4))
    return "\n".join([*lines, *_outcome_notes(outcome)])


def _outcome_notes(outcome):
    """What a user has to know beside the table."""
    notes = []
    if not outcome.quality:
        notes.append(
            "No quality was measured: the manifest has no reference for it, "
            "or this class no measure. Only the outputs were compared."
        )
    elif outcome.quality["source"].skipped:
        count = outcome.quality["source"].skipped
        notes.append(f"{count} items have no reference and are not measured.")
    if outcome.quality and (pair := outcome.quality["source"].unmet):
        notes.append(
            "What was measured means nothing: in full precision no answer has "
            "a word of its reference. They may be written otherwise: "
            f"{pair[0]!r} was answered by {pair[1]!r}."
        )
    left = Counter()
    for row in outcome.left_alone:
        left[row["reason"]] += row["parameters"]
    for reason, count in left.items():
        notes.append(f"{count} parameters stay in float: {reason}.")
    for name, reason in outcome.reasons.items():
        notes.append(f"Not quantized: {name} ({reason}).")
    return notes


KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_BAD_CARD = "%s: nothing of its front matter is taken over (%s)"


def read_front_matter(folder):
    """Read what the hub is told by a folder's model card.

    Arguments
    ---------
    folder : str or Path
        Any folder.

    Returns
    -------
    dict
        Texts, or lists of texts: `no` is Norwegian. Empty where there is no
        card, or none with a front matter; one that is damaged is warned about.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> text = "---\\nlicense: mit\\ntags: [asr]\\n---\\n# A model"
    >>> _ = (folder / "README.md").write_text(text, "utf-8")
    >>> read_front_matter(folder)
    {'license': 'mit', 'tags': ['asr']}
    """
    path = Path(folder, CARD_FILE)
    try:
        text = read_text(path) if path.is_file() else ""
        start, *rest = re.split(r"^---\s*$", text, maxsplit=2, flags=re.M)
        if start.strip() or len(rest) != 2:
            return {}
        matter = pyyaml.load(rest[0], pyyaml.BaseLoader)  # makes texts alone
        if not isinstance(matter, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError, pyyaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        logger.warning(_BAD_CARD, path, reason)
        return {}
    return {key: value for key, value in matter.items() if _is_text(value)}


def _is_text(value):
    """Whether it is a text or a list of texts, as all that the hub reads."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in values)


def _model_name(source):
    """A hub name as it is; of a folder its own name."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def model_card(outcome):
    """README.md of the packed folder."""
    head, *rows = _outcome_rows(outcome)
    before, after = outcome.bytes["source"], outcome.bytes["packed"]
    notes = "".join(f"* {note}\n" for note in _outcome_notes(outcome))
    name, card, budget = outcome.cls.__name__, outcome.card, outcome.budget
    return write_card(
        outcome.folder.name,
        f"""\
Post-training mixed-precision quantization of `{outcome.source}` to a budget
of {budget}, made by speechbrain_mpq. Its licence is that of the source.\
""",
        [
            ("average bits of a weight", f"{outcome.plan.average_bits:.3f}"),
            ("files with weights", size_word(after)),
            ("those of the source", size_word(before)),
            ("times smaller", f"{before / after:.1f}"),
        ],
        [
            f"## Results\n\n{markdown_table(head, rows)}",
            *([notes] if notes else []),
            f"""\
## Use

```python
from {outcome.cls.__module__} import {name}

model = {name}.from_hparams(source="{outcome.folder.name}")
```

needs `pip install speechbrain_mpq`: the .ckpt files with weights are packed
models (safetensors with bit-packed integers, no pickle), which a hook in
hyperparams.yaml reads. Once loaded, the model is an ordinary one in float32.
""",
        ],
        outcome.plan.to_dict(),
        "`quantization_config.json` lists the bits of every tensor.\n",
        base_model=_model_name(outcome.source),
        tags=_listed(card.get("tags")),
        **{key: card[key] for key in KEPT if card.get(key)},
    )


def _listed(value):
    """Tags as a list, of which one may be given without it."""
    return [value] if value and isinstance(value, str) else value or []


HOOK = "!name:speechbrain_mpq.load_packed_"


def packable(interface):
    """The modules of an interface's pretrainer that can be packed."""
    pretrainer = interface.hparams.pretrainer
    modules, reasons = {}, {}
    for name, loadable in pretrainer.loadables.items():
        if not any(True for _ in getattr(loadable, "parameters", tuple)()):
            continue
        if name in pretrainer.custom_hooks:
            reasons[name] = "is loaded by a hook of the source's own"
        elif name in pretrainer.conditions:
            reasons[name] = "is loaded under a condition only"
        elif _own_loader(loadable):
            reasons[name] = f"{type(loadable).__name__} loads itself"
        else:
            modules[name] = loadable
    return modules, reasons


def shared_parameters(root, modules):
    """Names of a root's parameters that some modules hold as well.

    Example
    -------
    >>> import torch
    >>> layers = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU())
    >>> shared_parameters(layers, [layers[1]])
    ['1.weight']
    """
    held = {id(p) for module in modules for p in module.parameters()}
    tensors = named_tensors(root).values()
    return [t.name for t in tensors if id(t.parameter) in held]


def _packed_hparams(text, names):
    """hyperparams.yaml with packed models in the place of some loadables."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 10**6
    yaml.indent(mapping=4, sequence=6, offset=4)
    content = yaml.load(text)
    pretrainer = content.get("pretrainer")
    if not isinstance(pretrainer, CommentedMap):
        raise ValueError(
            f"the source's {HPARAMS_FILE} has no key pretrainer with its "
            "loadables below it: write it out there"
        )
    pretrainer.pop("paths", None)
    hooks = pretrainer.setdefault("custom_hooks", CommentedMap())
    for name in names:
        hooks[name] = TaggedScalar("", None, HOOK)
    written = io.StringIO()
    yaml.dump(content, written)
    return written.getvalue()


def write_folder(interface, hparams_path, modules, folder, metadata=None):
    """Write the packed folder of a quantized interface."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = hparams_path.read_text(encoding="utf-8")
    hparams = _packed_hparams(text, modules)
    write_text(folder / HPARAMS_FILE, hparams)
    configs, total = {}, 0
    with scratch_folder(folder) as scratch:
        for name, module in modules.items():
            path = save_packed(module, scratch)
            total += path.stat().st_size
            path.replace(folder / f"{name}.ckpt")
            config = Path(scratch) / CONFIG_FILE
            configs[name] = read_json(config)
    config = {"loadables": configs, "metadata": metadata or {}}
    text = json.dumps(config, indent=1) + "\n"
    write_text(folder / CONFIG_FILE, text)
    _copy_the_rest(interface, hparams_path, modules, folder)
    return total


def source_bytes(interface, modules):
    """Bytes of the source's files in the place of packed ones."""
    paths = interface.hparams.pretrainer.paths
    return sum(Path(paths[name]).stat().st_size for name in modules)


def _own_loader(loadable):
    """Whether its class reads its files in a way of its own."""
    hook = get_default_hook(loadable, DEFAULT_TRANSFER_HOOKS)
    return hook is not torch_parameter_transfer


def _copy_the_rest(interface, hparams_path, modules, folder):
    """What else is loaded, and files that stand by the hyperparams.yaml."""
    pretrainer = interface.hparams.pretrainer
    for name in pretrainer.loadables:
        if name not in modules and pretrainer.is_loadable(name):
            shutil.copy(pretrainer.paths[name], folder / f"{name}.ckpt")
    named = set(re.findall(r"[\w.-]+", hparams_path.read_text("utf-8")))
    for path in sorted(hparams_path.parent.iterdir()):
        kept = path.suffix == ".py" or path.name in named
        if kept and path.is_file() and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
