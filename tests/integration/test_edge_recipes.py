"""The recipes of the edge models at tiny size, through their own scripts."""

import json
import shlex

import pytest
import torch
from helpers import (
    ROOT,
    call,
    like_a_process,
    load_script,
    read_rows,
    run_row,
    start_row,
)
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_mpq import QualityEstimator
from speechbrain_mpq.evaluation.runs import load_run
from speechbrain_mpq.inference.enhancement import SpeechEnhancer
from speechbrain_mpq.lobes.models.dnsmos import DNSMOS, BinaryDNSMOS
from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2
from speechbrain_mpq.run import main as run_recipe

pytest.importorskip("pesq")
RULES = ("moving mask", "uncertain mask", "chance")


@pytest.fixture(scope="module")
def shared(speech, tmp_path_factory):
    """The folder in the place of tests/tmp, with the corpus in it."""
    folder = tmp_path_factory.mktemp("edge")
    speech(folder / "embedded")
    return folder


def row_of(recipe):
    """The recipe's row of tests/recipes."""
    script = f"recipes/Embedded/{recipe}/train.py"
    return next(row for row in read_rows() if row["Script_file"] == script)


def metrics_of(output):
    """What the recipe leaves beside its log."""
    return json.loads((output / "metrics.json").read_text())


def test_enhancement(shared):
    output = run_row(row_of("Enhancement"), shared)
    metrics = metrics_of(output)
    names = ["noisy", "exit 0", "exit 1", "exit 5"]
    assert list(metrics["test"]) == list(metrics["test_unseen"]) == names
    exits = [metrics["test"][name] for name in names[1:]]
    for cost in ("macs", "bytes"):
        values = [row[cost] for row in exits]
        assert values == sorted(values) and values[0] > 0
    assert all(row["ms"] > 0 for row in exits)
    streams = metrics["streams"]
    assert set(streams) == {
        *("fixed exit 0", "fixed exit 1", "fixed exit 5"),
        *(f"{rule}, 50% of the MACs" for rule in RULES),
    }
    for rule in RULES:
        row = streams[f"{rule}, 50% of the MACs"]
        assert exits[0]["macs"] <= row["macs"] <= exits[2]["macs"]
        fixed = [streams[f"fixed exit {exit}"] for exit in (0, 1, 5)]
        costs = [end["macs"] for end in fixed]
        assert costs == [end["macs"] for end in exits]
        after = next(i for i in (1, 2) if row["macs"] <= costs[i])
        left, right = fixed[after - 1 : after + 1]
        low, high = costs[after - 1 : after + 1]
        share = (row["macs"] - low) / (high - low)
        expected = (1 - share) * left["si_snr"] + share * right["si_snr"]
        assert row["line"]["si_snr"] == pytest.approx(expected)
    # What is published is what was scored
    run = load_run(output)
    assert run["average"]["si_snr"] == pytest.approx(exits[2]["si_snr"])
    model = SpeechEnhancer.from_pretrained(output / "published")
    assert model.exits == (0, 1, 5)
    assert model.model.deepest == 5
    (threshold,) = model.model.thresholds
    assert threshold[0] == pytest.approx(model.model.macs() / 2)
    assert "What each exit does" in (output / "published/README.md").read_text()


def test_quantized_enhancement(shared):
    """An untouched recipe; dense layers are fitted, gates have own bits."""
    row = row_of("Enhancement")
    full = shared / row["Hparam_file"].removesuffix(".yaml")
    if not full.exists():
        run_row(row, shared)
    output = shared / "enhancement_4bit"
    flags = row["test_debug_flags"].replace("tests/tmp", str(shared))
    run_recipe(
        [
            *(str(ROOT / row[k]) for k in ("Script_file", "Hparam_file")),
            *shlex.split(flags),
            *("--device=cpu", "--noprogressbar"),
            *(f"--output_folder={output}", f"--weights={full / 'save'}"),
            *("--bits", "3", "--scores", "size", "--gates", "--batches", "1"),
            *("--codebook", "entropy", "--exclude", "*bias*"),
            *("--method", "post_training"),
        ]
    )
    before, after = metrics_of(full), metrics_of(output)
    assert after["bits"] == 3 and after["model_bytes"] < before["model_bytes"]
    assert after["fp32_bytes"] == before["fp32_bytes"]
    for name in ("exit 0", "exit 1", "exit 5"):
        one, other = before["test"][name], after["test"][name]
        assert other["bytes"] < 0.3 * one["bytes"]
        assert other["si_snr"] == pytest.approx(one["si_snr"], abs=3)
    assert set(after["streams"]) == set(before["streams"])


