"""Separator and recognizer as one chain of stages.

Layout: the mask network's inputs [items, features, frames] go in, the
recognizer's log-probabilities [items, frames, characters] come out.
"""

from collections import OrderedDict

import torch
import torch.nn as nn

from speechbrain_mpq.lobes.models.separator import apply_mask, match_level

HEARING = "hearing"  # the stage between the two networks


class FeatureBridge(nn.Module):
    """From a mask to the recognizer's features; it has no weights.

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

    def listen(self, reference, mixture):
        """Say which mixtures the masks to come are for.

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
    """One network of both, whose stages are those of the two.

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
    hearing = FeatureBridge(
        separator.features, encoder.compute_features, encoder.normalize
    )
    stages = [
        *separator.mask_net.named_children(),
        (HEARING, hearing),
        *encoder.convolutions.named_children(),
        ("output", encoder.output),
        ("log_softmax", encoder.log_softmax),
    ]
    return nn.Sequential(OrderedDict(stages)).eval()


def separator_stages(chain):
    """Names of the stages in front of the hearing.

    Arguments
    ---------
    chain : torch.nn.Sequential
        From `joint_chain`.

    Returns
    -------
    names : list of str
    """
    names = [name for name, _ in chain.named_children()]
    return names[: names.index(HEARING)]
