"""Graphs of LF-MMI: what was said, and everything that could have been said.

A transcript becomes a lattice of phones; the lattices of the training set give
a phone n-gram; both become graphs of the chain topology ("Purely
sequence-trained neural networks for ASR based on lattice-free MMI",
Interspeech 2016): a phone emits its entry pdf once, then its loop pdf any
number of times. As the transitions inside of a phone have weight one, a state
of the n-gram, entered with a phone, can be a state of the graph itself: no
other states are needed.

A numerator carries the weights of the n-gram and each of its phone sequences
once, hence its paths are a subset of the denominator's, with equal weights.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

START = -1  # in a history: nothing has been said yet


@dataclass
class PhoneLattice:
    """Phone sequences of one transcript, and how probable each is."""

    # list of int: phone of each node; node 0 is the start and has START
    phones: list
    # for each node, (next node, probability); next nodes have greater numbers
    arcs: list
    # list of float: probability of ending after each node; with those of its
    # arcs, it sums to one
    final: list


def phone_lattice(
    words,
    silence=None,
    between_silence=0.1,
    edge_silence=0.8,
    utterance="?",
) -> PhoneLattice:
    """All ways to say a transcript.

    Arguments
    ---------
    words : list
        For each word its pronunciations, each a list of phone numbers, as
        Lexicon.encode gives them. They are equally probable.
    silence : int, optional
        Phone of silence, which may come around words. None is never silent.
    between_silence : float
        Probability of silence between two words.
    edge_silence : float
        Probability of silence before the first and after the last word.
    utterance : str
        Its name, for errors.

    Example
    -------
    >>> lattice = phone_lattice([[[1, 2], [3]]], silence=0, edge_silence=0.5)
    >>> lattice.phones
    [-1, 0, 1, 2, 3, 0]
    >>> lattice.arcs[0]  # silence, or at once either pronunciation
    [(1, 0.5), (2, 0.25), (4, 0.25)]
    """
    _check_words(words, utterance)
    phones, arcs = [START], [[]]

    def add(phone, before):
        """A node after the nodes of `before`, node -> probability."""
        phones.append(phone)
        arcs.append([])
        for node, probability in before.items():
            arcs[node].append((len(phones) - 1, probability))
        return {len(phones) - 1: 1.0}

    def maybe_silence(before, probability):
        """Go on after an optional silence."""
        if silence is None or probability == 0:
            return before
        silent = {n: p * probability for n, p in before.items()}
        after = {n: p * (1 - probability) for n, p in before.items() if p}
        if probability == 1:
            after = {}
        return after | add(silence, silent)

    ends = maybe_silence({0: 1.0}, edge_silence)
    for position, alternatives in enumerate(words):
        if position:
            ends = maybe_silence(ends, between_silence)
        share = 1 / len(alternatives)
        before, ends = {n: p * share for n, p in ends.items()}, {}
        for alternative in alternatives:
            end = before
            for phone in alternative:
                end = add(phone, end)
            ends |= end
    ends = maybe_silence(ends, edge_silence)
    final = [ends.get(node, 0.0) for node in range(len(phones))]
    return PhoneLattice(phones, arcs, final)


def _check_words(words, utterance):
    """Refuse a transcript without words, and words without phones."""
    if not words:
        raise ValueError(
            f"utterance {utterance}: an empty transcript: remove it, or give "
            "it the phone of silence as a word"
        )
    for position, alternatives in enumerate(words):
        if not alternatives or not all(alternatives):
            raise ValueError(
                f"utterance {utterance}: word {position} has a pronunciation "
                "without phones: correct the lexicon"
            )


@dataclass
class PhoneNgram:
    """Phone n-gram without back-off arcs, a deterministic automaton."""

    order: int  # longest history plus one
    # list of tuple: history of each state, oldest phone first; state 0 is
    # (START,), states 1 to P are those of one phone
    histories: list
    # [states, P + 1], of each phone and, last, of the end
    probabilities: np.ndarray
    # [states, P], state after each phone: the longest history that is kept
    next_state: np.ndarray

    @property
    def phones(self):
        """Number of phones, P."""
        return self.next_state.shape[1]


def estimate_ngram(
    lattices, phones, order=2, extra_states=2000, smoothing=1.0
) -> PhoneNgram:
    """Phone n-gram of the transcripts of a training set.

    The counts are expected ones over the alternatives and silences of each
    lattice, where Kaldi draws one at random: it needs no seed, and no sequence
    of a training transcript has probability zero. Each state is estimated on
    exactly the contexts that lead to it (maximum likelihood).

    Arguments
    ---------
    lattices : iterable of PhoneLattice
        The transcripts.
    phones : int
        Number of phones, P.
    order : int
        2 for a bigram.
    extra_states : int
        The most frequent histories of two and more phones that are kept, the
        rest goes on with a shorter one.
    smoothing : float
        Counts that each state gets beside its own, spread as the phones are
        overall. Zero is Kaldi's unsmoothed estimate, with which sequences that
        the training set does not have, such as those of validation
        transcripts, cannot be scored.

    Example
    -------
    >>> lattice = phone_lattice([[[0, 1]], [[0, 1, 1]]])
    >>> estimate_ngram([lattice], 2, smoothing=0).probabilities
    array([[1.        , 0.        , 0.        ],
           [0.        , 1.        , 0.        ],
           [0.33333333, 0.33333333, 0.33333333]])
    """
    lattices = list(lattices)
    if order < 2:
        raise ValueError(f"order {order}: a bigram, order 2, is the least")
    if not lattices:
        raise ValueError("a phone n-gram needs at least one transcript")
    for lattice in lattices:
        _check_phones(lattice, phones)
    histories = [(START,), *((phone,) for phone in range(phones))]
    if order > 2:
        histories += _frequent_histories(lattices, order, extra_states)
    next_state = _next_states(histories, phones)
    counts = np.zeros((len(histories), phones + 1))
    for lattice in lattices:
        walk = _walk(lattice, phones, 0, lambda s, phone: next_state[s, phone])
        for state, symbol, mass in walk:
            counts[state, symbol] += mass
    overall = counts.sum(0) + 1
    prior = overall / overall.sum()
    seen = counts.sum(1, keepdims=True)
    smooth = np.where(seen > 0, smoothing, 1.0)  # never seen: as overall
    probabilities = (counts + smooth * prior) / (seen + smooth)
    return PhoneNgram(order, histories, probabilities, next_state)


def _check_phones(lattice, phones, utterance=None):
    """Refuse phones that are not in the phone set."""
    if max(lattice.phones) >= phones:
        prefix = f"utterance {utterance}: " if utterance else ""
        raise ValueError(
            f"{prefix}phone {max(lattice.phones)} is not among the {phones} of "
            "the n-gram: take the lexicon that it was estimated with"
        )


def _walk(lattice, end, start, advance):
    """Yield (state, symbol, expected count) of an automaton on a lattice."""
    reached = [defaultdict(float) for _ in lattice.phones]
    reached[0][start] = 1.0
    for node, states in enumerate(reached):
        for state, mass in states.items():
            if lattice.final[node]:
                yield state, end, mass * lattice.final[node]
            for target, probability in lattice.arcs[node]:
                phone = lattice.phones[target]
                yield state, phone, mass * probability
                reached[target][advance(state, phone)] += mass * probability


def _frequent_histories(lattices, order, most):
    """Histories of two to order - 1 symbols, the most frequent ones."""
    counts = defaultdict(float)

    def advance(history, phone):
        """The history one phone later."""
        return (*history, phone)[-(order - 1) :]

    for lattice in lattices:
        for history, _, mass in _walk(lattice, None, (START,), advance):
            for length in range(2, len(history) + 1):
                counts[history[-length:]] += mass
    ranked = sorted(counts, key=lambda h: (-counts[h], h))
    return sorted(ranked[:most], key=lambda h: (len(h), h))


def _next_states(histories, phones):
    """State after each state and phone, [states, P]."""
    number = {history: i for i, history in enumerate(histories)}
    table = np.empty((len(histories), phones), dtype=np.int64)
    for state, history in enumerate(histories):
        for phone in range(phones):
            longer = (*history, phone)
            while longer not in number:
                longer = longer[1:]
            table[state, phone] = number[longer]
    return table


@dataclass(frozen=True)
class ChainGraph:
    """Weighted paths over the outputs of a network.

    Entering a state emits its entry pdf, each frame of staying its loop pdf,
    with weight one. Other topologies are graphs of this kind too: with equal
    pdfs, and blanks between labels, it is CTC.

    Example
    -------
    >>> from numpy import array, inf
    >>> graph = ChainGraph(  # phones 0 1
    ...     entry=array([0, 2]),
    ...     loop=array([1, 3]),
    ...     sources=array([0]),
    ...     targets=array([1]),
    ...     log_weights=array([0.0]),
    ...     initial=array([0.0, -inf]),
    ...     final=array([-inf, 0.0]),
    ... )
    >>> graph.min_frames
    2
    """

    # [states], index of the output that is emitted on entering
    entry: np.ndarray
    loop: np.ndarray  # [states], index of the output that is emitted on staying
    sources: np.ndarray  # [arcs], state that an arc leaves
    targets: np.ndarray  # [arcs], state that it enters
    log_weights: np.ndarray  # [arcs], in nats
    # [states], log-weight of beginning with each state; -inf for never
    initial: np.ndarray
    final: np.ndarray  # [states], log-weight of ending in each state
    utterance: str = "?"  # its name, for errors

    @property
    def states(self):
        """Number of states."""
        return len(self.entry)

    @cached_property
    def min_frames(self):
        """Frames of the shortest path; None if no path has any weight."""
        front, frames = self.initial > -np.inf, 1
        seen = front.copy()
        ends = self.final > -np.inf
        while front.any():
            if (front & ends).any():
                return frames
            reached = np.zeros_like(front)
            reached[self.targets[front[self.sources]]] = True
            front = reached & ~seen
            seen |= front
            frames += 1
        return None

    @cached_property
    def predecessors(self):
        """States [states, most], log-weights of the arcs that enter each."""
        return _padded(self.targets, self.sources, self)

    @cached_property
    def successors(self):
        """States [states, most], log-weights of the arcs that leave each."""
        return _padded(self.sources, self.targets, self)


def _padded(owners, others, graph):
    """Table of arcs, one row for each owner, -inf where it has no more."""
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    counts = np.bincount(owners, minlength=graph.states)
    column = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    shape = (graph.states, max(1, counts.max(initial=0)))
    table = np.zeros(shape, dtype=np.int64)
    weights = np.full(shape, -np.inf)
    table[owners, column] = others[order]
    weights[owners, column] = graph.log_weights[order]
    return table, weights


def chain_topology(phones):
    """Entry and loop pdf of each phone.

    Returns
    -------
    pdfs : numpy.ndarray
        [P, 2], index of the output on entering and on staying. The network
        has 2 P outputs.

    Example
    -------
    >>> chain_topology(2)
    array([[0, 1],
           [2, 3]])
    """
    return np.arange(2 * phones).reshape(phones, 2)


def numerator_graph(lattice, ngram, utterance="?", pdfs=None) -> ChainGraph:
    """Graph of a transcript, weighted by the n-gram.

    Its states are pairs of a set of lattice nodes and a state of the n-gram:
    the subset construction that gives each phone sequence one path, also where
    two pronunciations or silences say the same.

    Arguments
    ---------
    lattice : PhoneLattice
        The transcript.
    ngram : PhoneNgram
        That of the denominator.
    utterance : str
        Its name, for errors.
    pdfs : numpy.ndarray, optional
        [P, 2], see chain_topology, which is the default.

    Example
    -------
    >>> lattice = phone_lattice([[[0, 1]], [[1], [1]]])
    >>> ngram = estimate_ngram([lattice], phones=2, smoothing=0)
    >>> graph = numerator_graph(lattice, ngram)
    >>> graph.entry
    array([0, 2, 2])
    >>> graph.min_frames
    3
    """
    _check_phones(lattice, ngram.phones, utterance)
    pdfs = chain_topology(ngram.phones) if pdfs is None else pdfs
    numbers, queue, arcs, ends = {}, [((0,), 0, None)], [], {}
    phones = []
    for nodes, history, source in queue:  # grows while it is read
        after = defaultdict(set)
        for node in nodes:
            for target, _ in lattice.arcs[node]:
                after[lattice.phones[target]].add(target)
        if any(lattice.final[node] > 0 for node in nodes):
            ends[source] = ngram.probabilities[history, -1]
        for phone in sorted(after):
            weight = ngram.probabilities[history, phone]
            if weight == 0:
                continue
            key = (
                tuple(sorted(after[phone])),
                int(ngram.next_state[history, phone]),
            )
            if key not in numbers:
                numbers[key] = len(numbers)
                phones.append(phone)
                queue.append((*key, numbers[key]))
            arcs.append((source, numbers[key], weight))
    first = {target: w for source, target, w in arcs if source is None}
    inner = [arc for arc in arcs if arc[0] is not None]
    states = range(len(numbers))
    phones = np.array(phones, dtype=np.int64)
    return ChainGraph(
        entry=pdfs[phones, 0],
        loop=pdfs[phones, 1],
        sources=np.array([a[0] for a in inner], dtype=np.int64),
        targets=np.array([a[1] for a in inner], dtype=np.int64),
        log_weights=_log([a[2] for a in inner]),
        initial=_log([first.get(s, 0.0) for s in states]),
        final=_log([ends.get(s, 0.0) for s in states]),
        utterance=utterance,
    )


def denominator_graph(ngram, pdfs=None) -> ChainGraph:
    """Graph of all phone sequences, weighted by the n-gram.

    Of a trigram, its states are all pairs of phones, p P + q with p = P for
    the start, whatever histories the n-gram has kept: the same weights of the
    same sequences, in a form that is a product of small dense matrices.

    Arguments
    ---------
    ngram : PhoneNgram
        The phone language model.
    pdfs : numpy.ndarray, optional
        [P, 2], see chain_topology, which is the default.

    Example
    -------
    >>> lattice = phone_lattice([[[0, 1]], [[0, 1, 1]]])
    >>> for order in (2, 3, 4):
    ...     ngram = estimate_ngram([lattice], 2, order)
    ...     graph = denominator_graph(ngram)
    ...     print(graph.states, len(graph.sources))
    2 4
    6 12
    10 20
    """
    phones = ngram.phones
    pdfs = chain_topology(phones) if pdfs is None else pdfs
    if ngram.order == 3:
        heads = np.append(1 + np.arange(phones), 0)  # state of p; of START
        history = ngram.next_state[heads]  # [P + 1, P], of the pair
        history = history.reshape(-1)  # [states]
        last = np.tile(np.arange(phones), phones + 1)
        after = last[:, None] * phones + np.arange(phones)  # (p, q) r -> (q, r)
        first = phones * phones + np.arange(phones)
    else:
        history = 1 + np.arange(len(ngram.histories) - 1)
        last = np.array([h[-1] for h in ngram.histories[1:]])
        after = ngram.next_state[1:] - 1
        first = ngram.next_state[0] - 1
    weights = ngram.probabilities[history]  # [states, P + 1]
    source, phone = np.nonzero(weights[:, :-1])
    initial = np.zeros(len(last))
    initial[first] = ngram.probabilities[0, :-1]
    return ChainGraph(
        entry=pdfs[last, 0],
        loop=pdfs[last, 1],
        sources=source,
        targets=after[source, phone],
        log_weights=_log(weights[source, phone]),
        initial=_log(initial),
        final=_log(weights[:, -1]),
        utterance="denominator",
    )


def ctc_graph(graph, blank):
    """The same phones in the topology of CTC.

    A phone emits its own output as often as it lasts; after each a blank may
    come, and must come between two equal ones. The blank is the phone of
    silence.

    Arguments
    ---------
    graph : ChainGraph
        With the pdfs of chain_topology.
    blank : int
        Phone and output of the blank.

    Returns
    -------
    ChainGraph
        The states of the other one and, after these, one blank for each.

    Example
    -------
    >>> lattice = phone_lattice([[[1, 1]]])
    >>> ngram = estimate_ngram([lattice], phones=2)
    >>> graph = ctc_graph(numerator_graph(lattice, ngram), blank=0)
    >>> graph.entry
    array([1, 1, 0, 0])
    >>> graph.min_frames
    3
    """
    phones = graph.entry // 2
    pdfs = np.append(phones, np.full_like(phones, blank))
    states = np.arange(graph.states)
    speech = states[phones != blank]
    direct = (phones[graph.sources] != phones[graph.targets]) | (
        phones[graph.sources] == blank
    )
    behind = phones[graph.sources] != blank  # arcs that a blank may precede
    return ChainGraph(
        entry=pdfs,
        loop=pdfs,
        sources=np.concatenate(
            [
                graph.sources[direct],
                speech,
                graph.sources[behind] + graph.states,
            ]
        ),
        targets=np.concatenate(
            [
                graph.targets[direct],
                speech + graph.states,
                graph.targets[behind],
            ]
        ),
        log_weights=np.concatenate(
            [
                graph.log_weights[direct],
                np.zeros(len(speech)),
                graph.log_weights[behind],
            ]
        ),
        initial=np.append(graph.initial, np.full(graph.states, -np.inf)),
        final=np.append(
            graph.final, np.where(phones != blank, graph.final, -np.inf)
        ),
        utterance=graph.utterance,
    )


def _log(weights):
    """Logarithm, -inf of zero, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(weights, dtype=np.float64))


def leak_distribution(graph, steps=100):
    """Average occupancy of a graph's states in its first steps.

    What the leaky HMM restarts with: each step normalizes the weights of a
    state (staying, leaving, ending) to probabilities, and forgets what has
    ended, as Kaldi does for its initial probabilities.

    Returns
    -------
    occupancy : numpy.ndarray
        [states], sums to one.
    """
    weights = np.exp(graph.log_weights)
    leaving = np.bincount(graph.sources, weights, graph.states)
    total = 1 + leaving + np.exp(graph.final)
    occupancy = np.exp(graph.initial)
    occupancy /= occupancy.sum()
    average = np.zeros(graph.states)
    for _ in range(steps):
        average += occupancy / steps
        share = occupancy / total
        occupancy = share + np.bincount(
            graph.targets, share[graph.sources] * weights, graph.states
        )
        occupancy /= occupancy.sum()
    return average
