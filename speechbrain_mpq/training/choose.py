"""Front doors for any Brain: bits before `fit`, a packed model afterwards."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import speechbrain as sb
import yaml
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_logger

from ..allocation.baselines import (
    RandomScores,
    ReversedScores,
    SizeScores,
    StoredScores,
    WeightErrorScores,
)
from ..allocation.hessian import HessianScores
from ..allocation.nas import NASScores
from ..allocation.output_scores import KLScores, LossScores, OutputErrorScores
from ..allocation.scores import Scorer, check_candidates
from ..allocation.solver import parse_budget
from ..locks import check_folder, hold_results
from ..quantization.fake_quant import FakeQuantize, LearnedStep
from ..quantization.gptq import PostTraining
from ..quantization.packing import stored_buffers
from ..quantization.plan import BitPlan, bit_plan
from ..quantization.tensors import named_tensors, select
from .admm_training import ADMMTraining
from .calibration import BrainCalibration, calibration_batches, unmeasured_norms
from .checkpoints import recover_whole
from .methods import EstimationMethod, attach
from .one_stage import OneStage
from .pipeline import (
    SETTINGS,
    Pipeline,
    PlanStore,
    earlier_settings,
    log_stats,
    plan_stats,
)
from .quantizer import NO_SCRIPT, Quantizer, as_list, quantizer_of
from .rounding import check_rounding

logger = get_logger(__name__)
CANDIDATES = (2, 3, 4, 6, 8, 16)
PROBES = 4  # of each batch, for the Hessian
SCORERS = {
    "kl": KLScores,
    "output_error": OutputErrorScores,
    "hessian": partial(
        # Any loss: CTC and fused recurrent kernels have no second derivative.
        HessianScores,
        probes=PROBES,
        distribution="rademacher",
        differences=True,
    ),
    "loss": LossScores,
    # As printed the penalty outweighs the loss, whatever the model.
    "nas": partial(NASScores, shares="size"),
    "weight_error": WeightErrorScores,
    "size": SizeScores,
    "random": RandomScores,
    "reversed": ReversedScores,
    "table": StoredScores,
}
SCORES = (*SCORERS, "uniform")
METHODS = {
    "post_training": partial(EstimationMethod, PostTraining),
    "straight_through": partial(EstimationMethod, FakeQuantize),
    "learned_step": partial(EstimationMethod, LearnedStep),
    "log_step": EstimationMethod,
    "admm": partial(ADMMTraining, penalty=0.03, growth=1.09),
    "admm_printed": partial(ADMMTraining, penalty=1e-3, printed=True),
    "one_stage": partial(OneStage, shrinks=True),
}
# As ruamel.yaml names them, in lists and tables too: [*id001, *id002].
ANCHOR = re.compile(r"(?<=[\s\[{,])([&*])id(\d+)\b")


def parse_name(text):
    """Name and settings of a way that is asked for as `name:key=value,...`.

    Example
    -------
    >>> parse_name("random:seed=3")
    ('random', {'seed': 3})
    >>> parse_name("kl")
    ('kl', {})
    """
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(
            f"{text!r} is not name:key=value,key=value, such as random:seed=3"
        )
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def _made(kind, text, *arguments):
    """What a class makes of the settings behind its name."""
    name, settings = parse_name(text)
    try:
        return kind(*arguments, **settings)
    except TypeError as error:
        if not settings:
            raise
        raise ValueError(
            f"{text!r}: {error}; see its class for {name}'s settings"
        ) from error


def method_of(name):
    """An estimation method by its name, with settings behind a colon or not.

    Example
    -------
    >>> method_of("straight_through").estimator.__name__
    'FakeQuantize'
    >>> method_of("admm:penalty=0.1").penalty
    0.1
    >>> method_of("adm")
    Traceback (most recent call last):
    ...
    ValueError: method 'adm' is none of ('post_training', ...
    """
    if isinstance(name, EstimationMethod):
        return name
    kind = METHODS.get(parse_name(name)[0])
    if kind is None:
        raise ValueError(f"method {name!r} is none of {tuple(METHODS)}")
    return _made(kind, name)


def _check_scripting(brain, quantizer):
    """Refuse --jit of what is to be quantized, before any work."""
    if not getattr(brain, "jit", False):
        return
    keys = brain.jit_module_keys or list(brain.modules)
    scripted = {
        id(parameter): key
        for key in keys
        if key in brain.modules
        for parameter in brain.modules[key].parameters()
    }
    tensors = named_tensors(quantizer.model)
    for tensor in select(tensors, **quantizer.selection.patterns):
        if id(tensor.parameter) in scripted:
            key = scripted[id(tensor.parameter)]
            raise ValueError(NO_SCRIPT.format(f"module {key!r}"))


def _method_for(brain, method_or_name, candidate_bits):
    """The method that a Brain is to be trained by; the usual one for None."""
    method = method_of(method_or_name or "log_step")
    if isinstance(method_or_name, str) and method.candidate_bits is not None:
        method.candidate_bits = check_candidates(candidate_bits)
    if method_or_name:
        method.check_brain(brain)
    return method


def _folder(brain, folder):
    """Where the plan is left: what is asked for, or the output folder."""
    own = getattr(getattr(brain, "hparams", None), "output_folder", None)
    if folder or own:
        check_folder(folder or own)
        hold_results(folder or own)
    return folder or own


def _usual_rounding(method, brain):
    """The rounding of a method, where none is asked for."""
    fresh = unmeasured_norms(brain)
    if method.rounding == "calibrated" and fresh:
        logger.info(
            f"Nearest rounding: {', '.join(fresh)} has no statistics yet, so "
            "that nothing can be fitted to what the model puts out"
        )
        return "nearest"
    return method.rounding


def check_scores(scores):
    """Refuse names that are no scores.

    Example
    -------
    >>> check_scores("kl")
    >>> check_scores("lk")
    Traceback (most recent call last):
    ...
    ValueError: scores must be one of ('kl', ...) or an object such as ...
    """
    named = isinstance(scores, str) and (
        scores == "uniform" or parse_name(scores)[0] in SCORERS
    )
    if not named and not isinstance(scores, Scorer):
        raise ValueError(
            f"scores must be one of {SCORES} or an object such as KLScores(), "
            f"not {scores!r}"
        )


def scorer_of(scores, scheme, candidate_bits=CANDIDATES):
    """A scorer of a model's scheme.

    Example
    -------
    >>> from speechbrain_mpq.quantization.plan import Scheme
    >>> scorer_of("kl", Scheme(codebook="midrise")).scheme.codebook
    'midrise'
    """
    check_scores(scores)
    if scores == "uniform":
        return None
    if isinstance(scores, str):
        kind = SCORERS[parse_name(scores)[0]]
        scores = _made(kind, scores, candidate_bits)
    return scores.with_scheme(scheme)


def choose_bits(
    brain,
    dataset,
    scores=None,
    budget=4,
    *,
    quantizer=None,
    include=("*",),
    exclude=(),
    vectors=True,
    scheme=None,
    output=None,
    batches=8,
    loader_kwargs=None,
    candidate_bits=CANDIDATES,
    min_bits=2,
    equal_bits=(),
    rounding=None,
    method=None,
    prototypes=None,
    stage=sb.Stage.VALID,
    folder=None,
    progress=True,
):
    """Choose the bits of every cluster of a Brain's modules, and quantize.

    To be called after the Brain is built, with its full-precision weights
    loaded, and before `fit`. Uses nothing but the Brain's own
    `evaluate_batch`, in eval mode. The plan is left in the output folder; the
    same call finds it there when a training is resumed, and chooses nothing
    anew. It rounds anew, to the same values, where no checkpoint is there that
    has them.

    Arguments
    ---------
    brain : speechbrain.Brain
        Before `fit`.
    dataset : Dataset or DataLoader
        Data to choose by, best what the model was not trained on.
    scores : str, Scorer or None
        "kl", the default: divergence of all of the model's own output
        distributions, or the squared error of its outputs where they are
        none or do not depend on all that the loss needs. "output_error": that
        error, relative, summed over outputs. "hessian": curvature of its loss.
        "loss": increase of its loss. "nas": search in a super-network.
        "weight_error", "size" and "random" look at weights only. "table:file=
        scores.json": those of an earlier run. "uniform": the same bits for
        all. Or an object such as `KLScores`.
    budget : int, float or str
        Bits on average, or bytes of the packed file (see `parse_budget`).
    quantizer : Quantizer or None
        None: that of the hparams, or a new one of all the Brain's modules.
    include, exclude : sequence of str
        For a new quantizer.
    vectors : bool
        For a new quantizer: biases and norms as well.
    scheme : Scheme or None
        For a new quantizer: how values are represented, such as
        `Scheme(gates=True)`.
    output : callable or None
        Predictions -> their log-probabilities or mask; None compares all
        distributions that are found (see `find_distributions`).
    batches : int
        Most batches of the data to look at.
    loader_kwargs : dict or None
        For the Brain's `make_dataloader`, such as batch_size.
    candidate_bits : sequence of int
        Bits to choose from, where scores are named.
    min_bits : int or float
        Least bits of any cluster.
    equal_bits : sequence of str
        What must share one bit width (see `equal_groups`).
    rounding : str or None
        "calibrated": layers that are matrices (see `is_matrix_layer`) or
        recurrent are fitted to what they put out in full precision, which
        changes biases and norms that stay in float as well. "nearest" needs
        no data. None: calibrated where the method begins at rounded weights
        and the model can be run.
    method : str, EstimationMethod or None
        How weights are found in the training that follows, one of `METHODS`;
        None: by the quantizer's own estimator.
    prototypes : dict or None
        Bits -> packed folder of the trained uniform system of these bits:
        clusters inherit their weights, and "nas" mixes them.
    stage : speechbrain.Stage
        That the Brain is told when it runs.
    folder : str or None
        Of scores.json and plan.json; None: the hparams' output_folder, and no
        files where there is none.
    progress : bool
        Shows a progress bar.

    Returns
    -------
    plan : BitPlan
        What the modules are quantized to now.
    """
    if brain.optimizers_dict is not None:
        raise ValueError("choose_bits comes before brain.fit, not after it")
    quantizer = quantizer_of(
        brain, quantizer, include, exclude, vectors, scheme
    )
    limits = {
        **parse_budget(budget),
        "min_bits": min_bits,
        "equal_bits": as_list(equal_bits or quantizer.equal_bits),
    }
    request = _Request(scores, rounding, method, candidate_bits, limits)
    request.complete(brain, quantizer)
    load = partial(calibration_batches, brain, dataset, batches, loader_kwargs)
    calibration = BrainCalibration(
        quantizer.model, brain, load, stage, output, prototypes
    )
    store = PlanStore(
        _folder(brain, folder), brain.checkpointer, request.settings
    )
    return _chosen(brain, quantizer, request, calibration, store, progress)


@dataclass
class _Request:
    """How bits and weights are found; None becomes the usual way."""

    scores: str | Scorer | None
    rounding: str | None
    requested_method: str | EstimationMethod | None
    candidate_bits: tuple
    limits: dict  # those of `allocate_bits`
    method: EstimationMethod | None = None

    def complete(self, brain, quantizer):
        """Fill in the usual ways, and refuse what a Brain cannot do."""
        _check_scripting(brain, quantizer)
        method = self.requested_method
        self.method = _method_for(brain, method, self.candidate_bits)
        if method:
            tensors = named_tensors(quantizer.model)
            chosen = select(tensors, **quantizer.selection.patterns)
            self.method.check_tensors(chosen)
            quantizer.use_method(self.method)
        if self.scores is None:
            self.scores = "kl" if self.method.keeps_plan else "uniform"
        self.rounding = self.rounding or _usual_rounding(self.method, brain)
        check_rounding(self.rounding)

    @property
    def settings(self):
        """What a plan depends on, for JSON."""
        scores, method = self.scores, self.requested_method
        return {
            "scores": scores if isinstance(scores, str) else _class(scores),
            **self.limits,
            "rounding": self.rounding,
            "candidate_bits": list(self.candidate_bits),
            "method": method
            if isinstance(method, str | None)
            else _class(method),
        }


def _class(way):
    """How an object is named in the files of a training."""
    return type(way).__name__


def _chosen(brain, quantizer, request, calibration, store, progress):
    """The plan of a complete request, which the modules follow from now on."""
    quantizer.dequantize()
    pipeline = Pipeline(
        calibration=calibration,
        quantize=quantizer.quantize,
        selection=quantizer.selection,
        scheme=quantizer.scheme,
        limits=request.limits,
        scorer=scorer_of(
            request.scores, quantizer.scheme, request.candidate_bits
        ),
        store=store,
        method=request.method,
        rounding=request.rounding,
        prototypes=calibration.prototypes,
    )
    is_new = store.is_new
    pipeline.run(progress)
    if request.requested_method:
        attach(brain, request.method, quantizer.model)
    if is_new and hasattr(brain, "hparams"):
        log_stats(brain.hparams, plan_stats(quantizer.plan, store.folder))
    return quantizer.plan


def pack_results(output_folder, packed=None, min_key=None, max_key=None):
    """Writes the best checkpoint of a quantized training as a packed model.

    Builds the modules anew from the folder's own hyperparams.yaml, and needs
    neither `train.py` nor data.

    Arguments
    ---------
    output_folder : str or Path
        That of the training: hyperparams.yaml and, where bits were chosen,
        plan.json are read. The hparams need `modules` and `checkpointer`.
    packed : str or Path or None
        Folder to write; output_folder/packed if not given.
    min_key, max_key : str or None
        Which checkpoint, as in `Brain.evaluate`; the latest if not given.

    Returns
    -------
    path : Path
        The model.safetensors.
    """
    folder = Path(output_folder)
    packed = check_folder(packed or folder / "packed")
    source = folder / "hyperparams.yaml"
    if not source.exists():
        raise FileNotFoundError(
            f"no {source}: name the output_folder of a finished training"
        )
    # HyperPyYAML writes anchors anew when it loads, and mixes up equal names.
    text = source.read_text(encoding="utf-8")
    hparams = load_hyperpyyaml(ANCHOR.sub(r"\1saved\2", text))
    missing = [key for key in ("modules", "checkpointer") if key not in hparams]
    if missing:
        raise ValueError(
            f"{source} has no key {missing[0]!r}, which this needs"
        )
    quantizer = _quantizer(hparams, folder)
    checkpoint = recover_whole(
        hparams["checkpointer"], min_key=min_key, max_key=max_key
    )
    if checkpoint is None:
        raise ValueError(
            f"no checkpoint in {hparams['checkpointer'].checkpoints_dir}: "
            "finish the training first"
        )
    if quantizer.method:
        quantizer.method.finish(quantizer.model)
    return quantizer.pack(packed)


def system_of(model, folder):
    """What metrics.json says of a system beside its scores.

    Arguments
    ---------
    model : torch.nn.Module
        What is scored, quantized or in full precision.
    folder : str or Path
        Output folder, where `choose_bits` has left what it was asked for.

    Returns
    -------
    dict
        "system", "bits", "average_bits", "estimator", "variant" and, of the
        same model in full precision, "fp32_bytes".

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import quantize_
    >>> layer = torch.nn.Linear(4, 2)
    >>> system_of(layer, getfixture("tmpdir"))["system"]
    'fp32'
    >>> _ = quantize_(layer, 4)
    >>> system_of(layer, getfixture("tmpdir"))["bits"]
    4.0
    """
    tensors = named_tensors(model)
    values = [t.weight for t in tensors.values()]
    values += stored_buffers(model).values()
    size = {"fp32_bytes": 4 * sum(value.numel() for value in values)}
    if not any(t.fake_quantize for t in tensors.values()):
        full = dict.fromkeys(("estimator", "variant"))
        full = {"bits": 32, "average_bits": 32, **full, **size}
        return {"system": "fp32", **full}
    plan = bit_plan(model)
    has_settings = (Path(folder) / SETTINGS).exists()
    settings = earlier_settings(folder) if has_settings else {}
    rounding = settings.get("rounding")
    return {
        "system": settings.get("scores", "uniform"),
        "bits": settings.get("average_bits", round(plan.average_bits, 2)),
        "average_bits": plan.average_bits,
        "estimator": settings.get("method") or "log_step",
        "variant": f"{rounding}, {plan.codebook}" if rounding else None,
        **size,
    }


def _quantizer(hparams, folder):
    """The quantizer of the hparams, or one for the plan that was chosen."""
    path = folder / "plan.json"
    quantizer = hparams.get("quantizer")
    if not path.exists():
        if quantizer is None:
            raise ValueError(
                f"{folder} is of no quantized training: its hyperparams.yaml "
                "has no quantizer, and it holds no plan.json"
            )
        return quantizer
    plan = BitPlan.load(path)
    if quantizer is None:
        quantizer = Quantizer(hparams["modules"], None)
    has_settings = (folder / SETTINGS).exists()
    method = earlier_settings(folder).get("method") if has_settings else None
    if method in METHODS:
        quantizer.use_method(method_of(method))
    quantizer.quantize(plan)
    return quantizer
