"""Packed folders of models: written, copied, described, shared on the hub.

Beside the weights stand hyperparams.yaml, which SpeechBrain's `from_hparams`
builds a model from, and the model card. Our own way of loading never reads
that file: YAML of this kind can execute anything, so load it from people you
trust only.

The Hugging Face hub's own client keeps what it downloads in a cache that
several processes may use; without a connection it takes what is there.
"""

import json
import re
from collections import Counter
from pathlib import Path

from ..lobes.models.separator import build_separator
from ..quantization.container import PackedModelError, write_container
from ..quantization.groups import slice_name, split_name, stored_cluster
from ..quantization.header import upgraded_header
from ..quantization.packing import (
    CONFIG_FILE,
    MODEL_FILE,
    read_model,
    readable_config,
    save_packed,
    with_coding,
)
from ..quantization.plan import mean_bits, packed_bytes
from ..quantization.unpacking import CODING, without_coding
from ..utils import read_json, write_chunks, write_text
from .card import SAMPLE_FILE, SEPARATED_FILE, model_card, read_sample
from .engines.activations import RANGES_FILE
from .loading import HYPERPARAMS_FILE, fill_
from .registry import build, describe, registered

CARD_FILE = "README.md"
VOCABULARY_FILE = "vocab.txt"  # of a language model
LEXICON_FILE = "lexicon.txt"  # of a hybrid recognizer
NGRAM_FILE = "lm.arpa"


# All that is ever downloaded or uploaded.
FILES = (
    *(MODEL_FILE, CONFIG_FILE, HYPERPARAMS_FILE),
    *(CARD_FILE, SAMPLE_FILE, SEPARATED_FILE, RANGES_FILE),
    *(VOCABULARY_FILE, LEXICON_FILE, NGRAM_FILE),
)


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def fetch_folder(
    source,
    revision=None,
    cache_dir=None,
    token=None,
    endpoint=None,
    local_files_only=False,
):
    """Download a packed model, unless it is a local folder."""
    if Path(source).is_dir():
        return Path(source)
    if not _REPOSITORY.fullmatch(str(source)) or ".." in str(source):
        raise FileNotFoundError(
            f"{source} is neither a folder nor a hub name such as user/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            endpoint=endpoint,
            local_files_only=local_files_only,
            allow_patterns=list(FILES),
        )
    except LocalEntryNotFoundError as error:  # most often a mistyped folder
        raise FileNotFoundError(
            f"{source} is no folder here; as a hub name it was not downloaded "
            "before, and now the hub cannot be reached: check the folder's "
            "name, or the connection"
        ) from error
    return Path(folder)


def push_folder(
    folder,
    repository,
    private=None,
    message="Packed model",
    revision=None,
    token=None,
    endpoint=None,
):
    """Upload the files of a packed folder, and no others."""
    from huggingface_hub import HfApi

    refuse_foreign_links(folder)
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        allow_patterns=list(FILES),
        commit_message=message,
        revision=revision,
    )
    return done.commit_url


def refuse_foreign_links(folder):
    """Raise ValueError where a file of a folder is really somewhere else.

    A folder from a stranger may link its README.md to a file that is not to
    be copied or uploaded. The client's own cache links into `blobs`.
    """
    for name in FILES:
        if is_foreign_link(folder, name):
            path = Path(folder).resolve() / name
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside its folder: "
                "replace it by a file"
            )


def is_foreign_link(folder, name):
    """Whether a file is a link out of its folder and the hub client's cache."""
    own = Path(folder).resolve()
    homes = [own, *(parent / "blobs" for parent in own.parents[1:2])]
    path = own / name
    return path.is_symlink() and path.resolve().parent not in homes


FLOAT_BITS = 32  # of the model that the compression is against
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


def hyperparams(architecture) -> str:
    """Compose the text of hyperparams.yaml.

    Arguments
    ---------
    architecture : dict
        From `registry.describe`.

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
    if architecture["class"] != "Separator":
        return _HEADER + "\n".join(_any_model(architecture)) + "\n"
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


def _any_model(architecture):
    """Lines of the hyperparams.yaml of a class that is no separator."""
    return [
        *_entries({"model": architecture}, indent=""),
        *_MODULES.replace("separator", "model").rstrip().split("\n"),
    ]


def with_current_names(text):
    """Update the names in a hyperparams.yaml of an earlier version."""
    for module in _FORMER_MODULES:
        text = text.replace(f"speechbrain_mpq.{module}.", "speechbrain_mpq.")
    return text


def _entries(arguments, indent="    "):
    """Lines of a mapping; registered classes in it are built."""
    for key, value in arguments.items():
        if isinstance(value, dict) and set(value) == {"class", "arguments"}:
            kind = registered(value["class"]).kind
            path = f"{kind.__module__}.{kind.__qualname__}"
            yield f"{indent}{key}: !new:{path}"
            yield from _entries(value["arguments"], indent + "    ")
        elif isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _entries(value, indent + "    ")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value):
    """A plain value in YAML; the registry's strings need no quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return "null" if value is None else str(value) or '""'


def coverage_rows(model):
    """Build the coverage table of a packed model."""
    rows = []
    groups = {name: len(own) for name, own in model.groups().items()}
    for name, tensor in model.quantized.items():
        count, scales = tensor.numel(), tensor.alpha.numel()
        size = packed_bytes(count, tensor.bits, scales)
        row = _row(name, tensor, tensor.bits, size, groups)
        rows.append({**row, "scales": scales, "reason": ""})
    for name, tensor in model.floats.items():
        width = tensor.element_size()
        row = _row(name, tensor, 8 * width, tensor.numel() * width)
        reason = f"stored as {str(tensor.dtype).removeprefix('torch.')}"
        rows.append({**row, "scales": 0, "reason": reason})
    return sorted(rows, key=lambda row: _in_order(row["tensor"]))


