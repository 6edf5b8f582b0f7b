"""Sums over all paths of a graph and posteriors of its outputs, in logarithms.

The forward-backward algorithm on decoders.chain_graphs' graphs. Exact for any
outputs and any graph, and with derivatives of any order; for a numerator, that
is small and full of dead states. B utterances, T frames, S states, K outputs.
Where a recursion runs along it, time comes first.
"""

from typing import NamedTuple

import numpy as np
import torch

DEAD = -1e30  # log of zero: finite, as the gradient of -inf is NaN


class PaddedGraphs(NamedTuple):
    """Graphs of a batch as tensors, DEAD where a state or arc is padding."""

    entry: torch.Tensor  # [B, S]
    loop: torch.Tensor  # [B, S]
    initial: torch.Tensor  # [B, S]
    final: torch.Tensor  # [B, S]
    sources: torch.Tensor  # [B, S, most arcs that enter a state]
    source_weights: torch.Tensor
    targets: torch.Tensor  # [B, S, most arcs that leave a state]
    target_weights: torch.Tensor


def pad_graphs(graphs, device=None, dtype=torch.float64):
    """Graphs of a batch in common tensors."""
    states = max(graph.states for graph in graphs)

    def stack(tables, fill):
        """One array, [B, S, ...], filled up at the ends."""
        width = tuple(max(table.shape[1:] for table in tables))
        stacked = np.full((len(tables), states, *width), fill)
        for row, table in zip(stacked, tables):
            row[tuple(slice(size) for size in table.shape)] = table
        if stacked.dtype == np.float64:
            stacked = np.maximum(stacked, DEAD)
            return torch.as_tensor(stacked, dtype=dtype, device=device)
        return torch.as_tensor(stacked, device=device)

    return PaddedGraphs(
        stack([graph.entry for graph in graphs], 0),
        stack([graph.loop for graph in graphs], 0),
        stack([graph.initial for graph in graphs], DEAD),
        stack([graph.final for graph in graphs], DEAD),
        stack([graph.predecessors[0] for graph in graphs], 0),
        stack([graph.predecessors[1] for graph in graphs], DEAD),
        stack([graph.successors[0] for graph in graphs], 0),
        stack([graph.successors[1] for graph in graphs], DEAD),
    )


class Leak(NamedTuple):
    """Leaky HMM: between frames, a share restarts anywhere.

    a'(s) = a(s) + coefficient * pi(s) * sum of a.
    """

    coefficient: float
    occupancy: torch.Tensor  # pi, [S]

    def forward(self, log_alpha):
        """Add what restarts, [B, S]."""
        if not self.coefficient:
            return log_alpha
        restart = log_alpha.logsumexp(1, keepdim=True) + self._log_share()
        return _log_add(log_alpha, restart)

    def backward(self, log_beta):
        """The same, from the end."""
        if not self.coefficient:
            return log_beta
        restart = (log_beta + self._log_share()).logsumexp(1, keepdim=True)
        return _log_add(log_beta, restart)

    def _log_share(self):
        """Logarithm of coefficient * pi."""
        return (self.coefficient * self.occupancy).log().clamp(min=DEAD)


NO_LEAK = Leak(0.0, None)


class Recursion(NamedTuple):
    """What a recursion forward leaves for the one backward."""

    log_sum: torch.Tensor  # [B], of all paths
    alphas: torch.Tensor  # [T, B, S], scaled in each frame
    scales: torch.Tensor  # [T, B]


def log_forward(graphs, outputs, lengths, leak=NO_LEAK):
    """Log-sum of the weights of all paths, in the log domain.

    Of differentiable operations, so that it has derivatives of any order.

    Arguments
    ---------
    outputs : torch.Tensor
        [B, T, K], the network's raw outputs.
    lengths : torch.Tensor
        [B], frames of each utterance.
    """
    entry = _of_states(outputs, graphs.entry)  # [B, T, S]
    loop = _of_states(outputs, graphs.loop)
    alphas, scales = [], []
    alpha = graphs.initial + entry[:, 0]
    for t in range(outputs.shape[1]):
        if t:
            before = leak.forward(alpha)
            entered = _along(before, graphs.sources, graphs.source_weights)
            alpha = _log_add(entered + entry[:, t], before + loop[:, t])
        scale = alpha.detach().amax(1, keepdim=True)
        alpha = alpha - scale
        alphas.append(alpha)
        scales.append(scale[:, 0])
    alphas, scales = torch.stack(alphas), torch.stack(scales)
    end = at_frame(alphas, lengths - 1) + graphs.final  # [B, S]
    log_sum = end.logsumexp(1) + at_frame(
        scales.double().cumsum(0), lengths - 1
    )
    return Recursion(log_sum, alphas, scales)


