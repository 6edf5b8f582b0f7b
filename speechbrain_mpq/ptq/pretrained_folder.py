"""Folders that SpeechBrain's own ``from_hparams`` loads, packed.

And what is said of them: a table of what quantization did, and a model card.

A source folder names what is loaded, and from where, in the `pretrainer` of
its hyperparams.yaml. In the packed folder each quantized loadable is a packed
model under the name that the Pretrainer looks for, <name>.ckpt, and a custom
hook reads it; all else stays as it was.
"""

import io
import json
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml as pyyaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from speechbrain.utils.checkpoints import (
    get_default_hook,
    torch_parameter_transfer,
)
from speechbrain.utils.parameter_transfer import DEFAULT_TRANSFER_HOOKS

from ..inference.card import size_word, table, write_card
from ..quantization.packing import CONFIG_FILE, save_packed
from ..quantization.tensors import named_tensors
from ..utils import read_json, write_text
from .pretrained_interfaces import HPARAMS_FILE

CARD_FILE = "README.md"


@dataclass
class PTQReport:
    """What became of an interface."""

    folder: Path  # packed
    source: str  # folder or hub name that it was made from
    cls: type  # loads both
    asked: str  # the budget
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
    left = Counter()
    for row in outcome.left_alone:
        left[row["reason"]] += row["parameters"]
    for reason, count in left.items():
        notes.append(f"{count} parameters stay in float: {reason}.")
    for name, reason in outcome.reasons.items():
        notes.append(f"Not quantized: {name} ({reason}).")
    return notes


KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def read_front_matter(folder):
    """Read what the hub is told by a folder's model card.

    Arguments
    ---------
    folder : str or Path
        Any folder.

    Returns
    -------
    dict
        Empty where there is no card, or none with a front matter.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> text = "---\\nlicense: mit\\ntags: [asr]\\n---\\n# A model"
    >>> _ = (folder / "README.md").write_text(text, "utf-8")
    >>> read_front_matter(folder)
    {'license': 'mit', 'tags': ['asr']}
    """
    path = Path(folder, CARD_FILE)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    start, *rest = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if start.strip() or len(rest) != 2:
        return {}
    try:
        found = pyyaml.safe_load(rest[0])
    except pyyaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _model_name(source):
    """A hub name as it is; of a folder its own name."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def model_card(outcome):
    """README.md of the packed folder."""
    head, *rows = _outcome_rows(outcome)
    before, after = outcome.bytes["source"], outcome.bytes["packed"]
    notes = "".join(f"* {note}\n" for note in _outcome_notes(outcome))
    name, card = outcome.cls.__name__, outcome.card
    return write_card(
        outcome.folder.name,
        f"""\
Post-training mixed-precision quantization of `{outcome.source}` to a budget
of {outcome.asked}, made by speechbrain_mpq. Its licence is that of the source.\
""",
        [
            ("average bits of a weight", f"{outcome.plan.average_bits:.3f}"),
            ("files with weights", size_word(after)),
            ("those of the source", size_word(before)),
            ("times smaller", f"{before / after:.1f}"),
        ],
        [
            f"## Results\n\n{table(head, rows)}",
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
        tags=card.get("tags") or [],
        **{key: card[key] for key in KEPT if key in card},
    )


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
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
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
        wanted = path.suffix == ".py" or path.name in named
        if wanted and path.is_file() and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
