"""Tied language models: one matrix, and the sizes that the paper prints."""

from fnmatch import fnmatch

import pytest
import torch
from helpers import ROOT
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.lobes.models.language_models import (
    TiedRNNLM,
    TiedTransformerLM,
)
from speechbrain_mpq.quantization.groups import split_name
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    clusters,
    coverage,
    quantize_,
)
from speechbrain_mpq.quantization.tensors import named_tensors

MODELS = {
    "lstm": lambda: TiedRNNLM(30, 8),
    "gru": lambda: TiedRNNLM(30, 8, rnn="gru"),
    "transformer": lambda: TiedTransformerLM(30, 8, 2, 2, 8),
}
PAPER = ROOT / "recipes/Switchboard/LM/hparams/models"


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_embedding_is_there_once(kind):
    model = MODELS[kind]()
    before = [p for p in model.parameters() if p.shape == (30, 8)]
    assert len(before) == 1
    plan = quantize_(model, 2, gates=True, exclude="*bias*")
    counted = [row for row in coverage(model) if row["shape"] == [30, 8]]
    assert sorted(row["bytes"] for row in counted) == [0, 64]  # 60, a scale
    assert sum(c.parameters == 240 for c in plan.clusters.values()) == 1
    words = torch.tensor([[1, 5, 6]])
    outputs = model(words)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_words_to_come_change_nothing():
    torch.manual_seed(0)
    for make in MODELS.values():
        model = make().eval()
        one, two = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 5, 9, 4]])
        outputs = [model(words) for words in (one, two)]
        outputs = [o[0] if isinstance(o, tuple) else o for o in outputs]
        torch.testing.assert_close(outputs[0][:, :2], outputs[1][:, :2])


def test_an_unknown_kind_of_layer():
    with pytest.raises(ValueError, match="rnn must be one of"):
        TiedRNNLM(30, 8, rnn="ligru")


def paper_model(kind, words):
    """A model of the paper's size, without memory."""
    with torch.device("meta"):
        text = (PAPER / f"{kind}.yaml").read_text()
        return load_hyperpyyaml(text, {"vocabulary": words})["model"]


@pytest.mark.parametrize(
    "kind, words, mib, within",
    [
        ("lstm", 30430, 183, 0.002),
        ("lstm", 47100, 248, 0.002),
        ("transformer", 30430, 106, 0.03),
        ("transformer", 47100, 138, 0.03),
    ],
)
def test_sizes_of_the_paper_in_full_precision(kind, words, mib, within):
    model = paper_model(kind, words)
    count = sum(p.numel() for p in model.parameters())
    assert 4 * count / 2**20 == pytest.approx(mib, rel=within)


@pytest.mark.parametrize(
    "kind, bits, mib",
    [
        *[("lstm", b, m) for b, m in ((1, 6.1), (2, 11.8), (4, 23.5))],
        *[("transformer", b, m) for b, m in ((1, 3.6), (2, 7.2), (4, 13.8))],
    ],
)
def test_sizes_of_the_paper_at_low_bits(kind, bits, mib):
    model = paper_model(kind, 30430)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    rest = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    plan = BitPlan.from_dict(
        {
            "version": 1,
            "rest_parameters": rest,
            "clusters": {
                str(i): {
                    "bits": bits,
                    "parameters": p.numel(),
                    "tensors": [str(i)],
                }
                for i, p in enumerate(parameters)
            },
        }
    )
    assert plan.bytes / 2**20 == pytest.approx(mib, rel=0.05)


@pytest.mark.parametrize(
    "kind, at_one_bit, mib, ratio",
    [
        ("lstm", ["*.input_l*"], 11.7, 15.6),
        ("transformer", ["*.pos_ffn.ffn.0"], 7.0, 15.1),
    ],
)
def test_sizes_of_the_paper_at_mixed_bits(kind, at_one_bit, mib, ratio):
    """Its KL systems of 1.9 bits, with 1 bit for some gates or sub-layers."""
    model = paper_model(kind, 30430)
    weights = [n for n, p in model.named_parameters() if p.dim() > 1]
    members = clusters(model, include=weights, gates=True)
    tensors = named_tensors(model)
    rest = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    entries = {}
    for cluster, names in members.items():
        low = any(fnmatch(cluster, pattern) for pattern in at_one_bit)
        parts = map(split_name, names)
        count = sum(tensors[name].weight[rows].numel() for name, rows in parts)
        entries[cluster] = ClusterBits(1 if low else 2, count, names)
    plan = BitPlan(entries, rest)
    full = 4 * sum(p.numel() for p in model.parameters())
    assert plan.average_bits == pytest.approx(1.9, abs=0.02)
    assert plan.bytes / 2**20 == pytest.approx(mib, rel=0.06)
    assert full / plan.bytes > ratio
