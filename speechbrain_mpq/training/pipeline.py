"""The one pipeline: scores, bits within a budget, quantization, rounding.

All front doors call it: `choose_bits` for any Brain, `QuantizationBrain` for
experiments of our own, `speechbrain_mpq.run` for untouched recipes. What is
special about them is in the `Calibration` that they bring. A `PlanStore` keeps
the files that tell a resumed training which bits were chosen, and why.

A mixed-precision system may start from uniform prototypes, trained models of
one bit width: it inherits every cluster from the one that has its bits.
"""

import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from speechbrain.utils.distributed import (
    MainProcessContext,
    if_main_process,
    main_process_only,
)
from speechbrain.utils.logger import get_logger

from ..allocation.analysis import (
    expected_gain,
    write_additivity,
    write_expected_gain,
)
from ..allocation.baselines import RandomScores
from ..allocation.scores import Scorer, ScoreTable
from ..allocation.sharing import process
from ..allocation.solver import allocate_bits
from ..quantization.groups import split_name
from ..quantization.packing import read_model, save_packed
from ..quantization.plan import BitPlan, Scheme, Selection
from ..quantization.quant_api import clusters, dequantize_, quantize_
from ..quantization.tensors import named_tensors
from ..utils import read_text, scratch_folder, strict_json, write_json
from .calibration import Calibration
from .methods import EstimationMethod
from .quantizer import check_uniform_bits
from .rounding import CalibratedRounding

logger = get_logger(__name__)


SETTINGS = "chosen.json"  # beside plan.json: what the plan was asked for
PARTS = "scoring"  # folder of what is scored so far
ROUNDS = 8  # until a packed file fits: names and headers take bytes, too


class PlanStore:
    """What is left in the output folder, and found there again.

    Arguments
    ---------
    folder : str or Path or None
        Of scores.json, plan.json and what a report needs; None: no files.
    checkpointer : speechbrain.utils.checkpoints.Checkpointer or None
        Of the training that follows.
    settings : dict or None
        What a plan depends on, for JSON; None: whoever has the folder takes
        care that it is of the same settings.
    tell : callable
        Takes the sentence on what mixed precision can win.
    """

    def __init__(
        self, folder, checkpointer=None, settings=None, tell=logger.info
    ):
        self.tell = tell
        self.folder = Path(folder) if folder else None
        self.checkpointer = checkpointer
        self.settings = settings

    @property
    def is_new(self):
        """Whether no earlier start has left anything."""
        if self.folder is None:
            return True
        names = "plan.json", SETTINGS
        return not any((self.folder / name).exists() for name in names)

    def earlier_plan(self):
        """The plan of an earlier start with the same settings, or None."""
        path = self.folder and self.folder / "plan.json"
        if not path or not path.exists():
            self._refuse_checkpoints()
            return None
        if self.settings is not None:
            self._check_settings(path)
        logger.info(f"Continuing with the bit plan in {path}")
        return BitPlan.load(path)

    def begin(self):
        """Note what a training is asked for that finds its plan itself.

        Refused where an earlier start was asked for something else.
        """
        if self.folder is None or self.settings is None:
            return
        path = self.folder / SETTINGS
        if path.exists():
            self._check_settings(path)
            return
        self._refuse_checkpoints()
        if if_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.settings)

    def _refuse_checkpoints(self):
        """Refuse checkpoints of a training that was not quantized."""
        if self.settings is None or not self.checkpointer:
            return
        if self.checkpointer.find_checkpoint():
            raise ValueError(
                f"{self.checkpointer.checkpoints_dir} holds checkpoints "
                "but no plan.json is beside them: fit would load weights "
                "that the bits were not chosen for. Load them with a "
                "Pretrainer instead, and train in another output_folder"
            )

    def _check_settings(self, path):
        """Refuse a plan that was chosen with others."""
        # Older files do not tell these.
        older = {"candidate_bits": self.settings.get("candidate_bits")}
        stored = {
            "rounding": "nearest",
            **older,
            **earlier_settings(self.folder),
        }
        stored.setdefault("method", self.settings.get("method"))
        if stored != self.settings:
            raise ValueError(
                f"{path} was chosen with {stored}, asked for is "
                f"{self.settings}: train in another output_folder"
            )

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

    def save_gain(self, table, plan, limits):
        """Log what mixed precision can win, and keep it for the report."""
        if self.folder and "average_bits" in limits:
            bits, least = limits["average_bits"], limits["min_bits"]
            write_expected_gain(self.folder, table, plan, bits, least)
        else:
            self.tell(expected_gain(table, plan)[1])

    @property
    def parts_folder(self):
        """Where finished parts of the scores are, until there is a plan."""
        return self.folder and self.folder / PARTS

    def remove_parts(self):
        """Delete what only a kill would have needed."""
        if self.folder and if_main_process():
            shutil.rmtree(self.parts_folder, ignore_errors=True)

    def save_plan(self, plan):
        """Keep the plan, which a resumed training needs."""
        if self.folder and if_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.settings is not None:
                write_json(self.folder / SETTINGS, self.settings)
            plan.save(self.folder / "plan.json")