def cluster_bits(rows):
    """Collect bits and parameters of the clusters, as in plan.json.

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
    """Summarise the sizes of a packed model."""
    quantized = [row for row in rows if not row["reason"]]
    count = sum(row["parameters"] for row in quantized)
    bits = [(row["stored_bits"], row["parameters"]) for row in quantized]
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
        "average_bits": round(mean_bits(bits), 4) if count else FLOAT_BITS,
        "compression": round(total * FLOAT_BITS / 8 / size, 2),
        "parameters_by_bits": dict(
            sorted(by_bits.items(), key=lambda item: float(item[0]))
        ),
    }


def _row(name, tensor, bits, size, groups=None):
    """What all rows have."""
    parameter, rows = split_name(name)
    module, _, attribute = parameter.rpartition(".")
    cluster = module = module or "."
    if rows != ...:
        gate = stored_cluster(module, attribute, rows, groups[parameter])
        cluster = gate or slice_name(module, rows)
    return {
        "tensor": name,
        "cluster": cluster,
        "shape": list(tensor.shape),
        "parameters": tensor.numel(),
        "stored_bits": bits,
        "bytes": size,
    }


def _in_order(name):
    """Numbers in names count as numbers; the ends stand at the ends."""
    place = 0 if "scale_in" in name else 1 if "conv_in." in name else 2
    place = 3 if "conv_out." in name else place
    parts = re.split(r"([0-9]+)", name)
    # Longer numbers are larger; a stranger's may be too long to compute with
    numbers = [part.lstrip("0") for part in parts[1::2]]
    return place, [
        *zip(parts[::2], [(len(n), n) for n in [*numbers, ""]]),
    ]


def save_separator(
    separator, folder, metadata=None, entropy_coded=False, **card
) -> Path:
    """Save a separator, or any registered model, as a packed folder.

    Arguments
    ---------
    separator : torch.nn.Module
        Quantized, or in full precision; it is left as it is.
    folder : str or Path
        Made if it is not there.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    entropy_coded : bool
        As for `save_packed`; a model with the entropy codebook always is.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.
    """
    architecture = describe(separator)
    save_packed(separator, folder, metadata, architecture, entropy_coded)
    write_hyperparams(folder, architecture)
    write_card(folder, **card)
    return Path(folder)


def write_hyperparams(folder, architecture):
    """Write hyperparams.yaml, for SpeechBrain's `from_hparams`."""
    build(architecture, None)  # a stranger's strings must not become YAML
    text = hyperparams(architecture)
    write_text(Path(folder, HYPERPARAMS_FILE), text)


def write_card(folder, **card):
    """Write README.md, the model card."""
    folder = Path(folder)
    config = read_json(
        folder / CONFIG_FILE,
        "write it with save_packed",
        "pack the model again",
    )
    text = model_card(
        config,
        (folder / MODEL_FILE).stat().st_size,
        sample=read_sample(folder),
        **card,
    )
    write_text(folder / CARD_FILE, text)


def copy_folder(packed, folder):
    """Copy a packed model that was read to another folder.

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
    copied = SAMPLE_FILE, SEPARATED_FILE, RANGES_FILE, VOCABULARY_FILE
    copied = *copied, LEXICON_FILE, NGRAM_FILE
    for name in (CONFIG_FILE, CARD_FILE, *copied):
        source = packed.path.parent / name
        if source.is_file():
            write_chunks(folder / name, [source.read_bytes()])
    if not (folder / CONFIG_FILE).exists():
        _write_config(folder, packed.header, packed.version)
    if not (folder / CARD_FILE).exists():
        write_card(folder)
    return folder


def repack(source, folder, entropy_coded=False, **card) -> Path:
    """Write a packed folder anew, in the present format.

    The integers stay the same. What to build is known from the header of the
    file; in formats 1 and 2 from the source's hyperparams.yaml only, which is
    executed: do this with folders that you trust. A card that is there stays,
    unless something is given for it.

    Arguments
    ---------
    source : str or Path
        Packed folder of a separator.
    folder : str or Path
        Another one, made if it is not there, or the same one.
    entropy_coded : bool
        As for `save_packed`; a model with the entropy codebook always is.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.
    """
    source, folder = Path(source), Path(folder)
    packed = read_model(source)
    architecture = packed.architecture
    if architecture is None:
        separator = build_separator(source / HYPERPARAMS_FILE).eval()
        fill_(separator, packed)  # refuses weights of another model
        architecture = describe(separator)
    header = {"architecture": architecture, **upgraded_header(packed.header)}
    header.pop("coding", None)
    tensors = without_coding(packed.container)
    version = 4 if "axes" in header else 3
    if entropy_coded or header.get("codebook") == "entropy":
        tensors, version = with_coding(tensors, header), 5
        header["coding"] = CODING
    folder.mkdir(parents=True, exist_ok=True)
    write_container(folder / MODEL_FILE, tensors, header, str(version))
    _write_config(folder, header, version, source / CONFIG_FILE)
    write_hyperparams(folder, architecture)
    if card or not (folder / CARD_FILE).exists():
        write_card(folder, **card)
    return folder


def _write_config(folder, header, version, older=None):
    """Write quantization_config.json; plan and metadata as in an older one."""
    kept = {"plan": None, "metadata": {}}
    if older is not None and older.is_file():
        content = read_json(older, broken="delete it: it is written anew")
        kept = {key: content.get(key, kept[key]) for key in kept}
    config = {**readable_config(header, version), **kept}
    text = json.dumps(config, indent=1) + "\n"
    write_text(folder / CONFIG_FILE, text)
