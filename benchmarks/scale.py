"""How time and memory grow with the model, from 1 M to 300 M parameters.

> python benchmarks/scale.py

Conformer encoders of SpeechBrain's own with random weights, the largest one
as large as wav2vec2-large, each in a process of its own; `--sizes wav2vec2` is
wav2vec2-large itself, random too, in SpeechBrain's wrapper (`pip install
'transformers<5'`). Told are seconds of
the processor and the peak of memory, in units of the model's own (4 bytes a
parameter) on top of what the process had before the model was made, for

* attaching quantizers at uniform bits (`quantize_`),
* packing (`save_packed`), which reads back what it wrote,
* loading into a new model (`load_packed_`), which is in memory beside it,
* KL scores of every module at three candidates on 8 batches of one utterance
  of 2 seconds: what `expected_seconds` tells before they begin, and what they
  take, for models of up to --scored parameters.

Linux only: the peak of a part is what /proc tells. How processes share scores
is told by

> python benchmarks/scale.py --sizes 1 --scores
> torchrun --nproc_per_node=2 benchmarks/scale.py --sizes 1 --scores

seconds of each process's processor and of the clock, the table's digest; the
Hessian with two batches of four utterances of 8 seconds.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
from speechbrain.nnet.attention import RelPosEncXL
from speechbrain.utils.distributed import ddp_barrier, ddp_init_group

from speechbrain_mpq import load_packed_, quantize_, save_packed
from speechbrain_mpq.allocation.output_scores import KLScores
from speechbrain_mpq.allocation.sharing import gathered, process
from speechbrain_mpq.training.choose import SCORERS
from speechbrain_mpq.utils import read_json, write_json

ROOT = Path(__file__).parents[1]
SIZES = {  # millions of parameters -> layers, width
    "1": (2, 128),
    "10": (6, 256),
    "100": (16, 512),
    "300": (12, 1024),
}
WAV2VEC2 = "wav2vec2"
LARGE = {  # what differs from the base model
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}
SAMPLES = 32000  # of an utterance of 2 s
TOKENS = 1000
FRAMES = 50  # of 40 ms
BATCHES = 8
CANDIDATES = (2, 4, 8)


class Recognizer(torch.nn.Module):
    """A Conformer from features to log-probabilities of tokens."""

    def __init__(self, layers, width):
        super().__init__()
        self.positions = RelPosEncXL(width)
        self.encoder = ConformerEncoder(layers, width, 4 * width, width // 64)
        self.output = torch.nn.Linear(width, TOKENS)

    def forward(self, x):
        """Log-probabilities [items, frames, tokens]."""
        encoded, _ = self.encoder(x, pos_embs=self.positions(x))
        return self.output(encoded).log_softmax(-1)


class Wav2Vec2Recognizer(torch.nn.Module):
    """A wav2vec 2.0 in SpeechBrain's wrapper, from samples to tokens."""

    def __init__(self, folder):
        super().__init__()
        from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2

        self.wav2vec2 = Wav2Vec2(folder, folder)
        self.output = torch.nn.Linear(LARGE["hidden_size"], TOKENS)

    def forward(self, x):
        """Log-probabilities [items, frames, tokens]."""
        return self.output(self.wav2vec2(x)).log_softmax(-1)


def maker(size, folder):
    """What makes a model, its parameters, and the shape of an utterance."""
    if size != WAV2VEC2:
        make = partial(Recognizer, *SIZES[size])
        with torch.device("meta"):
            return make, make(), (FRAMES, SIZES[size][1])
    import transformers

    config = transformers.Wav2Vec2Config(**LARGE)
    extractor = transformers.Wav2Vec2FeatureExtractor()
    for part in (extractor, transformers.Wav2Vec2Model(config)):
        part.save_pretrained(folder)  # what would be downloaded
    with torch.device("meta"):
        model = transformers.Wav2Vec2Model(config)
    model.output = torch.nn.Linear(LARGE["hidden_size"], TOKENS, device="meta")
    return partial(Wav2Vec2Recognizer, folder), model, (SAMPLES,)


