"""Pretrained SpeechBrain interfaces: finding, loading, comparing them."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import speechbrain.inference
import torch
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.fetching import fetch

from ..quantization.tensors import near_misses
from .pretrained_metrics import ErrorRate, SourceSISNR, WordErrorRate
from .pretrained_outputs import (
    AttentionOutputs,
    ClassOutputs,
    CTCOutputs,
    EncoderOutputs,
    WaveformOutputs,
)
from .pretrained_source import HPARAMS_FILE, check_source

# What a class puts out and how good that is; subclasses before their base.
KINDS = {
    "EncoderDecoderASR": (AttentionOutputs, WordErrorRate),
    "EncoderASR": (CTCOutputs, WordErrorRate),
    "SepformerSeparation": (WaveformOutputs, SourceSISNR),
    "SpectralMaskEnhancement": (WaveformOutputs, SourceSISNR),
    "WaveformEnhancement": (WaveformOutputs, SourceSISNR),
    "SpeakerRecognition": (EncoderOutputs, None),
    "EncoderClassifier": (ClassOutputs, ErrorRate),
    "AudioClassifier": (ClassOutputs, ErrorRate),
    "WaveformEncoder": (EncoderOutputs, None),
}


def find_class(name):
    """The interface class of a name.

    Arguments
    ---------
    name : str
        Name of a class in speechbrain.inference, or a class of your own with
        its module, "my_package.my_module.MyASR".

    Returns
    -------
    type

    Example
    -------
    >>> find_class("EncoderASR").__module__
    'speechbrain.inference.ASR'
    >>> find_class("EncoderASM")
    Traceback (most recent call last):
    ...
    ValueError: no class 'EncoderASM' in speechbrain.inference; near misses: ...
    """
    module, _, own = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), own)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no class {name!r}: {error}") from error
    else:
        classes = _interface_classes()
        if name not in classes:
            raise ValueError(
                f"no class {name!r} in speechbrain.inference"
                f"{near_misses(name, classes)}"
            )
        found = classes[name]
    kind_of(found)  # is it one that is served?
    return found


def kind_of(cls):
    """What a class puts out, and the measure that suits it.

    Arguments
    ---------
    cls : type
        A subclass of ``Pretrained``.

    Returns
    -------
    outputs : type
        The ``Comparison`` for it.
    measure : type or None
        The ``Measure`` for it.

    Example
    -------
    >>> [kind.__name__ for kind in kind_of(find_class("EncoderASR"))]
    ['CTCOutputs', 'WordErrorRate']
    """
    for base in inspect.getmro(cls):
        if base.__name__ in KINDS and issubclass(base, Pretrained):
            return KINDS[base.__name__]
    raise ValueError(
        f"{cls.__name__} is not served: it must be, or inherit from, one of "
        f"{', '.join(KINDS)}"
    )


def load_interface(cls, source, device="cpu"):
    """An interface, and where its hyperparams.yaml is.

    Arguments
    ---------
    cls : type
        A subclass of ``Pretrained``.
    source : str or Path
        Folder, or name on the Hugging Face hub.
    device : str
        Where to put it.

    Returns
    -------
    interface : Pretrained
    hparams_path : Path
    """
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


def divergence(comparison, interface, chunk=8):
    """How far another interface's outputs are from the compared one's.

    Arguments
    ---------
    comparison : Comparison
        Of the full-precision interface.
    interface : Pretrained
        For example quantized.
    chunk : int
        Items that go through at a time.

    Returns
    -------
    float
        In ``comparison.unit``, mean over all items.
    """
    other, error, scale = comparison.of(interface), 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(comparison), chunk):
            items = slice(start, min(start + chunk, len(comparison)))
            batch = comparison.batch(torch.arange(items.start, items.stop))
            reference = comparison.outputs(*batch)
            error += comparison.error(reference, other.outputs(*batch), items)
            scale += comparison.scale(reference, items)
    return float(error / scale)


def _interface_classes():
    """Name -> class, of all modules in speechbrain.inference that import."""
    found = {}
    for entry in pkgutil.iter_modules(speechbrain.inference.__path__):
        try:
            module = importlib.import_module(
                f"speechbrain.inference.{entry.name}"
            )
        except ImportError:  # its optional packages are not here
            continue
        for name, member in vars(module).items():
            if inspect.isclass(member) and issubclass(member, Pretrained):
                found[name] = member
    del found["Pretrained"]
    return found
