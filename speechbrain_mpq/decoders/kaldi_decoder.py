"""N-best lists by Kaldi's decoder, on a graph of lexicon and word n-gram.

The graph is Kaldi's HLG for the chain topology: G, the n-gram with its
back-off arcs, composed with L, the lexicon with optional silence, determinized,
and each phone replaced by one entry and any number of loop frames. Phones are
without context, so there is no C. It has the same paths with the same weights
as `viterbi.word_graph`, but for n-grams of any order and large vocabularies.

It takes the extra `decode`: kaldifst and kaldi-decoder, both Apache-2.0.
"""

import heapq
import math
from collections import Counter, defaultdict
from graphlib import TopologicalSorter

import numpy as np

from .chain_graphs import chain_topology
from .nbest import NBest
from .vocabulary import BOS, EOS

HINT = (
    "N-best lists need kaldifst and kaldi-decoder: pip install "
    "'speechbrain_mpq[decode]'"
)
PRUNE = 25  # frames between two prunings of the lattice
WIDER = (1, 2, 4)  # times the beam, until a sentence is complete


def _modules():
    """The two extensions, or an error that says how to get them."""
    try:
        import kaldi_decoder
        import kaldifst
    except ImportError as error:
        raise ImportError(f"{HINT} ({error})") from error
    return kaldifst, kaldi_decoder


class WordDecoder:
    """Beam search for the most probable word sequences.

    The score of a hypothesis is that of its best path,

        acoustic_scale * (outputs) + lm_scale * (n-gram) + (silences),

    in nats, where outputs are the network's and a silence or none after a word
    is a factor of `silence_weight` or the rest to one. Chain models are made
    for scales of one.

    Arguments
    ---------
    lexicon : Lexicon
        Pronunciations in the network's phones.
    ngram : Ngram
        Of any order; its words are the vocabulary.
    acoustic_scale, lm_scale : float
        lm_scale 0 lets words follow each other alike.
    silence_weight : float
        Weight of silence after a word and at the start.
    beam : float
        How much worse than the best, in nats, a partial path may be. Where no
        sentence is complete in the end, the search is made again with twice
        that, and four times.
    lattice_beam : float
        How much worse than the best a hypothesis may be.

    Example
    -------
    >>> from .vocabulary import Lexicon
    >>> from .ngram import Ngram, estimate_arpa
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> estimate_arpa(path, ["tea eat", "eat"])
    >>> lexicon = Lexicon({"tea": [["t", "iy"]], "eat": [["iy", "t"]]})
    >>> decoder = WordDecoder(lexicon, Ngram(path))
    >>> outputs = np.zeros((2, 6))  # sil, iy, t: entry and loop of each
    >>> outputs[0, 4] = outputs[1, 2] = 5  # t iy
    >>> decoder.nbest(outputs, count=1).hypotheses
    ['tea']
    """

    def __init__(
        self,
        lexicon,
        ngram,
        acoustic_scale=1.0,
        lm_scale=1.0,
        silence_weight=0.5,
        beam=16.0,
        lattice_beam=10.0,
    ):
        check_scales(acoustic_scale, lm_scale, silence_weight)
        if not (0 < beam < math.inf and 0 < lattice_beam < math.inf):
            raise ValueError(
                f"beam {beam} and lattice_beam {lattice_beam} must be above 0 "
                "and finite: about 16 and 10"
            )
        self.words = ngram.vocabulary
        self.ngram = ngram
        self.acoustic_scale, self.lm_scale = acoustic_scale, lm_scale
        self.outputs = 2 * len(lexicon.phones)
        self.graph = decoding_graph(lexicon, ngram, lm_scale, silence_weight)
        _, decoder = _modules()
        self.configs = [
            decoder.LatticeSimpleDecoderConfig(
                beam=factor * beam,
                lattice_beam=lattice_beam,
                prune_interval=PRUNE,
            )
            for factor in WIDER
        ]

    def nbest(self, outputs, count=20, utterance="utterance"):
        """The most probable word sequences, each once.

        Arguments
        ---------
        outputs : numpy.ndarray
            [frames, outputs] of the network; normalized in each frame
            (log-softmax), all scores are at most 0.
        count : int
            Most hypotheses.
        utterance : str
            Its name.

        Returns
        -------
        NBest
            The best first; details have "acoustic_scores" (silences included)
            and "lm_scores" before they are scaled.
        """
        outputs = np.asarray(outputs, dtype=np.float32)
        if outputs.ndim != 2 or outputs.shape[1] != self.outputs:
            raise ValueError(
                f"utterance {utterance}: outputs {outputs.shape} for a graph "
                f"of {self.outputs}: it was made with another model's lexicon"
            )
        if not np.isfinite(outputs).all():
            raise ValueError(
                f"utterance {utterance}: outputs hold NaN or infinity"
            )
        if count < 1:
            raise ValueError(f"{count} hypotheses: ask for at least one")
        lattice = self._lattice(outputs, utterance)
        texts, scores, details = [], [], []
        for numbers, cost in _distinct(lattice, count):
            words = [self.words[i] for i in numbers]
            own = math.fsum(self.ngram.score(words))
            rest = -cost - self.lm_scale * own
            texts.append(" ".join(words))
            scores.append(-cost)
            details.append(
                {
                    "acoustic_scores": rest / self.acoustic_scale,
                    "lm_scores": own,
                }
            )
        return NBest(utterance, texts, scores, details)

    def _lattice(self, outputs, utterance):
        """Kaldi's lattice of one utterance."""
        _, decoder = _modules()
        scaled = np.ascontiguousarray(self.acoustic_scale * outputs)
        for config in self.configs if len(scaled) else ():
            search = decoder.LatticeSimpleDecoder(self.graph, config)
            reached = search.decode(decoder.DecodableCtc(scaled))
            if reached and math.isfinite(search.final_relative_cost()):
                return search.get_raw_lattice()[1]
        raise ValueError(
            f"utterance {utterance}: no word sequence fits its {len(scaled)} "
            f"frames: it is too short, or a beam of {self.configs[-1].beam:g} "
            "too narrow"
        )


