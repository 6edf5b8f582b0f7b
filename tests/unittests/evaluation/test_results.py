"""What an experiment leaves behind, beside its neighbours."""

import logging

import numpy as np
import pytest

from speechbrain_mpq.evaluation.results import (
    Scored,
    show_results,
    write_results,
)
from speechbrain_mpq.evaluation.runs import load_run
from speechbrain_mpq.utils import write_json

pytestmark = pytest.mark.usefixtures("planned_pictures")

RATE = 16000  # Hz
LOG = """epoch: 1, lr: 1.0e-03 - train loss: -7.5 - valid loss: -8.0
epoch: 2, lr: 9.0e-04 - train loss: -7.6 - valid loss: -8.1
epoch: 2, lr: 9.0e-04 - train loss: -7.7 - valid loss: -8.2
"""


def make_scored(words="set red now"):
    """Scores of four mixtures, the first with its waveforms."""
    items = [
        {
            "id": f"mix_{index}",
            "angle": angle,
            "si_snr": 8.0,
            "si_snr_mixture": 0.0,
            "pesq": 2.0,
            "reference": "set red now",
            "hypothesis": words,
            "hypothesis_mixture": "now",
            "hypothesis_target": "set red now",
        }
        for index, angle in enumerate((5.0, 30.0, 60.0, 120.0))
    ]
    noise = np.random.default_rng(0).standard_normal(RATE // 8) * 0.1
    signals = dict.fromkeys(("mixture", "target", "estimate"), noise)
    example = {
        "id": "mix_0",
        "angle": 5.0,
        "doa_target": 40.0,
        "doa_interferer": 45.0,
        "reference": "set red now",
        "sample_rate": RATE,
        "signals": signals,
    }
    return Scored(items, [example], 20.0)


def finish(folder, name="kl", bits=4, scored=None, **more):
    """Write the results of one experiment, given how it is called."""
    folder = folder / f"{name}_{bits}bit" / "1"
    folder.mkdir(parents=True, exist_ok=True)
    system = {"system": name, "bits": bits, "seed": 1, "model_bytes": 4000}
    write_results(folder, system, scored or make_scored(), **more)
    return folder


def test_everything_is_there_and_comes_back(tmp_path):
    base = finish(tmp_path, "fp32", 32)
    folder = finish(
        tmp_path, scored=make_scored("set blue now"), baselines=[base]
    )
    run = load_run(folder)
    assert run["mapsswe"]["against"] == "fp32"
    assert run["average"]["wer"] == pytest.approx(100 / 3)
    assert run["items"] == make_scored("set blue now").items
    table = show_results([base, folder])
    assert [line.split()[1] for line in table.splitlines()[4:6]] == [
        "fp32",
        "kl",
    ]
    html = (folder / "report.html").read_text("utf-8")
    assert html.count("<audio") == 4  # mixture, target and both systems


def test_report_shows_the_files_beside_it(tmp_path):
    folder = tmp_path / "kl_4bit" / "1"
    folder.mkdir(parents=True)
    row = {"iteration": 1, "primal_residual": 0.1, "valid_loss": -8.0}
    write_json(folder / "admm.json", [row])
    (folder / "train_log.txt").write_text(LOG)
    finish(tmp_path)
    html = (folder / "report.html").read_text("utf-8")
    assert "Convergence of ADMM" in html and "Training by epoch" in html
    assert "Size against quality" not in html
    (folder / "admm.json").write_text("[")
    with pytest.raises(ValueError, match="admm.json is no JSON"):
        finish(tmp_path)


def test_neighbours_are_drawn_and_broken_ones_named(tmp_path, caplog):
    finish(tmp_path, "uniform")
    finish(tmp_path, "nas", scored=Scored(make_scored().items[:3], [], 20.0))
    broken = finish(tmp_path, "hes")
    (broken / "metrics.json").write_text("{")
    logger = "speechbrain_mpq.evaluation.results"
    with caplog.at_level(logging.WARNING, logger=logger):
        folder = finish(tmp_path, results_folder=tmp_path)
    assert str(broken / "metrics.json") in caplog.text
    html = (folder / "report.html").read_text("utf-8")
    assert "Size against quality" in html


def test_a_second_run_of_the_same_system_is_left_out(tmp_path, caplog):
    """It must not cost a finished run its results."""
    again = finish(tmp_path / "again", "uniform")
    again.parent.rename(tmp_path / "uniform_copy")
    finish(tmp_path, "uniform")
    logger = "speechbrain_mpq.evaluation.results"
    with caplog.at_level(logging.WARNING, logger=logger):
        folder = finish(tmp_path, results_folder=tmp_path)
    assert "a second run of uniform 4 bit with seed 1" in caplog.text
    assert load_run(folder)["system"] == "kl"


def test_a_baseline_without_items_is_named(tmp_path):
    base = finish(tmp_path, "fp32", 32)
    (base / "test_items.json").unlink()
    with pytest.raises(FileNotFoundError, match="test_items.json"):
        finish(tmp_path, baselines=[base])
