"""Every scorer and every estimation method, through every door."""

import json

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import yaml
from helpers import (
    CTC,
    FEATURES,
    TINY_RECIPE,
    brain_of,
    fit,
    hparams_of,
    script,
    write_source,
)
from speechbrain.inference.ASR import EncoderASR
from speechbrain.utils.fetching import LocalStrategy

from speechbrain_mpq import (
    choose_bits,
    load_packed_,
    pack_results,
    quantize_pretrained,
)
from speechbrain_mpq.__main__ import main as command
from speechbrain_mpq.quantization.packing import read_model
from speechbrain_mpq.quantization.plan import BitPlan, bit_plan
from speechbrain_mpq.run import Runner, main
from speechbrain_mpq.training.choose import METHODS, SCORES

SCRIPT, YAML = TINY_RECIPE / "train.py", TINY_RECIPE / "train.yaml"
FEW = (2, 4, 8)  # candidates; scoring takes less time
ALONE = [name for name in SCORES if name != "table"]  # which wants a file


def outputs(modules):
    """What the recipe's modules put out for fixed features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 9, 8, generator=generator)
    modules.eval()
    with torch.no_grad():
        hidden = modules["norm"](modules["encoder"](features)[0])
        return modules["output"](hidden)


@pytest.fixture
def runs(monkeypatch):
    """The runners of this test, which know their Brains."""
    seen, finish = [], Runner.finish

    def note(runner):
        seen.append(runner)
        return finish(runner)

    monkeypatch.setattr(Runner, "finish", note)
    return seen


def run(folder, *options, epochs=2):
    """The untouched recipe under the runner, two steps an epoch."""
    own = [f"--output_folder={folder}", "--device=cpu", "--noprogressbar"]
    own += [f"--epochs={epochs}", "--bits=4", "--batches=1"]
    return main([str(o) for o in (SCRIPT, YAML, *own, *options)])


class Killed(Exception):
    """In the place of a signal."""


def killed_in_second_epoch(monkeypatch):
    """Have a training end in the middle."""
    fit_batch = sb.Brain.fit_batch

    def step(brain, batch):
        if brain.optimizer_step == 3:
            raise Killed
        return fit_batch(brain, batch)

    monkeypatch.setattr(sb.Brain, "fit_batch", step)


@pytest.mark.parametrize("method", METHODS)
def test_runner_trains_resumes_packs_and_loads(method, tmp_path, runs):
    options = ["--method", method, "--min_bits=2"]
    if METHODS[method]().keeps_plan:
        options += ["--scores", "size", "--rounding", "nearest"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    path = run(whole, *options)
    trains = METHODS[method]().trains
    if trains:
        with pytest.MonkeyPatch.context() as patched:
            killed_in_second_epoch(patched)
            with pytest.raises(Killed):
                run(broken, *options)
        assert len(runs) == 1  # what is not trained is not packed
    run(broken, *options)
    again = run(broken, *options)  # with nothing left to do
    for folder in (whole, broken):
        plan = BitPlan.load(folder / "plan.json")
        assert plan.average_bits <= 4
        assert plan == bit_plan(runs[0].brain.modules)
    # The best checkpoint is a question of the last digits of the loss.
    assert again.read_bytes() == path.read_bytes()
    fresh = torch.nn.ModuleDict(hparams_of("plain", tmp_path)["modules"])
    load_packed_(fresh, path.parent)
    assert torch.equal(outputs(fresh), outputs(runs[0].brain.modules))
    best = {"min_key": "loss"} if trains else {}
    packed = pack_results(whole, tmp_path / "later", **best)
    assert packed.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("scores", ALONE)
def test_runner_scores_without_training(scores, tmp_path, runs):
    options = ["--method", "post_training", "--scores", scores]
    path = run(tmp_path, *options, "--equal_bits", "*")
    brain = runs[0].brain
    assert BitPlan.load(tmp_path / "plan.json") == bit_plan(brain.modules)
    table = tmp_path / "scores.json"
    assert table.exists() == (scores != "uniform")
    fresh = torch.nn.ModuleDict(hparams_of("plain", tmp_path)["modules"])
    load_packed_(fresh, path.parent)
    assert torch.equal(outputs(fresh), outputs(brain.modules))


def test_a_budget_in_bytes_holds_for_coded_files(tmp_path, capsys):
    options = ["--method", "post_training", "--scores", "size"]
    options += ["--rounding", "nearest", "--codebook", "entropy", "--bits"]
    for budget in (1000, 1100):
        path = run(tmp_path / str(budget), *options, budget)
        assert budget - 60 < path.stat().st_size <= budget
    assert "more than" not in capsys.readouterr().err


def test_runner_takes_the_scores_of_an_earlier_run(tmp_path, runs):
    options = ["--method", "post_training", "--bits", "3.5"]
    run(tmp_path / "first", *options, "--scores", "kl")
    stored = f"table:file={tmp_path}/first/scores.json"
    run(tmp_path / "second", *options, "--scores", stored)
    tables = [tmp_path / name / "scores.json" for name in ("first", "second")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    plans = [BitPlan.load(table.with_name("plan.json")) for table in tables]
    assert plans[0] == plans[1] and plans[0].average_bits <= 3.5
    with pytest.raises(SystemExit, match="no file nowhere .*scores.json"):
        run(tmp_path / "third", "--scores", "table:file=nowhere")


@pytest.mark.parametrize("scores", ALONE)
def test_any_brain_is_scored(scores, tmp_path):
    brain = brain_of(hparams_of("plain", tmp_path))
    plan = choose_bits(
        brain,
        script().dataset(4, seed=2),
        scores,
        3.0 if scores == "uniform" else 3.5,
        candidate_bits=FEW,
        loader_kwargs={"batch_size": 4},
        progress=False,
    )
    assert plan.average_bits <= 3.5
    assert plan == bit_plan(brain.modules)


@pytest.mark.parametrize("method", METHODS)
def test_any_brain_is_trained(method, tmp_path):
    hparams = hparams_of("plain", tmp_path, epochs=1)
    brain = brain_of(hparams)
    budget = {"one_stage": 1100}.get(method, 4)  # bytes of the packed file
    choose_bits(
        brain,
        [],
        None if method == "one_stage" else "uniform",
        budget,
        method=method,
        rounding="nearest",
        progress=False,
    )
    if METHODS[method]().trains:
        fit(brain, hparams)
        brain.on_evaluate_start(min_key="loss")
    if method == "one_stage":
        packed = brain.chosen_quantizer.pack(tmp_path / "packed")
        assert 900 < packed.stat().st_size <= 1100
    else:
        assert bit_plan(brain.modules).average_bits == 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A recognizer's folder and a manifest."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_source(folder / "ctc", FEATURES + CTC, ["layers"], ["tokenizer"])
    noise = np.random.default_rng(0).standard_normal((2, 3200)) / 9
    card = "---\nlicense: cc-by-4.0\ntags: [french]\n---\n# A recognizer\n"
    (folder / "ctc/README.md").write_text(card)
    entries = {}
    for number, audio in enumerate(noise):
        soundfile.write(folder / f"{number}.wav", audio, 16000)
        wav = f"{{data_root}}/{number}.wav"
        entries[f"item_{number}"] = {"wav": wav, "words": "a b"}
    (folder / "manifest.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("scores", ALONE)
def test_an_interface_is_scored(scores, source, tmp_path):
    done = quantize_pretrained(
        source / "ctc",
        "EncoderASR",
        source / "manifest.json",
        "4bit",
        tmp_path / "out",
        candidate_bits=FEW,
        scores=scores,
        progress=False,
    )
    assert done.plan.average_bits <= 4
    assert (tmp_path / "out/layers.ckpt").stat().st_size < 4000
    start, matter, _ = (
        (tmp_path / "out/README.md").read_text().split("---\n", 2)
    )
    matter = yaml.safe_load(matter)
    assert start == "" and matter["base_model"] == "ctc"
    assert matter["base_model_relation"] == "quantized"
    assert matter["license"] == "cc-by-4.0" and "french" in matter["tags"]


def test_an_interface_by_entropy_loads_as_it_was_rounded(source, tmp_path):
    done = quantize_pretrained(
        source / "ctc",
        "EncoderASR",
        source / "manifest.json",
        "4bit",
        tmp_path / "out",
        candidate_bits=FEW,
        codebook="entropy",
        progress=False,
    )
    packed = read_model(tmp_path / "out/layers.ckpt")
    assert done.plan.codebook == packed.header["codebook"] == "entropy"
    loaded = EncoderASR.from_hparams(
        source=str(tmp_path / "out"),
        savedir=str(tmp_path / "saved"),
        local_strategy=LocalStrategy.COPY,
    )
    state = loaded.mods.state_dict()
    for name, tensor in packed.quantized.items():
        (found,) = [v for n, v in state.items() if n.endswith(f".{name}")]
        assert torch.equal(found, tensor.values())


@pytest.mark.parametrize("method", METHODS)
def test_an_interface_cannot_be_trained(method, source, tmp_path, capsys):
    line = ["quantize", "--source", source / "ctc", "--class", "EncoderASR"]
    line += ["--calibration", source / "manifest.json", "--budget", "4bit"]
    line += ["-o", tmp_path / "out", "--method", method, "--scores", "uniform"]
    status = command([str(word) for word in line])
    if method == "post_training":
        assert not status
        return
    assert status
    said = capsys.readouterr().err
    assert f"{method} trains, which takes a recipe" in said
    assert "speechbrain_mpq.run train.py" in said
    assert not (tmp_path / "out").exists()
