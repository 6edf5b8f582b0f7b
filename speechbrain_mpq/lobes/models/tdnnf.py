"""Factored time-delay neural network (TDNN-F).

"Semi-orthogonal low-rank matrix factorization for deep neural networks"
(Interspeech 2018), as Kaldi's chain recipes have it, and with one bottleneck
size for each layer as the architecture search of "Towards green ASR"
(Interspeech 2022) asks for.

A layer holds its input back to a bottleneck of few dimensions, by a matrix
that training keeps semi-orthogonal, and goes out again by an affine one. The
context of all layers is taken from the input, whose ends are repeated: an
utterance has the same outputs alone and in a padded batch.
"""

import copy
from pathlib import Path

import torch
from torch.nn.utils import parametrize

from ...utils import read_json

BYPASS = 0.66  # share of its input that a layer adds to its output
SPEED = 0.125  # of the semi-orthogonal step; 0.125 converges quadratically
EVERY = 4  # training steps between two semi-orthogonal ones


def semi_orthogonal_step(weight, scale=None):
    """One step of a matrix M towards M M^T = scale^2 I (Section 3).

    M <- M - 4 nu / scale^2 (M M^T - scale^2 I) M, which goes downhill on the
    squared error of M M^T.

    Arguments
    ---------
    weight : torch.Tensor
        M, [rows, columns]; of a matrix with more rows than columns, the
        columns are made orthogonal.
    """
    if weight.shape[0] > weight.shape[1]:
        return semi_orthogonal_step(weight.T, scale).T
    gram = weight @ weight.T
    speed = SPEED
    if scale is None:
        trace, power = gram.trace(), gram.square().sum()
        square = power / trace
        # Far from orthogonal (1 if it is), the full step would overshoot.
        ratio = power * len(gram) / trace**2
        speed = speed * torch.where(ratio > 1.02, 0.5, 1.0)
        speed = speed * torch.where(ratio > 1.1, 0.5, 1.0)
    else:
        square = torch.tensor(float(scale) ** 2)
    gram.diagonal().sub_(square)
    return weight - 4 * speed / square * (gram @ weight)


def orthogonality_error(weight):
    """Relative distance of M M^T from a multiple of I.

    Arguments
    ---------
    weight : torch.Tensor
        [rows, columns].
    """
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    gram = weight @ weight.T
    square = gram.diagonal().mean()
    gram.diagonal().sub_(square)
    return (gram.norm() / (square * len(gram) ** 0.5)).item()


def read_bottlenecks(bottlenecks):
    """One bottleneck of each layer, as they are or of a search's file.

    Arguments
    ---------
    bottlenecks : sequence of int, str or Path
        A path is that of a JSON file with "bottlenecks".

    Example
    -------
    >>> read_bottlenecks([48, 24])
    [48, 24]
    """
    if not isinstance(bottlenecks, str | Path):
        return list(bottlenecks)
    content = read_json(
        bottlenecks,
        missing="give a list of sizes, or the file of a search",
        broken="delete it and search again",
    )
    dimensions = (
        content.get("bottlenecks") if isinstance(content, dict) else None
    )
    whole = isinstance(dimensions, list) and all(
        type(n) is int for n in dimensions
    )
    if not whole:
        raise ValueError(
            f"{bottlenecks} has no list of whole numbers as its "
            '"bottlenecks": give the file of a search'
        )
    return dimensions


class DropoutSchedule:
    """Dropout as a piecewise linear function of the training progress.

    Arguments
    ---------
    schedule : str
        Kaldi's form: `proportion@progress` between commas, where the first is
        at 0 and the last at 1.

    Example
    -------
    >>> schedule = DropoutSchedule("0,0@0.20,0.5@0.50,0")
    >>> [schedule(progress) for progress in (0.1, 0.5, 0.75, 1)]
    [0.0, 0.5, 0.25, 0.0]
    """

    def __init__(self, schedule):
        fields = str(schedule).split(",")
        points = []
        for position, field in enumerate(fields):
            proportion, at, progress = field.partition("@")
            if not at:
                progress = {0: 0.0, len(fields) - 1: 1.0}.get(position)
            try:
                points.append((float(progress), float(proportion)))
            except (TypeError, ValueError):
                raise ValueError(
                    f"dropout schedule {schedule!r}: {field!r} should be "
                    "proportion@progress, such as 0.5@0.50"
                ) from None
        if points != sorted(points) or not 0 <= points[0][0]:
            raise ValueError(
                f"dropout schedule {schedule!r}: the progress goes up, from 0 "
                "to 1"
            )
        self.points = points

    def __call__(self, progress):
        """Proportion at a progress between 0 and 1."""
        before = self.points[0]
        for point in self.points:
            if point[0] >= progress:
                width = point[0] - before[0]
                share = (progress - before[0]) / width if width > 0 else 1.0
                share = max(share, 0.0)
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1]