def earlier_settings(folder):
    """What the plan in a folder was asked for."""
    path = Path(folder) / SETTINGS
    try:
        return dict(strict_json(read_text(path)))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not tell what the plan.json beside it was asked "
            f"for ({error}): train in another output_folder"
        ) from error


@dataclass
class Pipeline:
    """From a full-precision model and calibration data to quantized weights."""

    calibration: Calibration  # of the model in full precision
    quantize: callable  # quantizes the model in place to a plan or to bits
    selection: Selection  # what is quantized
    scheme: Scheme  # how it is represented
    limits: dict  # those of `allocate_bits`; budget_bytes means the packed file
    scorer: Scorer | None = None  # of the scheme; None: the same bits for all
    # where an earlier plan is found and the new one is left
    store: PlanStore = field(default_factory=lambda: PlanStore(None))
    # how weights are found in the training that follows
    method: EstimationMethod = field(default_factory=EstimationMethod)
    rounding: str = "nearest"  # "calibrated" or "nearest"
    # bits -> packed folder of the trained uniform system of these bits
    prototypes: dict | None = None
    # measure some plans against what the scores predict, too
    additivity: bool = False
    seconds: dict = field(default_factory=dict)  # what stages took

    def __post_init__(self):
        self.calibration.granularity = self.scheme.granularity

    @property
    def model(self):
        """What is quantized."""
        return self.calibration.model

    def check(self):
        """Refuse what cannot be done, before any work."""
        self.method.check(self.scheme, self.rounding, self.scorer)
        patterns = self.selection.patterns
        cut = {"rows": self.scheme.rows, "gates": self.scheme.gates}
        clusters(self.model, **patterns, **cut)
        unknown = set(self.scorer.needs if self.scorer else ())
        unknown -= set(self.calibration.gives)
        if unknown:
            raise ValueError(
                f"{type(self.scorer).__name__} needs {sorted(unknown)}, which "
                "no Brain can give it: use other scores, such as "
                'scores="kl"'
            )
        self._check_file()
        if self.method.keeps_plan:
            check_limits(
                self.calibration, self.selection, self.scorer, self.limits
            )
        else:
            self.method.first_plan(self.limits)
        if self.scorer and self.scorer.needs:
            self.calibration.check()

    def _check_file(self):
        """Refuse a budget in bytes that no file can keep."""
        budget = self.limits.get("budget_bytes")
        chooses = self.scorer or self.method
        if budget is None or chooses.candidate_bits is None:
            return
        low = max(chooses.candidate_bits[0], self.limits["min_bits"])
        plan = self._uniform(low)
        least = self.calibration.packed_bytes(plan)
        if least > budget:
            whole = sum(c.bytes for c in plan.clusters.values())
            raise ValueError(
                f"a budget of {budget} bytes is out of reach: the files take "
                f"at least {least} bytes, {whole} for weights of {low} bits "
                f"and {least - whole} for what stays in float, buffers and "
                "headers; exclude less, allow fewer bits, or allow more bytes"
            )

    def run(self, progress=True):
        """Quantize the model in place, to the same values in all processes."""
        # Neither loading nor running may change how training goes on.
        with torch.random.fork_rng():
            plan = self._plan(progress)
            if self.prototypes and isinstance(plan, BitPlan):
                self._inherit(plan)
            with MainProcessContext():  # the others wait for its values
                calibrated = self._calibrated()
                self.quantize(plan)
                if calibrated:
                    calibrated.apply_(progress)
        same_in_all_processes_(self.model)
        if not self.method.keeps_plan:
            self.method.watch(self.model, self.limits, self.store)

    def _plan(self, progress):
        """The plan of an earlier start, or a new one; or the bits of all."""
        if not self.method.keeps_plan:
            self.check()
            self.store.begin()
            return self.method.first_plan(self.limits)
        plan = self.store.earlier_plan()
        if plan is not None:
            return plan
        self.check()
        if self.scorer is None:
            plan = self._uniform(self.limits["average_bits"])
        else:
            started = time.perf_counter()
            same_in_all_processes_(self.model)
            score = self._score
            if not self.scorer.shared:  # the others wait
                score = main_process_only(score)
            plan = score(progress)
            self.seconds["scores"] = time.perf_counter() - started
        self.store.save_plan(plan)
        self.store.remove_parts()
        return plan

    def _uniform(self, bits):
        """The plan that gives all the same bits."""
        patterns = self.selection.patterns
        plan = quantize_(self.model, bits, **patterns, scheme=self.scheme)
        dequantize_(self.model)
        return plan

    def _score(self, progress):
        """The best plan by the scores; made prototypes where they need some."""
        choose = partial(
            plan_by_scores,
            self.calibration,
            self.scorer,
            self.selection,
            self.limits,
            self.store,
            progress,
            self.additivity,
        )
        if "prototypes" not in self.scorer.needs or self.prototypes:
            return choose()
        logger.info(
            "No prototypes were given: the search mixes the model's own "
            "weights, rounded to each of the candidates"
        )
        with scratch_folder() as folder:
            self.calibration.prototypes = rounded_prototypes(
                self.model, self.selection, self.scorer, folder
            )
            return choose()

    def _calibrated(self):
        """Calibrated rounding where it is asked for and not done already."""
        calibrates = self.rounding == "calibrated" and if_main_process()
        if not calibrates or self.store.weights_follow(self.model):
            return None
        self.calibration.check()
        return CalibratedRounding(self.calibration)

    def _inherit(self, plan):
        """Give the clusters their weights from the prototypes of their bits."""
        used = {cluster.bits for cluster in plan.clusters.values()}
        loaded = {
            bits: load_prototype(folder)
            for bits, folder in self.prototypes.items()
            if bits in used
        }
        inherit_(self.model, plan, loaded)


