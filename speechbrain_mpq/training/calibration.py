"""What scores and calibrated rounding look at: a model's passes over some data.

Scorers take a network, inputs and a loss. `NetworkCalibration` has them as
tensors. `BrainCalibration` makes them from any Brain: an input is the number
of a batch, and the network runs the Brain's own `evaluate_batch` on it up to
what is needed, predictions for a divergence, `compute_objectives` for a loss.
Batches keep their own shapes. A Brain holds more than its modules: norms,
searches and metrics, which must not run or change meanwhile.

A Brain's passes may need what its `on_fit_start` and `on_stage_start` set:
losses of the last epoch, a vocoder, metrics. Bits are chosen before `fit`, so
that these hooks are rehearsed: they run as they are, but nothing is compiled
or loaded, and afterwards the Brain has the attributes, the checkpointer and
the random state of before. The hooks run again when `fit` does.
"""

import pickle
import random
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from unittest.mock import patch

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import LoopedLoader
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger
from torch.utils.data import DataLoader

from ..allocation.sharing import process
from ..allocation.sweep import evaluating, quantized_values, tensor_of
from ..quantization.packing import packed_file_bytes
from ..quantization.quant_api import dequantize_, quantize_
from .distributions import NoGradientError, ObjectiveNetwork, network_for
from .searches_and_metrics import (
    nothing,
    numpy_without_gradients,
    searching_once,
    without_metrics,
)

logger = get_logger(__name__)
SEED = 0  # of whatever is random in a forward pass, the same for all passes
_EMPTY = (
    "the calibration set is empty: give choose_bits data that the Brain can "
    "run on, such as the validation set. Scores that look at weights only "
    'need none with rounding="nearest"'
)


class Calibration:
    """Passes of a model over calibration data.

    Arguments
    ---------
    model : torch.nn.Module
        What is quantized; a plan has the names of its parameters.
    prefix : str
        Submodule that is scored and rounded; "" for the model itself.
    """

    passes = 1  # how many there are to run
    gives = ("inputs", "weights", "loss", "prototypes")  # what scores may need

    granularity = "tensor"  # of the scales in a packed file

    def __init__(self, model, prefix=""):
        self.model = model
        self.prefix = prefix

    def check(self):
        """Refuse a model that cannot be run yet, before any work."""

    def ready(self):
        """A context in which the model is run."""
        return evaluating(self.model)

    def run(self, index):
        """Run one pass, for whoever has hooks in the model."""
        raise NotImplementedError

    def loss(self, index):
        """The loss of one pass, [1]; None where nothing says what it is."""

    def packed_bytes(self, plan):
        """Bytes of the file that the model makes with a plan."""
        if plan.codebook != "entropy":
            return packed_file_bytes(self.model, plan, self.granularity)
        quantize_(self.model, plan)  # only rounded weights tell
        try:
            return packed_file_bytes(self.model)
        finally:
            dequantize_(self.model)

    def completed(self, table, scorer):
        """A score table, after a look at what it does not see."""
        return table

    def prepared(self, scorer):
        """What a scorer is called with.

        Returns
        -------
        scorer, network, values : tuple
            The scorer, maybe adapted; what it scores; what its `needs` name.
        """
        raise NotImplementedError


class NetworkCalibration(Calibration):
    """A submodule and the tensors that go into it.

    Arguments
    ---------
    model : torch.nn.Module
        What is quantized.
    prefix : str
        Submodule that maps the inputs to outputs; "" for the model itself.
    load : callable
        Returns, once it is needed, a dict of "inputs" [items, ...] and, for
        some scores, "weights" or "loss".
    prototypes : dict or None
        Bits -> packed folder of the uniform system of these bits.
    """

    def __init__(self, model, prefix, load, prototypes=None):
        super().__init__(model, prefix)
        self.network = model.get_submodule(prefix)
        self.load = load
        self.prototypes = prototypes

    @cached_property
    def values(self):
        """What scores may need."""
        return self.load()

    def ready(self):
        """A context in which the model is run."""
        return evaluating(self.network)

    def run(self, index):
        """Pass all inputs in one batch."""
        device = next(self.network.parameters()).device
        self.network(self.values["inputs"].to(device))

    def prepared(self, scorer):
        """See `Calibration.prepared`."""
        values = {"prototypes": self.prototypes, **self.values}
        return scorer, self.network, values


