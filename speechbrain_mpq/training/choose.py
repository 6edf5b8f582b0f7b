"""What no plan can keep to, told before the bits are chosen.

Scores by the names that a user types.

The files that tell a resumed training which bits were chosen.

What a budget says: bits on average, or bytes.

One line between building a Brain and `fit`: bits by what its data says.
"""

import copy
import json
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..allocation.analysis import expected_gain
from ..allocation.baselines import RandomScores, SizeScores, WeightErrorScores
from ..allocation.hessian import HessianScores
from ..allocation.output_scores import FORMS, KLScores, LossScores
from ..allocation.solver import allocate_bits
from ..allocation.sweep import OutputScores
from ..quantization.plan import BitPlan
from ..utils import write_json
from .brain_network import (
    Distribution,
    Objective,
    calibration_batches,
    ready_to_score,
    sum_of_losses,
)
from .quantizer import as_list, check_uniform_bits, quantizer_of
from .rounding import check_rounding, quantize_by_plan


def check_limits(quantizer, scorer, limits):
    """Refuses limits that no plan can keep, before any scoring."""
    if scorer is None:
        if "average_bits" not in limits:
            raise ValueError(
                "uniform bits need a budget in bits, such as 4: or use "
                'scores="kl"'
            )
        check_uniform_bits(limits["average_bits"])
        return
    candidates = getattr(getattr(scorer, "base", scorer), "candidate_bits", ())
    if candidates:
        # Any scores will do: whether there is a plan depends on sizes only.
        table = {**quantizer.table, "codebook": quantizer.codebook}
        scores = RandomScores(candidates, **table)
        scored = scores(quantizer.model, **quantizer.patterns, prefix="")
        allocate_bits(scored, **limits)


CANDIDATES = (2, 3, 4, 6, 8, 16)
PROBES = 4  # of each batch, for the Hessian
SCORES = ("kl", "hessian", "loss", "weight_error", "size", "uniform")


def check_scores(scores):
    """Refuses names that are no scores.

    Example
    -------
    >>> check_scores("kl")
    >>> check_scores("lk")
    Traceback (most recent call last):
    ...
    ValueError: scores must be one of ('kl', ...) or an object such as ...
    """
    if isinstance(scores, str) and scores not in SCORES:
        raise ValueError(
            f"scores must be one of {SCORES} or an object such as KLScores(), "
            f"not {scores!r}"
        )


def _scorer_for(scores, quantizer, candidate_bits=CANDIDATES):
    """An object that scores, with the quantizer's tables."""
    check_scores(scores)
    table = {**quantizer.table, "codebook": quantizer.codebook}
    if scores == "uniform":
        return None
    if scores == "hessian":
        scorer = HessianScores(
            candidate_bits,
            probes=PROBES,
            distribution="rademacher",
            granularity=table["granularity"],
            differences=True,
        )
    elif isinstance(scores, str):
        kinds = {
            "kl": KLScores,
            "loss": LossScores,
            "weight_error": WeightErrorScores,
            "size": SizeScores,
        }
        scorer = kinds[scores](candidate_bits, **table)
    else:
        scorer = copy.deepcopy(scores)
    _check_tables(scorer, table)
    return scorer


def _check_needs(scorer):
    """Refuses scores that need more than a Brain can give."""
    if scorer is None:
        return
    unknown = sorted(set(scorer.needs) - {"inputs", "loss"})
    if unknown:
        raise ValueError(
            f"{type(scorer).__name__} needs {unknown}, which no Brain can "
            f"give it: use one of {SCORES}"
        )


def _check_tables(scorer, table):
    """Scores must be of the tables that the model gets."""
    defaults = {"granularity": "tensor", "codebook": "midtread", "rows": None}
    base = getattr(scorer, "base", scorer)
    for key, asked in table.items():
        scored = getattr(base, key, defaults[key])
        if scored != asked:
            raise ValueError(
                f"{type(base).__name__} scores {key} {scored!r}, the quantizer "
                f"has {asked!r}: give both the same, or choose other scores"
            )


logger = get_logger(__name__)
SETTINGS = "chosen.json"  # beside plan.json: what the plan was asked for


