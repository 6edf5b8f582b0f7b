"""Packed folders of separators: everything that another person needs."""

import json
from pathlib import Path

from ..engines.range_file import RANGES_FILE
from ..quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)
from ..quantization.described import upgraded_header
from ..quantization.packing import (
    CONFIG_FILE,
    MODEL_FILE,
    readable_config,
    save_packed,
)
from ..quantization.unpacking import load_packed_, read_model
from ..separation.loading import build_separator
from ..separation.tcn import fold_norms_
from ..whole_files import write_text, write_whole
from .card import model_card
from .hub import (
    CARD_FILE,
    HYPERPARAMS_FILE,
    SAMPLE_FILE,
    refuse_foreign_links,
)
from .hyperparams import hyperparams
from .registry import build, describe


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
    """Writes hyperparams.yaml, for SpeechBrain's `from_hparams`.

    Arguments
    ---------
    folder : str or Path
        Packed folder.
    architecture : dict
        From `registry.describe`, or from a file: ValueError where it is not
        what the registry takes.
    """
    build(architecture)  # a stranger's strings must not become YAML
    text = hyperparams(architecture)
    write_text(Path(folder, HYPERPARAMS_FILE), text)


def write_card(folder, **card):
    """Writes README.md, the model card.

    Arguments
    ---------
    folder : str or Path
        Packed folder; what the card says of it is read from its files.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.
    """
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

    Arguments
    ---------
    packed : PackedModel
        Of format 3.
    folder : str or Path
        Made if it is not there.

    Returns
    -------
    Path
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
    write_whole(folder / MODEL_FILE, [packed.content])
    for name in (CONFIG_FILE, CARD_FILE, SAMPLE_FILE, RANGES_FILE):
        source = packed.path.parent / name
        if source.is_file():
            write_whole(folder / name, [source.read_bytes()])
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
