"""Real-time factors of a hybrid recognizer and the language model behind it.

> python benchmarks/speed/recognizer.py data/sotu/test_speech.json \
    --system "32 bits" results/asr_sotu/1234/published \
        results/lm_lstm/1234/published torch \
    --system "4 bits" pretrained/asr_sotu_4bit pretrained/lm_sotu_2bit torch \
    --system "4 bits, integers" pretrained/asr_sotu_4bit \
        pretrained/lm_sotu_2bit onnx

A system is a recognizer's folder, a language model's and the engine that both
run in. Seconds are those of the processor on one thread, over seconds of
speech; the systems take turns at every recording, so that ratios hold on a
busy machine too. All of them do the same: features, network, search for a list
of hypotheses with Kaldi's decoder, and rescoring of the list with the n-gram
and the language model. Times are ratios to the first system, medians over the
rounds.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from speechbrain_mpq import HybridASR, LanguageModel
from speechbrain_mpq.decoders.nbest import NBest, RescoringWeights
from speechbrain_mpq.evaluation.task import markdown_table
from speechbrain_mpq.inference.language_model import rescore
from speechbrain_mpq.utils import (
    SAMPLE_RATE,
    keep_freed_memory,
    read_json,
    write_json,
)

STAGES = ("features", "network", "search", "rescoring")
SUMS = {  # what a row tells
    "network": ("network",),
    "with features": ("features", "network"),
    "with search": ("features", "network", "search"),
    "with rescoring": STAGES,
}
WEIGHTS = RescoringWeights(lm_weight=1.0, word_bonus=0.0)


class System:
    """A recognizer and a language model whose stages are timed.

    Arguments
    ---------
    folder, lm : str or Path
        Packed folders.
    engine : str
    beams : dict
        Of the search.
    count : int
        Hypotheses of a list.
    """

    def __init__(self, folder, lm, engine, beams, count):
        self.recognizer = HybridASR.from_pretrained(folder, engine=engine)
        self.lm = LanguageModel.from_pretrained(lm, engine=engine)
        self.decoder = self.recognizer.word_decoder(**beams)
        self.count = count

    def run(self, wav):
        """Seconds of the processor in each stage for one recording.

        Arguments
        ---------
        wav : torch.Tensor
            [1, samples].
        """
        model, marks = self.recognizer, [time.process_time()]
        whole = torch.ones(1)
        with torch.inference_mode():
            feats = model.normalize(model.compute_features(wav), whole)
            marks.append(time.process_time())
            outputs = model.network(feats, whole).log_softmax(2)[0].numpy()
        marks.append(time.process_time())
        found = self.decoder.nbest(outputs, self.count)
        marks.append(time.process_time())
        own = [part["acoustic_scores"] for part in found.details]
        lists = [NBest(found.id, found.hypotheses, own)]
        rescore(lists, self.lm, WEIGHTS, model.ngram)
        marks.append(time.process_time())
        return {
            stage: end - start
            for stage, start, end in zip(STAGES, marks, marks[1:])
        }


def timed(systems, wavs, rounds):
    """Seconds of each system in each round, by stage.

    Arguments
    ---------
    systems : dict
        Name -> System.
    wavs : list of torch.Tensor
    rounds : int

    Returns
    -------
    dict of str -> list of dict
    """
    for system in systems.values():
        system.run(wavs[0])  # what is made once
    rows = {name: [] for name in systems}
    for _ in range(rounds):
        sums = {name: defaultdict(float) for name in systems}
        for wav in wavs:
            for name, system in systems.items():
                for stage, seconds in system.run(wav).items():
                    sums[name][stage] += seconds
        for name, row in sums.items():
            rows[name].append(dict(row))
    return rows


def factors(rows, seconds):
    """Real-time factors and how many times less than the first system's.

    Arguments
    ---------
    rows : dict of str -> list of dict
        From `timed`.
    seconds : float
        Of all recordings.

    Returns
    -------
    dict of str -> dict
        System -> what -> (factor, times).
    """
    first = next(iter(rows.values()))
    result = {}
    for name, own in rows.items():
        result[name] = {}
        for what, stages in SUMS.items():
            took = [sum(row[s] for s in stages) for row in own]
            base = [sum(row[s] for s in stages) for row in first]
            result[name][what] = (
                statistics.median(took) / seconds,
                statistics.median(b / t for b, t in zip(base, took)),
            )
    return result


def table(result):
    """Factors as a table in Markdown."""
    heads = ["system"]
    for what in SUMS:
        heads += [what, "times"]
    lines = []
    for name, row in result.items():
        cells = [(f"{row[w][0]:.4f}", f"{row[w][1]:.2f}") for w in SUMS]
        lines.append([name, *(cell for pair in cells for cell in pair)])
    return markdown_table(heads, lines).rstrip()


def read_options(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("manifest", type=Path)
    names = ("NAME", "RECOGNIZER", "LM", "ENGINE")
    add("--system", required=True, action="append", nargs=4, metavar=names)
    add("--items", type=int, default=20, help="recordings")
    add("--rounds", type=int, default=5)
    add("--nbest", type=int, default=20)
    add("--beam", type=float, default=9.0)
    add("--lattice_beam", type=float, default=6.0)
    add("--out", type=Path, help="JSON")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Time all systems and print the table."""
    options = read_options(arguments)
    keep_freed_memory()
    torch.set_num_threads(1)
    beams = {"beam": options.beam, "lattice_beam": options.lattice_beam}
    systems = {
        name: System(*paths, beams, options.nbest)
        for name, *paths in options.system
    }
    root = str(options.manifest.parent)
    read = next(iter(systems.values())).recognizer.read
    wavs = [
        read(entry["wav"].replace("{data_root}", root))[None]
        for entry in list(read_json(options.manifest).values())[: options.items]
    ]
    seconds = sum(wav.shape[1] for wav in wavs) / SAMPLE_RATE
    rows = timed(systems, wavs, options.rounds)
    result = factors(rows, seconds)
    if options.out:
        write_json(
            options.out, {"seconds": seconds, "rows": rows, "factors": result}
        )
    print(f"{len(wavs)} recordings, {seconds:.1f} s\n")
    print(table(result))


if __name__ == "__main__":
    main()
