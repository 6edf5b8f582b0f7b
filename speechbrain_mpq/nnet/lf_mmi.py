"""Lattice-free maximum mutual information (LF-MMI), exact, in plain PyTorch.

"Purely sequence-trained neural networks for ASR based on lattice-free MMI"
(Interspeech 2016) and, for whole utterances without alignments, "End-to-end
speech recognition using lattice-free MMI" (Interspeech 2018). Of utterance u
with outputs y,

    F_u = log sum over the paths of the numerator, of weight exp(sum of y)
        - log sum over the paths of the denominator,

whose gradient by the output of frame t and pdf k is the difference of the
posteriors, gamma_num(t, k) - gamma_den(t, k).
"""

import logging

import torch
from torch.autograd.function import once_differentiable

from .path_sums import Denominator, log_forward, log_occupancy, pad_graphs

logger = logging.getLogger(__name__)


class _Objective(torch.autograd.Function):
    """F and the posteriors of the numerators, with the gradient of F."""

    @staticmethod
    def forward(ctx, outputs, lengths, numerators, denominator):
        """F [B] and gamma_num [B, T, K]."""
        recursion = log_forward(numerators, outputs, lengths)
        numerator = log_occupancy(numerators, outputs, lengths, recursion)
        log_sum, denominator = _denominate(
            denominator, outputs, lengths, recursion
        )
        ctx.save_for_backward(numerator - denominator)
        ctx.mark_non_differentiable(numerator)
        return recursion.log_sum - log_sum, numerator

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        """dF/dy = gamma_num - gamma_den."""
        (difference,) = ctx.saved_tensors
        return grad[:, None, None] * difference, None, None, None


def _denominate(denominator, outputs, lengths, numerator):
    """Log-sum and posteriors of the denominator, exact for any outputs."""
    # Where the linear domain has lost paths (outputs that are hundreds of nats
    # apart), forward and backward disagree, or a part is more than the whole:
    # those utterances are done again in the log domain, which is slower.
    recursion = denominator(outputs, lengths)
    occupancy, again = denominator.occupancies(outputs, lengths, recursion)
    log_sum = recursion.log_sum
    small = 1e-9 if outputs.dtype == torch.float64 else 1e-5
    allowed = small * (1 + log_sum.abs() + outputs.abs().amax((1, 2)))
    lost = ~((log_sum - again).abs() <= allowed)
    lost |= numerator.log_sum - log_sum > allowed
    lost &= outputs.isfinite().all(2).all(1)  # NaN stays the caller's to see
    if lost.any():
        graphs, leak = denominator.log_graph(1)
        for row in lost.nonzero().flatten().tolist():
            arguments = (graphs, outputs[row : row + 1], lengths[row : row + 1])
            exact = log_forward(*arguments, leak)
            log_sum[row] = exact.log_sum[0]
            occupancy[row] = log_occupancy(*arguments, exact, leak)[0]
    return log_sum, occupancy


def lf_mmi(outputs, lengths, numerators, denominator, double_backward=False):
    """Objective F of each utterance and the posteriors of its transcript.

    Arguments
    ---------
    outputs : torch.Tensor
        [B, T, K], raw: neither softmax nor prior.
    lengths : torch.Tensor
        [B], frames, each at least the min_frames of its numerator.
    numerators : list of ChainGraph
        B transcripts.
    denominator : Denominator
        What they are told from.
    double_backward : bool
        Whether F shall have second derivatives (for a Hessian). That keeps all
        of the recursions for autograd: several times slower, and on a GPU
        not the same to the last bit in two runs.

    Returns
    -------
    objective : torch.Tensor
        [B], log-probability ratio in nats, at most 0.
    occupancy : torch.Tensor
        [B, T, K], gamma_num, without gradient.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     denominator_graph,
    ...     estimate_ngram,
    ...     numerator_graph,
    ...     phone_lattice,
    ... )
    >>> lattices = [phone_lattice([[phones]]) for phones in ([0, 1], [1, 0])]
    >>> ngram = estimate_ngram(lattices, phones=2, smoothing=0)
    >>> denominator = Denominator(denominator_graph(ngram), leak=0)
    >>> numerators = [numerator_graph(lattice, ngram) for lattice in lattices]
    >>> outputs, lengths = torch.zeros(2, 2, 4), torch.tensor([2, 2])
    >>> objective, _ = lf_mmi(outputs, lengths, numerators, denominator)
    >>> objective.exp()  # 1/8 of 3/4: two frames may be one phone, too
    tensor([0.1667, 0.1667], dtype=torch.float64)
    """
    inside = torch.arange(outputs.shape[1], device=outputs.device)
    inside = (inside < lengths[:, None])[:, :, None]
    # Not by a product: padding may be anything, NaN as well.
    outputs = torch.where(inside, outputs, 0.0).to(denominator.dtype)
    graphs = pad_graphs(numerators, outputs.device, denominator.dtype)
    with torch.autocast(outputs.device.type, enabled=False):
        if not double_backward:
            return _Objective.apply(outputs, lengths, graphs, denominator)
        recursion = log_forward(graphs, outputs, lengths)
        everything, leak = denominator.log_graph(len(outputs))
        total = log_forward(everything, outputs, lengths, leak).log_sum
        with torch.no_grad():
            occupancy = log_occupancy(graphs, outputs, lengths, recursion)
        return recursion.log_sum - total, occupancy


