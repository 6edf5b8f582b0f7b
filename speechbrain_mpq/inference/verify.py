"""What is wrong with a packed folder, as a list."""

import json
from pathlib import Path

from ..engines.lowering import lower
from ..engines.range_file import RANGES_FILE, read_ranges
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
    if text == hyperparams(packed.architecture):
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