def check_limits(calibration, selection, scorer, limits):
    """Refuse limits that no plan can keep, before any scoring."""
    if scorer is None:
        if "average_bits" not in limits:
            raise ValueError(
                "uniform bits need a budget in bits, such as 4: or use "
                'scores="kl"'
            )
        check_uniform_bits(limits["average_bits"])
        return
    # Any scores will do: whether there is a plan depends on sizes only.
    random = RandomScores(scorer.candidate_bits, scheme=scorer.scheme)
    network = calibration.model.get_submodule(calibration.prefix)
    table = random.score(network, {}, selection)
    table = calibration.completed(table, random)
    allocate_within(table, limits, packed_bytes=lambda plan: 0)


def allocate_within(table, limits, packed_bytes):
    """The best plan for a budget; one in bytes holds for the packed file."""
    if "budget_bytes" not in limits:
        return allocate_bits(table, **limits)
    limits = dict(limits)
    budget = limits.pop("budget_bytes")
    most = allocate_bits(table, average_bits=max(table.candidate_bits))
    allowed = min(budget, most.bytes)
    for _ in range(ROUNDS):
        plan = allocate_bits(table, budget_bytes=allowed, **limits)
        stored = packed_bytes(plan)
        if stored <= budget:
            return plan
        allowed = min(allowed - 1, budget - (stored - plan.bytes))
    raise ValueError(
        f"no plan found whose files take at most {budget} bytes: the last one "
        f"takes {stored}"
    )


def plan_by_scores(
    calibration,
    scorer,
    selection,
    limits,
    store,
    progress=True,
    additivity=False,
):
    """The best plan within limits by the scores of a model; leaves both."""
    scorer, network, values = calibration.prepared(scorer)
    with calibration.ready(), _twice_differentiable():
        table = scorer.score(
            network, values, selection, progress, store.parts_folder
        )
    table = calibration.completed(table, scorer)
    logger.info(f"Scored {len(table.scores)} clusters")

    @main_process_only
    def choose():
        store.save_table(table)
        plan = allocate_within(table, limits, calibration.packed_bytes)
        if scorer.additive and len(table.candidate_bits) > 1:
            store.save_gain(table, plan, limits)
        return plan

    plan = choose()
    if additivity and scorer.measure and store.folder:
        where = {**selection.patterns, "prefix": selection.prefix}
        needed = [values[need] for need in scorer.needs]
        write_additivity(
            store.folder, table, plan, scorer, network, needed, **where
        )
    return plan


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


