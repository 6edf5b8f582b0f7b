"""What is wrong with a packed folder, as a list."""

import json
import math
import os
from pathlib import Path

import soundfile
import torch

from ..locks import IN_USE
from ..nnet.integer_gru_file import is_integer_gru
from ..quantization.container import PackedModelError
from ..quantization.packing import (
    CONFIG_FILE,
    MODEL_FILE,
    readable_config,
)
from ..quantization.plan import BitPlan
from ..utils import strict_json
from .audio import system_path
from .card import SAMPLE_FILE, SEPARATED_FILE
from .engines.activations import RANGES_FILE, read_ranges
from .engines.engine import check_engine, probe_inputs
from .engines.lowered import lower, rounding, run
from .exporting import (
    EXPORTED_STEM,
    EXPORTS_FILE,
    export_problems,
    exported_names,
)
from .folder import (
    CARD_FILE,
    FILES,
    LEXICON_FILE,
    NGRAM_FILE,
    VOCABULARY_FILE,
    hyperparams,
    is_foreign_link,
    with_current_names,
)
from .loading import HYPERPARAMS_FILE, load, read_described
from .registry import registered

# Kinds of files that can execute code when they are loaded.
_EXECUTABLE = (
    *(".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib", ".dill"),
    *(".npy", ".npz", ".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe"),
)
_OWN = (*FILES, EXPORTS_FILE)
# How files of these kinds begin, whatever their names: pickles, archives,
# programs, scripts.
_EXECUTABLE_STARTS = (
    *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)),
    *(b"PK\x03\x04", b"\x7fELF", b"MZ", b"#!"),
)
# Text that git and the hub's client leave in folders that they make, and the
# log of its training, which SpeechBrain's published models have beside them.
_TOLERATED = (".gitattributes", ".gitignore", "train_log.txt")
_TOLERATED_FOLDERS = (".git/", ".cache/huggingface/")
_MAX_TEXT = 2**26  # bytes
# What no trained network has: weights of 1 do, statistics of 16-bit samples,
# their energies, may be 1e13.
MOST_WEIGHT, MOST_BUFFER = 1e6, 1e18


def check_folder(folder):
    """List everything that is wrong with a packed folder.

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
    if is_integer_gru(folder / MODEL_FILE):
        return _integer_problems(folder) + _other_problems(folder)
    try:
        _, packed = read_described(folder)
    except PackedModelError as error:
        if not (folder / MODEL_FILE).is_file():  # nor is it any other folder
            return [str(error)]
        return [str(error), *_other_problems(folder)]
    problems = _config_problems(folder / CONFIG_FILE, packed)
    try:
        model = load(folder)
    except PackedModelError as error:
        problems.insert(0, str(error))
    else:  # the others say what this architecture says
        problems += _rest_problems(folder / CONFIG_FILE, model)
        problems += _output_problems(packed, model)
        problems += _needed_problems(folder, packed, model)
        problems += _yaml_problems(folder / HYPERPARAMS_FILE, packed)
        problems += _ranges_problems(folder / RANGES_FILE, model)
    problems += export_problems(folder)
    problems += _other_problems(folder)
    return problems


def _rest_problems(path, model):
    """Where a plan counts other parameters in float than the model has."""
    try:
        plan = BitPlan.from_dict(strict_json(_text(path))["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # there is none, or it was told
    count = sum(parameter.numel() for parameter in model.parameters())
    count -= sum(cluster.parameters for cluster in plan.clusters.values())
    if plan.rest_parameters == count:
        return []
    return [
        f"{path}: 'plan' says that {plan.rest_parameters} parameters stay in "
        f"float, which are {count}"
    ]


def _integer_problems(folder):
    """Where an integer GRU cannot be loaded, or its configuration differs."""
    # It imports SpeechBrain, which takes another second
    from ..lobes.models.gru_classifier import IntegerClassifier

    try:
        network = IntegerClassifier.read(folder / MODEL_FILE)
        config = strict_json(_text(folder / CONFIG_FILE))
        if config["integer_gru"] != network.integer.description:
            raise ValueError(
                f"{folder / CONFIG_FILE}: is not what {MODEL_FILE} says"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [str(error)]
    return _unneeded(
        folder, {*FILES} - {MODEL_FILE, CONFIG_FILE, CARD_FILE, SAMPLE_FILE}
    )


def _output_problems(packed, model):
    """Where a model has values, or puts some out, that nobody has trained."""
    probe = registered(packed.architecture["class"]).probe
    if probe is not None:
        with torch.no_grad():
            finite = torch.isfinite(probe(model)).all()
        if not finite:
            return [
                f"{packed.path}: puts out NaN or infinity for an ordinary "
                "input: its weights are damaged or diverged"
            ]
    for named, most in (
        (model.named_parameters(), MOST_WEIGHT),
        (model.named_buffers(), MOST_BUFFER),
    ):
        for name, values in named:
            largest = values.abs().max().item() if values.numel() else 0
            if values.is_floating_point() and largest > most:
                return [
                    f"{packed.path}: {name} has values up to {largest:.3g}: "
                    "its weights are damaged or diverged"
                ]
    return []


def _needed_problems(folder, packed, model):
    """Where what a model needs beside its weights is another's, or no use."""
    needed_files = registered(packed.architecture["class"]).needed_files
    problems = []
    for name, check in needed_files.items():
        try:
            check(folder, model)
        except (OSError, ValueError) as error:
            text = str(error)  # of one file, maybe, that two checks read
            own = (
                text
                if text.startswith(str(folder))
                else (f"{folder / name}: {text}")
            )
            problems += [own] if own not in problems else []
    beside = {VOCABULARY_FILE, LEXICON_FILE, NGRAM_FILE}
    return problems + _unneeded(folder, beside - needed_files.keys())