class PlanFiles:
    """What is left in the output folder, and found there again.

    Arguments
    ---------
    brain : speechbrain.Brain
        Its hparams' output_folder and its checkpointer are looked at.
    folder : str or Path or None
        Instead of the output_folder; no files where there is neither.
    scores : str or object
        What the bits are chosen by.
    **settings : dict
        What else a plan depends on, for JSON.
    """

    def __init__(self, brain, folder, scores, **settings):
        own = getattr(getattr(brain, "hparams", None), "output_folder", None)
        folder = folder or own
        self.folder = Path(folder) if folder else None
        self.checkpointer = brain.checkpointer
        name = scores if isinstance(scores, str) else type(scores).__name__
        self.settings = {"scores": name, **settings}

    def earlier_plan(self):
        """The plan of an earlier start with the same settings, or None."""
        path = self.folder and self.folder / "plan.json"
        if not path or not path.exists():
            if self.checkpointer and self.checkpointer.find_checkpoint():
                raise ValueError(
                    f"{self.checkpointer.checkpoints_dir} holds checkpoints "
                    "but no plan.json is beside them: fit would load weights "
                    "that the bits were not chosen for. Load them with a "
                    "Pretrainer instead, and train in another output_folder"
                )
            return None
        # Older files do not tell these.
        older = {"candidate_bits": self.settings.get("candidate_bits")}
        found = {"rounding": "nearest", **older, **self._earlier_settings()}
        if found != self.settings:
            raise ValueError(
                f"{path} was chosen with {found}, asked for is {self.settings}"
                ": train in another output_folder"
            )
        logger.info(f"Continuing with the bit plan in {path}")
        return BitPlan.load(path)

    def _earlier_settings(self):
        """What the plan in the folder was asked for."""
        path = self.folder / SETTINGS
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not tell what the plan.json beside it was asked "
                f"for ({error}): train in another output_folder"
            ) from error

    def weights_follow(self, model):
        """Whether `fit` will load all weights of a model from a checkpoint."""
        if not (self.checkpointer and self.checkpointer.find_checkpoint()):
            return False
        loaded = {
            id(parameter)
            for saved in self.checkpointer.recoverables.values()
            if isinstance(saved, torch.nn.Module)
            for parameter in saved.parameters()
        }
        return all(id(parameter) in loaded for parameter in model.parameters())

    def save_table(self, table):
        """Keep the scores, from which other budgets can be solved."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            table.save(self.folder / "scores.json")

    def save_plan(self, plan):
        """Keep the plan, which a resumed training needs."""
        if self.folder and if_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, self.settings)
            plan.save(self.folder / "plan.json")


UNITS = {
    "bit": None,
    "bits": None,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


MOST_BITS = 32  # above it a bare number means bytes


def parse_budget(budget):
    """Arguments of `allocate_bits` for a budget."""
    unit = ""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", budget)
        if not found or found[2] and found[2].lower() not in UNITS:
            raise ValueError(_message(budget))
        budget, unit = float(found[1]), found[2].lower()
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(_message(budget))
    if not 0 < budget < float("inf"):
        raise ValueError(_message(budget))
    if unit and UNITS[unit]:
        return {"budget_bytes": int(budget * UNITS[unit])}
    if budget > MOST_BITS and not unit:
        return {"budget_bytes": int(budget)}
    whole = int(budget) if budget == int(budget) else budget
    return {"average_bits": whole}


def _message(budget):
    """How a budget is to be written."""
    return (
        f"budget {budget!r} is not understood: give bits on average such as 4 "
        'or "2.5 bit", or bytes such as 350000 or "350 KiB"'
    )


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
    scorer = _scorer_for(scores, quantizer, candidate_bits) if new else None
    _check_needs(scorer)
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
    additive = getattr(scorer, "foresees", True)
    if additive and len(table.candidate_bits) > 1:
        logger.info(expected_gain(table, plan)[1])
    return plan


def _score(brain, quantizer, scorer, output, batches, stage, progress):
    """The score table of the quantizer's clusters."""
    place = (quantizer.model, brain, batches, stage)
    by_loss = "loss" in scorer.needs
    network = Objective(*place) if by_loss else Distribution(output, *place)
    known = {"inputs": network.batch_indices, "loss": sum_of_losses}
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
        network(network.batch_indices[:1])
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
