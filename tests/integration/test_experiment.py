"""The user's own command at tiny size: train, quantize, resume, refuse."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers import ROOT, TINY, command, finished, quality, refused_run, run

from speechbrain_mpq.inference.folder import check_folder
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import load_packed_
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.training.prototypes import load_prototype

for needed in ("espeakng_loader", "pyroomacoustics", "pesq"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained full-precision separator in it."""
    folder = tmp_path_factory.mktemp("experiment")
    run(folder, "pretrain.yaml")
    return folder


@pytest.fixture(scope="module")
def shipped(folder):
    """The packed full-precision separator."""
    return folder / "results/pretrain_32bit/1234/packed"


@pytest.fixture(scope="module")
def kl(folder, shipped):
    """Results of the main job, and what it printed."""
    printed = run(folder, "kl_4bit.yaml", pretrained_separator=shipped)
    return folder / "results/kl_4bit/1234", printed


def test_main_job_leaves_everything_it_promises(kl):
    results, printed = kl
    for name in (
        *("metrics.json", "plan.json", "scores.json", "report.html"),
        *("packed/model.safetensors", "hyperparams.yaml", "env.log"),
    ):
        assert (results / name).stat().st_size > 0, name
    plan = BitPlan.load(results / "plan.json")
    assert plan.average_bits < 4.01  # single values take a whole byte
    assert {c.bits for c in plan.clusters.values()} <= {2, 4, 8, 16}
    assert {name.split(".")[1] for name in plan.clusters} == {
        *("conv_in", "tcn_0_0", "tcn_0_1", "conv_out"),
    }
    for system in ("fp32", "uniform", "kl"):
        assert system in printed
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["mapsswe"]["against"] == "fp32"
    stored = (results / "packed/model.safetensors").stat().st_size
    assert metrics["model_bytes"] == stored
    assert check_folder(results / "packed") == []
    card = (results / "packed/README.md").read_text()
    assert f"{stored:,} bytes" in card and "| full precision | 32 |" in card
    assert "base_model: pretrain_32bit" in card
    assert sum(b["n"] for b in metrics["buckets"].values()) == 8


def test_mixed_precision_is_no_larger_than_uniform(folder, kl):
    plans = [
        BitPlan.load(folder / f"results/{system}_4bit/1234/plan.json")
        for system in ("kl", "uniform")
    ]
    assert plans[0].bytes <= plans[1].bytes


def test_packed_folder_gives_what_was_evaluated(kl):
    """A fresh model with the folder's weights gives the stored examples."""
    import soundfile

    from speechbrain_mpq.simulation.dataio import listed_mixtures
    from speechbrain_mpq.simulation.mixtures import (
        MixtureMaker,
        fixed_mixtures,
        load_speech,
    )
    from speechbrain_mpq.simulation.rooms import RoomBank

    results, _ = kl
    data = results.parents[2] / "data"
    separator = build_separator(TINY).eval()
    fold_norms_(separator)
    load_packed_(separator, results / "packed")
    speech = load_speech(data / "test_speech.json", data)
    maker = MixtureMaker(speech, RoomBank(data, "test", 25))
    item = listed_mixtures(maker, fixed_mixtures(maker, 8))[0]
    with torch.no_grad():
        estimate = separator(item["mixture"][None], item["doa"][None])[0, 0]
    stored, _ = soundfile.read(
        results / f"examples/{item['id']}.flac", dtype="float32"
    )
    torch.testing.assert_close(
        estimate.clip(-1, 1), torch.from_numpy(stored), rtol=0, atol=1e-4
    )