class ContinuousDropout(torch.nn.Module):
    """Multiplicative noise, the same in all frames of an utterance.

    Uniform in [1 - 2p, 1 + 2p] for each utterance and dimension, Kaldi's
    per-dimension continuous dropout.

    Arguments
    ---------
    proportion : float
        p, at most 0.5.

    Example
    -------
    >>> ContinuousDropout(0.0)(torch.ones(1, 2, 3))
    tensor([[[1., 1., 1.],
             [1., 1., 1.]]])
    """

    def __init__(self, proportion=0.0):
        super().__init__()
        self.proportion = proportion

    def forward(self, x):
        """Noisy in training only, [B, D, T]."""
        if not self.training or self.proportion == 0:
            return x
        noise = torch.rand(x.shape[0], x.shape[1], 1, device=x.device)
        return x * (1 + 2 * self.proportion * (2 * noise - 1)).to(x.dtype)


class TDNNFLayer(torch.nn.Module):
    """Bottleneck, affine, ReLU, batch norm, dropout, and a bypass.

    Arguments
    ---------
    size : int
        Dimensions of input and output.
    bottleneck : int
        Dimensions between the two matrices.
    stride : int
        Frames between the two that each matrix sees: the bottleneck t - stride
        and t, the affine one t and t + stride. 0 sees t only.
    bypass : float
        Share of the input that is added to the output.
    scale : float, optional
        Of the semi-orthogonal constraint; None is floating.

    Example
    -------
    >>> layer = TDNNFLayer(8, 2, stride=3)
    >>> layer(torch.zeros(1, 8, 20)).shape  # 3 frames fewer on either side
    torch.Size([1, 8, 14])
    >>> sum(p.numel() for p in layer.parameters())
    72
    """

    def __init__(self, size, bottleneck, stride, bypass=BYPASS, scale=None):
        super().__init__()
        if not 0 < bottleneck <= size:
            raise ValueError(f"bottleneck {bottleneck} of a layer of {size}")
        self.stride = stride
        self.bypass = bypass
        self.scale = scale
        taps = 2 if stride else 1
        self.linear = torch.nn.Conv1d(
            size, bottleneck, taps, dilation=max(stride, 1), bias=False
        )
        self.affine = torch.nn.Conv1d(
            bottleneck, size, taps, dilation=max(stride, 1)
        )
        self.norm = torch.nn.BatchNorm1d(size, affine=False)
        self.dropout = ContinuousDropout()
        torch.nn.init.orthogonal_(self.linear.weight.flatten(1))

    def forward(self, x):
        """Features [B, size, T] to [B, size, T - 2 stride]."""
        return self._with_bypass(
            self._activated(self.affine(self.linear(x))), x
        )

    def _activated(self, y):
        """All that follows the affine map, but for the bypass."""
        return self.dropout(self.norm(y.relu()))

    def _with_bypass(self, y, x):
        """A share of the input added to the output."""
        if self.bypass == 0:
            return y
        return y + self.bypass * x[:, :, self.stride :][:, :, : y.shape[2]]


class Prefinal(torch.nn.Module):
    """Layers between the last TDNN-F layer and the outputs of one head.

    Arguments
    ---------
    small : int
        Dimensions of input and output, whose matrix is semi-orthogonal.
    large : int
        Dimensions between.
    outputs : int
        Number of outputs.

    Example
    -------
    >>> Prefinal(2, 8, 5)(torch.zeros(1, 2, 7)).shape
    torch.Size([1, 5, 7])
    """

    def __init__(self, small, large, outputs):
        super().__init__()
        self.affine = torch.nn.Conv1d(small, large, 1)
        self.norm = torch.nn.BatchNorm1d(large, affine=False)
        self.linear = torch.nn.Conv1d(large, small, 1, bias=False)
        self.small_norm = torch.nn.BatchNorm1d(small, affine=False)
        self.output = torch.nn.Conv1d(small, outputs, 1)
        # The first outputs say nothing: what is left is the language model.
        torch.nn.init.zeros_(self.output.weight)
        torch.nn.init.zeros_(self.output.bias)

    def forward(self, x):
        """Features [B, small, T] to outputs [B, outputs, T]."""
        x = self.norm(self.affine(x).relu())
        return self.output(self.small_norm(self.linear(x)))


