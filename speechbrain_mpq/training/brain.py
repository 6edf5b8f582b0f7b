"""Settings that cannot work, refused before any work.

A SpeechBrain Brain that scores, allocates, quantizes, fine-tunes and packs.

Subclass it as any Brain: `compute_forward` and `compute_objectives` say what
the model does, the methods here say what happens when. Every stage leaves a
file (scores.json, plan.json, checkpoints, packed/) and starts from it when
the experiment is started again, so that a run can be killed at any time.
"""

import json
import time
from pathlib import Path

import speechbrain as sb
from speechbrain.utils.distributed import main_process_only, run_on_main
from speechbrain.utils.logger import get_logger

from ..allocation.analysis import write_additivity, write_expected_gain
from ..allocation.solver import allocate_bits
from ..quantization.codebook import check_bits
from ..quantization.packing import save_packed
from ..quantization.plan import BitPlan
from ..quantization.quant_api import bit_plan, clusters, quantize_
from ..utils import write_json
from .prototypes import inherit_, load_prototype
from .rounding import round_calibrated_


def check_average_bits(bits):
    """Raise ValueError unless a budget can be meant.

    Example
    -------
    >>> check_average_bits(2.5)
    """
    if isinstance(bits, bool) or not 1 <= bits <= 16 and bits != 32:
        raise ValueError(
            f"bits must lie in 1 to 16, or be 32 for full precision, not "
            f"{bits!r}: change --bits"
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


def _check_methods(hparams):
    """Raise ValueError where methods exclude or miss each other."""
    if hparams.one_stage and hparams.scores:
        raise ValueError(
            "one_stage decides on the bits itself: set scores to null"
        )
    if hparams.round_calibrated and (hparams.admm or hparams.one_stage):
        raise ValueError(
            "calibrated rounding is for a plan that stays, and for "
            "estimators that begin at rounded weights: set "
            "round_calibrated to False"
        )
    if hparams.admm and hparams.rows:
        raise ValueError("ADMM takes whole layers: set rows to null")
    for key in ("granularity", "codebook", "rows"):
        asked = getattr(hparams, key)
        scored = getattr(hparams.scores, key, asked)
        if scored != asked:
            raise ValueError(
                f"scores have {key} {scored!r}, the model {asked!r}: "
                "give both the same"
            )


logger = get_logger(__name__)


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

    def check_settings(self, model):
        """Refuse impossible settings before any work."""
        hparams = self.hparams
        check_average_bits(hparams.bits)
        if hparams.bits == 32:
            return
        clusters(model, *self._patterns())  # each pattern must match
        _check_methods(hparams)
        scorer = hparams.one_stage or hparams.scores
        candidates = getattr(scorer, "candidate_bits", None)
        _check_reachable(hparams.bits, candidates, hparams.min_bits)

    def quantize(self, model, network_name, calibrate, prototypes=None):
        """Decide on the bits of every cluster and quantize in place."""
        self.check_settings(model)
        if self.hparams.bits == 32:
            return
        if not (self.trains or self.hparams.round_calibrated):
            logger.warning(
                "Nothing is trained and weights are rounded to nearest: "
                "--round_calibrated True is far better at few bits"
            )
        chosen = self._choose(model, network_name, calibrate, prototypes)
        if prototypes and isinstance(chosen, BitPlan):
            used = {cluster.bits for cluster in chosen.clusters.values()}
            loaded = {
                bits: load_prototype(folder)
                for bits, folder in prototypes.items()
                if bits in used
            }
            inherit_(model, chosen, loaded)
        uniform = not isinstance(chosen, BitPlan)
        plan = quantize_(
            model,
            chosen,
            *self._patterns(),
            granularity=self.hparams.granularity,
            estimator=self.hparams.estimator,
            codebook=self.hparams.codebook if uniform else None,
            rows=self.hparams.rows,
        )
        logger.info(
            f"Quantized {len(plan.clusters)} clusters to "
            f"{plan.average_bits:.3f} bits on average, {plan.bytes} bytes"
        )
        if self.hparams.round_calibrated:
            inputs = calibrate()["inputs"]
            show = not self.noprogressbar
            round_calibrated_(model, network_name, inputs, progress=show)
        if self.hparams.one_stage:
            self.hparams.one_stage.start(
                model,
                self.hparams.bits,
                self.hparams.min_bits,
                scores_file=self._output("scores.json"),
            )
            self.checkpointer.add_recoverable(
                "one_stage", self.hparams.one_stage
            )
        if self.hparams.admm:
            self.checkpointer.add_recoverable("admm", self.hparams.admm)

    @property
    def trains(self):
        """Whether there is anything to train."""
        full = self.hparams.bits == 32
        return full or getattr(self.hparams.estimator, "trains", True)

    def _choose(self, model, network_name, calibrate, prototypes):
        """The plan of an earlier start, of the scores, or the uniform bits."""
        if self.hparams.one_stage:
            return self.hparams.one_stage.candidate_bits[-1]
        path = self._output("plan.json")
        if path.exists():
            logger.info(f"Continuing with the bit plan in {path}")
            return BitPlan.load(path)
        if self.hparams.scores is None:
            return check_bits(self.hparams.bits)
        # One process scores; the others read the same plan.
        run_on_main(
            self._score, args=[model, network_name, calibrate, prototypes]
        )
        return BitPlan.load(path)

    def _patterns(self):
        """What to quantize and what to leave out of it."""
        return self.hparams.quantize_include, self.hparams.quantize_exclude

    def _score(self, model, network_name, calibrate, prototypes):
        """Write scores.json, what it foresees, and plan.json."""
        start = time.perf_counter()
        scorer, folder = self.hparams.scores, Path(self.hparams.output_folder)
        calibration = {"prototypes": prototypes, **calibrate()}
        values = [calibration[name] for name in scorer.needs]
        network = model.get_submodule(network_name)
        include, exclude = self._patterns()
        where = {"include": include, "exclude": exclude, "prefix": network_name}
        table = scorer(
            network, *values, progress=not self.noprogressbar, **where
        )
        table.save(folder / "scores.json")
        self.note_time("scores", time.perf_counter() - start)
        logger.info(f"Scored {len(table.scores)} clusters")
        bits, min_bits = self.hparams.bits, self.hparams.min_bits
        plan = allocate_bits(table, average_bits=bits, min_bits=min_bits)
        if getattr(scorer, "foresees", True) and len(table.candidate_bits) > 1:
            write_expected_gain(folder, table, plan, bits, min_bits)
        if hasattr(scorer, "measure"):
            write_additivity(
                folder, table, plan, scorer, network, values, **where
            )
        plan.save(folder / "plan.json")

    def on_fit_start(self):
        """Start the clock of the fine-tuning."""
        super().on_fit_start()
        self._fit_started = time.perf_counter()
        if self._quantized_by("admm"):
            self.hparams.admm.start(self.modules, self.optimizer)

    def on_fit_batch_start(self, batch, should_step):
        """Look ahead, where the estimation does."""
        if self._quantized_by("admm"):
            self.hparams.admm.look_ahead(self, batch)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Schedule the learning rate by steps; count them."""
        if not should_step:
            return
        if self.hparams.lr_schedule is not None:
            self.hparams.lr_schedule(self.optimizer, self.optimizer_step)
        if self._quantized_by("admm"):
            self.hparams.admm.count_step(self.optimizer_step)
        if self._quantized_by("one_stage"):
            self.hparams.one_stage.end_step()

    def _quantized_by(self, method):
        """Whether a method with stages of its own is at work."""
        return self.hparams.bits != 32 and getattr(self.hparams, method)

    def on_stage_start(self, stage, epoch=None):
        """Validate nothing that is over its budget still."""
        if stage == sb.Stage.VALID and self._quantized_by("one_stage"):
            self.hparams.one_stage.require_decision()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, checkpoint, and stop early when validation stops improving."""
        if stage == sb.Stage.TRAIN:
            self._train_loss = stage_loss
        elif stage == sb.Stage.VALID:
            stats = {}
            if self._quantized_by("admm"):
                row = self.hparams.admm.validated(stage_loss)
                stats["primal residual"] = row["primal_residual"]
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                {"loss": self._train_loss},
                {"loss": stage_loss, **stats},
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
        if self._quantized_by("admm"):
            self.hparams.admm.finish(model)
        plan = bit_plan(model)
        run_on_main(plan.save, args=[self._output("plan.json")])
        return plan

    def pack(self, model, metadata=None, architecture=None):
        """Write a model as a packed folder."""
        folder = self._output("packed")
        arguments = [model, folder, metadata, architecture]
        run_on_main(save_packed, args=arguments)
        return folder

    def times(self):
        """Seconds that each stage took, over all restarts."""
        path = self._output("times.json")
        return json.loads(path.read_text()) if path.exists() else {}

    def _output(self, name):
        """A file of this experiment."""
        return Path(self.hparams.output_folder) / name

    @main_process_only
    def note_time(self, stage, seconds, add=False):
        """Remember how long a stage took, across restarts."""
        times = self.times()
        times[stage] = seconds + (times.get(stage, 0.0) if add else 0.0)
        write_json(self._output("times.json"), times)
