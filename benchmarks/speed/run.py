"""Speed, memory, load time and bytes of all engines, in one command.

    pip install -e '.[openvino,onnx,fast]' nncf
    python benchmarks/speed/run.py

Prints a table and writes benchmarks/results/speed.json. Times are medians of
runs in turn (every system once, then every system again, ...), so that a busy
moment of the machine meets all of them. Memory and load time are measured in
a process of their own for each engine. For quality see quality.py.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from models import MODELS, packed_model
from systems import systems

from speechbrain_mpq.inference.engines.activations import write_ranges
from speechbrain_mpq.inference.engines.fused_features import fused
from speechbrain_mpq.inference.engines.lowered import decibels, lower
from speechbrain_mpq.inference.exporting import engine_ranges
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.utils import write_json

RATE = 16000  # Hz
BASELINE, OURS = "torch fp32", "openvino int8 (ours)"
MEASURED = ("network", "network_cpu", "path", "path_cpu")
CHILD = Path(__file__).parent / "one_engine.py"


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--skip", nargs="*", default=[], metavar="SYSTEM")
    parser.add_argument("--file_seconds", type=float, default=600.0)
    parser.add_argument("--out", default="benchmarks/results/speed.json")
    options = parser.parse_args()
    report = {
        "machine": machine(),
        "int8_gops": int8_limit(),
        "models": {},
    }
    options.int8_gops = report["int8_gops"]
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            report["models"][name] = measure_model(name, folder, options)
    write_json(options.out, report)
    print(json.dumps({k: report[k] for k in ("machine", "int8_gops")}))
    for name, model in report["models"].items():
        print(table(name, model))


def machine():
    """What was measured on."""
    flags = torch.backends.cpu.get_cpu_capability()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "capability": flags,
        "torch": torch.__version__,
    }


def int8_limit(size=1024, rounds=9):
    """Measured int8 rate of one thread, in 10^9 operations a second."""
    torch.set_num_threads(1)
    one = torch.randint(-127, 127, (size, size), dtype=torch.int8)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch._int_mm(one, one)
        times.append(time.perf_counter() - start)
    return 2e-9 * size**3 / min(times)


def measure_model(name, folder, options):
    """All numbers of one model."""
    packed = packed_model(name, folder)
    network = lower(packed)
    model = QuantizedSeparator.from_pretrained(packed)
    front = model.separator.features
    samples = int(options.seconds * RATE)
    rows = torch.randn(1, len(front.microphones), samples) / 10
    waveforms = rows.transpose(1, 2)  # as `separate_batch` lays them
    doa = torch.tensor([60.0])
    with torch.no_grad():
        inputs, _ = model.separator.analyse(waveforms, doa)
    ranges = engine_ranges(network, [inputs])
    write_ranges(packed, ranges, options.seconds)
    makers = systems(packed, network, ranges, [inputs])
    makers = {k: m for k, m in makers.items() if k not in options.skip}
    per_hour = 3600 / options.seconds
    gop = network.operations() * inputs.shape[2] * per_hour / 1e9
    result = {
        "parameters": sum(x.levels.size for x in network.convolutions()),
        "gop_per_hour": gop,
        "int8_gops": options.int8_gops,
        "bytes": (packed / "model.safetensors").stat().st_size,
        "bytes_fp32": 4 * sum(x.levels.size for x in network.convolutions()),
        "analysis": {},
        "threads": {},
        "engines": {},
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        running = {k: make(threads) for k, make in makers.items()}
        result["analysis"][threads] = analysis(
            front, waveforms, doa, options.rounds, per_hour
        )
        result["threads"][threads] = interleaved(
            running, inputs, waveforms, doa, model.separator, options, per_hour
        )
    for engine in ("torch", "openvino", "onnx"):
        result["engines"][engine] = alone(packed, engine, options.file_seconds)
    return result


@torch.no_grad()
def interleaved(running, inputs, waveforms, doa, separator, options, per_hour):
    """Median seconds per hour of speech of network and whole path."""
    reference = running[BASELINE](inputs) if BASELINE in running else None
    fast = fused(separator.features)
    original, rows = (separator.mask_net, separator.features), {}
    for name, network in running.items():
        snr = None
        if reference is not None and name != BASELINE:
            snr = decibels(reference, network(inputs))
        rows[name] = {"decibels": snr} | {key: [] for key in MEASURED}
    for _ in range(options.rounds):
        for name, network in running.items():
            separator.mask_net = _Called(network)
            # As `load_for_engine` has them
            separator.features = fast if "(ours)" in name else original[1]
            times = timed(lambda n=network: n(inputs))
            times += timed(lambda: separator(waveforms, doa))
            for key, seconds in zip(MEASURED, times, strict=True):
                rows[name][key].append(seconds)
    separator.mask_net, separator.features = original
    for row in rows.values():
        for key in MEASURED:
            row[key] = per_hour * statistics.median(row[key])
    return rows


@torch.no_grad()
def analysis(features, waveforms, doa, rounds, per_hour):
    """Median CPU seconds per hour of STFT and features, in both forms."""
    forms = {"torch": features, "fused": fused(features)}
    level, times = torch.ones(1, 1), {form: [] for form in forms}
    for timed_round in range(rounds + 1):
        for form, front in forms.items():
            call = partial(front.analyse, waveforms, level, doa[:, None])
            _, cpu = timed(call)
            if timed_round:  # the first one compiles
                times[form].append(cpu)
    return {k: per_hour * statistics.median(v) for k, v in times.items()}


class _Called(torch.nn.Module):
    """A function in the place of a module."""

    def __init__(self, function):
        super().__init__()
        self.function = [function]  # a list hides modules from this one

    def forward(self, inputs):
        """Call it."""
        return self.function[0](inputs)


def timed(function):
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def alone(packed, engine, seconds):
    """Load time and peak memory of an engine in a process of its own."""
    command = [sys.executable, CHILD, packed, engine, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(name, model):
    """The numbers of a model as text."""
    lines = [
        f"\n{name}: {model['parameters'] / 1e6:.2f} M weights, "
        f"{model['gop_per_hour']:.0f} G operations per hour, "
        f"{model['bytes']} bytes packed"
    ]
    for threads, rows in model["threads"].items():
        lines.append(f"{threads} thread{'s' * (int(threads) > 1)}, s/hour:")
        lines.append(
            f"{'':26}network  times    cpu  times    path  times    cpu  "
            "times     dB"
        )
        base = rows.get(BASELINE)
        for system, row in rows.items():
            cells = [f"{system:26}"]
            for key in MEASURED:
                times = f"{base[key] / row[key]:6.2f}" if base else "     -"
                cells.append(f"{row[key]:7.2f} {times}")
            snr = row["decibels"]
            cells.append("     -" if snr is None else f"{snr:6.1f}")
            lines.append(" ".join(cells))
        cpu = model["analysis"][threads]
        lines.append(
            f"STFT and features, cpu: {cpu['torch']:.2f} in PyTorch, "
            f"{cpu['fused']:.2f} fused"
        )
        floor = model["gop_per_hour"] / model["int8_gops"]
        if OURS in rows and int(threads) == 1:
            share = floor / rows[OURS]["network_cpu"]
            # Without fast int8 in torch its rate is no limit of the core.
            lines.append(
                f"floor of int8 on this core: {floor:.2f} s/hour; {OURS} is at "
                f"{100 * share:.0f} % of its rate"
                if share <= 1
                else "no floor of int8: torch's product is slower than "
                f"{OURS} on this core"
            )
    for engine, row in model["engines"].items():
        lines.append(
            f"{engine}: loads in {row['load_seconds']:.2f} s, "
            f"{row['file_seconds']:.0f} s of audio in "
            f"{row['file_wall_seconds']:.1f} s, peak {row['peak_mib']:.0f} MiB "
            f"({row['imported_mib']:.0f} of it before loading)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