def _identity(size):
    """A square affine map of each frame that begins as none."""
    affine = torch.nn.Conv1d(size, size, 1)
    torch.nn.init.eye_(affine.weight[:, :, 0])
    torch.nn.init.zeros_(affine.bias)
    return affine


def _check_counts(outputs, phones, bottlenecks, strides):
    """Refuse lists of other lengths than the layers and the outputs need."""
    if phones and outputs != 2 * len(phones):
        raise ValueError(
            f"{outputs} outputs and {len(phones)} phones: a phone has two"
        )
    if len(bottlenecks) != len(strides):
        raise ValueError(
            f"{len(bottlenecks)} bottlenecks and {len(strides)} strides: "
            "one of each for each layer"
        )


def _first_slow(strides, subsampling):
    """The first layer whose successors all skip frames."""
    slow = len(strides)
    while slow and strides[slow - 1] % subsampling == 0:
        slow -= 1
    return slow


class TDNNF(torch.nn.Module):
    """TDNN-F for LF-MMI, one output frame for several of the input.

    Arguments
    ---------
    input_size : int
        Features of a frame.
    outputs : int
        Outputs of a head, twice the phones.
    size : int
        Dimensions of the layers.
    bottlenecks : list of int
        For each layer, the dimensions of its bottleneck.
    strides : list of int
        For each layer, see TDNNFLayer.
    prefinal : int
        Dimensions between the layers and the heads.
    subsampling : int
        Frames of the input for one of the output. Layers that only see every
        third frame are not computed elsewhere.
    speaker_size : int
        Dimensions of a vector that tells the speaker (i-vector, x-vector).
    context : int
        Frames on either side that are spliced to the first.
    decorrelate : bool
        Whether a square affine matrix comes first, where Kaldi has an LDA.
    xent : bool
        Whether there is a second head for cross-entropy, which only training
        needs.
    bypass : float
        See TDNNFLayer.
    scale : float, optional
        Of the semi-orthogonal constraints; None is floating.
    phones : sequence of str
        Symbols that the outputs stand for, where they are known: two outputs
        each, in this order.
    files_sha256 : sequence of str
        Checksums of the lexicon and the n-gram that a packed folder has beside
        the weights; empty where they are not known.

    Example
    -------
    >>> model = TDNNF(40, 84, size=64, bottlenecks=[16] * 3, strides=[1, 0, 3])
    >>> model(torch.zeros(2, 100, 40)).shape
    torch.Size([2, 34, 84])
    >>> outputs, xent = model(torch.zeros(2, 100, 40), heads=True)
    >>> model.context  # frames of 10 ms
    5
    """

    def __init__(
        self,
        input_size,
        outputs,
        size=1536,
        bottlenecks=(160,) * 14,
        strides=(1, 1, 1, 0, *(3,) * 10),
        prefinal=256,
        subsampling=3,
        speaker_size=0,
        context=1,
        decorrelate=True,
        xent=True,
        bypass=BYPASS,
        scale=None,
        phones=(),
        files_sha256=(),
    ):
        super().__init__()
        _check_counts(outputs, phones, bottlenecks, strides)
        self.settings = {
            "input_size": input_size,
            "outputs": outputs,
            "size": size,
            "bottlenecks": list(bottlenecks),
            "strides": list(strides),
            "prefinal": prefinal,
            "subsampling": subsampling,
            "speaker_size": speaker_size,
            "context": context,
            "decorrelate": decorrelate,
            "xent": xent,
            "bypass": bypass,
            "scale": scale,
            "phones": list(phones),
            "files_sha256": list(files_sha256),
        }
        self.subsampling, self.scale, self._steps = subsampling, scale, 0
        self.splice, self.context = context, context + sum(strides)
        spliced = (2 * context + 1) * input_size + speaker_size
        self.decorrelate = _identity(spliced) if decorrelate else None
        self.first = torch.nn.Conv1d(spliced, size, 1)
        self.first_norm = torch.nn.BatchNorm1d(size, affine=False)
        self.first_dropout = ContinuousDropout()
        self.slow = _first_slow(strides, subsampling)
        self.layers = torch.nn.ModuleList(self._own_layers())
        self.prefinal = torch.nn.Conv1d(size, prefinal, 1, bias=False)
        self.chain = Prefinal(prefinal, size, outputs)
        self.xent = Prefinal(prefinal, size, outputs) if xent else None

    def _own_layers(self):
        """Layers with strides in frames of their own: slow ones see a third."""
        size, bypass = self.settings["size"], self.settings["bypass"]
        for index, (bottleneck, stride) in enumerate(
            zip(self.settings["bottlenecks"], self.settings["strides"])
        ):
            stride //= self.subsampling if index >= self.slow else 1
            yield TDNNFLayer(size, bottleneck, stride, bypass, self.scale)

    def forward(self, feats, wav_lens=None, speaker=None, heads=False):
        """Raw outputs of each frame.

        Arguments
        ---------
        feats : torch.Tensor
            [B, T, input_size].
        wav_lens : torch.Tensor, optional
            [B], relative to the longest.
        speaker : torch.Tensor, optional
            [B, speaker_size].
        heads : bool
            Whether to return those of the cross-entropy head as well.

        Returns
        -------
        outputs : torch.Tensor
            [B, ceil(T / subsampling), outputs], for LFMMILoss.
        xent : torch.Tensor
            Of the same shape, if asked for.
        """
        x = self._spliced(feats, wav_lens, speaker)
        if self.decorrelate is not None:
            x = self.decorrelate(x)
        x = self.first_dropout(self.first_norm(self.first(x).relu()))
        for i, layer in enumerate(self.layers):
            if i == self.slow:
                x = x[:, :, :: self.subsampling]
            x = layer(x)
        if self.slow == len(self.layers):
            x = x[:, :, :: self.subsampling]
        x = self.prefinal(x)
        outputs = self.chain(x).transpose(1, 2)
        if not heads:
            return outputs
        if self.xent is None:
            raise ValueError("no second head: make the network with xent: True")
        return outputs, self.xent(x).transpose(1, 2)

    def _spliced(self, feats, wav_lens, speaker):
        """Input of the first layer with all context, [B, D, frames]."""
        batch, longest, _ = feats.shape
        if wav_lens is None:
            wav_lens = feats.new_ones(batch)
        last = (wav_lens * longest).round().long().clamp(min=1) - 1
        kept = -(-longest // self.subsampling)  # output frames
        frames = (kept - 1) * self.subsampling + 1 + 2 * self.context
        time = torch.arange(frames, device=feats.device) - self.context
        # The first and last frame go on: padding has no influence.
        time = time.clamp(min=0)[None].minimum(last[:, None])  # [B, frames]
        x = feats.gather(1, time[:, :, None].expand(-1, -1, feats.shape[2]))
        width = 2 * self.splice + 1
        x = x.unfold(1, width, 1).transpose(2, 3).flatten(2)
        if speaker is not None:
            speaker = speaker[:, None].expand(-1, x.shape[1], -1)
            x = torch.cat([x, speaker], 2)
        return x.transpose(1, 2)

    def without_xent(self):
        """A copy that lacks the second head, for all but training.

        Returns
        -------
        TDNNF
            Quantized where this one is.
        """
        other = copy.deepcopy(self)
        other.xent = None
        other.settings["xent"] = False
        return other

    def set_dropout(self, proportion):
        """Set the dropout of all layers, see DropoutSchedule.

        Arguments
        ---------
        proportion : float
            At most 0.5.
        """
        for module in self.modules():
            if isinstance(module, ContinuousDropout):
                module.proportion = proportion

    @torch.no_grad()
    def constrain(self):
        """Keep the matrices semi-orthogonal: call it after each training step.

        Works every fourth time, as Kaldi does, and on the full-precision
        weights of a network that is being quantized.
        """
        self._steps += 1
        if self._steps % EVERY:
            return
        for module in self.semi_orthogonal():
            weight = module.weight
            if parametrize.is_parametrized(module, "weight"):
                weight = module.parametrizations.weight.original
            matrix = weight.flatten(1)
            weight.copy_(
                semi_orthogonal_step(matrix, self.scale).view_as(weight)
            )

    def semi_orthogonal(self):
        """Yield the modules with semi-orthogonal weights."""
        for layer in self.layers:
            yield layer.linear
        yield self.prefinal
        yield self.chain.linear
        if self.xent is not None:
            yield self.xent.linear
