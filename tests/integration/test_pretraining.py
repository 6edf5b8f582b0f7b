"""Full-precision training at tiny size: new, on the device, grown."""

import re
import shutil
import sys

import pytest
from helpers import TINY, finished, run, train_losses

from speechbrain_mpq.inference.verification import check_folder

for needed in ("espeakng_loader", "pyroomacoustics", "pesq"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained full-precision separator in it."""
    folder = tmp_path_factory.mktemp("pretraining")
    run(folder, "pretrain.yaml")
    return folder


@pytest.fixture(scope="module")
def shipped(folder):
    """The packed full-precision separator."""
    return folder / "results/pretrain_32bit/1234/packed"


def grow(smaller, larger, output, *options):
    """Run the recipe; the SI-SNRs that it prints, by model."""
    line = ["recipes/Embedded/growth/grow.py", smaller, larger, "-o", output]
    printed = finished([sys.executable, *line, *options])
    return dict(re.findall(r"(\w+): .* ([-.\d]+) dB", printed))


def test_training_lowers_the_loss(folder):
    losses = train_losses(folder / "results/pretrain_32bit")
    assert len(losses) == 2 and losses[1] < losses[0]


def test_mixtures_from_the_device_train_as_well(folder):
    run(folder, "pretrain.yaml", system="on_device", mix_on_device=True)
    results = folder / "results/on_device_32bit"
    assert "are made on cpu" in (results / "1234/log.txt").read_text()
    losses = train_losses(results)
    expected = train_losses(folder / "results/pretrain_32bit")
    assert losses[0] == pytest.approx(expected[0], abs=0.05)  # of 29 dB
    # Adam's first step goes by the gradient's sign: the mixtures agree within
    # 4e-7, yet some weights whose gradient is near zero take opposite ways.
    assert losses[1] < losses[0]


def test_a_small_separator_grows_and_trains_on(folder, shipped):
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
    new = train_losses(folder / "results/pretrain_32bit")
    assert train_losses(results)[0] < new[1]  # it goes on from there
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
