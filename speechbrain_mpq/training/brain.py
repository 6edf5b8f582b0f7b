"""A SpeechBrain Brain that scores, allocates, quantizes, fine-tunes and packs.

Subclass it as any Brain: `compute_forward` and `compute_objectives` say what
the model does, the methods here say what happens when. Every stage leaves a
file (scores.json, plan.json, checkpoints, packed/) and starts from it when
the experiment is started again, so that a run can be killed at any time.
"""

import time
from pathlib import Path

import speechbrain as sb
from speechbrain.utils.distributed import main_process_only, run_on_main
from speechbrain.utils.logger import get_logger

from ..quantization.codebook import MAX_BITS, check_bits
from ..quantization.packing import save_packed
from ..quantization.plan import Scheme, Selection, bit_plan
from ..quantization.quant_api import quantize_, watch_scales
from ..utils import read_json, write_json
from .calibration import NetworkCalibration
from .methods import EstimationMethod, attach
from .pipeline import Pipeline, PlanStore, log_stats, plan_stats

logger = get_logger(__name__)


def check_average_bits(bits):
    """Raise ValueError unless a budget can be meant.

    Example
    -------
    >>> check_average_bits(2.5)
    """
    if isinstance(bits, bool) or not 1 <= bits <= MAX_BITS and bits != 32:
        raise ValueError(
            f"bits must lie in 1 to {MAX_BITS}, or be 32 for full precision, "
            f"not {bits!r}: change --bits"
        )


def _check_reachable(bits, candidates, min_bits):
    """Raise ValueError unless some plan has these bits on average."""
    if candidates is None:
        check_bits(bits)  # a whole number of them
        return
    least, most = max(candidates[0], min_bits), candidates[-1]
    if bits < least:
        raise ValueError(
            f"{bits} bits on average cannot be reached with at least {least} "
            "in each cluster: raise --bits, or lower candidate_bits and "
            "--min_bits"
        )
    if bits > most:
        raise ValueError(
            f"{bits} bits on average cannot be reached with at most {most} "
            "in each cluster: lower --bits, or give scores more "
            "candidate_bits"
        )