def status(key):
    """A number of kilobytes in this process's status, as bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


class Stages:
    """Time and memory of parts, one after the other."""

    def __init__(self, parameters):
        self.own = 4 * parameters
        self.before = status("VmRSS")
        self.found = {}

    @contextmanager
    def stage(self, name):
        """Measure what is done inside."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now
        started = time.process_time(), time.perf_counter()
        yield
        peak = status("VmHWM") - self.before
        self.found[name] = {
            "cpu_seconds": round(time.process_time() - started[0], 2),
            "seconds": round(time.perf_counter() - started[1], 2),
            "peak": round(peak / self.own, 2),
            "peak_mib": round(peak / 2**20),
        }


def measure(size, bits, scored, folder):
    """All stages of one size."""
    torch.manual_seed(0)
    make, described, shape = maker(size, folder)
    parameters = sum(p.numel() for p in described.parameters())
    stages = Stages(parameters)
    with stages.stage("make"):
        model = make().eval()
    inputs = torch.randn(BATCHES, *shape)
    found = {"parameters": parameters}
    scores = KLScores(CANDIDATES, form="categorical", chunk=1)
    found["kl_expected_seconds"] = scores.expected_seconds(model, inputs)
    if parameters <= scored:
        with stages.stage("kl"):
            scores(model, inputs, progress=False)
    with stages.stage("attach"):
        quantize_(model, bits)
    with tempfile.TemporaryDirectory() as folder:
        with stages.stage("pack"):
            path = save_packed(model, folder)
        found["packed_bytes"] = path.stat().st_size
        other = make().eval()
        with stages.stage("load"):
            load_packed_(other, folder)
    with torch.no_grad():
        assert torch.equal(other(inputs[:1]), model(inputs[:1]))
    return {**found, **stages.found}


def score(size):
    """What scores take in each process that shares them."""
    if "RANK" in os.environ:
        ddp_init_group({"distributed_backend": "gloo"})
    torch.manual_seed(0)
    width = SIZES[size][1]
    model = Recognizer(*SIZES[size]).eval()
    inputs = torch.randn(BATCHES, FRAMES, width)
    longer = torch.randn(BATCHES, 4 * FRAMES, width)
    tokens = torch.randint(TOKENS, longer.shape[:2])

    def loss(output, items):
        flat = output.flatten(0, 1), tokens[items].flatten()
        return torch.nn.functional.nll_loss(*flat, reduction="sum") / FRAMES

    kl = KLScores(CANDIDATES, form="categorical", chunk=1)
    hessian = SCORERS["hessian"](CANDIDATES, chunk=BATCHES // 2)
    for name, scorer, *values in (
        ("kl", kl, inputs),
        ("hessian", hessian, longer, loss),
    ):
        ddp_barrier()
        started = time.process_time(), time.perf_counter()
        table = scorer(model, *values, progress=False)
        took = (
            time.process_time() - started[0],
            time.perf_counter() - started[1],
        )
        alike = hashlib.sha256(repr(table.scores).encode()).hexdigest()[:16]
        for rank, row in enumerate(gathered((*took, alike))):
            if process()[0] == 0:
                text = "{} in process {}: {:.1f} s of CPU, {:.1f} s, table {}"
                print(text.format(name, rank, *row), flush=True)


def main():
    """Measure all sizes, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", choices=[*SIZES, WAV2VEC2], default=list(SIZES)
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scored", type=float, default=20e6)
    parser.add_argument(
        "--output", default=ROOT / "benchmarks/results/scale.json"
    )
    parser.add_argument("--alone", action="store_true", help="in this process")
    parser.add_argument("--scores", action="store_true", help="scores only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.scores:
        for size in options.sizes:
            score(size)
        return
    if options.alone:
        (size,) = options.sizes
        with tempfile.TemporaryDirectory() as folder:
            found = measure(size, options.bits, options.scored, folder)
        print(json.dumps(found))
        return
    output = Path(options.output)
    rows = read_json(output) if output.exists() else {}
    for size in options.sizes:
        line = [sys.executable, *sys.argv, "--sizes", size, "--alone"]
        done = subprocess.run(line, check=True, stdout=subprocess.PIPE)
        rows[size] = json.loads(done.stdout.splitlines()[-1])
        print(size, json.dumps(rows[size]), flush=True)
        write_json(output, rows)


if __name__ == "__main__":
    main()
