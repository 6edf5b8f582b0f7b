"""Make, calibrate and score every system from the same things.

The separator, its calibration and its training data are those of our own
experiments; a system is scored by the functions that score our own.
"""

import hashlib
import random
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch

from speechbrain_mpq.evaluation.results import score_separation
from speechbrain_mpq.evaluation.signal_tasks import bucket_of
from speechbrain_mpq.experiments.talker_separation import (
    Separation,
    starting_separator,
)
from speechbrain_mpq.inference.speech_recognition import Recognizer
from speechbrain_mpq.simulation.dataio import dataio_prep
from speechbrain_mpq.training.experiment import read_hparams

ROOT = Path(__file__).parents[2]
HPARAMS = "hparams/kl_4bit.yaml"
RESAMPLES = 2000  # of the bootstrap


class Workbench:
    """The checkpoint, the data and the scores of the comparison.

    Arguments
    ---------
    work : Path
        Folder for what needs not be kept.
    """

    def __init__(self, work):
        self.work = Path(work)
        self.work.mkdir(parents=True, exist_ok=True)
        # Only read: nothing is written where the experiments' results are.
        folder = self.work / "hparams"
        overrides = f"results_folder: {folder}\nsystem: peers"
        self.hparams = read_hparams(HPARAMS, overrides)
        if not Path(self.hparams["test_speech"]).exists():
            raise SystemExit(
                f"no {self.hparams['test_speech']}: make the corpus first, "
                "with `make demo`"
            )
        torch.set_num_threads(self.hparams["threads"])
        microphones = self.separator().features.microphones
        self.hparams["microphones"] = microphones
        self._recognizer = None

    def separator(self, hparams=None):
        """The full-precision separator, anew each time, in eval mode.

        Arguments
        ---------
        hparams : dict or None
            Of one of our systems, which may equalize the first layer.

        Returns
        -------
        separator : Separator
        """
        return starting_separator(hparams or self.hparams).eval()

    @cached_property
    def data(self):
        """Datasets by split and the maker of training mixtures."""
        return dataio_prep(self.hparams)

    @cached_property
    def test_mixtures(self):
        """The test mixtures, rendered once for all systems (0.4 GB)."""
        return list(self.data[0]["test"])

    @cached_property
    def calibration(self):
        """Training mixtures for whatever looks at data, as our scores do.

        Returns
        -------
        values : dict
            "inputs" of the mask network [items, channels, frames], "weights"
            (energies of the reference channel) and "loss": `loss(output,
            items)` is the summed negative SI-SNR in dB of network outputs
            for a slice of the items.
        """
        brain = Separation(
            {"separator": self.separator()}, None, self.hparams, {}
        )
        count = self.hparams["calibration_mixtures"]
        return brain.calibration(self.data[0]["train"], count)

    def score(self, separator):
        """Results of every test mixture, see `evaluation.metrics`.

        Arguments
        ---------
        separator : torch.nn.Module
            Maps waveforms and directions to waveforms.

        Returns
        -------
        items : list of dict
        """
        if self._recognizer is None:
            self._recognizer = RememberingRecognizer(self.hparams["asr_source"])
        scored = score_separation(
            separator.eval(),
            self.test_mixtures,
            self._recognizer,
            workers=1,
            keep=0,
        )
        return scored.items


class RememberingRecognizer:
    """A recognizer that hears each waveform once.

    Mixtures and targets are the same for all systems.

    Arguments
    ---------
    source : str
        See `Recognizer`.
    """

    def __init__(self, source):
        self._recognize = Recognizer(source)
        self._known = {}

    def __call__(self, waveform):
        """Words of one waveform, [samples]."""
        content = waveform.contiguous().numpy().tobytes()
        key = hashlib.sha256(content).digest()
        if key not in self._known:
            self._known[key] = self._recognize(waveform)
        return self._known[key]


def paired_interval(items, baseline_items, seed=0):
    """How much SI-SNR a system loses, with a 95 % bootstrap interval.

    Mixtures are drawn again within each angle bucket; the average is that of
    the buckets.

    Arguments
    ---------
    items, baseline_items : list of dict
        Results of the same mixtures.
    seed : int
        Of the drawing.

    Returns
    -------
    mean, low, high : float
        Of the system's SI-SNR minus the baseline's, in dB.
    """
    baseline = {item["id"]: item["si_snr"] for item in baseline_items}
    buckets = {}
    for item in items:
        difference = item["si_snr"] - baseline[item["id"]]
        buckets.setdefault(bucket_of(item["angle"]), []).append(difference)
    rng = random.Random(seed)
    draws = sorted(
        fmean(fmean(rng.choices(b, k=len(b))) for b in buckets.values())
        for _ in range(RESAMPLES)
    )
    mean = fmean(fmean(bucket) for bucket in buckets.values())
    tail = round(0.025 * RESAMPLES)
    return mean, draws[tail], draws[-1 - tail]