class QuantizationBrain(sb.Brain):
    """Stages of a quantization experiment on top of `sb.Brain`.

    The hparams need `output_folder`, `bits` (32: leave in full precision),
    `scores` (an object such as `KLScores`, or None for uniform precision),
    `min_bits`, `granularity`, `codebook`, `rows`, `quantize_include` and
    `quantize_exclude` (see `quantize_`), `estimator` (a class such as
    `LearnedStep`), `admm` (an `ADMMTraining` or None), `one_stage` (a
    `OneStage` or None), `round_calibrated` (of a system that is not trained),
    `epoch_counter` (an `EpochCounterWithStopper`), `train_logger` and
    `lr_schedule` (or None).
    """

    @property
    def method(self):
        """How the weights of this experiment are found."""
        hparams = self.hparams
        if hparams.bits == 32:
            return _IN_FULL
        own = hparams.admm or hparams.one_stage
        if own is None and not hasattr(self, "_method"):
            self._method = EstimationMethod(hparams.estimator)
        return own or self._method

    def check_settings(self, model, network_name=""):
        """Refuse impossible settings before any work."""
        hparams = self.hparams
        check_average_bits(hparams.bits)
        if hparams.bits == 32:
            return
        scorer = hparams.one_stage or hparams.scores
        candidates = getattr(scorer, "candidate_bits", None)
        _check_reachable(hparams.bits, candidates, hparams.min_bits)
        self._pipeline(model, network_name, dict, None).check()

    def quantize(self, model, network_name, calibrate, prototypes=None):
        """Decide on the bits of every cluster and quantize in place."""
        hparams = self.hparams
        self.check_settings(model, network_name)
        if hparams.bits == 32:
            return
        if not (self.trains or hparams.round_calibrated):
            logger.warning(
                "Nothing is trained and weights are rounded to nearest: "
                "--round_calibrated True is far better at few bits"
            )
        pipeline = self._pipeline(model, network_name, calibrate, prototypes)
        is_new = pipeline.store.is_new
        pipeline.run(progress=not self.noprogressbar)
        for stage, seconds in pipeline.seconds.items():
            self.note_time(stage, seconds)
        plan = bit_plan(model)
        logger.info(
            f"Quantized {len(plan.clusters)} clusters to "
            f"{plan.average_bits:.3f} bits on average, {plan.bytes} bytes"
        )
        if is_new:
            log_stats(hparams, plan_stats(plan, hparams.output_folder))
        if self.trains:
            watch_scales(model)
        attach(self, self.method, model)

    def _pipeline(self, model, network_name, calibrate, prototypes):
        """What the hparams say of the pipeline."""
        hparams = self.hparams
        scheme = Scheme(hparams.granularity, hparams.codebook, hparams.rows)
        patterns = hparams.quantize_include, hparams.quantize_exclude
        rounded = hparams.round_calibrated

        def quantize(plan_or_bits):
            quantize_(
                model,
                plan_or_bits,
                *patterns,
                estimator=hparams.estimator,
                scheme=scheme,
            )

        return Pipeline(
            calibration=NetworkCalibration(
                model, network_name, calibrate, prototypes
            ),
            quantize=quantize,
            selection=Selection(*patterns, network_name),
            scheme=scheme,
            limits={"average_bits": hparams.bits, "min_bits": hparams.min_bits},
            scorer=hparams.scores and hparams.scores.with_scheme(scheme),
            store=PlanStore(hparams.output_folder),
            method=self.method,
            rounding="calibrated" if rounded else "nearest",
            prototypes=prototypes,
            additivity=True,
        )

    @property
    def trains(self):
        """Whether there is anything to train."""
        return self.method.trains

    def on_fit_start(self):
        """Start the clock of the fine-tuning."""
        super().on_fit_start()
        self._fit_started = time.perf_counter()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Schedule the learning rate by steps."""
        if should_step and self.hparams.lr_schedule is not None:
            self.hparams.lr_schedule(self.optimizer, self.optimizer_step)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, checkpoint, and stop early when validation stops improving."""
        if stage == sb.Stage.TRAIN:
            self._train_loss = stage_loss
        elif stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                {"loss": self._train_loss},
                {"loss": stage_loss, **self.method.stats},
            )
            elapsed = time.perf_counter() - self._fit_started
            self.note_time("estimation", elapsed, add=True)
            self._fit_started = time.perf_counter()
            self.hparams.epoch_counter.update_metric(float(stage_loss))
            self.checkpointer.save_and_keep_only(
                {"loss": float(stage_loss)}, min_keys=["loss"]
            )

    def recover_best(self, model):
        """Load the checkpoint with the lowest validation loss."""
        self.checkpointer.recover_if_possible(min_key="loss")
        if self.hparams.bits == 32:
            return None
        self.method.finish(model)
        plan = bit_plan(model)
        run_on_main(plan.save, args=[self._output("plan.json")])
        return plan

    def pack(self, model, metadata=None, architecture=None):
        """Write a model as a packed folder."""
        folder = self._output("packed")
        coded = getattr(self.hparams, "entropy_coded", False)
        coded = coded and self.hparams.bits != 32  # weights as they are
        arguments = [model, folder, metadata, architecture, coded]
        run_on_main(save_packed, args=arguments)
        return folder

    def times(self):
        """Seconds that each stage took, over all restarts."""
        path = self._output("times.json")
        return read_json(path) if path.exists() else {}

    def _output(self, name):
        """A file of this experiment."""
        return Path(self.hparams.output_folder) / name

    @main_process_only
    def note_time(self, stage, seconds, add=False):
        """Remember how long a stage took, across restarts."""
        times = self.times()
        times[stage] = seconds + (times.get(stage, 0.0) if add else 0.0)
        write_json(self._output("times.json"), times)


_IN_FULL = EstimationMethod()
