"""What is said of a quantized interface: table, notes and model card."""

from pathlib import Path

import pytest
import torch
import yaml

from speechbrain_mpq.ptq.pretrained_folder import (
    PTQReport,
    model_card,
    outcome_table,
)
from speechbrain_mpq.quantization.quant_api import quantize_


@pytest.fixture
def outcome():
    """Of a layer whose bias stays in float."""
    return PTQReport(
        folder=Path("asr_4bit"),
        source="someone/asr",
        cls=torch.nn.Linear,
        asked="4bit",
        plan=quantize_(torch.nn.Linear(8, 4), 4, exclude="bias"),
        bytes={"source": 144, "packed": 36},
        divergence=0.01,
        unit="KL",
        quality={},
        left_alone=[{"reason": "biases", "parameters": 4}],
        reasons={"tokenizer": "loads itself"},
        card={"license": "mit", "language": "fr", "tags": ["asr"]},
    )


def test_table_says_what_became_of_it(outcome):
    rows = [row.split() for row in outcome_table(outcome).splitlines()]
    assert rows[0] == ["source", "packed"]
    assert [*"files with weights, bytes 144 36".split()] in rows
    assert "average bits of a quantized weight 32 4.00".split() in rows
    assert ["KL", "0", "0.01"] in rows
    assert "4 parameters stay in float: biases.".split() in rows
    assert "Not quantized: tokenizer (loads itself).".split() in rows
    assert rows[-3][:2] == ["No", "quality"]


def test_card_is_one_that_the_hub_reads(outcome):
    start, matter, text = model_card(outcome).split("---\n", 2)
    matter = yaml.safe_load(matter)
    assert start == ""
    assert matter["license"] == "mit" and matter["language"] == "fr"
    assert matter["base_model"] == "someone/asr"
    assert matter["base_model_relation"] == "quantized"
    assert {"speechbrain_mpq", "quantized", "4-bit", "asr"} <= {*matter["tags"]}
    assert "| times smaller | 4.0 |" in text
    assert "| KL | 0 | 0.01 |" in text
    assert "* 4 parameters stay in float: biases." in text
    assert 'Linear.from_hparams(source="asr_4bit")' in text
    assert "| 4 | 1 | 32 | 88.9 % |" in text
