"""What a short delay costs a stream, and what memory a long file takes.

> python benchmarks/streams.py

SI-SNR of the shipped separator in full precision on validation mixtures, since
how the gain of a stream follows was chosen on test mixtures. CPU time, as the
clock is no measure on a shared machine. Memory is the peak of a process that
runs `speechbrain-mpq separate` on noise, beside one that only imports torch;
both without the settings of malloc that speed up this repository's runs.

Needs the corpus in data/embedded (`make demo` makes it).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import soundfile
import torch
from plug_in import setting

from speechbrain_mpq import QuantizedSeparator
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.simulation.mixtures import (
    MixtureMaker,
    fixed_mixtures,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank
from speechbrain_mpq.utils import SAMPLE_RATE, write_json

ROOT = Path(__file__).parents[1]
ROOMS = 50  # of the validation set
BLOCK = 2560  # samples that are pushed at a time
STREAMS = (  # look-ahead, step, history in seconds
    (2, 0.32, None),
    (1, 0.32, None),
    (1, 0.32, 2),
    (0.5, 0.16, None),
    (0.25, 0.16, 2),
    (0.25, 0.16, 1),
    (0.1, 0.16, None),
    (0, 0.16, None),
)
# Not ru_maxrss, which begins at what the parent process had
PEAK = """
import sys
from pathlib import Path
{work}
lines = Path("/proc/self/status").read_text().splitlines()
(line,) = [x for x in lines if x.startswith("VmHWM:")]
print(int(line.split()[1]) / 1024)
"""
SEPARATE = """
from speechbrain_mpq.__main__ import main
assert main(["separate", *sys.argv[1:], "--quiet"]) == 0
"""


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "pretrained/separator_mini")
    parser.add_argument(
        "--packed", default=ROOT / "pretrained/separator_mini_4bit"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data/embedded")
    parser.add_argument("--mixtures", type=int, default=24)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 10])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/streams.json"
    )
    return parser.parse_args(arguments)


def mixtures(options):
    """Mixture [samples, mics], target [samples], direction of each."""
    speech = load_speech(options.data / "valid_speech.json", options.data)
    maker = MixtureMaker(speech, RoomBank(options.data, "valid", ROOMS))
    drawn = fixed_mixtures(maker, options.mixtures)
    for mixture in drawn.values():
        signals = maker.render(mixture)
        parts = signals["mixture"], signals["target"]
        yield *map(torch.from_numpy, parts), mixture["doa"]


def ways(model):
    """Name -> stream of (mixture, direction), by its options."""
    yield {"name": "file"}, None
    # SI-SNR does not see which gain is given
    yield (
        {"name": "all, level and gain given"},
        lambda mixture, doa: model.stream(
            doa, level=float(mixture[:, 0].square().mean().sqrt()), gain=1.0
        ),
    )
    yield {"name": "all"}, lambda mixture, doa: model.stream(doa)
    for look_ahead, step, history in STREAMS:
        seconds = {"look_ahead": look_ahead, "step": step, "history": history}
        yield (
            {"name": f"{look_ahead} s", **seconds},
            lambda mixture, doa, s=seconds: model.stream(doa, **s),
        )


def separated(model, stream, mixture, doa):
    """The target of a whole mixture, [samples]."""
    if stream is None:
        return model.separate_batch(mixture[None], [doa])[0, 0]
    pieces = [stream.push(block) for block in mixture.split(BLOCK)]
    return torch.cat([*pieces, stream.finish()], 1)[0]


def quality(model, items):
    """A row for every way, with what each mixture gave; the ways in turns."""
    made = list(ways(model))
    rows = [{**row, "values": [], "cpu": []} for row, _ in made]
    for mixture, target, doa in items:
        for row, (_, make) in zip(rows, made, strict=True):
            started = time.process_time()
            stream = make(mixture, doa) if make else None
            estimate = separated(model, stream, mixture, doa)
            row["cpu"].append(time.process_time() - started)
            row["values"].append(si_snr(estimate, target).item())
            if stream:
                row |= {"delay": stream.delay, "work": stream.work}
    return rows


def summary(rows, lengths):
    """Means, what is lost against the file, its standard error, medians."""
    whole = rows[0]["values"]
    for row in rows:
        values = row.pop("values")
        lost = [a - b for a, b in zip(whole, values, strict=True)]
        row["si_snr"] = fmean(values)
        row["lost"] = fmean(lost)
        row["standard_error"] = stdev(lost) / len(lost) ** 0.5
        times = zip(row.pop("cpu"), lengths, strict=True)
        row["cpu_per_second"] = median(cpu / long for cpu, long in times)
    return rows


def peak_mib(work, *arguments):
    """The most memory that a process of its own has for some work."""
    kept = {k: v for k, v in os.environ.items() if "MALLOC" not in k}
    command = [sys.executable, "-c", PEAK.format(work=work), *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    return float(done.stdout.splitlines()[-1])


def write_noise(path, seconds, microphones):
    """A recording of noise, a second at a time."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, microphones) as file:
        for _ in range(int(seconds)):
            file.write(0.1 * rng.standard_normal((SAMPLE_RATE, microphones)))


def memory(options, microphones):
    """Peaks in MiB: torch alone, then files of so many minutes."""
    rows = {"import torch": peak_mib("import torch")}
    for minutes in options.minutes:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder) / "mix.wav", Path(folder) / "out.wav"
            write_noise(path, 60 * minutes, microphones)
            arguments = path, "--doa", 60, "--model", options.packed, "-o", out
            rows[f"{minutes:g} minutes"] = peak_mib(SEPARATE, *arguments)
    return rows


def show(row):
    """Print one row of the table."""
    cells = [row.get(k) for k in ("step", "history", "delay", "work")]
    print(f"{row['name']:26}", end="")
    for cell in cells:
        print(f"{'' if cell is None else f'{cell:.2f}':>7}", end="")
    print(f"{row['cpu_per_second']:7.3f} s/s {row['si_snr']:6.2f} dB", end="")
    print(f" {-row['lost']:6.2f} ± {row['standard_error']:.2f}")


def main(arguments=None):
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(1)
    model = QuantizedSeparator.from_pretrained(options.model)
    items = list(mixtures(options))
    lengths = [len(mixture) / SAMPLE_RATE for mixture, _, _ in items]
    rows = summary(quality(model, items), lengths)
    for row in rows:
        show(row)
    peaks = memory(options, len(model.microphones))
    for name, peak in peaks.items():
        above = peak - peaks["import torch"]
        print(f"{name:14}{peak:7.0f} MiB, {above:.0f} above import torch")
    counts = {"mixtures": len(items), "seconds": round(sum(lengths), 1)}
    write_json(
        options.out,
        {**setting(), **counts, "streams": rows, "peak_mib": peaks},
    )


if __name__ == "__main__":
    main()
