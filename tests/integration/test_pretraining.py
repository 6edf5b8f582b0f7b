"""Full-precision training at tiny size: new, on the device, grown."""

import re
import shutil

import pytest
from helpers import ROOMS, TINY, call, run, train_losses

from speechbrain_mpq.inference.verification import check_folder


def grow(smaller, larger, output, *options):
    """Run the recipe in few rooms; the SI-SNRs that it prints, by model."""
    script = "recipes/Embedded/growth/grow.py"
    line = [smaller, larger, "-o", output, *options]
    printed = call(script, *line, ROOMS=ROOMS["train"])
    return dict(re.findall(r"(\w+): .* ([-.\d]+) dB", printed))


def test_training_lowers_the_loss(trained):
    losses = train_losses(trained)
    assert len(losses) == 2 and losses[1] < losses[0]


def on_device(folder, **options):
    """Training losses with the mixtures made on the device."""
    options = {"system": "on_device", "mix_on_device": True, **options}
    run(folder, "pretrain.yaml", **options)
    results = options.get("results_folder", folder / "results")
    results = results / f"{options['system']}_32bit"
    log = (results / "1234/log.txt").read_text()
    assert ("are made on cpu" in log) == options["mix_on_device"]
    return train_losses(results)


def test_mixtures_from_the_device_train_as_well(folder):
    losses = on_device(folder)
    assert losses[1] < losses[0]


def test_mixtures_from_the_device_are_those_of_the_loader(folder):
    """The loss of the first step is, before any weight has moved."""
    # Later ones may be far apart: the mixtures agree within 4e-7 (see
    # test_dataio.py), but Adam's first step is the rate times the gradient's
    # sign, so weights whose gradient is next to zero go opposite ways, and
    # what the training makes of that has no bound.
    one_step = {
        "mixtures": {"train": 4, "valid": 4, "test": 4},
        "number_of_epochs": 1,
        "results_folder": folder / "one_step",
    }
    mixed = on_device(folder, **one_step)
    loaded = on_device(folder, **one_step, system="cpu", mix_on_device=False)
    assert mixed == pytest.approx(loaded, abs=0.011)  # two digits are logged


def test_a_small_separator_grows_and_trains_on(folder, trained, shipped):
    larger, grown = folder / "larger.yaml", folder / "grown"
    sizes = TINY.read_text().replace("channels: 8", "channels: 12")
    larger.write_text(sizes.replace("layers: 2", "layers: 3"))
    printed = grow(shipped, larger, grown, "--data_folder", folder / "data")
    assert printed["smaller"] == printed["grown"]
    run(
        folder,
        "pretrain_large.yaml",
        pretrained_separator=grown,
        separator_file=larger,
    )
    results = folder / "results/pretrain_large_32bit"
    assert (
        train_losses(results)[0] < train_losses(trained)[1]
    )  # it goes on from there
    assert check_folder(results / "1234/packed") == []


def test_a_separator_is_fitted_to_other_features(folder, shipped):
    other, fitted = folder / "other.yaml", folder / "fitted"
    pairs = TINY.read_text().replace("[[8, 1]]", "[[8, 1], [2, 1]]")
    other.write_text(pairs)
    data = folder / "other_data"  # the same speech in rooms of their own
    shutil.copytree(
        folder / "data", data, ignore=shutil.ignore_patterns("rooms")
    )
    options = ["--data_folder", data, "--refit", 8]
    printed = grow(shipped, other, fitted, *options)
    assert set(printed) == {"smaller", "refitted", "grown"}
    assert printed["refitted"] == printed["grown"]
    before, after = (float(printed[name]) for name in ("smaller", "grown"))
    assert after == pytest.approx(before, abs=0.05)  # all is there
    assert check_folder(fitted) == []
