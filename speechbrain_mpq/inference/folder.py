"""hyperparams.yaml, written from the architecture that the weights carry.

SpeechBrain's `from_hparams` builds a model from this file. Our own
`from_pretrained` never reads it: YAML of this kind can execute anything, so
load it from people you trust only.

What a packed model stores, tensor by tensor, without building it.

Packed folders of separators: everything that another person needs.

What is wrong with a packed folder, as a list.
"""

import json
import re
from collections import Counter
from pathlib import Path

from ..lobes.models.separator import build_separator
from ..lobes.models.tcn import fold_norms_
from ..quantization.container import (
    PackedModelError,
    read_container,
    strict_json,
    write_container,
)
from ..quantization.groups import slice_name, split_name
from ..quantization.header import upgraded_header
from ..quantization.packing import (
    CONFIG_FILE,
    MODEL_FILE,
    load_packed_,
    read_model,
    readable_config,
    save_packed,
)
from ..quantization.plan import packed_bytes
from ..utils import write_chunks, write_text
from .card import model_card
from .engines.activations import RANGES_FILE, read_ranges
from .engines.lowered import lower
from .hub import CARD_FILE, HYPERPARAMS_FILE, SAMPLE_FILE, refuse_foreign_links
from .loading import load_checked
from .registry import build, describe

_HEADER = """\
# ############################################################################
# Written by speechbrain_mpq from the architecture in model.safetensors, for
# SpeechBrain's from_hparams. Nothing else is built with other values.
# ############################################################################
"""


_FORMER_MODULES = (
    "separation.features",
    "separation.separator",
    "separation.tcn",
    "inference.pretrainer",
)

_LOADING = """\

# The packed weights have their BatchNorms folded.
__fold: !apply:speechbrain_mpq.fold_norms_
    - !ref <separator>
"""


_MODULES = """\

modules:
    separator: !ref <separator>

pretrainer: !new:speechbrain_mpq.PackedPretrainer
    loadables:
        separator: !ref <separator>
"""


def hyperparams(architecture):
    """The text of hyperparams.yaml.

    Arguments
    ---------
    architecture : dict
        Of a separator, from `registry.describe`.

    Returns
    -------
    str

    Example
    -------
    >>> features = {"class": "SpatialFeatures", "arguments": {"hop": 256}}
    >>> sizes = {"features": features, "channels": 8, "folded": False}
    >>> text = hyperparams({"class": "Separator", "arguments": sizes})
    >>> print(text[text.index("features") : text.index("modules")].rstrip())
    features: !new:speechbrain_mpq.SpatialFeatures
        hop: 256
    <BLANKLINE>
    separator: !new:speechbrain_mpq.Separator
        features: !ref <features>
        channels: 8
    """
    arguments = dict(architecture["arguments"])
    features = arguments.pop("features")["arguments"]
    folded = arguments.pop("folded")
    lines = [
        "features: !new:speechbrain_mpq.SpatialFeatures",
        *_entries(features),
        "",
        "separator: !new:speechbrain_mpq.Separator",
        "    features: !ref <features>",
        *_entries(arguments),
    ]
    text = _HEADER + "\n".join(lines) + "\n"
    return text + (_LOADING if folded else "") + _MODULES


def with_current_names(text):
    """The text of a hyperparams.yaml of an earlier version as of today."""
    for module in _FORMER_MODULES:
        text = text.replace(f"speechbrain_mpq.{module}.", "speechbrain_mpq.")
    return text


