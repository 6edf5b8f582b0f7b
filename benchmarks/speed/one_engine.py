"""One engine in a process of its own: load time and peak memory, as JSON.

python benchmarks/speed/one_engine.py FOLDER ENGINE SECONDS
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from speechbrain_mpq.inference.separation import QuantizedSeparator

RATE = 16000  # Hz


def main():
    """Load, separate a long file, print what it took."""
    folder, engine, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    torch.set_num_threads(1)
    if engine != "torch":  # what importing the libraries takes is not ours
        __import__(
            f"speechbrain_mpq.inference.engines.{engine}_engine",
            fromlist=["compiled"],
        )
    imported = peak_mib()
    start = time.perf_counter()
    model = QuantizedSeparator.from_pretrained(folder, engine=engine)
    loaded = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mix.wav"
        write_noise(path, seconds, len(model.microphones))
        start = time.perf_counter()
        model.separate_file(path, doa=60.0, out=Path(scratch) / "out.wav")
        wall = time.perf_counter() - start
    report = {
        "load_seconds": loaded,
        "imported_mib": imported,
        "peak_mib": peak_mib(),
        "file_seconds": seconds,
        "file_wall_seconds": wall,
    }
    print(json.dumps(report))


def write_noise(path, seconds, channels):
    """A noise recording, a second at a time."""
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", RATE, channels) as file:
        for _ in range(int(seconds)):
            file.write(0.1 * generator.standard_normal((RATE, channels)))


def peak_mib():
    """The most memory that this process has had.

    Not ru_maxrss, which begins at what the parent process had.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [x for x in status.splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024  # kB


if __name__ == "__main__":
    main()
