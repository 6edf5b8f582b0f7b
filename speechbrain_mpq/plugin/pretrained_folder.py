"""Folders that SpeechBrain's own ``from_hparams`` loads, packed.

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
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from speechbrain.utils.checkpoints import (
    get_default_hook,
    torch_parameter_transfer,
)
from speechbrain.utils.parameter_transfer import DEFAULT_TRANSFER_HOOKS

from ..quantization.packing import CONFIG_FILE, save_packed
from ..quantization.tensors import named_tensors
from ..whole_files import write_text
from .pretrained_source import HPARAMS_FILE

HOOK = "!name:speechbrain_mpq.load_packed_"


def packable(interface):
    """The modules of an interface's pretrainer that can be packed.

    Arguments
    ---------
    interface : speechbrain.inference.interfaces.Pretrained
        Loaded by ``from_hparams``.

    Returns
    -------
    modules : dict of str -> torch.nn.Module
        By their names in the pretrainer.
    reasons : dict of str -> str
        Why the others with parameters cannot.
    """
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

    Arguments
    ---------
    root : torch.nn.Module
        Plain.
    modules : iterable of torch.nn.Module
        Plain.

    Returns
    -------
    list of str

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


def packed_hparams(text, names):
    """hyperparams.yaml with packed models in the place of some loadables.

    All else says what it said, comments included. The paths of the pretrainer
    go, so that all is loaded from the folder itself.

    Arguments
    ---------
    text : str
        The source's hyperparams.yaml.
    names : iterable of str
        Loadables that are packed.

    Returns
    -------
    str

    Example
    -------
    >>> text = '''
    ... pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    ...     loadables:
    ...         asr: !ref <asr>  # the model
    ... '''
    >>> print(packed_hparams(text, ["asr"]))
    pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
        loadables:
            asr: !ref <asr>  # the model
        custom_hooks:
            asr: !name:speechbrain_mpq.load_packed_
    <BLANKLINE>
    """
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
    """Write the packed folder of a quantized interface.

    Arguments
    ---------
    interface : speechbrain.inference.interfaces.Pretrained
        Quantized.
    hparams_path : Path
        The source's hyperparams.yaml on this machine.
    modules : dict of str -> torch.nn.Module
        Loadables to pack; those in which nothing is quantized are packed in
        full precision.
    folder : Path
        Where to; it is made.
    metadata : dict or None
        For quantization_config.json.

    Returns
    -------
    int
        Bytes of the packed files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = hparams_path.read_text(encoding="utf-8")
    hparams = packed_hparams(text, modules)
    write_text(folder / HPARAMS_FILE, hparams)
    configs, total = {}, 0
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, module in modules.items():
            path = save_packed(module, scratch)
            total += path.stat().st_size
            path.replace(folder / f"{name}.ckpt")
            config = Path(scratch) / CONFIG_FILE
            configs[name] = json.loads(config.read_text())
    config = {"loadables": configs, "metadata": metadata or {}}
    text = json.dumps(config, indent=1) + "\n"
    write_text(folder / CONFIG_FILE, text)
    _copy_the_rest(interface, hparams_path, modules, folder)
    return total


def source_bytes(interface, modules):
    """Bytes of the source's files in the place of packed ones.

    Arguments
    ---------
    interface : speechbrain.inference.interfaces.Pretrained
        The source.
    modules : iterable of str
        Loadables that are packed.

    Returns
    -------
    int
    """
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
