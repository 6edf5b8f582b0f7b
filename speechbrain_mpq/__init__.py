"""Mixed-precision quantization of speech models, a plugin for SpeechBrain.

The names below are loaded when they are first used, so that importing the
package costs next to nothing.

Example
-------
>>> import torch
>>> from speechbrain_mpq import quantize_
>>> quantize_(torch.nn.Linear(4, 2), 4, exclude=["bias"]).bytes
16
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "quantize_": "quantization.quantizer",
    "dequantize_": "quantization.quantizer",
    "coverage": "quantization.quantizer",
    "FakeQuantize": "quantization.fake_quant",
    "LearnedStep": "quantization.fake_quant",
    "save_packed": "quantization.packing",
    "load_packed_": "quantization.packing",
    "KLScores": "allocation.kl",
    "MaskErrorScores": "allocation.mask_error",
    "allocate_bits": "allocation.solver",
}
__all__ = list(_HOMES)


def __getattr__(name):
    """Import a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    """Public names, for completion."""
    return sorted([*globals(), *__all__])