class LFMMILoss(torch.nn.Module):
    """LF-MMI with the regularizers of Kaldi's chain models.

    -F per frame + l2 / 2 * |y|^2 + xent * cross-entropy of a second head
    against the numerator's posteriors.

    An utterance that cannot be aligned (more phones than frames, or a phone
    sequence that the n-gram does not allow) is left out: logged once, and kept
    with the reason in `left_out`.

    Arguments
    ---------
    graph : ChainGraph
        The denominator, of denominator_graph.
    leak : float
        Coefficient of the leaky HMM, see Denominator.
    l2 : float
        Of the outputs, which the objective alone leaves undetermined.
    xent : float
        Of the cross-entropy head, if there is one.
    dtype : torch.dtype
        Of the recursions, see Denominator.
    double_backward : bool
        See lf_mmi.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     denominator_graph,
    ...     estimate_ngram,
    ...     numerator_graph,
    ...     phone_lattice,
    ... )
    >>> lattice = phone_lattice([[[0, 1, 0]]])
    >>> ngram = estimate_ngram([lattice], phones=2, smoothing=0)
    >>> loss = LFMMILoss(denominator_graph(ngram), leak=0)
    >>> numerator = numerator_graph(lattice, ngram, utterance="u1")
    >>> outputs = torch.zeros(1, 5, 4, requires_grad=True)
    >>> loss(outputs, [numerator], torch.ones(1))  # per frame
    tensor(0.0697, grad_fn=<ToCopyBackward0>)
    >>> loss(outputs, [numerator], torch.tensor([0.4])).item()  # 2 of 5 frames
    0.0
    >>> loss.left_out
    {'u1': '3 frames at least, 2 there'}
    """

    def __init__(
        self,
        graph,
        leak=1e-5,
        l2=5e-5,
        xent=0.1,
        dtype=torch.float64,
        double_backward=False,
    ):
        super().__init__()
        self.denominator = Denominator(graph, leak, dtype)
        self.l2 = l2
        self.xent = xent
        self.double_backward = double_backward
        self.left_out = {}

    def forward(self, outputs, numerators, wav_lens, xent_outputs=None):
        """Loss of a batch, per frame.

        Arguments
        ---------
        outputs : torch.Tensor
            [B, T, K], raw.
        numerators : list of ChainGraph
            The transcripts, of numerator_graph.
        wav_lens : torch.Tensor
            [B], relative to the longest, as SpeechBrain has them.
        xent_outputs : torch.Tensor, optional
            [B, T, K], raw, of the cross-entropy head.

        Returns
        -------
        loss : torch.Tensor
            Of no dimension, float32. Zero, with a gradient of zero, where no
            utterance of the batch can be aligned.
        """
        lengths = (wav_lens * outputs.shape[1]).round().long()
        kept = self._alignable(outputs, numerators, lengths.tolist())
        if not kept:
            # Zero also where outputs are infinite; DDP wants a gradient.
            return torch.where(outputs.isnan() & False, outputs, 0.0).sum()
        if len(kept) < len(numerators):
            rows = torch.tensor(kept, device=outputs.device)
            outputs, lengths = outputs[rows], lengths[rows]
            numerators = [numerators[row] for row in kept]
            if xent_outputs is not None:
                xent_outputs = xent_outputs[rows]
        objective, occupancy = lf_mmi(
            outputs,
            lengths,
            numerators,
            self.denominator,
            self.double_backward,
        )
        inside = torch.arange(outputs.shape[1], device=outputs.device)
        inside = (inside < lengths[:, None])[:, :, None]
        energy = torch.where(inside, outputs, 0.0).float().square().sum()
        total = -objective.sum() + self.l2 / 2 * energy
        if xent_outputs is not None and self.xent:
            log_probs = xent_outputs.float().log_softmax(2)
            log_probs = torch.where(inside, log_probs, 0.0)
            total = total - self.xent * (occupancy * log_probs).sum()
        return (total / lengths.sum()).float()

    def _alignable(self, outputs, numerators, lengths):
        """Rows of the batch that have a path; the rest is noted."""
        if len(numerators) != len(outputs):
            raise ValueError(
                f"{len(outputs)} utterances and {len(numerators)} numerators"
            )
        size = outputs.shape[2]
        kept = []
        for row, (graph, frames) in enumerate(zip(numerators, lengths)):
            used = max(graph.entry.max(initial=0), graph.loop.max(initial=0))
            if used >= size:
                raise ValueError(
                    f"utterance {graph.utterance}: its graph has pdf {used}, "
                    f"the network {size} outputs: both want the phone set of "
                    "one lexicon"
                )
            if graph.min_frames is None:
                reason = (
                    "a phone sequence that the n-gram does not have: "
                    "estimate it with smoothing"
                )
            elif graph.min_frames > frames:
                reason = f"{graph.min_frames} frames at least, {frames} there"
            else:
                kept.append(row)
                continue
            if graph.utterance not in self.left_out:
                self.left_out[graph.utterance] = reason
                logger.warning(
                    "LF-MMI leaves out utterance %s: %s",
                    graph.utterance,
                    reason,
                )
        return kept