def test_again_does_nothing_and_other_settings_lie_beside(folder, shipped, kl):
    results, _ = kl
    stamp = (results / "metrics.json").stat().st_mtime_ns
    run(folder, "kl_4bit.yaml", pretrained_separator=shipped)
    assert (results / "metrics.json").stat().st_mtime_ns == stamp
    # Another list of baselines is no other model.
    options = {"pretrained_separator": shipped, "against": "[]"}
    run(folder, "kl_4bit.yaml", **options)
    assert (results / "metrics.json").stat().st_mtime_ns == stamp
    options = {"pretrained_separator": shipped, "against": "[]", "lr": 0.1}
    printed = run(folder, "kl_4bit.yaml", **options)
    beside = folder / "results/kl_4bit-lr_0.1/1234"
    assert f"with other lr: this one is in {beside}" in printed
    assert (beside / "metrics.json").exists()
    assert (results / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("within_epoch", [False, True])
def test_killed_run_ends_like_an_uninterrupted_one(
    folder, shipped, kl, within_epoch
):
    results, _ = kl
    again = folder / f"again_{within_epoch}"
    (again).mkdir()
    (again / "data").symlink_to(folder / "data")
    options = {"pretrained_separator": shipped, "against": "[]"}
    if within_epoch:
        options["ckpt_interval_steps"] = 1
    process = subprocess.Popen(
        command(again, "kl_4bit.yaml", **options),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    other = again / "results/kl_4bit/1234"
    deadline = time.time() + 120
    wanted = f"end-of-epoch: {'false' if within_epoch else 'true'}"
    while not any(
        wanted in meta.read_text()
        for meta in other.glob("save/CKPT*/CKPT.yaml")
    ):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (other / "metrics.json").exists()
    run(again, "kl_4bit.yaml", **options)
    assert (other / "plan.json").read_text() == (
        (results / "plan.json").read_text()
    )
    ours, theirs = quality(other), quality(results)
    theirs.pop("mapsswe")
    assert ours == theirs


def test_two_processes_choose_the_same_bits(folder, shipped, kl):
    results, _ = kl
    line = command(
        folder,
        "kl_4bit.yaml",
        system="two",
        pretrained_separator=shipped,
        against="[]",
        distributed_backend="gloo",
    )
    start = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    start += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    finished([line[0], *start, *line[1:]])
    two = folder / "results/two_4bit/1234"
    assert (two / "plan.json").read_text() == (
        (results / "plan.json").read_text()
    )
    scores, expected = (
        json.loads((path / "scores.json").read_text())
        for path in (two, results)
    )
    assert scores["clusters"] == expected["clusters"]
    assert check_folder(two / "packed") == []
    assert json.loads((two / "metrics.json").read_text())["system"] == "two"


def test_missing_weights_name_the_command(folder):
    options = {"pretrained_separator": "none", "against": "[]", "seed": 9}
    said = refused_run(folder, "uniform_4bit.yaml", **options)
    assert "python train.py hparams/pretrain.yaml" in said


def test_impossible_budget_names_the_limits(folder, shipped):
    options = {"pretrained_separator": shipped, "against": "[]", "bits": 1}
    said = refused_run(folder, "kl_4bit.yaml", **options)
    assert "1 bits on average cannot be reached" in said
    assert len(said.splitlines()) == 1


METHODS = {
    "hes_4bit.yaml": ("hes", {}),
    "nas_4bit.yaml": ("nas", {}),
    "best_4bit.yaml": ("best", {}),
    "one_stage_4bit.yaml": ("one_stage", {"one_stage": "{interval: 2}"}),
    "admm_4bit.yaml": ("admm", {"admm": "{iteration_steps: 2}"}),
}


@pytest.mark.parametrize("file", METHODS)
def test_every_method_meets_its_budget(folder, shipped, file):
    system, options = METHODS[file]
    options = {"pretrained_separator": shipped, "against": "[]", **options}
    run(folder, file, **options)
    results = folder / f"results/{system}_4bit/1234"
    plan = BitPlan.load(results / "plan.json")
    # Single values take a whole byte, and the input scales are more values.
    assert plan.average_bits <= 4.1
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["system"] == system and metrics["estimator"]
    foreseen = {"hes", "best"}
    assert (results / "ceiling.json").exists() == (system in foreseen)
    if system == "nas":  # its prototypes
        made = {path.parent.name for path in results.parents[1].glob("u*/1234")}
        assert made >= {f"uniform_{bits}bit" for bits in (2, 4, 8, 16)}
    if system == "admm":
        history = json.loads((results / "admm.json").read_text())
        assert len(history) == 4 and history[1]["valid_loss"] is not None
    if system == "best":
        shape = (results / "packed/hyperparams.yaml").read_text()
        assert "scale_inputs: true" in shape.lower()


def test_post_training_trains_nothing(folder, shipped):
    options = {
        "pretrained_separator": shipped,
        "estimator": "!name:speechbrain_mpq.PostTraining",
        "round_calibrated": True,
        "results_folder": folder / "post_training",
    }
    printed = run(folder, "kl_4bit.yaml", **options)
    assert "PostTraining" in printed
    results = folder / "post_training/kl_4bit/1234"
    assert not (results / "train_log.txt").exists()
    rows = json.loads((results / "additivity.json").read_text())
    assert rows[0]["plan"] == "chosen" and rows[0]["measured"] > 0


def test_prototypes_are_inherited(folder, shipped):
    """With nothing trained, a uniform plan's weights are the prototype's."""
    shared = {"pretrained_separator": shipped, "against": "[]"}
    options = {
        **shared,
        "prototypes": "hparams/uniform_4bit.yaml",
        "scores": "{candidate_bits: [4]}",
        "number_of_epochs": 0,
        "system": "heir",
    }
    # Prototypes share the command line: they are not trained either.
    options["results_folder"] = folder / "heirs"
    run(folder, "kl_4bit.yaml", **options)
    heir, prototype = (
        load_prototype(folder / f"heirs/{system}_4bit/1234/packed")
        for system in ("heir", "uniform")
    )
    for name, value in prototype.items():
        torch.testing.assert_close(heir[name], value)