def test_exits_one_after_the_other():
    network = EarlyExitNsNet2(bins=9, side=4)
    hparams = {"network": network, "train_exits": [3], "start_from": None}
    with like_a_process(row_of("Enhancement")["Script_file"]):
        load_script(row_of("Enhancement")["Script_file"]).begin(hparams)
    frozen = {p for part in network.parts_of(1) for p in part.parameters()}
    for parameter in network.parameters():
        assert parameter.requires_grad == (parameter not in frozen)


@pytest.mark.usefixtures("planned_pictures")
def test_speech_quality(shared):
    row = row_of("SpeechQuality")
    trained = run_row(row, shared)
    plain = metrics_of(trained)
    assert plain["bits"] == 32 and "bits_run" not in plain
    assert plain["memory"]["all maps"][2] == 1
    options = {"binary_maps": True, "start_from": trained, "system": "maps"}
    output = start_row(row, shared, shared / "bits", **options)
    binary = metrics_of(output)
    assert binary["bits_run"]["same_scores"]
    assert binary["bits_run"]["bytes"] < 4 * 45_697
    assert binary["buckets"]["held out"]["n"] == 3
    assert round(binary["memory"]["all maps"][2], 1) == 15.5  # float weights
    estimator = QualityEstimator.from_pretrained(output / "estimator")
    assert estimator.measure == "pesq"
    script = "recipes/Embedded/SpeechQuality/compare.py"
    folders = [trained, output, "--energy", shared / "embedded"]
    printed = call(script, *folders)
    for name in ("float", "maps", "energy alone"):
        assert printed.count(f"| {name} |") == 2 + (name != "energy alone")
    assert f"{binary['memory']['all maps'][1]:,.0f} (15.5)" in printed


def test_runs_that_are_no_start_are_refused(tmp_path):
    script = row_of("SpeechQuality")["Script_file"]
    with like_a_process(script):
        load_start = load_script(script).load_start
    network = DNSMOS([[8, True]], dense=[8])
    hparams = {"network": network, "start_from": str(tmp_path / "nothing")}
    with pytest.raises(ValueError, match="no trained checkpoint in .*nothing"):
        load_start(hparams)
    assert not (tmp_path / "nothing").exists()
    save = Checkpointer(tmp_path / "run/save", {"network": network})
    save.save_checkpoint(meta={"loss": 1.0})
    assert load_start({**hparams, "start_from": tmp_path / "run"})
    for other in (DNSMOS([[8, True]], dense=[4]), BinaryDNSMOS(True, 1, True)):
        with pytest.raises(ValueError, match="run has another network"):
            load_start({"network": other, "start_from": tmp_path / "run"})


def test_voices_are_moved_by_whole_bands():
    script = row_of("SpeechQuality")["Script_file"]
    with like_a_process(script):
        shift_bands = load_script(script).shift_bands
    features = torch.arange(6.0).expand(200, 3, 6)
    shifted = shift_bands(features, 2)
    found = {tuple(clip[0].tolist()) for clip in shifted}
    assert found == {
        (0, 0, 0, 1, 2, 3),
        (0, 0, 1, 2, 3, 4),
        (0, 1, 2, 3, 4, 5),
        (1, 2, 3, 4, 5, 5),
        (2, 3, 4, 5, 5, 5),
    }
    assert (shifted == shifted[:, :1]).all()