class BrainCalibration(Calibration):
    """A Brain's own passes over batches of its data.

    Arguments
    ---------
    model : torch.nn.Module
        What is quantized; parameters keep the names that they have in it.
    brain : speechbrain.Brain
        Runs the passes.
    load : callable
        Returns the batches of calibration data, once they are needed.
    stage : speechbrain.Stage
        That the Brain is told.
    output : callable or None
        Predictions -> distribution to compare; None compares all that are
        found.
    prototypes : dict or None
        Bits -> packed folder of the uniform system of these bits.
    """

    gives = ("inputs", "loss", "prototypes")

    def __init__(
        self,
        model,
        brain,
        load,
        stage=sb.Stage.VALID,
        output=None,
        prototypes=None,
    ):
        super().__init__(model)
        self.brain = brain
        self.load = load
        self.stage = stage
        self.output = output
        self.prototypes = prototypes
        self._searched = {}  # batch -> what searches have found in it
        self._rehearsal = Rehearsal(brain, stage)

    @cached_property
    def batches(self):
        """Batches of calibration data."""
        return self.load()

    @property
    def passes(self):
        """How many there are to run."""
        return len(self.batches)

    def check(self):
        """Refuse normalization whose statistics no batch has made yet."""
        fresh = unmeasured_norms(self.brain)
        if fresh:
            raise ValueError(
                f"{', '.join(fresh)}: no statistics yet, which the first "
                "training makes: give --weights or load trained ones before "
                "choose_bits. Fresh ones can be trained with "
                'scores="uniform" or others that look at weights only, and '
                'rounding="nearest"'
            )

    @contextmanager
    def ready(self):
        """Eval mode as in a stage that the Brain has started."""
        with evaluating(self.brain.modules), self._rehearsal.started():
            yield  # evaluate_batch itself sees to autocast

    def run(self, index, objective=False):
        """Predictions of a batch, or with `objective` the loss."""
        torch.manual_seed(SEED)
        method = "compute_objectives" if objective else "compute_forward"
        with ExitStack() as stack:
            stack.enter_context(without_metrics())
            found = self._searched.setdefault(index, {})
            stack.enter_context(searching_once(found))
            result_of = partial(
                _result_of, self.brain, method, self.batches[index], self.stage
            )
            try:
                return result_of()
            except AttributeError as error:
                return self._completed_start(error, result_of)

    def loss(self, index):
        """The Brain's own loss of a batch, [1]."""
        return ObjectiveNetwork(self)(index)

    def _completed_start(self, error, result_of):
        """What a pass returns once a training stage has started, too."""
        own = self.brain, getattr(self.brain, "hparams", None)
        if error.obj is None or not any(error.obj is x for x in own):
            raise error
        if self._rehearsal.start_training():
            try:
                return result_of()
            except AttributeError as again:
                return self._completed_start(again, result_of)
        raise ValueError(
            f"{type(self.brain).__name__} reads {error.name!r} when it "
            f"evaluates a batch, which it does not have before it trains: set "
            "it in __init__, on_fit_start or on_stage_start, or use scores "
            'that look at weights only, such as "weight_error", with '
            'rounding="nearest"'
        ) from error

    def prepared(self, scorer):
        """See `Calibration.prepared`."""
        if not scorer.needs:
            return scorer, self.model, {}
        scorer = scorer.one_by_one()
        if "loss" in scorer.needs:
            network = ObjectiveNetwork(self)
        else:
            scorer, network = network_for(scorer, self)
        values = {
            "inputs": torch.arange(self.passes),
            "loss": _sum_of_losses,
            "prototypes": self.prototypes,
        }
        return scorer, network, values

    def completed(self, table, scorer):
        """Refuse clusters that the scores do not see but the loss needs."""
        silent = [
            name
            for name, row in table.scores.items()
            if not any(row.values()) and self._changes(table, name, scorer)
        ]
        if silent and not any(any(r.values()) for r in table.scores.values()):
            raise ValueError(
                "quantizing changes nothing that is scored on this data, so "
                "that all scores are zero and say nothing about bits: give "
                "other data, name the outputs by output=, or use "
                'scores="weight_error"'
            )
        try:
            unused = self._unused({n: table.tensors[n] for n in silent})
        except NoGradientError as error:
            logger.warning(f"Not known whether the loss needs them: {error}")
            unused = silent
        needed = [name for name in silent if name not in unused]
        if needed:
            raise ValueError(
                f"{len(needed)} clusters do not change the outputs that are "
                f"compared, but the loss depends on them "
                f"({', '.join(needed[:3])}{', ...' if needed[3:] else ''}): "
                "nothing says how many bits they need. Name the outputs by "
                'output=, or use scores="loss"'
            )
        if unused:
            logger.warning(
                f"{len(unused)} clusters change neither outputs nor loss and "
                f"get the least bits: {', '.join(unused[:5])}"
                f"{', ...' if unused[5:] else ''}"
            )
        return table

    def _changes(self, table, cluster, scorer):
        """Whether quantizing a cluster to the least bits changes its values."""
        names, least = table.tensors[cluster], table.candidate_bits[0]
        values = quantized_values(self.model, names, least, scorer.scheme)
        return not all(
            torch.equal(value, tensor_of(self.model, name).weight)
            for name, value in values.items()
        )

    def _unused(self, clusters):
        """Those of some clusters that the loss does not depend on."""
        if not clusters:
            return []
        weights = {
            name: [tensor_of(self.model, t).parameter for t in tensors]
            for name, tensors in clusters.items()
        }
        flat = [weight for row in weights.values() for weight in row]
        reached = self.reached(ObjectiveNetwork(self), flat)
        return [
            name
            for name, row in weights.items()
            if not any(id(weight) in reached for weight in row)
        ]

    def reached(self, network, weights):
        """Ids of those weights that what a network puts out depends on."""
        flags = [weight.requires_grad for weight in weights]
        # Its recurrent networks have no backward pass in eval mode.
        plain = torch.backends.cudnn.flags(enabled=False)
        with self.ready(), torch.enable_grad(), plain:
            for weight in weights:
                weight.requires_grad_(True)
            try:
                output = network(torch.tensor(0))
                if not output.requires_grad:  # detached, as a hard decision
                    return set()
                total = (output + output.square() / 2).sum()
                gradients = torch.autograd.grad(
                    total, weights, allow_unused=True
                )
            finally:
                for weight, flag in zip(weights, flags):
                    weight.requires_grad_(flag)
        return {
            id(weight)
            for weight, gradient in zip(weights, gradients)
            if gradient is not None and gradient.any()
        }


