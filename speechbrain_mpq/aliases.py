"""Modules under the names they had before, for files that name them.

Published `hyperparams.yaml` files name classes by the path of their module. A
module that moves keeps its old path here, so that they load for ever.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

ROOT = __package__
PACKAGES = ("brains", "separation")  # of which nothing but aliases is left
MOVED = {
    "allocation.budget": "allocation.solver",
    "allocation.super_network": "allocation.nas",
    "allocation.traces": "allocation.hessian",
    "brains.files": "training.checkpoints",
    "commands.device": "commands.arguments",
    "commands.file_loop": "commands.audio_files",
    "commands.output_names": "commands.audio_files",
    "commands.parser": "commands.arguments",
    "commands.source": "commands.audio_files",
    "decoders.lexicon": "decoders.vocabulary",
    "evaluation.classification_task": "evaluation.word_tasks",
    "evaluation.comparisons": "evaluation.results_table",
    "evaluation.correlation": "evaluation.significance",
    "evaluation.enhancement_task": "evaluation.signal_tasks",
    "evaluation.language_task": "evaluation.word_tasks",
    "evaluation.mapsswe": "evaluation.significance",
    "evaluation.mcnemar": "evaluation.significance",
    "evaluation.media": "evaluation.page",
    "evaluation.metrics": "evaluation.runs",
    "evaluation.mos": "evaluation.signal_quality",
    "evaluation.perplexity": "evaluation.word_tasks",
    "evaluation.pesq": "evaluation.signal_quality",
    "evaluation.quality_task": "evaluation.signal_tasks",
    "evaluation.recognition_task": "evaluation.word_tasks",
    "evaluation.scoring": "evaluation.results",
    "evaluation.separation_task": "evaluation.signal_tasks",
    "evaluation.si_snr": "evaluation.signal_quality",
    "experiments.costs": "experiments.command_line",
    "inference.array_drawing": "inference.card",
    "inference.engines.reference": "inference.engines.lowered",
    "inference.exports": "inference.exporting",
    "inference.hub": "inference.folder",
    "inference.pretrainer": "inference.separation",
    "inference.rescoring": "inference.language_model",
    "inference.sample": "inference.card",
    "lobes.models.equalization": "lobes.models.tcn",
    "lobes.models.front_end": "lobes.models.separator",
    "lobes.models.tdnnf_supernet": "experiments.bottleneck_search",
    "memory": "utils",
    "nnet.denominator": "nnet.path_sums",
    "nnet.exit_rules": "lobes.models.exit_rules",
    "nnet.fake_quantized_gru": "nnet.gru_simulation",
    "nnet.gru_calibration": "nnet.gru_conversion",
    "nnet.spectral_loss": "lobes.models.nsnet2",
    "ptq.pretrained_interfaces": "ptq.pretrained_folder",
    "quantization.gates": "quantization.groups",
    "quantization.model_card": "inference.card",
    "quantization.rounding_functions": "quantization.fake_quant",
    "quantization.scheme": "quantization.plan",
    "separation.features": "lobes.models.spatial_features",
    "separation.separator": "lobes.models.separator",
    "separation.tcn": "lobes.models.tcn",
    "simulation.noisy_speech": "simulation.augmentation",
    "simulation.voices": "simulation.corpus",
    "training.brain_parts": "training.calibration",
    "training.layer_rounding": "training.rounding",
    "training.loggers": "training.pipeline",
    "training.packed_results": "training.choose",
    "training.plan_store": "training.pipeline",
    "training.prototypes": "training.pipeline",
    "training.rehearsal": "training.calibration",
    "training.unreached": "training.quantizer",
    "vision.detector": "vision.video",
    "vision.direction": "vision.face_tracking",
    "vision.face_track": "vision.face_tracking",
    "vision.mouth": "vision.video",
    "vision.track": "vision.face_tracking",
}


class AliasFinder(MetaPathFinder, Loader):
    """Finds a moved module under its old name.

    Example
    -------
    >>> from speechbrain_mpq.separation.tcn import fold_norms_
    >>> fold_norms_.__module__
    'speechbrain_mpq.lobes.models.tcn'
    """

    def find_spec(self, name, path=None, target=None):
        """The spec of an old name, or None for any other."""
        old = name.removeprefix(f"{ROOT}.")
        if old == name or old not in (*PACKAGES, *MOVED):
            return None
        return ModuleSpec(name, self, is_package=old in PACKAGES)

    def exec_module(self, module):
        """Give a module the names of the one that took its place."""
        new = MOVED.get(module.__name__.removeprefix(f"{ROOT}."))
        if new is None:
            return  # a package: its modules are found one by one
        content = vars(import_module(f"{ROOT}.{new}")).items()
        module.__dict__.update(
            (name, value)
            for name, value in content
            if not name.startswith("__")
        )


def install():
    """Let old names be imported, once a process."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder())
