"""Public names and where they are, for editors and type checkers."""

__version__: str

from .allocation.analysis import coding_gain as coding_gain
from .allocation.baselines import RandomScores as RandomScores
from .allocation.baselines import SizeScores as SizeScores
from .allocation.baselines import WeightErrorScores as WeightErrorScores
from .allocation.hessian import HessianScores as HessianScores
from .allocation.nas import NASScores as NASScores
from .allocation.output_scores import KLScores as KLScores
from .allocation.output_scores import LossScores as LossScores
from .allocation.output_scores import MaskErrorScores as MaskErrorScores
from .allocation.output_scores import RefinedScores as RefinedScores
from .allocation.solver import allocate_bits as allocate_bits
from .inference.chunks import SeparationStream as SeparationStream
from .inference.classification import (
    SpokenWordClassifier as SpokenWordClassifier,
)
from .inference.enhancement import SpeechEnhancer as SpeechEnhancer
from .inference.enhancement import save_enhancer as save_enhancer
from .inference.folder import repack as repack
from .inference.folder import save_separator as save_separator
from .inference.interfaces import doa_from_face as doa_from_face
from .inference.language_model import LanguageModel as LanguageModel
from .inference.language_model import save_language_model as save_language_model
from .inference.loading import load_separator as load_separator
from .inference.localization import Localizer as Localizer
from .inference.onnx_interfaces import export_interface as export_interface
from .inference.quality_estimation import QualityEstimator as QualityEstimator
from .inference.quality_estimation import (
    save_quality_estimator as save_quality_estimator,
)
from .inference.separation import PackedPretrainer as PackedPretrainer
from .inference.separation import QuantizedSeparator as QuantizedSeparator
from .inference.speech_recognition import HybridASR as HybridASR
from .inference.speech_recognition import save_recognizer as save_recognizer
from .inference.verification import check_folder as check_folder
from .lobes.models.separator import Separator as Separator
from .lobes.models.separator import SeparatorFrontEnd as SeparatorFrontEnd
from .lobes.models.spatial_features import SpatialFeatures as SpatialFeatures
from .lobes.models.tcn import fold_norms_ as fold_norms_
from .ptq.pretrained import quantize_pretrained as quantize_pretrained
from .quantization.admm import ADMM as ADMM
from .quantization.fake_quant import FakeQuantize as FakeQuantize
from .quantization.fake_quant import LearnedStep as LearnedStep
from .quantization.fake_quant import LogStep as LogStep
from .quantization.fake_quant import StraightThrough as StraightThrough
from .quantization.gptq import PostTraining as PostTraining
from .quantization.packing import load_packed_ as load_packed_
from .quantization.packing import packed_file_bytes as packed_file_bytes
from .quantization.packing import save_packed as save_packed
from .quantization.quant_api import coverage as coverage
from .quantization.quant_api import dequantize_ as dequantize_
from .quantization.quant_api import quantize_ as quantize_
from .quantization.quant_api import requantize_ as requantize_
from .simulation.augmentation import Augmentation as Augmentation
from .training.admm_training import AdamExtraGradient as AdamExtraGradient
from .training.admm_training import ADMMTraining as ADMMTraining
from .training.admm_training import ExtraGradient as ExtraGradient
from .training.checkpoints import AtomicCheckpointer as AtomicCheckpointer
from .training.choose import choose_bits as choose_bits
from .training.choose import pack_results as pack_results
from .training.one_stage import LearnedBits as LearnedBits
from .training.one_stage import OneStage as OneStage
from .training.one_stage import learn_bits as learn_bits
from .training.quantizer import Quantizer as Quantizer
from .training.rounding import round_calibrated_ as round_calibrated_
