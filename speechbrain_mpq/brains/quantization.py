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
from ..quantization.codebook import check_bits
from ..quantization.packing import save_packed
from ..quantization.plan import BitPlan
from ..quantization.quantizer import clusters, quantize_
from .files import write_whole
from .prototypes import inherit_, load_prototype

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
    `min_bits`, `granularity`, `estimator` (a class such as `LearnedStep`),
    `quantize_include`, `quantize_exclude`, `epoch_counter` (an
    `EpochCounterWithStopper`), `train_logger` and, if steps are scheduled,
    `lr_schedule`.
    """

    def check_settings(self, model):
        """Refuse impossible settings before any work.

        Arguments
        ---------
        model : torch.nn.Module
            The model to be quantized.
        """
        bits, scorer = self.hparams.bits, self.hparams.scores
        check_average_bits(bits)
        if bits == 32:
            return
        clusters(model, *self._patterns())  # each pattern must match
        candidates = getattr(scorer, "candidate_bits", None)
        if candidates is None:
            check_bits(bits)  # a whole number of them
        elif not max(candidates[0], self.hparams.min_bits) <= bits:
            raise ValueError(
                f"{bits} bits on average cannot be reached with at least "
                f"{max(candidates[0], self.hparams.min_bits)} in each cluster"
                ": raise --bits, or lower candidate_bits and --min_bits"
            )
        elif bits > candidates[-1]:
            raise ValueError(
                f"{bits} bits on average cannot be reached with at most "
                f"{candidates[-1]} in each cluster: lower --bits, or give "
                "scores more candidate_bits"
            )

    def quantize(self, model, network_name, calibrate, prototypes=None):
        """Decide on the bits of every cluster and quantize in place.

        Arguments
        ---------
        model : torch.nn.Module
            In full precision; changed in place.
        network_name : str
            Submodule that is scored, the one that maps calibration inputs to
            outputs.
        calibrate : callable
            Returns a dict with what scores may need, by the names in their
            `needs`: "inputs" of the network and, for some, "weights" or the
            "loss". Called only where there are no scores yet.
        prototypes : dict or None
            Bits -> packed folder of the trained uniform system with these
            bits. Clusters inherit their weights from them.

        Returns
        -------
        plan : BitPlan or None
            None at 32 bits.
        """
        self.check_settings(model)
        if self.hparams.bits == 32:
            return None
        chosen = self._choose(model, network_name, calibrate, prototypes)
        if prototypes and isinstance(chosen, BitPlan):
            used = {cluster.bits for cluster in chosen.clusters.values()}
            loaded = {
                bits: load_prototype(folder)
                for bits, folder in prototypes.items()
                if bits in used
            }
            inherit_(model, chosen, loaded)
        plan = quantize_(
            model,
            chosen,
            *self._patterns(),
            granularity=self.hparams.granularity,
            estimator=self.hparams.estimator,
        )
        plan.save(self._output("plan.json"))
        logger.info(
            f"Quantized {len(plan.clusters)} clusters to "
            f"{plan.average_bits:.3f} bits on average, {plan.bytes} bytes"
        )
        return plan

    def _choose(self, model, network_name, calibrate, prototypes):
        """The plan of an earlier start, of the scores, or the uniform bits."""
        path = self._output("plan.json")
        if path.exists():
            logger.info(f"Continuing with the bit plan in {path}")
            return BitPlan.load(path)
        if self.hparams.scores is None:
            return check_bits(self.hparams.bits)
        # One process scores; the others read the same table.
        run_on_main(
            self._score, args=[model, network_name, calibrate, prototypes]
        )
        return allocate_bits(
            ScoreTable.load(self._output("scores.json")),
            average_bits=self.hparams.bits,
            min_bits=self.hparams.min_bits,
        )

    def _patterns(self):
        """What to quantize and what to leave out of it."""
        return self.hparams.quantize_include, self.hparams.quantize_exclude

    def _score(self, model, network_name, calibrate, prototypes):
        """Write the sensitivity of every cluster at every candidate width."""
        path = self._output("scores.json")
        if path.exists():
            return
        start = time.perf_counter()
        scorer = self.hparams.scores
        calibration = {"prototypes": prototypes, **calibrate()}
        include, exclude = self._patterns()
        table = scorer(
            model.get_submodule(network_name),
            *(calibration[name] for name in scorer.needs),
            include=include,
            exclude=exclude,
            prefix=network_name,
            progress=not self.noprogressbar,
        )
        table.save(path)
        seconds = time.perf_counter() - start
        self.note_time("scores", seconds)
        logger.info(f"Scored {len(table.scores)} clusters in {seconds:.1f} s")

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
