"""A SpeechBrain Brain that scores, allocates, quantizes, fine-tunes and packs.

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

from ..allocation.scores import ScoreTable
from ..allocation.solver import allocate_bits
from ..quantization.packing import save_packed
from ..quantization.plan import BitPlan
from ..quantization.quantizer import quantize_
from .files import write_whole

logger = get_logger(__name__)


def check_average_bits(bits):
    """Raise ValueError unless a budget can be meant.

    Arguments
    ---------
    bits : float
        1 to 16, or 32 for full precision.

    Example
    -------
    >>> check_average_bits(2.5)
    """
    if isinstance(bits, bool) or not 1 <= bits <= 16 and bits != 32:
        raise ValueError(
            f"bits must lie in 1 to 16, or be 32 for full precision, not "
            f"{bits!r}: change --bits"
        )


class QuantizationBrain(sb.Brain):
    """Stages of a quantization experiment on top of `sb.Brain`.

    The hparams need `output_folder`, `bits` (32: leave in full precision),
    `scores` (an object such as `KLScores`, or None for uniform precision),
    `estimator` (`FakeQuantize` or `LearnedStep`),
    `quantize_include`, `quantize_exclude`, `epoch_counter` (an
    `EpochCounterWithStopper`), `train_logger` and, if steps are scheduled,
    `lr_schedule`.
    """

    def quantize(self, model, network_name, calibrate):
        """Decide on the bits of every cluster and quantize in place.

        Arguments
        ---------
        model : torch.nn.Module
            In full precision; changed in place.
        network_name : str
            Submodule that is scored, the one that maps calibration inputs to
            outputs.
        calibrate : callable
            Returns a dict with what the scores need: "inputs" of the network
            and, for some, "weights". Called only where there are no scores
            yet.

        Returns
        -------
        plan : BitPlan or None
            None at 32 bits.
        """
        check_average_bits(self.hparams.bits)
        if self.hparams.bits == 32:
            return None
        path = self._output("plan.json")
        patterns = (
            self.hparams.quantize_include,
            self.hparams.quantize_exclude,
        )
        if path.exists():
            logger.info(f"Continuing with the bit plan in {path}")
            chosen = BitPlan.load(path)
        elif self.hparams.scores is None:
            chosen = self.hparams.bits
        else:
            table = self._score(model, network_name, calibrate, patterns)
            chosen = allocate_bits(table, average_bits=self.hparams.bits)
        estimator = self.hparams.estimator
        plan = quantize_(model, chosen, *patterns, estimator=estimator)
        plan.save(path)
        logger.info(
            f"Quantized {len(plan.clusters)} clusters to "
            f"{plan.average_bits:.3f} bits on average, {plan.bytes} bytes"
        )
        return plan

    def _score(self, model, network_name, calibrate, patterns):
        """Sensitivity of every cluster at every candidate width."""
        path = self._output("scores.json")
        if path.exists():
            return ScoreTable.load(path)
        start = time.perf_counter()
        scorer = self.hparams.scores
        calibration = calibrate()
        table = scorer(
            model.get_submodule(network_name),
            *(calibration[name] for name in scorer.needs),
            include=patterns[0],
            exclude=patterns[1],
            prefix=network_name,
            progress=not self.noprogressbar,
        )
        table.save(path)
        seconds = time.perf_counter() - start
        self.note_time("scores", seconds)
        logger.info(f"Scored {len(table.scores)} clusters in {seconds:.1f} s")
        return table

    def on_fit_start(self):
        """Start the clock of the fine-tuning."""
        super().on_fit_start()
        self._fit_started = time.perf_counter()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Schedule the learning rate by steps."""
        schedule = getattr(self.hparams, "lr_schedule", None)
        if should_step and schedule is not None:
            schedule(self.optimizer, self.optimizer_step)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, checkpoint, and stop early when validation stops improving."""
        if stage == sb.Stage.TRAIN:
            self._train_loss = stage_loss
        elif stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                {"loss": self._train_loss},
                {"loss": stage_loss},
            )
            elapsed = time.perf_counter() - self._fit_started
            self.note_time("estimation", elapsed, add=True)
            self._fit_started = time.perf_counter()
            self.hparams.epoch_counter.update_metric(float(stage_loss))
            self.checkpointer.save_and_keep_only(
                {"loss": float(stage_loss)}, min_keys=["loss"]
            )

    def recover_best(self):
        """Load the checkpoint with the lowest validation loss."""
        self.checkpointer.recover_if_possible(min_key="loss")

    def pack(self, model, metadata=None):
        """Write a model as a packed folder.

        Arguments
        ---------
        model : torch.nn.Module
            Plain or quantized.
        metadata : dict or None
            Strings to keep in the file.

        Returns
        -------
        folder : pathlib.Path
        """
        folder = self._output("packed")
        run_on_main(save_packed, args=[model, folder, metadata])
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
        write_whole(self._output("times.json"), times)
