"""Every method of hparams/ at tiny size, through the user's own command."""

import json

import pytest
from helpers import run

from speechbrain_mpq.quantization.plan import BitPlan

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
    options["mixtures"] = {"train": 16, "valid": 4, "test": 4}
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
