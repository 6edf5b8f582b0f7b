"""The coverage table of slices and codebooks; the rest is with the zoo."""

import torch

from speechbrain_mpq.quantization.coverage import coverage
from speechbrain_mpq.quantization.quantizer import quantize_


def test_slices_and_tables_have_their_rows():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.PReLU())
    plan = quantize_(model, 1.6, exclude="1.*", codebook="midrise", rows=3)
    rows = {row["tensor"]: row for row in coverage(model)}
    assert list(rows) == [
        "0.weight[0:3]",
        "0.weight[3:6]",
        "0.bias",
        "1.weight",
    ]
    piece = rows["0.weight[3:6]"]
    assert piece["cluster"] == "0[3:6]" and piece["shape"] == [3, 8]
    assert (piece["asked_bits"], piece["stored_bits"]) == (1.6, 1.6)
    assert piece["bytes"] == 5 + 4 and piece["codebook"] == "midrise"
    assert rows["1.weight"]["codebook"] is None
    assert sum(row["bytes"] for row in rows.values()) == plan.bytes
