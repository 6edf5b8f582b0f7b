"""The speech quality task: from clips to metrics, table, report and card."""

import json

import numpy as np
import pytest

from speechbrain_mpq.evaluation.results import (
    Scored,
    show_results,
    write_results,
)
from speechbrain_mpq.evaluation.runs import summarise
from speechbrain_mpq.evaluation.significance import mse, pcc, srcc
from speechbrain_mpq.evaluation.task import find_task
from speechbrain_mpq.inference.card import model_card

pytestmark = pytest.mark.usefixtures("planned_pictures")
TASK = find_task("speech quality")


def clips(noise, count=40):
    """Clips whose scores are wrong by some noise."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(1, 4.5, count)
    scores = labels + noise * rng.standard_normal(count)
    return [
        {
            "id": f"c{index}",
            "score": float(score),
            "label": float(label),
            "held_out": index % 4 == 0,
        }
        for index, (score, label) in enumerate(zip(scores, labels))
    ]


def finish(folder, system, bits, items, **more):
    """Write the results of one network."""
    folder = folder / system / "1"
    folder.mkdir(parents=True)
    about = {"system": system, "bits": bits, "seed": 1, "model_bytes": 4000}
    write_results(folder, about, Scored(items), task=TASK, **more)
    return folder


def test_measures_by_type_of_noise():
    items = clips(0.5)
    found = summarise(items, TASK)
    assert [found["buckets"][name]["n"] for name in found["buckets"]] == [
        30,
        10,
    ]
    some = [item for item in items if item["held_out"]]
    pair = [i["score"] for i in some], [i["label"] for i in some]
    block = found["buckets"]["held out"]
    for measure in (pcc, srcc, mse):
        assert block[measure.__name__] == measure(*pair)
    constant = [{**item, "score": 2.0} for item in items]
    average = summarise(constant, TASK)["average"]
    assert average["pcc"] is None and average["mse"] > 0


def test_table_report_and_card(tmp_path):
    full = finish(tmp_path, "float", 32, clips(0.2))
    folder = finish(tmp_path, "maps", 4, clips(0.8), baselines=[full])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["paired_z"]["z"] > 2 and metrics["paired_z"]["p"] < 0.05
    assert metrics["paired_z"]["clips"] == 40
    table = show_results([full, folder], wide=False)
    assert "PCC" in table and "SRCC" in table and "MSE" in table
    html = (folder / "report.html").read_text("utf-8")
    assert "significantly more squared errors" in html
    config = {"architecture": {"class": "BinaryDNSMOS", "arguments": {}}}
    text = model_card(config, 4000, metrics, task=TASK)
    assert "with binary activation maps" in text
    assert 'estimate_file("recording.wav")' in text
    assert "{" not in text.split("## How to use")[1].split("## ")[0]


def test_equal_networks_do_not_differ(tmp_path):
    full = finish(tmp_path, "float", 32, clips(0.2))
    same = finish(tmp_path, "same", 4, clips(0.2), baselines=[full])
    metrics = json.loads((same / "metrics.json").read_text())
    assert metrics["paired_z"] == {"against": "float", "z": 0.0, "p": 1.0} | {
        "clips": 40
    }
