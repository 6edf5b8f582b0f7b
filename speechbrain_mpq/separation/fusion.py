"""Factorised attention: the lips decide which views of the audio count.

Layout: [batch, channels, frames]. The form is that of the audio-visual
multichannel recognizer that the paper's experiments build on
(https://arxiv.org/abs/2011.07755).
"""

import torch
import torch.nn as nn

BEGIN_SMALL = 0.1  # factor on the first weights of a residual fusion


class FactorisedAttention(nn.Module):
    """Fuses audio and visual embeddings frame by frame.

    K views a_k = P_k A of the audio embedding A are weighted by v =
    softmax(P^V V) of the visual embedding V. As published, the fused
    embedding is sigmoid(sum_k v_k a_k). The residual form A + sum_k v_k
    (a_k + b_k) begins near the audio alone, so that a trained audio-only
    network can go on from there.

    Arguments
    ---------
    audio_channels, visual_channels : int
        Channels of the two embeddings.
    factors : int
        K, views of the audio.
    residual : bool
        Which of the forms.

    Example
    -------
    >>> fusion = FactorisedAttention(8, 4, factors=3)
    >>> fusion(torch.randn(2, 8, 5), torch.randn(2, 4, 5)).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self, audio_channels, visual_channels, factors=10, residual=False
    ):
        super().__init__()
        self.factors = factors
        self.residual = residual
        self.views = nn.Conv1d(
            audio_channels, factors * audio_channels, 1, bias=residual
        )
        self.weights = nn.Conv1d(visual_channels, factors, 1, bias=False)
        if residual:
            with torch.no_grad():
                self.views.weight *= BEGIN_SMALL
                self.views.bias *= BEGIN_SMALL

    def forward(self, audio, visual):
        """Fuse.

        Arguments
        ---------
        audio : torch.Tensor
            [batch, audio_channels, frames].
        visual : torch.Tensor
            [batch, visual_channels, frames].

        Returns
        -------
        fused : torch.Tensor
            [batch, audio_channels, frames].
        """
        views = self.views(audio).unflatten(1, (self.factors, -1))
        weights = self.weights(visual).softmax(1)[:, :, None]  # [B, K, 1, T]
        fused = (views * weights).sum(1)
        return audio + fused if self.residual else torch.sigmoid(fused)
