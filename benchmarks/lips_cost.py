"""What the lip stream costs on a CPU: time with pictures over time without.

> python benchmarks/lips_cost.py

Separates ten seconds with the small separator, with and without a lip stream,
in turn, on one thread; new weights, since time does not depend on them. Prints
the medians.
"""

import argparse
import statistics
import time

import torch

from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_

MODELS = {
    "audio only": "hparams/models/separator_mini.yaml",
    "with lips": "hparams/models/separator_av_mini.yaml",
}
SECONDS = 10


@torch.no_grad()
def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    separators = {n: build_separator(f).eval() for n, f in MODELS.items()}
    size = separators["with lips"].lips_size
    pictures = torch.randint(256, (1, SECONDS * 25 + 1, *size)).byte()
    mixture = torch.randn(1, SECONDS * 16000, 7)
    inputs = {
        "audio only": (mixture, torch.tensor([60.0])),
        "with lips": (mixture, torch.tensor([60.0]), pictures),
    }
    times = {name: [] for name in MODELS}
    for separator in separators.values():
        fold_norms_(separator)
    for _ in range(rounds + 1):  # the first round warms up
        for name, separator in separators.items():
            start = time.process_time()
            separator(*inputs[name])
            times[name].append(time.process_time() - start)
    medians = {n: statistics.median(t[1:]) for n, t in times.items()}
    for name, median in medians.items():
        print(f"{name:12}{1000 * median:8.1f} ms for {SECONDS} s")
    extra = medians["with lips"] / medians["audio only"] - 1
    print(f"lips cost {100 * extra:.1f} % more")


if __name__ == "__main__":
    main()
