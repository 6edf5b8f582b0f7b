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

from .aliases import install as _install_aliases

__version__ = "0.1.0"

_HOMES = {
    "Separator": "lobes.models.separator",
    "SpatialFeatures": "lobes.models.spatial_features",
    "fold_norms_": "lobes.models.tcn",
    "PackedPretrainer": "inference.separation",
    "AtomicCheckpointer": "training.checkpoints",
    "quantize_": "quantization.quant_api",
    "dequantize_": "quantization.quant_api",
    "requantize_": "quantization.quant_api",
    "coverage": "quantization.quant_api",
    "save_packed": "quantization.packing",
    "load_packed_": "quantization.packing",
    "packed_file_bytes": "quantization.packing",
    "FakeQuantize": "quantization.fake_quant",
    "StraightThrough": "quantization.fake_quant",
    "LearnedStep": "quantization.fake_quant",
    "LogStep": "quantization.fake_quant",
    "PostTraining": "quantization.gptq",
    "ADMM": "quantization.admm",
    "ADMMTraining": "training.admm_training",
    "ExtraGradient": "training.admm_training",
    "AdamExtraGradient": "training.admm_training",
    "OneStage": "training.one_stage",
    "round_calibrated_": "training.rounding",
    "KLScores": "allocation.output_scores",
    "HessianScores": "allocation.hessian",
    "NASScores": "allocation.nas",
    "MaskErrorScores": "allocation.output_scores",
    "LossScores": "allocation.output_scores",
    "RefinedScores": "allocation.output_scores",
    "RandomScores": "allocation.baselines",
    "SizeScores": "allocation.baselines",
    "WeightErrorScores": "allocation.baselines",
    "allocate_bits": "allocation.solver",
    "Quantizer": "training.quantizer",
    "LearnedBits": "training.one_stage",
    "learn_bits": "training.one_stage",
    "choose_bits": "training.choose",
    "pack_results": "training.choose",
    "coding_gain": "allocation.analysis",
    "quantize_pretrained": "ptq.pretrained",
    "SeparationStream": "inference.chunks",
    "SpokenWordClassifier": "inference.classification",
    "doa_from_face": "inference.interfaces",
    "Localizer": "inference.localization",
    "Augmentation": "simulation.augmentation",
    "SeparatorFrontEnd": "lobes.models.separator",
    "load_separator": "inference.loading",
    "QuantizedSeparator": "inference.separation",
    "save_separator": "inference.folder",
    "LanguageModel": "inference.language_model",
    "save_language_model": "inference.language_model",
    "export_interface": "inference.onnx_interfaces",
    "QualityEstimator": "inference.quality_estimation",
    "save_quality_estimator": "inference.quality_estimation",
    "HybridASR": "inference.speech_recognition",
    "save_recognizer": "inference.speech_recognition",
    "SpeechEnhancer": "inference.enhancement",
    "save_enhancer": "inference.enhancement",
    "repack": "inference.folder",
    "check_folder": "inference.verification",
}
_FORMER = {"WholeCheckpointer": "AtomicCheckpointer", "ceiling": "coding_gain"}
__all__ = list(_HOMES)
_install_aliases()


def __getattr__(name):
    """Import a public name from the module that holds it."""
    name = _FORMER.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    """Public names, for completion."""
    return sorted([*globals(), *__all__])