def _entries(arguments, indent="    "):
    """Lines of a mapping."""
    for key, value in arguments.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _entries(value, indent + "    ")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value):
    """A plain value in YAML; the registry's strings need no quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return "null" if value is None else str(value)


FLOAT_BITS = 32  # of the model that the compression is against


def coverage_rows(model):
    """The coverage table of a packed model."""
    rows = []
    for name, tensor in model.quantized.items():
        count, scales = tensor.numel(), tensor.alpha.numel()
        size = packed_bytes(count, tensor.bits, scales)
        row = _row(name, tensor, tensor.bits, size)
        rows.append({**row, "scales": scales, "reason": ""})
    for name, tensor in model.floats.items():
        width = tensor.element_size()
        row = _row(name, tensor, 8 * width, tensor.numel() * width)
        reason = f"stored as {str(tensor.dtype).removeprefix('torch.')}"
        rows.append({**row, "scales": 0, "reason": reason})
    return sorted(rows, key=lambda row: _in_order(row["tensor"]))


def cluster_bits(rows):
    """Bits and parameters of every quantized cluster, as in plan.json.

    Example
    -------
    >>> row = {"cluster": "conv", "stored_bits": 4, "reason": ""}
    >>> cluster_bits([{**row, "parameters": 6}, {**row, "parameters": 2}])
    {'conv': {'bits': 4, 'parameters': 8}}
    """
    clusters = {}
    for row in rows:
        if row["reason"]:
            continue
        new = {"bits": row["stored_bits"], "parameters": 0}
        cluster = clusters.setdefault(row["cluster"], new)
        cluster["parameters"] += row["parameters"]
    return clusters


def summarise(model, rows):
    """Sizes of a packed model."""
    quantized = [row for row in rows if not row["reason"]]
    count = sum(row["parameters"] for row in quantized)
    bits = sum(row["parameters"] * row["stored_bits"] for row in quantized)
    by_bits = Counter()
    for row in quantized:
        by_bits[f"{row['stored_bits']:g}"] += row["parameters"]
    size = Path(model.path).stat().st_size
    total = sum(row["parameters"] for row in rows)
    return {
        "format": model.version,
        "codebook": model.header.get("codebook", "midtread"),
        "bytes": size,
        "payload_bytes": sum(row["bytes"] for row in rows),
        "parameters": total,
        "quantized_parameters": count,
        "average_bits": round(bits / count, 4) if count else FLOAT_BITS,
        "compression": round(total * FLOAT_BITS / 8 / size, 2),
        "parameters_by_bits": dict(
            sorted(by_bits.items(), key=lambda item: float(item[0]))
        ),
    }


def _row(name, tensor, bits, size):
    """What all rows have."""
    parameter, rows = split_name(name)
    module = parameter.rpartition(".")[0] or "."
    return {
        "tensor": name,
        "cluster": slice_name(module, rows) if rows != ... else module,
        "shape": list(tensor.shape),
        "parameters": tensor.numel(),
        "stored_bits": bits,
        "bytes": size,
    }


def _in_order(name):
    """Numbers in names count as numbers; the ends stand at the ends."""
    place = 0 if "scale_in" in name else 1 if "conv_in." in name else 2
    place = 3 if "conv_out." in name else place
    parts = re.split(r"(\d+)", name)
    return place, [int(p) if p.isdigit() else p for p in parts]


def save_separator(separator, folder, metadata=None, **card):
    """Writes a separator as a packed folder.

    Arguments
    ---------
    separator : Separator
        Quantized, or in full precision; it is left as it is.
    folder : str or Path
        Made if it is not there.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.

    Returns
    -------
    Path
    """
    architecture = describe(separator)
    save_packed(separator, folder, metadata, architecture)
    write_hyperparams(folder, architecture)
    write_card(folder, **card)
    return Path(folder)


def write_hyperparams(folder, architecture):
    """Writes hyperparams.yaml, for SpeechBrain's `from_hparams`."""
    build(architecture)  # a stranger's strings must not become YAML
    text = hyperparams(architecture)
    write_text(Path(folder, HYPERPARAMS_FILE), text)


def write_card(folder, **card):
    """Writes README.md, the model card."""
    folder = Path(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    text = model_card(
        config,
        (folder / MODEL_FILE).stat().st_size,
        has_sample=(folder / SAMPLE_FILE).exists(),
        **card,
    )
    write_text(folder / CARD_FILE, text)


def copy_folder(packed, folder):
    """Writes a packed model that was read to another folder.

    Card, plan, sample and the like come from the folder that it was read
    from.
    """
    if packed.architecture is None:
        raise PackedModelError(
            packed.path,
            f"format {packed.version} does not say what to build",
            'write it anew with speechbrain_mpq.repack("OLD", "NEW")',
        )
    refuse_foreign_links(packed.path.parent)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_hyperparams(folder, packed.architecture)
    write_chunks(folder / MODEL_FILE, [packed.content])
    for name in (CONFIG_FILE, CARD_FILE, SAMPLE_FILE, RANGES_FILE):
        source = packed.path.parent / name
        if source.is_file():
            write_chunks(folder / name, [source.read_bytes()])
    if not (folder / CONFIG_FILE).exists():
        _write_config(folder, packed.header, packed.version)
    if not (folder / CARD_FILE).exists():
        write_card(folder)
    return folder


def repack(source, folder, **card):
    """Writes a packed folder of an older format as one of the present.

    The integers stay the same. What to build is known from the source's
    hyperparams.yaml only, which is executed: do this with folders that you
    trust. A card that is there stays, unless something is given for it.

    Arguments
    ---------
    source : str or Path
        Packed folder of a separator.
    folder : str or Path
        Another one, made if it is not there, or the same one.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.

    Returns
    -------
    Path
    """
    source, folder = Path(source), Path(folder)
    packed = read_model(source)
    separator = build_separator(source / HYPERPARAMS_FILE).eval()
    if not any(name.endswith("running_mean") for name in packed.floats):
        fold_norms_(separator)
    load_packed_(separator, packed)  # refuses weights of another model
    architecture = describe(separator)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"architecture": architecture, **upgraded_header(packed.header)}
    tensors = read_container(packed.path).tensors
    write_container(folder / MODEL_FILE, tensors, header, "3")
    _write_config(folder, header, 3, source / CONFIG_FILE)
    write_hyperparams(folder, architecture)
    if card or not (folder / CARD_FILE).exists():
        write_card(folder, **card)
    return folder