def log_occupancy(graphs, outputs, lengths, recursion, leak=NO_LEAK):
    """Posterior of each output, by the recursion backward.

    Arguments
    ---------
    outputs : torch.Tensor
        [B, T, K].
    lengths : torch.Tensor
        [B].

    Returns
    -------
    occupancy : torch.Tensor
        [B, T, K], gamma. The rows of an utterance's frames sum to one, those
        of the padding are zero.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     estimate_ngram,
    ...     numerator_graph,
    ...     phone_lattice,
    ... )
    >>> lattice = phone_lattice([[[0, 1]]])
    >>> ngram = estimate_ngram([lattice], phones=2, smoothing=0)
    >>> graphs = pad_graphs([numerator_graph(lattice, ngram)])
    >>> outputs, lengths = torch.zeros(1, 3, 4), torch.tensor([3])
    >>> recursion = log_forward(graphs, outputs, lengths)
    >>> log_occupancy(graphs, outputs, lengths, recursion)[0].float()
    tensor([[1.0000, 0.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    entry = _of_states(outputs, graphs.entry).transpose(0, 1)  # [T, B, S]
    loop = _of_states(outputs, graphs.loop).transpose(0, 1)
    frames = len(entry)
    last = (lengths - 1)[:, None]
    beta, betas = graphs.final, [graphs.final]
    for t in range(frames - 2, -1, -1):
        ahead = beta + entry[t + 1]
        beta = _log_add(
            _along(ahead, graphs.targets, graphs.target_weights),
            beta + loop[t + 1],
        )
        beta = leak.backward(beta)
        beta = beta - beta.amax(1, keepdim=True)
        beta = torch.where(last <= t, graphs.final, beta)
        betas.append(beta)
    alphas, scales = recursion.alphas, recursion.scales[:, :, None]
    occupancy = (alphas + torch.stack(betas[::-1])).softmax(2)
    # Of the weight of being in a state, the share that was there before.
    before = (
        torch.stack([leak.forward(alpha) for alpha in alphas[:-1]])
        if frames > 1
        else alphas[:0]
    )
    stayed = before + loop[1:] - (alphas + scales)[1:]
    stayed = stayed.clamp(max=0).exp()
    staying = torch.cat(
        [torch.zeros_like(occupancy[:1]), occupancy[1:] * stayed]
    )
    entering = occupancy - staying
    return _of_outputs(entering, staying, graphs, outputs, lengths)


def _log_add(a, b):
    """Log of the sum of two weights.

    The second derivative of logaddexp is NaN where one of them is DEAD.
    """
    if torch.is_grad_enabled():
        return torch.stack((a, b)).logsumexp(0)
    return torch.logaddexp(a, b)


def _of_states(outputs, pdfs):
    """Output of each state's pdf, [B, T, K] and [B, S] to [B, T, S]."""
    pdfs = pdfs[:, None].expand(-1, outputs.shape[1], -1)
    return outputs.gather(2, pdfs)


def _along(log_values, others, log_weights):
    """Log-sum over each state's arcs, [B, S] and [B, S, arcs] to [B, S]."""
    values = log_values.gather(1, others.flatten(1)).view_as(log_weights)
    return (values + log_weights).logsumexp(2)


def at_frame(values, frames):
    """Values of one frame for each utterance.

    Arguments
    ---------
    values : torch.Tensor
        [T, B, ...].
    frames : torch.Tensor
        [B], index of each utterance's frame.

    Returns
    -------
    picked : torch.Tensor
        [B, ...].

    Example
    -------
    >>> at_frame(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 0]))
    tensor([3, 2])
    """
    return values[frames, torch.arange(len(frames), device=values.device)]


def _of_outputs(entering, staying, graphs, outputs, lengths):
    """Posteriors of states as those of outputs, [T, B, S] to [B, T, K].

    A product with the states' pdfs: adding to indices has no fixed order on a
    GPU.
    """
    size = outputs.shape[2]
    occupancy = 0
    for share, pdfs in ((entering, graphs.entry), (staying, graphs.loop)):
        pdfs = torch.nn.functional.one_hot(pdfs, size).to(share.dtype)
        occupancy = occupancy + share.transpose(0, 1) @ pdfs  # [B, T, K]
    time = torch.arange(outputs.shape[1], device=outputs.device)
    return occupancy * (time < lengths[:, None])[:, :, None]