class _Enough(Exception):
    """A pass has computed what it was run for."""


def _result_of(brain, name, batch, stage):
    """What a method of a Brain returns when it evaluates a batch."""
    # Recipes whose `compute_forward` takes other arguments than a batch, as in
    # separation, call it from an `evaluate_batch` of their own.
    results, plain = [], getattr(brain, name)

    def stop(*args, **kwargs):
        results.append(plain(*args, **kwargs))
        raise _Enough

    gradients = torch.is_grad_enabled()
    forward = brain.compute_forward if name != "compute_forward" else stop
    objectives = stop if name != "compute_forward" else None

    def with_gradients(method):
        def call(*args, **kwargs):
            with torch.set_grad_enabled(gradients):
                return method(*args, **kwargs)

        return call

    methods = {"compute_forward": with_gradients(forward)}
    if objectives:
        methods["compute_objectives"] = with_gradients(objectives)
    with patch.multiple(brain, **methods), numpy_without_gradients():
        try:
            brain.evaluate_batch(batch, stage)
        except _Enough:
            return results[0]
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            raise NoGradientError(
                f"{type(brain).__name__} takes values out of its {name} in "
                f"{stage} that have gradients ({error}): use scores that need "
                'none, such as "kl" or "loss", or another stage='
            ) from error
    raise ValueError(
        f"{type(brain).__name__}.evaluate_batch does not call {name}: scores "
        "and calibrated rounding need it; use scores that look at weights "
        'only, such as "weight_error", with rounding="nearest"'
    )


def _sum_of_losses(output, items):
    """The loss that scores ask for: the network has computed it."""
    del items
    return output.sum()


def calibration_batches(brain, dataset, count, loader_kwargs=None):
    """The first batches of some data, as the Brain would see them."""
    if count < 1:
        raise ValueError(f"calibration takes at least 1 batch, not {count}")
    if not isinstance(dataset, DataLoader | LoopedLoader):
        if hasattr(dataset, "__len__") and not len(dataset):
            raise ValueError(_EMPTY)
        dataset = brain.make_dataloader(
            dataset, sb.Stage.VALID, ckpt_prefix=None, **(loader_kwargs or {})
        )
    batches = _of_main_process(dataset, count)
    if not batches:
        raise ValueError(_EMPTY)
    return batches


