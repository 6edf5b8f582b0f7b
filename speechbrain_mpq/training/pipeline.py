"""The one pipeline: scores, bits within a budget, quantization, rounding.

All front doors call it: `choose_bits` for any Brain, `QuantizationBrain` for
experiments of our own, `speechbrain_mpq.run` for untouched recipes. What is
special about them is in the `Calibration` that they bring.
"""

import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..allocation.analysis import write_additivity
from ..allocation.baselines import RandomScores
from ..allocation.scores import Scorer
from ..allocation.solver import allocate_bits
from ..quantization.packing import save_packed
from ..quantization.plan import BitPlan
from ..quantization.quant_api import clusters, dequantize_, quantize_
from ..quantization.scheme import Scheme, Selection
from .calibration import Calibration
from .methods import EstimationMethod
from .plan_store import PlanStore
from .prototypes import inherit_, load_prototype
from .quantizer import check_uniform_bits
from .rounding import CalibratedRounding

logger = get_logger(__name__)
ROUNDS = 4  # until a packed file fits: names and headers take bytes, too


@dataclass
class Pipeline:
    """From a full-precision model and calibration data to quantized weights.

    Arguments
    ---------
    calibration : Calibration
        Of the model in full precision.
    quantize : callable
        Quantizes the model in place to a plan or to bits.
    selection : Selection
        What is quantized.
    scheme : Scheme
        How it is represented.
    limits : dict
        Those of `allocate_bits`; budget_bytes means the packed file.
    scorer : Scorer or None
        Of the scheme; None: the same bits for all.
    store : PlanStore
        Where an earlier plan is found and the new one is left.
    method : EstimationMethod
        How weights are found in the training that follows.
    rounding : str
        "calibrated" or "nearest".
    prototypes : dict
        Bits -> packed folder of the trained uniform system of these bits.
    additivity : bool
        Measure some plans against what the scores predict, too.
    """

    calibration: Calibration
    quantize: callable
    selection: Selection
    scheme: Scheme
    limits: dict
    scorer: Scorer | None = None
    store: PlanStore = field(default_factory=lambda: PlanStore(None))
    method: EstimationMethod = field(default_factory=EstimationMethod)
    rounding: str = "nearest"
    prototypes: dict | None = None
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
        clusters(self.model, **patterns, rows=self.scheme.rows)
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
            calibrated = self._calibrated()
            self.quantize(plan)
            if calibrated:
                calibrated.apply_(progress)
        if torch.distributed.is_initialized():
            for tensor in self.model.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
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
            plan = _of_main_process(partial(self._score, progress))
            self.seconds["scores"] = time.perf_counter() - started
        self.store.save_plan(plan)
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
        with tempfile.TemporaryDirectory() as folder:
            self.calibration.prototypes = rounded_prototypes(
                self.model, self.selection, self.scorer, folder
            )
            return choose()

    def _calibrated(self):
        """Calibrated rounding where it is asked for and not done already."""
        asked = self.rounding == "calibrated" and if_main_process()
        if not asked or self.store.weights_follow(self.model):
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
    asked = limits.pop("budget_bytes")
    most = allocate_bits(table, average_bits=max(table.candidate_bits))
    allowed = min(asked, most.bytes)
    for _ in range(ROUNDS):
        plan = allocate_bits(table, budget_bytes=allowed, **limits)
        stored = packed_bytes(plan)
        if stored <= asked:
            return plan
        allowed = min(allowed - 1, asked - (stored - plan.bytes))
    raise ValueError(
        f"no plan found whose files take at most {asked} bytes: the last one "
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
        table = scorer.score(network, values, selection, progress)
    table = calibration.completed(table, scorer)
    store.save_table(table)
    logger.info(f"Scored {len(table.scores)} clusters")
    plan = allocate_within(table, limits, calibration.packed_bytes)
    if scorer.additive and len(table.candidate_bits) > 1:
        store.save_gain(table, plan, limits)
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


def _of_main_process(choose):
    """The plan of the main process, for all."""
    if not torch.distributed.is_initialized():
        return choose()
    content = [choose().to_dict() if if_main_process() else None]
    torch.distributed.broadcast_object_list(content)
    return BitPlan.from_dict(content[0])