def decoding_graph(lexicon, ngram, lm_scale=1.0, silence_weight=0.5):
    """Kaldi's HLG: pdf + 1 on the input, word number + 1 on the output.

    Arguments
    ---------
    lexicon : Lexicon
    ngram : Ngram
    lm_scale, silence_weight : float
        See WordDecoder.

    Returns
    -------
    kaldifst.StdVectorFst
    """
    fst, _ = _modules()
    words = ngram.vocabulary
    phones = len(lexicon.phones)
    lexicon_text, backoff = _lexicon_fst(lexicon, words, silence_weight)
    left = fst.compile(lexicon_text)
    right = fst.compile(_ngram_fst(ngram, words, lm_scale))
    fst.arcsort(left, "olabel")
    fst.arcsort(right, "ilabel")
    graph = fst.compose(left, right)
    if graph.start < 0:
        raise ValueError("lexicon and n-gram have no sentence in common")
    fst.determinize_star(graph)
    return fst.compile(_chain_fst(graph.to_str(), phones))


def check_scales(acoustic_scale, lm_scale, silence_weight=0.5):
    """Refuse scales that no search is made for."""
    if not (0 < acoustic_scale < math.inf and 0 <= lm_scale < math.inf):
        raise ValueError(
            f"acoustic_scale {acoustic_scale} must be above 0, lm_scale "
            f"{lm_scale} not below"
        )
    if not 0 < silence_weight < 1:
        raise ValueError(
            f"silence_weight {silence_weight} must be between 0 and 1"
        )