def _of_main_process(dataset, count):
    """The first batches of some data, the same in all processes."""
    # A sampler may give each process other data, and augmentation draws anew.
    load = main_process_only(lambda: [b for _, b in zip(range(count), dataset)])
    try:
        return load()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if process()[1] == 1:
            raise
        raise ValueError(
            f"batches cannot be sent to other processes ({error}): choose "
            "bits in one process first, with the same output_folder"
        ) from error


def _parts(brain):
    """Modules of a Brain by name, those of its hyper-parameters included."""
    hparams = vars(getattr(brain, "hparams", None) or object).items()
    own = {n: v for n, v in hparams if isinstance(v, torch.nn.Module)}
    return {**own, **dict(brain.modules.named_modules())}


def unmeasured_norms(brain):
    """Names of global normalizations that have seen no batch."""
    norms = {
        id(part): name
        for name, part in _parts(brain).items()
        if isinstance(part, InputNormalization)
        and part.norm_type == "global"
        and not part.count
    }
    return sorted(norms.values())


_TRAINS = (
    "{} trains in its on_stage_start, which would change the weights that bits "
    'are chosen for: use scores that look at weights only, such as "size", '
    'with rounding="nearest"'
)


class Rehearsal:
    """Runs the hooks before a Brain's first batch, and undoes them."""

    def __init__(self, brain, stage):
        self.brain = brain
        self.stage = stage
        self._set = None  # attributes that on_fit_start has set, once it ran
        self._trains = False  # whether on_stage_start(TRAIN) is needed, too

    @contextmanager
    def started(self):
        """The Brain between the start of a stage and its first batch."""
        with as_before(self.brain):
            self._start_fit()
            self._start_stage()
            yield

    def start_training(self):
        """Start a training stage before the other; False if it has been."""
        if self._trains:
            return False
        self._trains = True
        self._start_stage()
        return True

    def _start_stage(self):
        """What `fit` calls before the first batch of the stage."""
        if self._trains:
            with patch.object(self.brain, "fit", self._refuse_fit):
                self.brain.on_stage_start(sb.Stage.TRAIN, 1)
        self.brain.on_stage_start(self.stage, 1)
        self.brain.modules.eval()

    def _refuse_fit(self, *args, **kwargs):
        """In the place of `fit`."""
        raise ValueError(_TRAINS.format(type(self.brain).__name__))

    def _start_fit(self):
        """Run on_fit_start; later only set anew what it has set."""
        brain = self.brain
        hook = getattr(brain.on_fit_start, "__func__", None)
        if hook is sb.Brain.on_fit_start:
            return  # an optimizer is all that it would set
        if self._set is None:
            before = [dict(owner) for owner in _attributes(brain)]
            with _preparing_nothing(brain):
                brain.on_fit_start()
            self._set = [
                {k: v for k, v in owner.items() if old.get(k, owner) is not v}
                for owner, old in zip(_attributes(brain), before)
            ]
        for owner, new in zip(_attributes(brain), self._set):
            owner.update(new)


def _attributes(brain):
    """Where the hooks of a Brain set things: dicts of name to value."""
    owners = [brain]
    owners += [x for x in (getattr(brain, "hparams", None),) if x is not None]
    attributes = [vars(owner) for owner in owners]
    if brain.checkpointer is not None:
        own = vars(brain.checkpointer).values()
        attributes += [value for value in own if isinstance(value, dict)]
    return attributes


@contextmanager
def as_before(brain):
    """Attributes, recoverables, frozen weights, random states come back."""
    kept = [(owner, dict(owner)) for owner in _attributes(brain)]
    flags = [(p, p.requires_grad) for p in brain.modules.parameters()]
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for owner, values in kept:
            owner.clear()
            owner.update(values)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _preparing_nothing(brain):
    """Modules stay what they are, and no checkpoint is read or written."""
    with ExitStack() as stack:
        for name in ("_compile", "_wrap_distributed"):
            stack.enter_context(patch.object(brain, name, nothing))
        if brain.checkpointer is not None:
            for name in (
                "recover_if_possible",
                "load_checkpoint",
                "save_checkpoint",
                "delete_checkpoints",
            ):
                stack.enter_context(
                    patch.object(brain.checkpointer, name, nothing)
                )
        yield
