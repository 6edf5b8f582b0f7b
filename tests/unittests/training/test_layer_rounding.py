"""Layers as matrices: weight x inputs + bias must be the layer's output."""

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.lobes.models.tcn import ChannelAffine
from speechbrain_mpq.training.layer_rounding import (
    input_matrix,
    is_matrix_layer,
    output_matrix,
    weight_matrix,
)

LAYERS = {
    "linear": nn.Linear(6, 4),
    "1x1": nn.Conv1d(6, 4, 1),
    "ordinary": nn.Conv1d(6, 4, 3, stride=2, dilation=2, padding=3),
    "depthwise": nn.Conv1d(6, 6, 3, groups=6, padding=2, dilation=2),
    "grouped": nn.Conv1d(6, 4, 3, groups=2, padding="same"),
    "multiplier": nn.Conv1d(6, 12, 3, groups=6),
    "reflecting": nn.Conv1d(6, 4, 4, padding="same", padding_mode="reflect"),
    "batch norm": nn.BatchNorm1d(6).eval(),
    "layer norm": nn.LayerNorm(6),
    "group norm": nn.GroupNorm(2, 6),
    "affine": ChannelAffine(6),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_matrix_product_is_the_layers_output(name):
    torch.manual_seed(0)
    layer = LAYERS[name]
    for value in layer.parameters():
        value.normal_()
    last = isinstance(layer, nn.Linear | nn.LayerNorm)
    inputs = torch.randn(3, 11, 6) if last else torch.randn(3, 6, 11)
    outputs = output_matrix(layer, layer(inputs))
    weight = weight_matrix(layer, layer.weight)
    found = weight @ input_matrix(layer, inputs)
    found += layer.bias.reshape(*weight.shape[:2], 1)
    torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-5)
    assert is_matrix_layer(layer)


@torch.no_grad()
def test_two_dimensional_inputs():
    layer = nn.BatchNorm1d(6).eval()
    inputs = torch.randn(5, 6)
    assert input_matrix(layer, inputs).shape == (6, 1, 5)
    assert input_matrix(nn.Linear(6, 2), inputs).shape == (1, 6, 5)


def test_what_is_no_matrix():
    others = nn.PReLU(6), nn.LSTM(4, 4), nn.ReLU(), nn.Conv2d(2, 2, 3)
    assert not any(is_matrix_layer(layer) for layer in others)
    assert not is_matrix_layer(nn.LayerNorm([4, 5]))


class Curve(nn.Module):
    """Has the parameters of a norm, but does something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x * self.weight[:, None] + self.bias[:, None]).tanh()


@torch.no_grad()
def test_layer_that_only_looks_like_a_norm_is_refused():
    with pytest.raises(ValueError, match="Curve .* does not scale and shift"):
        input_matrix(Curve(), torch.randn(2, 3, 4))