def _write_config(folder, header, version, older=None):
    """Write quantization_config.json; plan and metadata as in an older one."""
    kept = {"plan": None, "metadata": {}}
    if older is not None and older.is_file():
        content = json.loads(older.read_text(encoding="utf-8"))
        kept = {key: content.get(key, kept[key]) for key in kept}
    config = {**readable_config(header, version), **kept}
    text = json.dumps(config, indent=1) + "\n"
    write_text(folder / CONFIG_FILE, text)


# Kinds of files that can execute code when they are loaded.
_EXECUTABLE = (".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".py", ".npy")
_MAX_TEXT = 2**26  # bytes


def check_folder(folder):
    """Everything that is wrong with a packed folder of a separator.

    model.safetensors rules: it alone is read by `from_pretrained`. The other
    files are for people and for SpeechBrain, and must say the same.

    Arguments
    ---------
    folder : str or Path
        Packed folder.

    Returns
    -------
    list of str
        A sentence for each problem; empty where there is none.

    Example
    -------
    >>> from speechbrain_mpq.inference.folder import save_separator
    >>> from speechbrain_mpq import Separator, SpatialFeatures
    >>> separator = Separator(SpatialFeatures([(8, 1)]), 4, 8, 3, 1, 1)
    >>> folder = save_separator(separator, getfixture("tmpdir"))
    >>> check_folder(folder)
    []
    >>> (folder / "README.md").unlink()
    >>> check_folder(folder)
    ['...README.md: no model card']
    """
    folder = Path(folder)
    if folder.is_file():
        return [f"{folder}: a file; name the folder that it is in"]
    try:
        packed = read_model(folder)
    except PackedModelError as error:
        return [str(error)]
    problems = _config_problems(folder / CONFIG_FILE, packed)
    try:
        load_checked(folder)
    except PackedModelError as error:
        problems.insert(0, str(error))
    else:  # the others say what this architecture says
        problems += _yaml_problems(folder / HYPERPARAMS_FILE, packed)
        problems += _ranges_problems(folder / RANGES_FILE)
    problems += _other_problems(folder)
    return problems


def _config_problems(path, packed):
    """Where quantization_config.json does not say what the file does."""
    try:
        config = strict_json(_text(path))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        return [f"{path}: not readable ({error})"]
    expected = readable_config(packed.header, packed.version)
    expected = json.loads(json.dumps(expected))
    problems = [
        f"{path}: {key!r} is not what model.safetensors says"
        for key, value in expected.items()
        if config.get(key) != value
    ]
    bits = {n: t["bits"] for n, t in expected["tensors"].items()}
    if config.get("plan") and _plan_bits(config["plan"]) != bits:
        problems.append(f"{path}: 'plan' has other bits than the file")
    return problems


def _plan_bits(plan):
    """Tensor -> bits of a plan; None where it is no plan."""
    try:
        return {
            name: cluster["bits"]
            for cluster in plan["clusters"].values()
            for name in cluster["tensors"]
        }
    except (AttributeError, KeyError, TypeError):
        return None


def _yaml_problems(path, packed):
    """Where hyperparams.yaml builds something else, or might."""
    try:
        text = _text(path).decode("utf-8")
    except (OSError, ValueError) as error:
        return [f"{path}: not readable ({error})"]
    if with_current_names(text) == hyperparams(packed.architecture):
        return []
    return [
        f"{path}: is not what the architecture in model.safetensors gives; "
        "do not use from_hparams with it unless you know why"
    ]


def _ranges_problems(path):
    """Where an engine would refuse the activation ranges."""
    if not path.exists():
        return []
    try:
        read_ranges(path.parent, lower(path.parent))
    except PackedModelError as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        return [f"{path}: of no use ({error})"]
    return []


def _other_problems(folder):
    """Missing cards, samples that are none, files that execute."""
    problems = []
    if not (folder / CARD_FILE).is_file():
        problems.append(f"{folder / CARD_FILE}: no model card")
    sample = folder / SAMPLE_FILE
    if sample.exists() and not _is_flac(sample):
        problems.append(f"{sample}: no FLAC file")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _EXECUTABLE:
            problems.append(
                f"{path}: can execute code when it is loaded, and does not "
                "belong here"
            )
    return problems


def _is_flac(path):
    """Whether a file begins as FLAC files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"fLaC"


def _text(path):
    """Bytes of a text file of a sane size."""
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError("no ordinary file")
    if path.stat().st_size > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT} bytes")
    return path.read_bytes()
