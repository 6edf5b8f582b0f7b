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
    "coverage": "quantization.coverage",
    "save_packed": "quantization.packing",
    "load_packed_": "quantization.packing",
    "FakeQuantize": "quantization.fake_quant",
    "StraightThrough": "quantization.fake_quant",
    "LearnedStep": "quantization.fake_quant",
    "LogStep": "quantization.log_step",
    "PostTraining": "quantization.rounding",
    "ADMM": "quantization.admm",
    "ADMMTraining": "brains.admm",
    "ExtraGradient": "brains.extra_gradient",
    "AdamExtraGradient": "brains.extra_gradient",
    "OneStage": "brains.one_stage",
    "round_calibrated_": "brains.rounding",
    "KLScores": "allocation.kl",
    "HessianScores": "allocation.hessian",
    "NASScores": "allocation.nas",
    "MaskErrorScores": "allocation.mask_error",
    "LossScores": "allocation.loss",
    "RefinedScores": "allocation.refined",
    "RandomScores": "allocation.controls",
    "SizeScores": "allocation.controls",
    "WeightErrorScores": "allocation.controls",
    "allocate_bits": "allocation.solver",
    "Quantizer": "plugin.quantizer",
    "LearnedBits": "plugin.learned_bits",
    "learn_bits": "plugin.optimizer",
    "choose_bits": "plugin.choose",
    "pack_results": "plugin.results",
    "ceiling": "allocation.ceiling",
    "quantize_pretrained": "plugin.pretrained_quantization",
    "SeparationStream": "inference.stream",
    "doa_from_face": "inference.directions",
    "SeparatorFrontEnd": "separation.front_end",
    "load_separator": "inference.separators",
    "QuantizedSeparator": "inference.pretrained",
    "save_separator": "inference.folder",
    "repack": "inference.folder",
    "check_folder": "inference.verify",
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
