"""Both models, calibration and test mixtures: what is measured on."""

import copy
import sys
from pathlib import Path

import torch
from joint_chain import joint_chain
from joint_plans import CODEBOOK

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for train.py

from speechbrain_mpq.allocation.output_scores import (  # noqa: E402
    KLScores,
    MaskErrorScores,  # noqa: E402
    categorical_kl,
)
from speechbrain_mpq.evaluation.scoring import Recognizer  # noqa: E402
from speechbrain_mpq.evaluation.si_snr import si_snr  # noqa: E402
from speechbrain_mpq.quantization.quant_api import (  # noqa: E402
    dequantize_,
    quantize_,
)
from speechbrain_mpq.simulation.dataio import (  # noqa: E402
    dataio_prep,
    prepare_data,
)
from speechbrain_mpq.training.rounding import round_calibrated_  # noqa: E402
from train import starting_separator  # noqa: E402

EXCLUDE = ["conv_in.bias", "conv_out.bias"]  # as the experiments at the root
DAMPINGS = (1.0,)  # of calibrated rounding: no choice among several, to be fast


class Bench:
    """Both models as a chain, calibration inputs, and test mixtures.

    Arguments
    ---------
    hparams : dict
        Of an experiment at the root, such as hparams/best_4bit.yaml.
    calibration_mixtures : int
    """

    def __init__(self, hparams, calibration_mixtures):
        torch.set_num_threads(hparams["threads"])
        self.separator = starting_separator(hparams).eval()
        hparams["microphones"] = self.separator.features.microphones
        prepare_data(hparams)
        datasets, _ = dataio_prep(hparams)
        self.recognizer = Recognizer(hparams["asr_source"]).model
        encoder = self.recognizer.mods.encoder
        self.chain = joint_chain(self.separator, encoder)
        items = [datasets["train"][i] for i in range(calibration_mixtures)]
        self.calibration = self.analysed(
            torch.stack([item["mixture"] for item in items]),
            torch.stack([item["doa"][0] for item in items]),
        )
        self.test = datasets["test"]

    @torch.no_grad()
    def analysed(self, mixtures, doa):
        """Inputs of the chain; spectrum and waveform of the reference."""
        inputs, reference = self.separator.analyse(mixtures, doa)
        return inputs, reference, mixtures[..., 0]

    def scores(self, candidate_bits):
        """Score tables of both models: by their own outputs, by the end's.

        Arguments
        ---------
        candidate_bits : sequence of int

        Returns
        -------
        tables : dict
            "end": of the chain; "own": of the mask network.
        """
        inputs, reference, mixture = self.calibration
        self.chain.hearing.listen(reference, mixture)
        # One chunk: the hearing knows one set of mixtures.
        shared = {"codebook": CODEBOOK, "chunk": len(inputs)}
        where = {"prefix": "", "progress": sys.stderr.isatty()}
        end = KLScores(candidate_bits, "categorical", **shared)(
            self.chain, inputs, exclude=EXCLUDE, **where
        )
        weights = reference.abs().square()
        own = MaskErrorScores(candidate_bits, **shared)(
            self.separator.mask_net, inputs, weights, exclude=EXCLUDE, **where
        )
        # Behind the separator the end's score is the recognizer's own.
        return {"end": end, "own": own}

    def estimated(self, plan, calibrated=False):
        """A plain copy of the chain with the values of a plan.

        Arguments
        ---------
        plan : BitPlan
        calibrated : bool
            Fit all layers to their full-precision outputs; else round to the
            nearest level.

        Returns
        -------
        chain : torch.nn.Sequential
        """
        inputs, reference, mixture = self.calibration
        self.chain.hearing.listen(reference, mixture)
        chain = copy.deepcopy(self.chain)
        quantize_(chain, plan, exclude=EXCLUDE)
        if calibrated:
            show = sys.stderr.isatty()
            round_calibrated_(chain, "", inputs, DAMPINGS, progress=show)
        dequantize_(chain, keep_quantized=True)
        return chain

    @torch.no_grad()
    def divergence(self, chain):
        """KL divergence of the posteriors on the calibration mixtures.

        Arguments
        ---------
        chain : torch.nn.Sequential
            Plain.

        Returns
        -------
        divergence : float
            Nats a frame.
        """
        inputs, reference, mixture = self.calibration
        for network in (self.chain, chain):
            network.hearing.listen(reference, mixture)
        expected, found = self.chain(inputs), chain(inputs)
        total = categorical_kl(expected, found).sum()
        return total.item() / expected[..., 0].numel()

    @torch.no_grad()
    def measure(self, chain):
        """Items of all test mixtures, as `summarise` takes them.

        Arguments
        ---------
        chain : torch.nn.Sequential
            Plain.

        Returns
        -------
        items : list of dict
        """
        return [self._item(chain, item) for item in self.test]

    def _item(self, chain, item):
        """Scores of one test mixture."""
        inputs, *heard = self.analysed(item["mixture"][None], item["doa"])
        chain.hearing.listen(*heard)
        log_probs = chain(inputs)
        target = item["targets"][:, 0]
        sequences = self.recognizer.decoding_function(log_probs, torch.ones(1))
        words = self.recognizer.tokenizer.decode_ndim(sequences)[0]
        return {
            "id": item["id"],
            "angle": item["drawn"]["angle"],
            "si_snr": si_snr(chain.hearing.speech[0], target).item(),
            "si_snr_mixture": si_snr(heard[1][0], target).item(),
            "pesq": None,
            "reference": item["drawn"]["words"],
            "hypothesis": "".join(words).strip().lower(),
        }