def _lexicon_fst(lexicon, words, silence_weight):
    """Text of L, phone + 1 to word + 1, and the symbol of back-off in it."""
    # Symbols above the phones keep pronunciations apart that are the same or
    # begin alike (#1, #2, ...), silences (the next one) and back-off (#0): they
    # go when the graph has been determinized.
    lexicon.check_vocabulary(words)
    encoded = lexicon.encode(words)
    uses = Counter(tuple(alternative) for row in encoded for alternative in row)
    beginnings = {key[:end] for key in uses for end in range(len(key))}
    backoff = len(lexicon.phones) + 1
    apart, silent = backoff + 2, backoff + 1
    quiet, spoken = -math.log(silence_weight), -math.log(1 - silence_weight)
    pause = lexicon.silence + 1
    begin, again, after, behind, alone = 1, 2, 3, 4, 6
    lines = [
        f"0 {begin} 0 0 {spoken}",
        f"0 5 {pause} 0 {quiet}",
        f"5 {begin} {silent} 0 0",
        f"{after} {behind} {pause} 0 0",
        f"{behind} {again} {silent} 0 0",
        f"0 {alone} {pause} 0 {quiet}",
    ]
    state, used = 7, Counter()
    for number, row in enumerate(encoded, 1):
        for alternative in map(tuple, row):
            labels = [phone + 1 for phone in alternative]
            if uses[alternative] > 1 or alternative in beginnings:
                labels.append(apart + used[alternative])
                used[alternative] += 1
            before = state
            for start in (begin, again):
                lines.append(f"{start} {state} {labels[0]} {number} 0")
            state += 1
            for label in labels[1:]:
                lines.append(f"{before} {state} {label} 0 0")
                before, state = state, state + 1
            lines.append(f"{before} {again} 0 0 {spoken}")
            lines.append(f"{before} {after} 0 0 {quiet}")
    for loop in (begin, again, alone):
        lines.append(f"{loop} {loop} {backoff} {len(words) + 1} 0")
    lines += [f"{again} 0", f"{alone} 0"]  # silence alone has no words
    return "\n".join(lines) + "\n", backoff


def _ngram_fst(ngram, words, scale):
    """Text of G, an acceptor of word + 1 whose back-off symbol is the last."""
    numbers = {word: i for i, word in enumerate(words, 1)}
    model, order = ngram.model, ngram.model.top_order
    start = (BOS,) if order > 1 else ()
    contexts = {start, ()}
    for length in range(2, order + 1):
        contexts.update(model.ngrams[length])
    contexts.update(c for t in model.backoffs.values() for c in t)
    contexts = {
        c
        for c in contexts
        if len(c) < order and all(w in numbers for w in c if w != BOS)
    }
    states = {start: 0}  # the first line's state is the start
    for context in sorted(contexts):
        states.setdefault(context, len(states))
    cost = -math.log(10) * scale

    def longest(gram):
        """The state of the longest end of a gram that has one."""
        gram = gram[-(order - 1) :] if order > 1 else ()
        while gram not in states:
            gram = gram[1:]
        return states[gram]

    lines = []
    for context, state in states.items():
        following = model.ngrams[len(context) + 1].get(context, {})
        for word, weight in following.items():
            if word == EOS:
                lines.append(f"{state} {cost * weight}")
            elif word in numbers:
                label, target = numbers[word], longest((*context, word))
                lines.append(
                    f"{state} {target} {label} {label} {cost * weight}"
                )
        if context:
            weight = model.backoffs[len(context)].get(context, 0.0)
            target = longest(context[1:]) if context[1:] else states[()]
            lines.append(f"{state} {target} {len(words) + 1} 0 {cost * weight}")
    # OpenFst takes the first line's state for the start.
    lines.sort(key=lambda line: not line.startswith("0 "))
    return "\n".join(lines) + "\n"


