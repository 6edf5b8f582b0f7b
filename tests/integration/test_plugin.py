"""The plugin from the shell: torchrun, and the runner of untouched scripts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import speechbrain
import torch
from helpers import PLAIN, TINY_RECIPE, hparams_of, quantized_yaml, train_tiny

from speechbrain_mpq import load_packed_, pack_results
from speechbrain_mpq.quantization.packing import read_packed
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.run import UnsuitableScript, main

HERE = Path(__file__).parent

SCRIPT = str(TINY_RECIPE / "train.py")


def run(*command):
    """What a command prints; it must succeed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout + done.stderr


# Each process leaves what it has at the end of fit. The recipe's norm is not
# used through `modules`, so that DDP does not average its gradients.
ON_EACH_RANK = """
import os, speechbrain, torch
fit = speechbrain.Brain.fit

def fit_and_leave(brain, *args, **kwargs):
    fit(brain, *args, **kwargs)
    found = {"steps": brain.optimizer_step, **brain.modules.state_dict()}
    path = f"{brain.hparams.output_folder}/rank{os.environ['RANK']}.pt"
    torch.save(found, path)

speechbrain.Brain.fit = fit_and_leave
"""


def torchrun(script, yaml, folder, *options):
    """The tiny recipe on two processes."""
    return run(
        *("-m", "torch.distributed.run", "--nproc_per_node=2"),
        "--master_port=0",
        *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
        *(script, yaml, f"--output_folder={folder}", "--batch_size=2"),
        *("--device=cpu", "--distributed_backend=gloo", *options),
    )


@pytest.mark.parametrize("scores", ["kl", "hessian"])
def test_two_processes_score_as_one(scores, tmp_path):
    """And both round and train: what is scored is all that they share."""
    options = [f"--scores={scores}", "--bits=3.5", "--batches=2"]
    yaml = TINY_RECIPE / "train.yaml"
    recipe = [SCRIPT, yaml, "--device=cpu", "--epochs=1", "--batch_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    module = ["-m", "speechbrain_mpq.run"]
    run(*module, *recipe, f"--output_folder={one}", *options)
    run(
        *("-m", "torch.distributed.run", "--nproc_per_node=2"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
        *(*module, *recipe, f"--output_folder={two}", *options),
        "--distributed_backend=gloo",
    )
    plans = [(path / "plan.json").read_text() for path in (one, two)]
    assert plans[0] == plans[1]
    tables = [json.loads((p / "scores.json").read_text()) for p in (one, two)]
    assert tables[0]["clusters"] == tables[1]["clusters"]
    assert not (two / "scoring").exists()
    # The names are those of the plain modules, not of DDP's wrappers.
    names = set(BitPlan.load(one / "plan.json").tensors)
    assert set(read_packed(two / "packed")[0]) == names


def write(path, text):
    """A hparams file."""
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["uniform", "learned"])
def test_two_processes(kind, tmp_path):
    yaml = write(tmp_path / "train.yaml", quantized_yaml(kind))
    text = Path(SCRIPT).read_text(encoding="utf-8")
    assert text.count("self.hparams.norm(") == 1
    text = text.replace("self.hparams.norm(", "self.modules.norm(")
    text = text.replace("\nimport sys", ON_EACH_RANK + "import sys")
    script, folder = write(tmp_path / "train.py", text), tmp_path / "results"
    output = torchrun(script, yaml, folder, "--epochs=2")
    states = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
    # 8 items in batches of 2, on two processes, twice.
    assert [state.pop("steps") for state in states] == [4, 4]
    assert_equal_states(*states)
    fresh = torch.nn.ModuleDict(hparams_of(kind, tmp_path)["modules"])
    for name, start in fresh.named_parameters():
        module, _, rest = name.partition(".")
        assert not torch.equal(states[0][f"{module}.module.{rest}"], start)
    # Two processes may write on one line.
    tests = re.findall(r"test loss (\d+\.\d{6})", output)
    assert len(tests) == 2
    assert len(set(tests)) == 1
    assert "epoch: 2" in (folder / "train_log.txt").read_text()
    path = pack_results(folder, min_key="loss")
    quantized, _ = read_packed(path.parent)
    assert "output.w.weight" in quantized


def assert_equal_states(one, other):
    """Bit-identical, and of the same names."""
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def runner(folder, *options, script=SCRIPT):
    """The tiny recipe, untouched, under the runner."""
    yaml = TINY_RECIPE / "train.yaml"
    places = [f"--output_folder={folder}", "--device=cpu", "--epochs=1"]
    return main([str(o) for o in (script, yaml, *places, *options)])


def test_runner_chooses_trains_and_packs(tmp_path, capsys):
    assert "speechbrain_mpq" not in PLAIN
    folder = tmp_path / "results"
    fit = speechbrain.Brain.fit
    path = runner(folder, "--bits", "3.5", "--scores", "kl")
    assert speechbrain.Brain.fit is fit
    plan = BitPlan.load(folder / "plan.json")
    assert plan.average_bits <= 3.5
    hparams = hparams_of("plain", tmp_path / "other")
    fresh = torch.nn.ModuleDict(hparams["modules"])
    load_packed_(fresh, path.parent)
    assert len(fresh["output"].w.weight.unique()) < 2**8
    assert "test loss" in capsys.readouterr().out


def test_runner_begins_with_full_precision_weights(tmp_path):
    plain = tmp_path / "plain"
    train_tiny("plain", plain, epochs=9)
    losses = []
    for name, options in (
        ("new", []),
        ("old", ["--weights", str(plain / "save")]),
    ):
        runner(tmp_path / name, "--bits=4", "--lr=1.0e-6", *options)
        log = (tmp_path / name / "train_log.txt").read_text()
        losses.append(float(log.split("valid loss: ")[1].split("\n")[0]))
    assert losses[1] < 0.7 * losses[0]


FORMS = {
    "never calls fit": (
        "import speechbrain\nprint('done')\n",
        "ended without calling Brain.fit",
    ),
    "own loop": (
        "class Own({base}):\n"
        "    def fit(self, *args, **kwargs):\n"
        "        pass\n",
        "Own is evaluated before Brain.fit",
    ),
    "two Brains": (
        "class Second({base}):\n    pass\n",
        "trains another Brain, Second",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_scripts_that_cannot_be_served(form, tmp_path):
    body, message = FORMS[form]
    text = Path(SCRIPT).read_text(encoding="utf-8")
    if form == "never calls fit":
        text = body
    elif form == "own loop":
        own = body.format(base="TinyASR")
        text = text.replace("def dataset(", f"{own}\n\ndef dataset(")
        text = text.replace("brain = TinyASR(", "brain = Own(")
    else:
        own = body.format(base="TinyASR")
        text = text.replace("def dataset(", f"{own}\n\ndef dataset(")
        text = text.replace(
            "    main(sys.argv[1:])",
            "    brain = main(sys.argv[1:])\n"
            "    Second(brain.raw_modules).fit([], [])",
        )
    script = write(tmp_path / "train.py", text)
    with pytest.raises(UnsuitableScript, match=message):
        runner(tmp_path / "results", script=script)
