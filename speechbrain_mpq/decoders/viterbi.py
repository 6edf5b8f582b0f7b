"""Exact search for the most probable words of a small vocabulary.

The whole graph of words, pronunciations and word bigram is searched without a
beam: slow, for tasks of a few hundred words and to check faster decoders.
"""

import numpy as np

from .chain_graphs import ChainGraph, chain_topology, ctc_graph

LARGEST_EXACT = 1000  # words, whose pairs are all arcs of the search


class ExactDecoder:
    """Search for the most probable words of a lexicon and a word bigram.

    Arguments
    ---------
    lexicon : Lexicon
    ngram : Ngram
        A bigram; its words are the vocabulary, 1000 at most.
    acoustic_scale, lm_scale : float
        Of the outputs and of the n-gram's log-probabilities.
    ctc : bool
        Whether the outputs are those of CTC, one a phone, with silence as the
        blank.

    Example
    -------
    >>> from .ngram import Ngram, estimate_arpa
    >>> from .vocabulary import Lexicon
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> estimate_arpa(path, ["tea eat", "eat"])
    >>> lexicon = Lexicon({"tea": [["t", "iy"]], "eat": [["iy", "t"]]})
    >>> decoder = ExactDecoder(lexicon, Ngram(path))
    >>> outputs = np.zeros((2, 6))  # sil, iy, t: entry and loop of each
    >>> outputs[0, 4] = outputs[1, 2] = 5  # t iy
    >>> decoder(outputs)[0]
    ['tea']
    """

    def __init__(
        self, lexicon, ngram, acoustic_scale=1.0, lm_scale=1.0, ctc=False
    ):
        self.words, self.scale = ngram.vocabulary, acoustic_scale
        if len(self.words) > LARGEST_EXACT:
            raise ValueError(
                f"{len(self.words)} words are too many for the exact search: "
                "ask for N-best lists (nbest), with pip install "
                "'speechbrain_mpq[decode]'"
            )
        lexicon.check_vocabulary(self.words)
        self.outputs = len(lexicon.phones) * (1 if ctc else 2)
        self.graph, self.labels = word_graph(
            lexicon, self.words, ngram.bigram(self.words), lm_scale
        )
        if ctc:
            self.graph = ctc_graph(self.graph, lexicon.silence)
            self.labels += [None] * (self.graph.states - len(self.labels))

    def __call__(self, outputs):
        """Words of one utterance, and the log-weight of their path.

        Arguments
        ---------
        outputs : numpy.ndarray
            [frames, outputs] of the network.

        Returns
        -------
        words : list of str
        score : float
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.outputs:
            raise ValueError(
                f"outputs {outputs.shape} for a graph of {self.outputs}: it "
                "was made with another model's lexicon"
            )
        states, score = best_path(self.graph, self.scale * outputs)
        numbers = [self.labels[state] for state in states]
        return [self.words[i] for i in numbers if i is not None], score


def word_graph(lexicon, words, ngram, scale=1.0, silence_weight=0.5):
    """Graph of all word sequences, each word with its pronunciations.

    Arguments
    ---------
    lexicon : Lexicon
        Pronunciations of the words.
    words : list of str
        The vocabulary.
    ngram : PhoneNgram
        Of order 2, with the numbers of words for phones.
    scale : float
        Of the n-gram's log-probabilities; LF-MMI is made for 1. Zero lets all
        words follow each other alike.
    silence_weight : float
        Weight of silence after a word and at the start, the rest is that of
        none.

    Returns
    -------
    graph : ChainGraph
    labels : list
        For each state, the number of the word that begins with it, or None.

    Example
    -------
    >>> from .chain_graphs import estimate_ngram, phone_lattice
    >>> from .vocabulary import Lexicon
    >>> lexicon = Lexicon({"a": [["x"]], "b": [["y", "x"]]})
    >>> lattices = [phone_lattice([[[0]], [[1]]])]  # a b
    >>> graph, labels = word_graph(
    ...     lexicon, ["a", "b"], estimate_ngram(lattices, phones=2)
    ... )
    >>> labels  # after each word and at the start, a silence
    [None, 0, None, 1, None, None]
    """
    if ngram.order != 2 or ngram.phones != len(words):
        raise ValueError(
            f"a bigram of {len(words)} words is wanted, this has order "
            f"{ngram.order} and {ngram.phones} words"
        )
    with np.errstate(divide="ignore"):
        follows = np.log(ngram.probabilities) * scale if scale else None
    if follows is None:
        follows = np.zeros_like(ngram.probabilities)
    quiet, spoken = np.log([silence_weight, 1 - silence_weight])
    phones, labels = [lexicon.silence], [None]
    begins, ends, arcs = [[] for _ in words], [], []
    for number, alternatives in enumerate(lexicon.encode(words)):
        pause = []
        for alternative in alternatives:
            begins[number].append(len(phones))
            for position, phone in enumerate(alternative):
                if position:
                    arcs.append((len(phones) - 1, len(phones), 0.0))
                phones.append(phone)
                labels.append(None if position else number)
            pause.append(len(phones) - 1)
        ends.append((pause, len(phones)))
        phones.append(lexicon.silence)
        labels.append(None)
    initial = np.full(len(phones), -np.inf)
    final = initial.copy()
    initial[0] = quiet
    final[0] = follows[0, -1]  # silence alone has no words
    for number, (pause, silence) in enumerate(ends):
        arcs += [(state, silence, quiet) for state in pause]
        leaving = [(state, spoken) for state in pause] + [(silence, 0.0)]
        row = follows[1 + number]
        for state, weight in leaving:
            final[state] = weight + row[-1]
            arcs += [
                (state, begin, weight + row[other])
                for other, states in enumerate(begins)
                for begin in states
            ]
        for begin in begins[number]:
            initial[begin] = spoken + follows[0, number]
            arcs.append((0, begin, follows[0, number]))
    sources, targets, weights = map(np.array, zip(*arcs))
    pdfs = chain_topology(len(lexicon.phones))[phones]
    graph = ChainGraph(
        pdfs[:, 0], pdfs[:, 1], sources, targets, weights, initial, final
    )
    return graph, labels


def best_path(graph, outputs):
    """States of the most probable path (Viterbi algorithm).

    Arguments
    ---------
    graph : ChainGraph
        Any.
    outputs : numpy.ndarray
        [frames, outputs] of the network, raw.

    Returns
    -------
    states : list of int
        Those that the path enters, in order; empty if no path has so few
        frames.
    score : float
        Log-weight of the path.

    Example
    -------
    >>> from .chain_graphs import (
    ...     estimate_ngram,
    ...     numerator_graph,
    ...     phone_lattice,
    ... )
    >>> lattice = phone_lattice([[[1, 0], [0]]])  # two pronunciations
    >>> graph = numerator_graph(lattice, estimate_ngram([lattice], phones=2))
    >>> outputs = np.zeros((3, 4))
    >>> outputs[0, 2] = 5  # phone 1 is entered at once
    >>> states, score = best_path(graph, outputs)
    >>> graph.entry[states] // 2
    array([1, 0])
    """
    outputs = np.asarray(outputs, dtype=np.float64)
    sources, weights = graph.predecessors
    rows = np.arange(graph.states)
    came = np.empty((len(outputs), graph.states), dtype=np.int64)
    score = graph.initial + outputs[0, graph.entry]
    for t in range(1, len(outputs)):
        choices = score[sources] + weights  # [states, arcs]
        best = choices.argmax(1)
        entered = choices[rows, best] + outputs[t, graph.entry]
        stayed = score + outputs[t, graph.loop]
        came[t] = np.where(stayed >= entered, -1, sources[rows, best])
        score = np.maximum(stayed, entered)
    score = score + graph.final
    state = int(score.argmax())
    total = float(score[state])
    if total == -np.inf:
        return [], total
    states = [state]
    for t in range(len(outputs) - 1, 0, -1):
        if came[t, state] >= 0:
            state = int(came[t, state])
            states.append(state)
    return states[::-1], total