def _unneeded(folder, names):
    """Files that other kinds of models have beside their weights."""
    return [
        f"{folder / name}: does not belong here"
        for name in sorted(names)
        if os.path.lexists(folder / name)
    ]


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
    if config.get("plan"):
        told = _plan_problem(config["plan"], expected["tensors"])
        problems += [f"{path}: 'plan' {told}"] if told else []
    return problems


def _plan_problem(content, tensors):
    """Where a plan is none, or is not that of the tensors; or nothing."""
    try:
        own = dict(content)
        own.pop("bytes", None)  # told below, as other sums are
        plan = BitPlan.from_dict(own)
    except (TypeError, ValueError) as error:
        return f"is none ({error})"
    clusters = plan.clusters.values()
    bits = {name: c.bits for c in clusters for name in c.tensors}
    if bits != {name: tensor["bits"] for name, tensor in tensors.items()}:
        return "has other bits than the file"
    for cluster in clusters:
        shapes = [tensors[name]["shape"] for name in cluster.tensors]
        if cluster.parameters != sum(map(math.prod, shapes)):
            return "counts other parameters than the file"
    sums = plan.to_dict()
    wrong = [key for key, value in content.items() if value != sums.get(key)]
    if wrong:
        named = " and ".join(map(repr, wrong))
        return f"says {named} otherwise than its clusters"
    return ""


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


def _ranges_problems(path, model):
    """Where an engine would refuse the activation ranges."""
    if not path.exists():
        return []
    try:
        network = lower(path.parent)
        ranges = read_ranges(path.parent, network)
        inputs = probe_inputs(network, model)
        hook = rounding(network, ranges)
        check_engine(
            "an engine",
            lambda x: run(network, x, hook),
            network,
            ranges,
            inputs,
        )
    except PackedModelError as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        return [f"{path}: of no use ({error})"]
    return []


def _other_problems(folder):
    """Missing cards, and all that does not belong into a packed folder."""
    problems = []
    card = folder / CARD_FILE
    if not card.is_file():
        problems.append(f"{card}: no model card")
    elif not _is_text(card):
        problems.append(f"{card}: no text")
    for sample in (folder / SAMPLE_FILE, folder / SEPARATED_FILE):
        if sample.exists() and not _is_flac(sample):
            problems.append(f"{sample}: no FLAC file")
    expected = {*_OWN, *exported_names(folder)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if is_foreign_link(folder, name):
            problems.append(f"{path}: a link out of the folder")
        elif name not in expected and not path.is_dir():
            problems += _strange_problems(path, name)
    return problems


def _strange_problems(path, name):
    """What is wrong with a file that no packed folder needs."""
    if name == IN_USE and not path.stat().st_size:
        return []  # the lock of an export that was killed
    if name in _TOLERATED:
        return [] if _is_text(path) else [f"{path}: no text"]
    runs = path.suffix.lower() in _EXECUTABLE or _is_executable(path)
    if name.startswith(".git/hooks/"):  # of which git runs no sample
        runs = not name.endswith(".sample")
    if name.startswith(_TOLERATED_FOLDERS) and path.is_file() and not runs:
        return []
    if name.startswith(EXPORTED_STEM):
        return [
            f"{path}: nothing tells which weights it was made of: run "
            "`speechbrain-mpq export` again"
        ]
    why = "can execute code when it is loaded, and " if runs else ""
    return [f"{path}: {why}does not belong here"]


def _is_executable(path):
    """Whether a file begins as those that can execute code."""
    return path.is_file() and _start(path).startswith(_EXECUTABLE_STARTS)


def _start(path, count=8):
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(count)


def _is_text(path):
    """Whether a file is text of a sane size."""
    try:
        return "\0" not in _text(path).decode("utf-8")
    except ValueError:
        return False


def _is_flac(path):
    """Whether a file is FLAC, and no other one under its name."""
    if not path.is_file() or not _start(path).startswith(b"fLaC"):
        return False
    try:
        return soundfile.info(system_path(path)).frames > 0
    except soundfile.LibsndfileError:
        return False


def _text(path):
    """Bytes of a text file of a sane size."""
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError("no ordinary file")
    if path.stat().st_size > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT} bytes")
    return path.read_bytes()