def _chain_fst(text, phones):
    """Text of HLG of that of LG."""
    # An arc with a phone goes to a state that emits its loop pdf, one for each
    # phone and target, and from there on by the target's arcs.
    pdfs = chain_topology(phones) + 1
    rows = [line.split() for line in text.splitlines() if line.strip()]
    free = 1 + max(int(n) for row in rows for n in row[: 1 + (len(row) > 2)])
    inside, lines = {}, []
    for row in rows:
        if len(row) < 4:  # final
            lines.append(" ".join(row))
            continue
        source, target, label, word = map(int, row[:4])
        weight = row[4] if len(row) > 4 else "0"
        if label == 0 or label > phones:  # none, or one to tell apart
            lines.append(f"{source} {target} 0 {word} {weight}")
            continue
        entry, loop = pdfs[label - 1]
        key = (target, label)
        if key not in inside:
            inside[key] = free
            free += 1
            lines.append(f"{inside[key]} {inside[key]} {loop} 0 0")
            lines.append(f"{inside[key]} {target} 0 0 0")
        lines.append(f"{source} {inside[key]} {entry} {word} {weight}")
    start = rows[0][0]
    lines.sort(key=lambda line: line.split()[0] != start)
    return "\n".join(lines) + "\n"


def _distinct(lattice, count):
    """Word numbers and costs of the best word sequences of a lattice."""
    # Paths that differ in times, silences or pronunciations only are one. A
    # beginning of a sentence is the set of states that it leads to; the cost of
    # the best way to the end from each is known, so that beginnings are gone on
    # with in the order of the sentences that they can become.
    arcs, final = _read_lattice(lattice)
    order = _topological(arcs)
    rest = dict(final)  # the least cost from each state to the end
    for state in reversed(order):
        for target, _, cost in arcs[state]:
            if target in rest:
                total = cost + rest[target]
                rest[state] = min(rest.get(state, math.inf), total)
    place = {state: i for i, state in enumerate(order)}
    start = order[0]
    queue = [(rest[start], 0, (), {start: 0.0})] if start in rest else []
    sequences, pushed = [], 0
    while queue and len(sequences) < count:
        cost, _, words, states = heapq.heappop(queue)
        if states is None:
            sequences.append((list(words), cost))
            continue
        states, following = _followed(states, arcs, place)
        ends = [c + final[s] for s, c in states.items() if s in final]
        if ends:
            pushed += 1
            heapq.heappush(queue, (min(ends), pushed, words, None))
        for word, targets in following.items():
            costs = [c + rest[s] for s, c in targets.items() if s in rest]
            if costs:
                pushed += 1
                entry = min(costs), pushed, (*words, word - 1), targets
                heapq.heappush(queue, entry)
    return sequences


def _followed(states, arcs, place):
    """All states without a further word, and those one word later."""
    reached, following = dict(states), defaultdict(dict)
    queue = [(place[state], state) for state in states]
    heapq.heapify(queue)
    queued = set(states)
    while queue:
        _, state = heapq.heappop(queue)  # all arcs that enter it are done
        cost = reached[state]
        for target, word, weight in arcs[state]:
            costs = following[word] if word else reached
            if cost + weight < costs.get(target, math.inf):
                costs[target] = cost + weight
            if not word and target not in queued:
                queued.add(target)
                heapq.heappush(queue, (place[target], target))
    return reached, following


def _read_lattice(lattice):
    """Arcs (target, word, cost) of each state, and costs of ending."""
    arcs, final = defaultdict(list), {}
    for row in map(str.split, lattice.to_str().splitlines()):
        cost = 0.0
        if len(row) in (2, 5):
            cost = sum(map(float, row.pop().split(",")))
        if len(row) == 1:
            final[int(row[0])] = cost
        elif row:
            source, target, _, word = map(int, row)
            arcs[source].append((target, word, cost))
    return arcs, final


def _topological(arcs):
    """States of a lattice, each before those that its arcs enter."""
    targets = {s: {a[0] for a in rows} for s, rows in arcs.items()}
    backward = TopologicalSorter(targets).static_order()
    return list(backward)[::-1]
