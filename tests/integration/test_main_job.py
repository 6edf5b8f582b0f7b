"""The user's own command at tiny size: train, quantize, refuse."""

import json

import pytest
import torch
from helpers import ROOMS, TINY, refused_run, run

from speechbrain_mpq.inference.card import read_sample
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import load_packed_
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.training.pipeline import load_prototype


def test_main_job_leaves_everything_it_promises(main_job, kl):
    for name in (
        *("metrics.json", "plan.json", "scores.json", "report.html"),
        *("packed/model.safetensors", "hyperparams.yaml", "env.log"),
    ):
        assert (kl / name).stat().st_size > 0, name
    plan = BitPlan.load(kl / "plan.json")
    assert plan.average_bits < 4.01  # single values take a whole byte
    assert {c.bits for c in plan.clusters.values()} <= {2, 4, 8, 16}
    assert {name.split(".")[1] for name in plan.clusters} == {
        *("conv_in", "tcn_0_0", "tcn_0_1", "conv_out"),
    }
    printed = (main_job / "printed.txt").read_text()
    for system in ("fp32", "uniform", "kl"):
        assert system in printed
    metrics = json.loads((kl / "metrics.json").read_text())
    assert metrics["mapsswe"]["against"] == "fp32"
    stored = (kl / "packed/model.safetensors").stat().st_size
    assert metrics["model_bytes"] == stored
    assert check_folder(kl / "packed") == []
    card = (kl / "packed/README.md").read_text()
    assert f"{stored:,} bytes" in card and "| full precision | 32 |" in card
    assert "base_model: pretrain_32bit" in card
    sample = read_sample(kl / "packed")
    assert f"doa={sample['doa']:g}" in card and sample["license"] in card
    log = (kl / "train_log.txt").read_text()
    assert "bits: " in log and f"bytes: {stored} - test si_snr: " in log
    assert sum(b["n"] for b in metrics["buckets"].values()) == 8


def test_mixed_precision_is_no_larger_than_uniform(main_job):
    plans = [
        BitPlan.load(main_job / f"results/{system}_4bit/1234/plan.json")
        for system in ("kl", "uniform")
    ]
    assert plans[0].bytes <= plans[1].bytes


def test_packed_folder_gives_what_was_evaluated(main_job, kl):
    """A fresh model with the folder's weights gives the stored examples."""
    import soundfile

    from speechbrain_mpq.simulation.dataio import listed_mixtures
    from speechbrain_mpq.simulation.mixtures import (
        MixtureMaker,
        fixed_mixtures,
        load_speech,
    )
    from speechbrain_mpq.simulation.rooms import RoomBank

    data = main_job / "data"
    separator = build_separator(TINY).eval()
    fold_norms_(separator)
    load_packed_(separator, kl / "packed")
    speech = load_speech(data / "test_speech.json", data)
    maker = MixtureMaker(speech, RoomBank(data, "test", ROOMS["test"]))
    item = listed_mixtures(maker, fixed_mixtures(maker, 8))[0]
    with torch.no_grad():
        estimate = separator(item["mixture"][None], item["doa"][None])[0, 0]
    stored, _ = soundfile.read(
        kl / f"examples/{item['id']}.flac", dtype="float32"
    )
    torch.testing.assert_close(
        estimate.clip(-1, 1), torch.from_numpy(stored), rtol=0, atol=1e-4
    )


def test_again_does_nothing_and_other_settings_lie_beside(
    main_job, shipped, kl
):
    options = {"pretrained_separator": shipped, "examples": 2}
    stamp = (kl / "metrics.json").stat().st_mtime_ns
    run(main_job, "kl_4bit.yaml", **options)
    assert (kl / "metrics.json").stat().st_mtime_ns == stamp
    # Another list of baselines is no other model.
    options["against"] = "[]"
    run(main_job, "kl_4bit.yaml", **options)
    assert (kl / "metrics.json").stat().st_mtime_ns == stamp
    printed = run(main_job, "kl_4bit.yaml", **options, lr=0.1)
    beside = main_job / "results/kl_4bit-lr_0.1/1234"
    assert f"with other lr: this one is in {beside}" in printed
    assert (beside / "metrics.json").exists()
    assert (kl / "metrics.json").stat().st_mtime_ns == stamp


def test_missing_weights_name_the_command(folder):
    options = {"pretrained_separator": "none", "against": "[]", "seed": 9}
    with pytest.raises(
        ValueError, match="python train.py hparams/pretrain.yaml"
    ):
        run(folder, "uniform_4bit.yaml", **options)


def test_impossible_budget_names_the_limits(folder, shipped):
    """As a process: what is said last, and the exit status."""
    options = {"pretrained_separator": shipped, "against": "[]", "bits": 1}
    said = refused_run(folder, "kl_4bit.yaml", **options)
    assert "1 bits on average cannot be reached" in said
    assert len(said.splitlines()) == 1


def test_post_training_trains_nothing(folder, shipped):
    options = {
        "pretrained_separator": shipped,
        "estimator": "!name:speechbrain_mpq.PostTraining",
        "round_calibrated": True,
        "results_folder": folder / "post_training",
        "against": "[hparams/uniform_4bit.yaml]",
    }
    printed = run(folder, "kl_4bit.yaml", **options)
    assert "PostTraining" in printed
    results = folder / "post_training/kl_4bit/1234"
    assert "epoch" not in (results / "train_log.txt").read_text()
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
