"""One line between building a Brain and `fit`: bits by what its data says."""

from contextlib import contextmanager
from functools import partial

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..allocation.kl import FORMS, KLScores
from ..allocation.solver import allocate_bits
from ..allocation.sweep import OutputScores
from ..brains.outlook import foresee
from ..quantization.plan import BitPlan
from .brain_network import (
    Distribution,
    Objective,
    calibration_batches,
    ready_to_score,
    summed,
)
from .brain_quantizer import quantizer_of
from .budget import parse_budget
from .calibrated import check_rounding, quantize_by_plan
from .limits import check_limits
from .plan_files import PlanFiles
from .quantizer_options import as_list
from .scorers import CANDIDATES, check_needs, scorer_for

logger = get_logger(__name__)


def choose_bits(
    brain,
    dataset,
    scores="kl",
    budget=4,
    *,
    quantizer=None,
    include=("*",),
    exclude=(),
    output=None,
    batches=8,
    loader_kwargs=None,
    candidate_bits=CANDIDATES,
    min_bits=2,
    equal_bits=(),
    rounding="calibrated",
    stage=sb.Stage.VALID,
    folder=None,
    progress=True,
):
    """Chooses the bits of every cluster of a Brain's modules, and quantizes.

    To be called after the Brain is built, with its full-precision weights
    loaded, and before `fit`. Uses nothing but the Brain's own
    `compute_forward` and `compute_objectives`, in eval mode. The plan is left
    in the output folder; the same call finds it there when a training is
    resumed, and chooses nothing anew. It rounds anew, to the same values,
    where no checkpoint is there that has them.

    Arguments
    ---------
    brain : speechbrain.Brain
        Before `fit`.
    dataset : Dataset or DataLoader
        Data to choose by, best what the model was not trained on.
    scores : str or object
        "kl": divergence of the model's own output distribution. "hessian":
        curvature of its loss. "loss": increase of its loss. "weight_error"
        and "size" look at weights only. "uniform": the same bits for all. Or
        an object such as `KLScores`.
    budget : int, float or str
        Bits on average, or bytes (see `parse_budget`).
    quantizer : Quantizer or None
        None: that of the hparams, or a new one of all the Brain's modules.
    include, exclude : sequence of str
        For a new quantizer.
    output : callable or None
        Predictions -> their log-probabilities or mask; None looks for them
        (see `find_distribution`).
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
    rounding : str
        "calibrated": layers that are matrices (see `is_matrix_layer`) are
        fitted to what they put out in full precision, which changes biases
        and norms that stay in float as well. "nearest" needs no data.
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
    check_rounding(rounding)
    budget = parse_budget(budget)
    quantizer = quantizer_of(brain, quantizer, include, exclude)
    limits = {
        **budget,
        "min_bits": min_bits,
        "equal_bits": as_list(equal_bits or quantizer.equal_bits),
    }
    choice = {"rounding": rounding, "candidate_bits": list(candidate_bits)}
    files = PlanFiles(brain, folder, scores, **limits, **choice)
    plan = files.earlier_plan()
    new = plan is None
    scorer = scorer_for(scores, quantizer, candidate_bits) if new else None
    check_needs(scorer)
    fitted = rounding == "calibrated"
    fitted = fitted and not files.weights_follow(quantizer.model)
    quantizer.dequantize()
    if new:
        check_limits(quantizer, scorer, limits)
    # Neither loading nor running may change how training goes on.
    with torch.random.fork_rng():
        found = ()
        if if_main_process() and (fitted or (scorer and scorer.needs)):
            found = calibration_batches(brain, dataset, batches, loader_kwargs)
        if new:
            place = brain, quantizer, scorer, output, found, stage, progress
            choose = partial(_chosen, quantizer, limits, files, scorer, place)
            plan = _on_main_process(choose)
        place = brain, found if fitted else (), stage
        quantize_by_plan(quantizer, plan, *place, progress)
    if new:
        files.save_plan(plan)
    return quantizer.plan


def _chosen(quantizer, limits, files, scorer, place):
    """The best plan within limits; leaves its scores."""
    if scorer is None:
        return _uniform(quantizer, limits)
    table = _score(*place)
    files.save_table(table)
    plan = allocate_bits(table, **limits)
    foresees = getattr(scorer, "foresees", True)
    if foresees and len(table.candidate_bits) > 1:
        logger.info(foresee(table, plan)[1])
    return plan


def _score(brain, quantizer, scorer, output, batches, stage, progress):
    """The score table of the quantizer's clusters."""
    place = (quantizer.model, brain, batches, stage)
    by_loss = "loss" in scorer.needs
    network = Objective(*place) if by_loss else Distribution(output, *place)
    known = {"inputs": network.numbers, "loss": summed}
    base = getattr(scorer, "base", scorer)
    with ready_to_score(brain, stage), _twice_differentiable():
        if isinstance(base, OutputScores):
            base.chunk = 1  # a batch is an item, and has its own shape
        if isinstance(base, KLScores):
            _take_form(base, network)
        return scorer(
            network,
            *[known[need] for need in scorer.needs],
            **quantizer.patterns,
            prefix="",
            progress=progress,
        )


@contextmanager
def _twice_differentiable():
    """Say what to do where autograd has no second derivative."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "derivative" not in str(error):
            raise
        raise ValueError(
            f"the loss cannot be differentiated twice ({error}): use "
            'HessianScores(differences=True), or scores="hessian", which has it'
        ) from error


def _take_form(scorer, network):
    """The divergence that suits the model's distribution."""
    with torch.no_grad():
        network(network.numbers[:1])
    if network.form == "categorical" or scorer.method == "categorical_kl":
        scorer.summand = FORMS[network.form]
        scorer.method = f"{network.form}_kl"
        scorer.signed = False


def _uniform(quantizer, limits):
    """The plan that gives all the same bits."""
    quantizer.quantize(limits["average_bits"])
    plan = quantizer.plan
    quantizer.dequantize()
    return plan


def _on_main_process(choose):
    """The plan of the main process, for all."""
    if not torch.distributed.is_initialized():
        return choose()
    content = [choose().to_dict() if if_main_process() else None]
    torch.distributed.broadcast_object_list(content)
    return BitPlan.from_dict(content[0])
