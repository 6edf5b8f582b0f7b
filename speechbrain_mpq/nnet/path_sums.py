"""Sums over all paths of a graph and posteriors of its outputs, for LF-MMI.

The forward-backward algorithm on decoders.chain_graphs' graphs. In logarithms
it is exact for any outputs and any graph, with derivatives of any order: for a
numerator, that is small and full of dead states. For the denominator, the sum
over all phone sequences, it is in the linear domain: each frame is a product
with the arcs of the graph, scaled to sum one. The products are dense ones or,
on a GPU, sums of segments: in a fixed order, hence deterministic.

B utterances, T frames, S states, K outputs; time comes first where a recursion
runs along it.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch

from ..decoders.chain_graphs import leak_distribution

DEAD = -1e30  # log of zero: finite, as the gradient of -inf is NaN
DENSE_STATES = 512  # up to here, a product with all S^2 weights is faster
BLOCK = 2**16  # values of temporary tensors, which then stay in the cache


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
    end = _at_frame(alphas, lengths - 1) + graphs.final  # [B, S]
    log_sum = end.logsumexp(1) + _at_frame(
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
    """Log of the sum of two weights."""
    # The second derivative of logaddexp is NaN where one of them is DEAD.
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


def _at_frame(values, frames):
    """Values [T, B, ...] of a frame for each utterance, [B, ...]."""
    return values[frames, torch.arange(len(frames), device=values.device)]


def _of_outputs(entering, staying, graphs, outputs, lengths):
    """Posteriors of states as those of outputs, [T, B, S] to [B, T, K]."""
    # A product with the states' pdfs: adding to indices has no fixed order on a
    # GPU.
    size = outputs.shape[2]
    occupancy = 0
    for share, pdfs in ((entering, graphs.entry), (staying, graphs.loop)):
        pdfs = torch.nn.functional.one_hot(pdfs, size).to(share.dtype)
        occupancy = occupancy + share.transpose(0, 1) @ pdfs  # [B, T, K]
    time = torch.arange(outputs.shape[1], device=outputs.device)
    return occupancy * (time < lengths[:, None])[:, :, None]


class DenseTransitions(torch.nn.Module):
    """All arcs of a small graph, such as a bigram's, as one matrix.

    Arguments
    ---------
    graph : ChainGraph
        The denominator.
    dtype : torch.dtype
        Of the weights.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     denominator_graph,
    ...     estimate_ngram,
    ...     phone_lattice,
    ... )
    >>> lattices = [phone_lattice([[[0, 1, 1]]])]
    >>> ngram = estimate_ngram(lattices, 2, order=2, smoothing=0)
    >>> transitions = DenseTransitions(denominator_graph(ngram), torch.float64)
    >>> transitions.backward(torch.ones(1, 2).double())  # without the end
    tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """

    def __init__(self, graph, dtype):
        super().__init__()
        matrix = np.zeros((graph.states, graph.states))
        np.add.at(
            matrix, (graph.sources, graph.targets), np.exp(graph.log_weights)
        )
        matrix = torch.as_tensor(matrix, dtype=dtype)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, alpha):
        """Weight that enters each state, [B, S]."""
        return alpha @ self.matrix

    def backward(self, beta):
        """Weight ahead of each state, [B, S]."""
        return beta @ self.matrix.T


class PairTransitions(torch.nn.Module):
    """Arcs of a trigram: from the pair (p, q) to (q, r), a matrix for each q.

    Arguments
    ---------
    graph : ChainGraph
        The denominator, its states as denominator_graph has them.
    dtype : torch.dtype
        Of the weights.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     denominator_graph,
    ...     estimate_ngram,
    ...     phone_lattice,
    ... )
    >>> lattices = [phone_lattice([[[0, 1, 1]]])]
    >>> ngram = estimate_ngram(lattices, 2, order=3, smoothing=0)
    >>> transitions = PairTransitions(denominator_graph(ngram), torch.float64)
    >>> transitions.weights.shape  # [q, p, r]
    torch.Size([2, 3, 2])
    """

    def __init__(self, graph, dtype):
        super().__init__()
        self.phones = _pairs_of(graph)
        weights = np.zeros((self.phones, self.phones + 1, self.phones))
        head, middle = np.divmod(graph.sources, self.phones)
        weights[middle, head, graph.targets % self.phones] = np.exp(
            graph.log_weights
        )
        weights = torch.as_tensor(weights, dtype=dtype)  # [q, p, r]
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, alpha):
        """Weight that enters each state, [B, S]."""
        pairs = alpha.view(len(alpha), self.phones + 1, self.phones)
        entered = pairs.permute(2, 0, 1) @ self.weights  # [q, B, r]
        # Nothing enters a pair that begins with the start.
        return torch.nn.functional.pad(
            entered.transpose(0, 1).flatten(1), (0, self.phones)
        )

    def backward(self, beta):
        """Weight ahead of each state, [B, S]."""
        pairs = beta.view(len(beta), self.phones + 1, self.phones)[:, :-1]
        ahead = pairs.transpose(0, 1) @ self.weights.mT  # [q, B, p]
        return ahead.permute(1, 2, 0).flatten(1)


def _pairs_of(graph):
    """Phones P of a graph whose states are pairs of a trigram, or None."""
    phones = int((graph.states + 0.25) ** 0.5 - 0.5)  # P (P + 1) states
    if phones * (phones + 1) != graph.states:
        return None
    follows = graph.targets // phones == graph.sources % phones
    return phones if follows.all() else None


class SparseTransitions(torch.nn.Module):
    """Arcs of a large graph, such as a 4-gram's, sorted by state.

    Arguments
    ---------
    graph : ChainGraph
        The denominator.
    dtype : torch.dtype
        Of the weights.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     denominator_graph,
    ...     estimate_ngram,
    ...     phone_lattice,
    ... )
    >>> lattices = [phone_lattice([[[0, 1, 1]]])]
    >>> ngram = estimate_ngram(lattices, 2, order=4, smoothing=0)
    >>> transitions = SparseTransitions(denominator_graph(ngram), torch.float64)
    >>> transitions(torch.ones(1, 7).double())[0, :2]
    tensor([1.1429, 0.0000], dtype=torch.float64)
    """

    def __init__(self, graph, dtype):
        super().__init__()
        for name, owners, others in (
            ("entering", graph.targets, graph.sources),
            ("leaving", graph.sources, graph.targets),
        ):
            order = np.argsort(owners, kind="stable")
            counts = np.bincount(owners, minlength=graph.states)
            weights = np.exp(graph.log_weights[order])
            for part, values in (
                ("others", torch.as_tensor(others[order])),
                ("offsets", torch.as_tensor(np.append(0, counts.cumsum()))),
                ("weights", torch.as_tensor(weights, dtype=dtype)),
            ):
                self.register_buffer(f"{name}_{part}", values, persistent=False)

    def forward(self, alpha):
        """Weight that enters each state, [B, S]."""
        return _sum_arcs(
            alpha,
            self.entering_others,
            self.entering_weights,
            self.entering_offsets,
        )

    def backward(self, beta):
        """Weight ahead of each state, [B, S]."""
        return _sum_arcs(
            beta,
            self.leaving_others,
            self.leaving_weights,
            self.leaving_offsets,
        )


def _sum_arcs(values, others, weights, offsets):
    """Weighted sum over the arcs of each state, [B, S]."""
    if values.is_cuda:  # where products of sparse matrices have no fixed order
        return _sum_segments(values, others, weights, offsets)
    size = len(offsets) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        warnings.filterwarnings("ignore", "Sparse invariant checks")
        arcs = torch.sparse_csr_tensor(
            offsets, others, weights, (size, size), check_invariants=False
        )
    return (arcs @ values.T).T.contiguous()


def _sum_segments(values, others, weights, offsets):
    """The same, 30 times slower on a CPU."""
    arcs = values.T[others] * weights[:, None]  # [arcs, B]
    return torch.segment_reduce(
        arcs, "sum", offsets=offsets, axis=0, initial=0.0
    ).T.contiguous()


class Denominator(torch.nn.Module):
    """Sum over all phone sequences, in the linear domain.

    Chooses the product by the graph: dense for a bigram, small dense ones for
    a trigram, sparse for longer histories.

    Arguments
    ---------
    graph : ChainGraph
        As denominator_graph gives it.
    leak : float
        Coefficient of the leaky HMM: 0.1 in Kaldi's recipes, 1e-5 in PyChain.
    dtype : torch.dtype
        Of the recursion. float64 loses nothing, whatever the outputs are;
        float32 takes half the memory, and on a GPU wants
        torch.backends.cuda.matmul.allow_tf32 off.

    Example
    -------
    >>> from speechbrain_mpq.decoders.chain_graphs import (
    ...     denominator_graph,
    ...     estimate_ngram,
    ...     phone_lattice,
    ... )
    >>> lattices = [phone_lattice([[[0, 1]]])]
    >>> ngram = estimate_ngram(lattices, phones=2, smoothing=0)
    >>> denominator = Denominator(denominator_graph(ngram), leak=0)
    >>> outputs = torch.zeros(2, 4, 4, dtype=torch.float64)
    >>> denominator(outputs, torch.tensor([2, 4])).log_sum.exp()  # 2 phones
    tensor([1.0000, 3.0000], dtype=torch.float64)
    """

    def __init__(self, graph, leak=1e-5, dtype=torch.float64):
        super().__init__()
        if leak < 0:
            raise ValueError(f"leak {leak}: a share of 0 or more")
        self.graph = graph
        self.dtype = dtype
        self.leak = leak
        if graph.states <= DENSE_STATES:
            self.transitions = DenseTransitions(graph, dtype)
        elif _pairs_of(graph):
            self.transitions = PairTransitions(graph, dtype)
        else:
            self.transitions = SparseTransitions(graph, dtype)
        for name, values in (
            ("entry", torch.as_tensor(graph.entry)),
            ("loop", torch.as_tensor(graph.loop)),
            ("initial", torch.as_tensor(np.exp(graph.initial), dtype=dtype)),
            ("final", torch.as_tensor(np.exp(graph.final), dtype=dtype)),
            (
                "occupancy",
                torch.as_tensor(leak_distribution(graph), dtype=dtype),
            ),
        ):
            self.register_buffer(name, values, persistent=False)

    @torch.no_grad()  # the gradient comes from occupancies
    def forward(self, outputs, lengths):
        """Log-sum of all paths.

        Arguments
        ---------
        outputs : torch.Tensor
            [B, T, K].
        lengths : torch.Tensor
            [B], frames.
        """
        peaks = outputs.amax(2)  # [B, T]; with it, no exponential is infinite
        emitted = (outputs - peaks[:, :, None]).exp().transpose(0, 1)
        restart = self.leak * self.occupancy
        alphas = emitted.new_empty(*emitted.shape[:2], len(self.entry))
        scales = emitted.new_empty(emitted.shape[:2])  # [T, B]
        tiny = torch.finfo(emitted.dtype).tiny
        alpha = self.initial * emitted[0][:, self.entry]
        for t, emission in enumerate(emitted):
            if t:
                before = alpha + restart
                alpha = self.transitions(before) * emission[:, self.entry]
                alpha += before * emission[:, self.loop]
            scale = alpha.sum(1).clamp(min=tiny)
            alpha = alpha / scale[:, None]
            alphas[t], scales[t] = alpha, scale
        log_scales = (scales.double().log() + peaks.T).cumsum(0)
        end = (_at_frame(alphas, lengths - 1) * self.final).sum(1)
        log_sum = end.clamp(min=tiny).log() + _at_frame(log_scales, lengths - 1)
        return Recursion(log_sum, alphas, scales)

    @torch.no_grad()
    def occupancies(self, outputs, lengths, recursion):
        """Posterior of each output, by the recursion backward.

        Arguments
        ---------
        outputs : torch.Tensor
            [B, T, K].
        lengths : torch.Tensor
            [B], frames.

        Returns
        -------
        occupancy : torch.Tensor
            [B, T, K], gamma.
        log_sum : torch.Tensor
            [B], of all paths once more: it is another number than forward's
            only where one of the two has lost paths to underflow.
        """
        peaks = outputs.amax(2)
        emitted = (outputs - peaks[:, :, None]).exp().transpose(0, 1)
        last = (lengths - 1)[:, None]
        tiny = torch.finfo(emitted.dtype).tiny
        beta = self.final.expand(len(outputs), -1)
        betas = torch.empty_like(recursion.alphas)
        betas[-1] = beta
        log_sum = 0.0  # float64, whatever the recursion is
        for t in range(len(emitted) - 2, -1, -1):
            emission = emitted[t + 1]
            ahead = self.transitions.backward(beta * emission[:, self.entry])
            ahead = ahead + beta * emission[:, self.loop]
            if self.leak:
                restart = (ahead @ self.occupancy)[:, None]
                ahead = ahead + self.leak * restart
            scale = ahead.amax(1, keepdim=True).clamp(min=tiny)
            beta = torch.where(last <= t, self.final, ahead / scale)
            log_sum = log_sum + torch.where(last > t, scale.double().log(), 0.0)
            betas[t] = beta
        first = self.initial * emitted[0][:, self.entry]
        log_sum = log_sum + (first * beta).sum(1, True).clamp(min=tiny).log()
        inside = torch.arange(outputs.shape[1], device=last.device) <= last
        log_sum = log_sum[:, 0] + (peaks * inside).sum(1)
        return self._posteriors(emitted, recursion, betas, inside), log_sum

    def _posteriors(self, emitted, recursion, betas, inside):
        """Posterior of each output from those of the states, [B, T, K]."""
        frames, batch, size = emitted.shape
        tiny = torch.finfo(emitted.dtype).tiny
        pdfs = torch.stack([self.entry, self.loop])
        pdfs = torch.nn.functional.one_hot(pdfs, size).to(emitted.dtype)
        posteriors = torch.empty_like(emitted)
        # Without alphas before it, the first frame has entered every state.
        first = torch.zeros_like(recursion.alphas[:1])
        length = max(1, BLOCK // (batch * len(self.entry)))
        for begin in range(0, frames, length):
            block = slice(begin, min(begin + length, frames))
            alphas = recursion.alphas[block]
            occupancy = alphas * betas[block]  # [frames, B, S]
            occupancy /= occupancy.sum(2, keepdim=True).clamp(min=tiny)
            # Of the weight of being in a state, what was there before.
            before = recursion.alphas[max(begin - 1, 0) : block.stop - 1]
            stayed = before + self.leak * self.occupancy
            if begin == 0:
                stayed = torch.cat([first, stayed])
            stayed *= emitted[block][:, :, self.loop]
            stayed /= (alphas * recursion.scales[block][:, :, None]).clamp(
                min=tiny
            )
            staying = occupancy * stayed.clamp_(max=1)
            posteriors[block] = (occupancy - staying) @ pdfs[0]
            posteriors[block] += staying @ pdfs[1]
        return posteriors.transpose(0, 1) * inside[:, :, None]

    def log_graph(self, batch):
        """The graph and leak in the log domain, for a batch of that size."""
        padded = pad_graphs([self.graph], self.entry.device, self.dtype)
        repeated = (part.expand(batch, *part.shape[1:]) for part in padded)
        return PaddedGraphs(*repeated), Leak(self.leak, self.occupancy)
