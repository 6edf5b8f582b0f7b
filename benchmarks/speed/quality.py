"""Quality of the engines on the test set, in the form of an experiment.

    python benchmarks/speed/quality.py results/best_4bit/1234
    python -m speechbrain_mpq table results/

Makes a folder such as results/best_openvino_4bit/1234 for each engine, with
the same test mixtures, scores and files as train.py leaves, so that the table
shows engines beside PyTorch. Calibrated on training mixtures.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from speechbrain_mpq.evaluation.results import score_separation, write_results
from speechbrain_mpq.inference.engines.activations import write_ranges
from speechbrain_mpq.inference.engines.lowered import lower
from speechbrain_mpq.inference.exporting import engine_ranges
from speechbrain_mpq.inference.folder import repack
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.inference.speech_recognition import Recognizer
from speechbrain_mpq.simulation.dataio import dataio_prep
from speechbrain_mpq.training.experiment import read_hparams

CALIBRATION = 16  # training mixtures


def main():
    """Score the engines of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--engines", nargs="+", default=["openvino", "onnx"])
    parser.add_argument("--hparams", default="hparams/best_4bit.yaml")
    parser.add_argument("--results_folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = options.results_folder or options.run.parents[1]
    with tempfile.TemporaryDirectory() as folder:
        hparams = read_hparams(options.hparams, f"results_folder: {folder}")
        packed = repack(options.run / "packed", Path(folder) / "packed")
        separator = QuantizedSeparator.from_pretrained(packed).separator
        hparams["microphones"] = separator.features.microphones
        datasets, _ = dataio_prep(hparams)
        batches = calibration(separator, datasets["train"])
        ranges = engine_ranges(lower(packed), batches)
        write_ranges(packed, ranges, CALIBRATION * hparams["chunk_seconds"])
        recognize = Recognizer(hparams["asr_source"])
        test = list(datasets["test"])
        for engine in options.engines:
            score(options.run, packed, engine, test, recognize, results)


def calibration(separator, dataset):
    """Features of training mixtures, [1, inputs, frames] each."""
    batches = []
    for index in range(CALIBRATION):
        item = dataset[index]
        with torch.no_grad():
            inputs, _ = separator.analyse(
                item["mixture"][None], item["doa"][:1, None]
            )
        batches.append(inputs)
    return batches


def score(run, packed, engine, test, recognize, results):
    """Score an engine and leave its results."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    name = f"{metrics['system']}_{engine}"
    kept = ("bits", "average_bits", "estimator", "model_bytes", "fp32_bytes")
    system = {key: metrics[key] for key in (*kept, "corpus", "seed")}
    model = QuantizedSeparator.from_pretrained(packed, engine=engine)
    scored = score_separation(model.separator, test, recognize, workers=1)
    folder = results / f"{name}_{metrics['bits']}bit" / str(metrics["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    system = {"system": name, **system, "wall_seconds": {}}
    write_results(folder, system, scored, [run], None)
    print(folder)


if __name__ == "__main__":
    main()
