"""Seconds and memory of a training step's loss: LF-MMI against torch's CTC.

> python benchmarks/lf_mmi.py
> python benchmarks/lf_mmi.py --batch 32 --seconds 10 --device cuda

Loss and gradient of random outputs at 30 ms, for transcripts of random phones
at 12 in a second, without the network. Each row runs in a process of its own.
Seconds are those of the process (on a GPU, of the clock); memory is what it
holds at most beyond what it held before (on a GPU, what torch has allocated).
CTC has the phones and a blank as its outputs.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from speechbrain_mpq.decoders.chain_graphs import (
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.evaluation.task import markdown_lines
from speechbrain_mpq.nnet.lf_mmi import LFMMILoss

FRAME = 0.03  # seconds, after subsampling by three
RATE = 12  # phones in a second
SYSTEMS = {
    "torch CTC": None,
    "LF-MMI, bigram": (2, torch.float64),
    "LF-MMI, bigram, float32": (2, torch.float32),
    "LF-MMI, trigram": (3, torch.float64),
    "LF-MMI, trigram, float32": (3, torch.float32),
    "LF-MMI, 4-gram": (4, torch.float64),
}


def transcripts(options, count, rng):
    """Phones of random sentences, not all equally frequent."""
    frequency = 1 / (1 + np.arange(options.phones - 1))
    frequency /= frequency.sum()
    length = int(RATE * options.seconds)
    return [
        (1 + rng.choice(options.phones - 1, length, p=frequency)).tolist()
        for _ in range(count)
    ]


def loss_of(system, options):
    """Number of outputs, and loss as a function of them."""
    rng = np.random.default_rng(0)
    transcriptions = transcripts(options, options.batch, rng)
    if system is None:
        phones = torch.tensor(transcriptions, device=options.device)
        frames = torch.full((options.batch,), int(options.seconds / FRAME))
        lengths = torch.full((options.batch,), phones.shape[1])
        ctc = torch.nn.CTCLoss()
        return options.phones + 1, lambda outputs: ctc(
            outputs.log_softmax(2).transpose(0, 1),
            phones[: len(outputs)],
            frames[: len(outputs)],
            lengths[: len(outputs)],
        )
    order, dtype = system
    lattices = [
        phone_lattice([[sentence]], silence=0)
        for sentence in transcriptions + transcripts(options, options.text, rng)
    ]
    ngram = estimate_ngram(lattices, options.phones, order)
    loss = LFMMILoss(denominator_graph(ngram), dtype=dtype).to(options.device)
    transcriptions = [
        numerator_graph(lattice, ngram) for lattice in lattices[: options.batch]
    ]
    whole = torch.ones(options.batch, device=options.device)
    return 2 * options.phones, lambda outputs: loss(
        outputs, transcriptions[: len(outputs)], whole[: len(outputs)]
    )


def held(device):
    """Most memory so far, in MiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(name, options):
    """The least seconds of a step, and MiB."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size, loss = loss_of(SYSTEMS[name], options)
    outputs = torch.randn(options.batch, int(options.seconds / FRAME), size)
    outputs = outputs.to(options.device).requires_grad_()
    loss(outputs[:1]).backward()  # loads what torch loads late
    clock = time.perf_counter if outputs.is_cuda else time.process_time
    before, seconds = held(options.device), []
    for _ in range(options.repeats):
        outputs.grad = None
        start = clock()
        value = loss(outputs)
        value.backward()
        value.item()  # waits for a GPU
        seconds.append(clock() - start)
    return min(seconds), held(options.device) - before


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--phones", type=int, default=42)
    parser.add_argument("--text", type=int, default=200, help="sentences")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = (in_a_process(name, options) for name in SYSTEMS)
    for line in markdown_lines(("loss", "ms a step", "MiB"), rows):
        print(line, flush=True)


def in_a_process(name, options):
    """Cells of one loss, whose memory no other one has taken."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        seconds, mib = pool.submit(measure, name, options).result()
    return name, f"{1e3 * seconds:.0f}", f"{mib:.0f}"


if __name__ == "__main__":
    main()
