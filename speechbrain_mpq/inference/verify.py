"""What is wrong with a packed folder, as a list."""

import hashlib
import json
from pathlib import Path

from ..engines.range_file import RANGES_FILE
from ..quantization.checked_header import strict_json
from ..quantization.container import PackedModelError
from ..quantization.packing import CONFIG_FILE, readable_config
from ..quantization.unpacking import read_model
from .checked import load_checked
from .hub import CARD_FILE, HYPERPARAMS_FILE, SAMPLE_FILE
from .hyperparams import hyperparams

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
    >>> from speechbrain_mpq.separation.features import SpatialFeatures
    >>> from speechbrain_mpq.separation.separator import Separator
    >>> separator = Separator(SpatialFeatures([(8, 1)]), 4, 8, 3, 1, 1)
    >>> folder = save_separator(separator, getfixture("tmpdir"))
    >>> check_folder(folder)
    []
    >>> (folder / "README.md").unlink()
    >>> check_folder(folder)
    ['...README.md: no model card']
    """
    folder = Path(folder)
    try:
        packed = read_model(folder)
    except PackedModelError as error:
        return [str(error)]
    problems = []
    try:
        load_checked(folder)
    except PackedModelError as error:
        problems.append(str(error))
    problems += _config_problems(folder / CONFIG_FILE, packed)
    if packed.architecture is not None:
        problems += _yaml_problems(folder / HYPERPARAMS_FILE, packed)
    problems += _ranges_problems(folder / RANGES_FILE, packed)
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
        expected = hyperparams(packed.architecture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path}: not readable ({error})"]
    if text == expected:
        return []
    return [
        f"{path}: is not what the architecture in model.safetensors gives; "
        "do not use from_hparams with it unless you know why"
    ]


def _ranges_problems(path, packed):
    """Where activation ranges belong to other weights."""
    if not path.exists():
        return []
    try:
        ranges = strict_json(_text(path))
        belongs = ranges["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path}: not readable ({error!r})"]
    if belongs == hashlib.sha256(packed.content).hexdigest():
        return []
    return [f"{path}: is of other weights; export the folder again"]


def _other_problems(folder):
    """Missing cards, samples that are none, files that execute."""
    problems = []
    if not (folder / CARD_FILE).is_file():
        problems.append(f"{folder / CARD_FILE}: no model card")
    sample = folder / SAMPLE_FILE
    if sample.exists() and sample.read_bytes()[:4] != b"fLaC":
        problems.append(f"{sample}: no FLAC file")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _EXECUTABLE:
            problems.append(
                f"{path}: can execute code when it is loaded, and does not "
                "belong here"
            )
    return problems


def _text(path):
    """Bytes of a text file of a sane size."""
    if path.stat().st_size > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT} bytes")
    return path.read_bytes()
