"""Chain separator and recognizer, and measure what plans do to both.

Layout: the mask network's inputs [items, features, frames] go in, the
recognizer's log-probabilities [items, frames, characters] come out.
"""

import copy
import sys
from collections import OrderedDict

import torch
import torch.nn as nn

from speechbrain_mpq.allocation.output_scores import (
    KLScores,
    MaskErrorScores,
    categorical_kl,
)
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.experiments.talker_separation import starting_separator
from speechbrain_mpq.inference.speech_recognition import Recognizer
from speechbrain_mpq.lobes.models.separator import apply_mask, match_level
from speechbrain_mpq.quantization.quant_api import dequantize_, quantize_
from speechbrain_mpq.simulation.dataio import dataio_prep, prepare_data
from speechbrain_mpq.training.rounding import round_calibrated_

CODEBOOK = "midrise"
EXCLUDE = ["conv_in.bias", "conv_out.bias"]  # as the experiments at the root
DAMPINGS = (1.0,)  # of calibrated rounding: no choice among several, to be fast
BRIDGE = "bridge"  # the stage between the two networks


class FeatureBridge(nn.Module):
    """Turn masks into the recognizer's features; it has no weights.

    Arguments
    ---------
    spatial : SpatialFeatures
        Of the separator.
    compute_features, normalize : torch.nn.Module
        Of the recognizer.
    """

    def __init__(self, spatial, compute_features, normalize):
        super().__init__()
        self.spatial = spatial
        self.compute_features = compute_features
        self.normalize = normalize

    def set_mixtures(self, reference, mixture):
        """Set the mixtures that the next masks are for.

        Arguments
        ---------
        reference : torch.Tensor
            [items, bins, frames], complex spectra at unit level.
        mixture : torch.Tensor
            [items, samples], first microphone.
        """
        self.reference, self.mixture = reference, mixture

    def forward(self, mask):
        """Features [n * items, frames, filters] of masks for n * items.

        `mean_errors` puts several tries of all items side by side.
        """
        times = len(mask) // len(self.reference)
        spectrum = apply_mask(mask, self.reference.repeat(times, 1, 1))
        mixture = self.mixture.repeat(times, 1)
        speech = self.spatial.istft(spectrum, mixture.shape[1])
        self.speech = match_level(speech, mixture)  # [n * items, samples]
        lengths = torch.ones(len(mask), device=mask.device)
        return self.normalize(self.compute_features(self.speech), lengths)


def joint_chain(separator, encoder):
    """Make one network of both, whose stages are those of the two.

    Arguments
    ---------
    separator : Separator
    encoder : torch.nn.Module
        That of a recognizer with convolutions in a row, as in
        recipes/Embedded/ASR/CTC/hparams/inference.yaml.

    Returns
    -------
    chain : torch.nn.Sequential
        Sharing all weights with the two; in eval mode.
    """
    bridge = FeatureBridge(
        separator.features, encoder.compute_features, encoder.normalize
    )
    stages = [
        *separator.mask_net.named_children(),
        (BRIDGE, bridge),
        *encoder.convolutions.named_children(),
        ("output", encoder.output),
        ("log_softmax", encoder.log_softmax),
    ]
    return nn.Sequential(OrderedDict(stages)).eval()


def separator_stages(chain):
    """List the stages in front of the bridge.

    Arguments
    ---------
    chain : torch.nn.Sequential
        From `joint_chain`.

    Returns
    -------
    names : list of str
    """
    names = [name for name, _ in chain.named_children()]
    return names[: names.index(BRIDGE)]


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
        self.chain.bridge.set_mixtures(reference, mixture)
        # One chunk: the bridge knows one set of mixtures.
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
        self.chain.bridge.set_mixtures(reference, mixture)
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
            network.bridge.set_mixtures(reference, mixture)
        expected, estimate = self.chain(inputs), chain(inputs)
        total = categorical_kl(expected, estimate).sum()
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
        inputs, *mixtures = self.analysed(item["mixture"][None], item["doa"])
        chain.bridge.set_mixtures(*mixtures)
        log_probs = chain(inputs)
        target = item["targets"][:, 0]
        sequences = self.recognizer.decoding_function(log_probs, torch.ones(1))
        words = self.recognizer.tokenizer.decode_ndim(sequences)[0]
        return {
            "id": item["id"],
            "angle": item["drawn"]["angle"],
            "si_snr": si_snr(chain.bridge.speech[0], target).item(),
            "si_snr_mixture": si_snr(mixtures[1][0], target).item(),
            "pesq": None,
            "reference": item["drawn"]["words"],
            "hypothesis": "".join(words).strip().lower(),
        }