def rounded_prototypes(model, selection, scorer, folder):
    """Packed uniform systems of a model's own weights, rounded to nearest."""
    prototypes = {}
    for bits in scorer.candidate_bits:
        quantize_(model, bits, **selection.patterns, scheme=scorer.scheme)
        try:
            path = Path(folder, str(bits))
            prototypes[bits] = save_packed(model, path).parent
        finally:
            dequantize_(model)
    return prototypes


def same_in_all_processes_(model):
    """Give a model the main process's values of parameters and buffers."""
    if process()[1] > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def load_prototype(folder):
    """The values of a packed model, by parameter name."""
    if not Path(folder, "model.safetensors").exists():
        raise FileNotFoundError(
            f"no prototype in {folder}: make it with `python train.py "
            "hparams/uniform_4bit.yaml --bits N` or name another"
        )
    return read_model(folder).values({})


def inherit_(model, plan, prototypes):
    """Give a plain model the prototypes' weights, cluster by cluster.

    What the plan leaves in full precision comes from the prototype that most
    parameters come from.
    """
    used = {cluster.bits for cluster in plan.clusters.values()}
    missing = sorted(used - set(prototypes))
    if missing:
        raise ValueError(
            f"the plan uses {missing} bits and there are prototypes of "
            f"{sorted(prototypes)} only: make the others, or choose among "
            "these as candidate_bits"
        )
    count = dict.fromkeys(used, 0)
    source = {}
    for cluster in plan.clusters.values():
        count[cluster.bits] += cluster.parameters
        source.update(dict.fromkeys(cluster.tensors, cluster.bits))
    most = max(count, key=count.get)
    tensors = named_tensors(model)
    for bits in used:
        _check_architecture(prototypes[bits], tensors, bits)
    with torch.no_grad():
        for name, tensor in tensors.items():
            values = prototypes[source.get(name, most)][name]
            tensor.parameter.copy_(values)
        for name, bits in source.items():
            parameter, rows = split_name(name)
            if rows is not ...:
                values = prototypes[bits][parameter][rows]
                tensors[parameter].parameter[rows] = values


def _check_architecture(values, tensors, bits):
    """Raise ValueError unless a prototype has the model's parameters."""
    for name, tensor in tensors.items():
        own = tuple(values[name].shape) if name in values else "nothing"
        expected = tuple(tensor.parameter.shape)
        if own != expected:
            raise ValueError(
                f"the {bits}-bit prototype is of another architecture: "
                f"{name} is {own}, the model's {expected}; make prototypes "
                "of this model"
            )


def _train_loggers(hparams):
    """The train loggers among a Brain's hyper-parameters, each once."""
    # Importing it says that there is no torchvision: the recipe does that
    from speechbrain.utils.train_logger import TrainLogger

    loggers = {
        id(value): value
        for value in hparams.values()
        if isinstance(value, TrainLogger)
    }
    return list(loggers.values())


@main_process_only
def log_stats(hparams, stats, test_stats=None):
    """Log statistics with all train loggers of a Brain's hyper-parameters.

    Arguments
    ---------
    hparams : dict or SimpleNamespace
        Of a Brain.
    stats : dict of str -> number
        Of the model: "bits", "bytes".
    test_stats : dict of str -> number or None
        What it was scored.
    """
    hparams = hparams if isinstance(hparams, dict) else vars(hparams)
    for logger in _train_loggers(hparams):
        file = getattr(logger, "save_file", None)
        if file:  # bits are chosen before some recipes make their folder
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        logger.log_stats(stats_meta=stats, test_stats=test_stats)


def plan_stats(plan, folder=None):
    """Compute what is logged of a bit plan.

    Arguments
    ---------
    plan : BitPlan
        What a model is quantized to.
    folder : str or Path or None
        Of a scores.json, where the bits were chosen by scores.

    Returns
    -------
    dict of str -> number
        "bits", average of a quantized weight; "bytes" of the weights; where
        there are scores, "score", their sum over the clusters at these bits.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import quantize_
    >>> plan_stats(quantize_(torch.nn.Linear(8, 4), 4, exclude="bias"))
    {'bits': 4.0, 'bytes': 36}
    """
    stats = {"bits": float(plan.average_bits), "bytes": plan.bytes}
    path = Path(folder, "scores.json") if folder else None
    if path is None or not path.exists():
        return stats
    scores = ScoreTable.load(path).scores
    chosen = {name: cluster.bits for name, cluster in plan.clusters.items()}
    if all(bits in scores.get(name, {}) for name, bits in chosen.items()):
        stats["score"] = sum(
            scores[name][bits] for name, bits in chosen.items()
        )
    return stats
