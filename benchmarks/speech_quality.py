"""Time, memory and bytes of the quality predictor, in float and in bits.

> python benchmarks/speech_quality.py --seconds 5

Networks with random weights (of 4 bits where maps are binary) judge features
of some seconds on one core: the float network, the training graph of binary
maps, and `BitDNSMOS` with few and with more rows at a time. Times are medians
of CPU time over rounds in turn. Memory is what a process of its own takes
during one call at most beyond what it had before (Linux).
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from speechbrain_mpq import coverage, quantize_
from speechbrain_mpq.evaluation.task import markdown_table
from speechbrain_mpq.lobes.models.dnsmos import (
    DNSMOS,
    BinaryDNSMOS,
    BitDNSMOS,
    memory,
)

FRAMES_PER_SECOND = 50
CALLS = 10  # in one measurement
COLUMNS = (
    "system",
    "ms of CPU time",
    "peak KiB",
    "stored bytes",
    "counted KiB",
)
SYSTEMS = {
    "float network": partial(DNSMOS),
    "binary maps, training graph": partial(BinaryDNSMOS),
    "binary maps, bits": partial(BinaryDNSMOS),
    "binary maps, bits, 2 rows": partial(BinaryDNSMOS),
    "{-1, +1} maps, bits": partial(BinaryDNSMOS, signed=True),
    "binary maps and weights, bits": partial(BinaryDNSMOS, binary_weights=True),
}


def built(name):
    """A network, how it is called on [T, mels], and its bytes."""
    torch.manual_seed(0)
    network = SYSTEMS[name]().eval()
    if isinstance(network, BinaryDNSMOS) and "weights" not in name:
        quantize_(network, 4)
    size = sum(row["bytes"] for row in coverage(network))
    if "bits" not in name:
        return network, lambda x: network(x[None]), size
    small = BitDNSMOS(network, **({"rows": 2} if "2 rows" in name else {}))
    return network, small, small.nbytes


def features_of(seconds):
    """Something like a log-mel spectrogram, [T, mels]."""
    generator = torch.Generator().manual_seed(0)
    frames = round(seconds * FRAMES_PER_SECOND) - 1
    return torch.randn(frames, 120, generator=generator) / 4


def peak_bytes(call):
    """Memory that a call takes at most, beyond what was there before."""
    call()  # plans and caches stay
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key):
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}")


@torch.inference_mode()
def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = features_of(options.seconds)
    if options.peak_of:
        _, call, _ = built(options.peak_of)
        print(peak_bytes(lambda: call(x)))
        return
    systems = {name: built(name) for name in SYSTEMS}
    times = {name: [] for name in SYSTEMS}
    for _ in range(options.rounds):
        for name, (_, call, _) in systems.items():
            started = time.process_time()
            for _ in range(CALLS):
                call(x)
            times[name].append((time.process_time() - started) / CALLS)
    rows = []
    for name, (network, _, size) in systems.items():
        command = [sys.executable, __file__, "--peak_of", name]
        command += ["--seconds", str(options.seconds)]
        peak = int(subprocess.check_output(command, text=True))
        binary = isinstance(network, BinaryDNSMOS)
        values = size * 8 / 45_697
        counts = memory(network, len(x), 120, values, 1 if binary else 32)
        ms = 1000 * statistics.median(times[name])
        counted = counts["largest map"][1]
        sizes = f"{peak / 1024:.0f}", f"{size:,}", f"{counted / 1024:.0f}"
        rows.append((name, f"{ms:.1f}", *sizes))
    print(markdown_table(COLUMNS, rows), end="")


if __name__ == "__main__":
    main()
