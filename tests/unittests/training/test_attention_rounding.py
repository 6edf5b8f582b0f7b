"""Attention's two matrices, against linear layers and heads written out."""

import copy

import pytest
import torch
import torch.nn as nn
from speechbrain.nnet.attention import MultiheadAttention

from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.training.attention_rounding import attended_by
from speechbrain_mpq.training.matrix_rounding import (
    as_linear,
    matched_items,
    round_layer_,
)
from speechbrain_mpq.training.rounding import (
    round_calibrated_,
    tensors_by_owner,
)

ITEMS, STEPS, SIZE, HEADS = 16, 9, 12, 3
LENGTHS = torch.arange(ITEMS) % STEPS + 1


class Attention(nn.Module):
    """What SpeechBrain's layers make of PyTorch's attention."""

    def __init__(self, masks="", crossed=False, **options):
        super().__init__()
        self.att = nn.MultiheadAttention(SIZE, HEADS, **options)
        for name, value in self.att.named_parameters():
            if "bias" in name:
                nn.init.normal_(value)
        self.masks, self.crossed = masks, crossed

    def own_masks(self):
        """Arguments of its forward."""
        padding = torch.arange(STEPS) >= LENGTHS[:, None]
        future = torch.ones(STEPS, STEPS).triu(1).bool()
        masks = {"key_padding_mask": padding, "attn_mask": future}
        if "float" in self.masks:
            masks = {
                key: torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
                for key, mask in masks.items()
            }
        return {key: masks[key] for key in masks if key in self.masks}

    def forward(self, x):
        """Outputs, in the layout of x, [items, steps, features]."""
        given = x if self.att.batch_first else x.transpose(0, 1)
        other = given.flip(-1) if self.crossed else given.clone()
        out = self.att(given, other, other, **self.own_masks())[0]
        return out if self.att.batch_first else out.transpose(0, 1)


def given(seed=0):
    """Items with a few directions that matter more than others."""
    torch.manual_seed(seed)
    return torch.randn(ITEMS, STEPS, SIZE) @ torch.randn(SIZE, SIZE)


def heads(att, x, hidden):
    """What the heads put out, written out; x [items, steps, features]."""
    projected = x @ att.in_proj_weight.mT
    if att.in_proj_bias is not None:
        projected = projected + att.in_proj_bias
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in projected.chunk(3, -1)
    )
    scores = q @ k.mT / (SIZE // HEADS) ** 0.5
    scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rounded_alone(plain, inputs, wanted, keep, **options):
    """A linear layer that is rounded on the steps that count."""
    layer = copy.deepcopy(plain)
    quantize_(layer, 3, **options)
    pairs = matched_items(inputs, [plain(item) for item in wanted], keep)
    round_layer_(tensors_by_owner(layer), layer, plain, pairs)
    return layer


CASES = {
    "alone": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "causal": {"masks": "attn_mask"},
    "padding": {"masks": "key_padding_mask attn_mask"},
    "float masks": {"masks": "float key_padding_mask attn_mask"},
}


@pytest.mark.parametrize("codebook", ["table", "entropy"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_matrices_are_rounded_as_linear_layers(case, codebook):
    options = {} if codebook == "table" else {"codebook": codebook}
    options["include"] = ["*weight"]
    x = given()
    model = Attention(**CASES[case]).eval()
    plain, masks = copy.deepcopy(model.att), model.own_masks()
    hidden, keep = torch.zeros(1, 1, 1, 1).bool(), None
    if "attn_mask" in masks:
        hidden = hidden | torch.ones(STEPS, STEPS).triu(1).bool()
    if "key_padding_mask" in masks:
        padding = torch.arange(STEPS) >= LENGTHS[:, None]
        hidden, keep = hidden | padding[:, None, None], list(~padding)
    quantize_(model, 3, **options)
    found = round_calibrated_(model, "", x, progress=False)
    assert set(found) == {"att", "att.out_proj"}
    linear = as_linear(plain, "in_proj_weight", "in_proj_bias")
    first = rounded_alone(linear, x, x, keep, **options)
    torch.testing.assert_close(model.att.in_proj_weight, first.weight)
    if first.bias is not None:
        torch.testing.assert_close(model.att.in_proj_bias, first.bias)
    second = rounded_alone(
        plain.out_proj,
        heads(model.att, x, hidden),
        heads(plain, x, hidden),
        keep,
        **options,
    )
    assert (model.att.out_proj.weight - second.weight).abs().max() < 1e-4
    if second.bias is not None:
        torch.testing.assert_close(model.att.out_proj.bias, second.bias)


@torch.no_grad()
def test_what_is_padding_has_no_say():
    x = given()
    results = []
    for noise in (0.0, 100.0):
        torch.manual_seed(1)
        model = Attention("key_padding_mask").eval()
        padding = model.own_masks()["key_padding_mask"]
        quantize_(model, 3)
        noisy = x + noise * padding[..., None]
        round_calibrated_(model, "", noisy, progress=False)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key])


@pytest.mark.parametrize("options", [{}, {"gates": True}, {"rows": 6}])
@torch.no_grad()
def test_outputs_come_closer(options):
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = Attention("attn_mask").eval(), given(seed)
        wanted = model(x)
        quantize_(model, 3, **options)
        nearest = (model(x) - wanted).square().mean()
        round_calibrated_(model, "", x, progress=False)
        errors.append([nearest, (model(x) - wanted).square().mean()])
    nearest, calibrated = torch.tensor(errors).mean(0)
    assert calibrated < 0.8 * nearest


@torch.no_grad()
def test_attention_to_something_else_keeps_its_first_matrix(caplog):
    torch.manual_seed(0)
    model = Attention(crossed=True).eval()
    x = given()
    quantize_(model, 3)
    before = model.att.in_proj_weight.clone()
    with caplog.at_level("INFO"):
        found = round_calibrated_(model, "", x, progress=False)
    assert found == ["att.out_proj"]
    assert torch.equal(model.att.in_proj_weight, before)
    reason = "queries, keys and values are not the same): att"
    assert f"Nearest rounding stays ({reason}" in caplog.text


@torch.no_grad()
def test_speechbrains_wrapper():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MultiheadAttention(HEADS, SIZE)

        def forward(self, x):
            return self.layer(x, x, x)[0]

    torch.manual_seed(0)
    model = Wrapped().eval()
    quantize_(model, 3)
    found = round_calibrated_(model, "", given(), progress=False)
    assert set(found) == {"layer.att", "layer.att.out_proj"}


def test_inputs_are_told_apart_by_their_values():
    layer, x = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4)
    assert len(attended_by(layer, x, x.clone(), x).inputs) == 1
    assert len(attended_by(layer, x, x + 1, value=x).inputs) == 3
    moved = attended_by(layer, x, x, x, key_padding_mask=torch.ones(2, 3) > 0)
    moved = moved.to("cpu", dtype=torch.float64)
    assert moved.inputs[0].dtype is torch.float64
    assert moved.masks["key_padding_mask"].dtype is torch.bool


def test_one_item_says_nothing_about_another(caplog):
    model = Attention().eval()
    quantize_(model, 3)
    with caplog.at_level("INFO"):
        inputs = given()[:2, 0]  # two steps of one sequence without a batch
        model.att.batch_first = True
        assert not round_calibrated_(model, "", inputs, progress=False)
    told = "a single item goes in: give more batches): att, att.out_proj"
    assert told in caplog.text
