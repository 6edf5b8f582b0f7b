"""Word errors and bytes of recognizers with language models behind them.

> python benchmarks/quality/whole_system.py --ngram data/sotu/lm.arpa \
    --system "32 and 32 bits" results/asr_sotu/1234 results/lm/published \
    --system "4 and 2 bits" results/asr_sotu_4bit/1234 results/lm_2/published

A system is the output folder of a recognizer, with `published/` and, for each
of --sets, its N-best lists and references, and the packed folder of a language
model (- for none: the first pass). Lists are rescored with the n-gram and the
model half and half, weight 1, which take the place of the first pass's n-gram.
p is that of MAPSSWE against the first system and against the second one.

Bytes are those of both `model.safetensors`; lexicon, n-gram, vocabulary and the
decoding graph, which all systems have alike, are told apart from them.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
from rescoring import (
    Bench,
    Remembering,
    chosen,
    error_rate,
    read_references,
    with_own_scores,
)

from speechbrain_mpq import HybridASR, LanguageModel
from speechbrain_mpq.decoders.kaldi_decoder import decoding_graph
from speechbrain_mpq.decoders.nbest import read_nbest
from speechbrain_mpq.decoders.ngram import Ngram
from speechbrain_mpq.evaluation.significance import mapsswe
from speechbrain_mpq.evaluation.task import markdown_table
from speechbrain_mpq.utils import scratch_folder, write_json

NONE = "-"  # in the place of a language model
MODEL_FILE = "model.safetensors"
SHARED = ("lexicon.txt", "lm.arpa")  # of the recognizer's folder


class Once:
    """A language model that scores no sentence twice.

    Arguments
    ---------
    lm : LanguageModel
    """

    def __init__(self, lm):
        self.lm, self.vocabulary, self.known = lm, lm.vocabulary, {}

    def score(self, texts, progress=False):
        """See `LanguageModel.score`."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, self.lm.score(new, progress=progress)))
        return [self.known[text] for text in texts]


class Hypotheses:
    """The best hypotheses of systems, of which no pair is rescored twice.

    Arguments
    ---------
    ngram : Ngram
    sets : sequence of str
    """

    def __init__(self, ngram, sets):
        self.ngram, self.sets = ngram and Remembering(ngram), sets
        self.references = {}  # set -> id -> words
        self.language_model = cache(
            lambda folder: Once(LanguageModel.from_pretrained(folder))
        )
        self.of = cache(self._of)

    def _of(self, run, lm):
        """Set -> id -> words, of a recognizer's run and a model's folder."""
        lists, own = {}, {}
        for name in self.sets:
            path = Path(run, f"{name}_nbest.json")
            rows = read_nbest(path)
            references = read_references(Path(run, f"{name}_refs.txt"), rows)
            known = self.references.setdefault(name, references)
            if known != references:
                raise ValueError(f"{path} is of another test than the first")
            lists[name] = rows, references
            own[name] = with_own_scores(path, rows, "acoustic_scores")
        if lm == NONE:
            return {name: chosen(rows) for name, (rows, _) in lists.items()}
        bench = Bench(lists, self.ngram, own)
        model = self.language_model(lm)
        return {
            name: chosen(bench.rescored(model, name), bench.weights)
            for name in self.sets
        }


def size_of(run, lm):
    """Bytes of both models."""
    recognizer = Path(run, "published", MODEL_FILE).stat().st_size
    behind = 0 if lm == NONE else Path(lm, MODEL_FILE).stat().st_size
    return {"recognizer": recognizer, "lm": behind}


def graph_size(folder):
    """States, arcs and bytes, as a file, of a recognizer's decoding graph."""
    model = HybridASR.from_pretrained(folder)
    graph = decoding_graph(model.lexicon, model.ngram)
    with scratch_folder() as scratch:
        path = Path(scratch, "graph.fst")
        graph.write(str(path))
        size = path.stat().st_size
    states = range(graph.num_states)
    arcs = sum(graph.num_arcs(state) for state in states)
    return {"states": len(states), "arcs": arcs, "bytes": size}


def shared_bytes(run, lm):
    """Bytes of what all systems have alike, by name."""
    files = {name: Path(run, "published", name) for name in SHARED}
    if lm != NONE:
        files["vocabulary"] = Path(lm, "vocab.txt")
    return {name: path.stat().st_size for name, path in files.items()}


def measured(systems, hypotheses):
    """A row for each system.

    Arguments
    ---------
    systems : list of (str, str, str)
        Name, run of the recognizer, folder of the language model.
    hypotheses : Hypotheses

    Returns
    -------
    list of dict
    """
    rivals = [hypotheses.of(*pair) for _, *pair in systems[:2]]
    full = sum(size_of(*systems[0][1:]).values())
    rows = []
    for name, *pair in systems:
        size = size_of(*pair)
        row = {"system": name, **size, "together": sum(size.values())}
        row["times"] = full / row["together"]
        row["sets"] = {}
        for set_name, best in hypotheses.of(*pair).items():
            references = hypotheses.references[set_name]
            row["sets"][set_name] = {
                "wer": error_rate(best, references),
                "p": [
                    mapsswe(
                        (words, rival[set_name][key], best[key])
                        for key, words in references.items()
                    ).p
                    for rival in rivals
                ],
            }
        rows.append(row)
    return rows


def table(rows):
    """Rows as a table in Markdown."""
    names = list(rows[0]["sets"])
    heads = ["", "system", "recognizer", "language model", "together", "times"]
    for name in names:
        heads += [f"WER {name}", "p 0", "p 1"]
    lines = []
    for number, row in enumerate(rows):
        cells = [f"{number}", row["system"]]
        cells += [f"{row[k]:,}" for k in ("recognizer", "lm", "together")]
        cells.append(f"{row['times']:.1f}")
        for name in names:
            cells.append(f"{row['sets'][name]['wer']:.2f}")
            for rival, p in enumerate(row["sets"][name]["p"]):
                small = "< 0.001" if p < 0.001 else f"{p:.2g}"
                cells.append("" if rival == number else small)
        lines.append(cells)
    return markdown_table(heads, lines).rstrip()


def read_options(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    system = {"metavar": ("NAME", "RUN", "LM"), "nargs": 3}
    add("--system", required=True, action="append", **system)
    add("--ngram", required=True, help="ARPA file of the first pass")
    add("--sets", nargs="+", default=["clean", "noisy"])
    add("--out", type=Path, help="JSON")
    options = parser.parse_args(arguments)
    if len(options.system) < 2:
        parser.error("give --system twice or more: p is against the first two")
    return options


def main(arguments=None):
    """Rescore all lists and print the table."""
    options = read_options(arguments)
    torch.set_num_threads(1)
    hypotheses = Hypotheses(Ngram(options.ngram), options.sets)
    rows = measured(options.system, hypotheses)
    alike = shared_bytes(*options.system[0][1:])
    graph = graph_size(Path(options.system[0][1], "published"))
    if options.out:
        command = " ".join(["python", *sys.argv])
        content = {"command": command, "systems": rows}
        write_json(options.out, {**content, "alike": alike, "graph": graph})
    print(table(rows))
    print(f"\nall alike, bytes: {alike}; decoding graph: {graph}")


if __name__ == "__main__":
    main()
