"""Binary maps: the surrogate, exact sums, and inference with bits."""

import numpy as np
import pytest
import torch

from speechbrain_mpq.nnet.binary_activations import (
    INPUT_STEPS,
    BinaryActivation,
    BitConv2d,
    ExactConv2d,
    ExactLinear,
    StoredLinear,
    StoredWeights,
    binarize_weights_,
    eight_bit_input,
    fixed_point,
    fixed_point_exponent,
    packed_input,
)


def bits_like(rng, *shape):
    """A random map of bits, [T, F, C]."""
    return rng.random(shape) < 0.4


def as_tensor(bits, signed):
    """The map as the training graph has it, [1, C, T, F]."""
    x = torch.from_numpy(bits).float().permute(2, 0, 1)[None]
    return 2 * x - 1 if signed else x


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_surrogate_gradient(beta):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    y = BinaryActivation(signed=True, beta=beta)(x)
    y.sum().backward()
    assert y.tolist() == [-1.0] * 5 + [1.0] * 4
    expected = 2 / (beta * x.detach().abs() + 1) ** 2
    assert torch.allclose(x.grad, expected)


def test_binary_weights_learn():
    torch.manual_seed(0)
    layer = ExactConv2d(8, 4, kernel_size=3)
    binarize_weights_([layer])
    size = (2 / 72) ** 0.5
    assert torch.allclose(layer.weight.abs(), torch.tensor(size))
    layer(torch.ones(1, 8, 4, 4)).square().sum().backward()
    grad = layer.parametrizations.weight.original.grad
    assert grad.abs().min() > 0


def test_fixed_point_is_fine_and_leaves_the_gradient():
    weight = torch.tensor([0.7, -0.3, 1e-9], requires_grad=True)
    fixed = fixed_point(weight, terms=288)
    fixed.sum().backward()
    assert torch.allclose(fixed, weight, atol=2**-15)
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]
    exponent = fixed_point_exponent(weight, terms=288)
    integers = torch.ldexp(fixed.detach(), torch.tensor(exponent))
    assert torch.equal(integers, integers.round())
    assert 288 * integers.abs().max() < 2**24
    assert torch.equal(fixed_point(fixed, 288), fixed)
    assert fixed_point(torch.zeros(3), 288).tolist() == [0, 0, 0]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["float", "codes", "binary"])
@pytest.mark.parametrize("channels", [3, 32])
def test_bits_give_what_the_graph_gives(signed, kind, channels):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layer = ExactConv2d(channels, 12, kernel_size=3)
    if kind == "binary":
        binarize_weights_([layer])
        torch.nn.init.uniform_(layer.bias, -1, 1)
    elif kind == "codes":  # any four-bit grid
        step = layer.weight.abs().max() / 7
        layer.weight.data = (layer.weight.data / step).round() * step
    bits = bits_like(rng, 11, 8, channels)
    small = BitConv2d(layer, signed)
    assert small.popcount == (kind == "binary")
    y = BinaryActivation()(layer(as_tensor(bits, signed)))[0] > 0
    y = y.permute(1, 2, 0).numpy()
    assert 0.1 < y.mean() < 0.9
    packed = np.packbits(bits, axis=-1)
    for rows in (2, 4, 12):
        assert np.array_equal(small(packed, rows=rows), np.packbits(y, -1))
    pooled = y[:10].reshape(5, 2, 4, 2, 12).any((1, 3))
    assert np.array_equal(small(packed, pool=True), np.packbits(pooled, -1))
    assert np.array_equal(small.anywhere(packed), y.any((0, 1)))


def test_sums_do_not_depend_on_their_order():
    torch.manual_seed(0)
    layer = ExactConv2d(32, 4, kernel_size=3)
    x = (torch.rand(1, 32, 9, 9) < 0.5).float()
    order = torch.randperm(32)
    again = ExactConv2d(32, 4, kernel_size=3)
    again.weight.data = layer.weight.data[:, order]
    again.bias.data = layer.bias.data
    assert torch.equal(again(x[:, order]), layer(x))
    exact = torch.nn.functional.conv2d(
        x.double(),
        fixed_point(layer.weight, layer.terms).double(),
        padding=1,
    )
    assert torch.equal(layer(x), exact.float() + layer.bias[:, None, None])


def test_integer_input():
    torch.manual_seed(0)
    layer = ExactConv2d(1, 8, kernel_size=3, input_peak=INPUT_STEPS)
    x = eight_bit_input(torch.randn(1, 1, 7, 6))
    y = (layer(x)[0] > 0).permute(1, 2, 0).numpy()
    small = BitConv2d(layer)
    assert np.array_equal(small(packed_input(x[0, 0])), np.packbits(y, -1))


def test_dense_layers_give_what_the_graph_gives():
    torch.manual_seed(0)
    head = torch.nn.Sequential(
        ExactLinear(64, 64), torch.nn.ReLU(), ExactLinear(64, 1)
    )
    first, second = StoredLinear(head[0]), StoredLinear(head[2])
    for _ in range(20):
        x = (torch.rand(64) < 0.5).float()
        hidden = np.maximum(first(x.numpy()), 0)
        assert second(hidden).item() == head(x).item()


@pytest.mark.parametrize("values", [1, 2, 3, 16, 256, 257, 1000])
def test_stored_weights(values):
    rng = np.random.default_rng(0)
    matrix = rng.permutation(np.arange(2000) % values).reshape(50, 40)
    stored = StoredWeights(matrix.astype(np.float32))
    assert np.array_equal(stored.matrix(), matrix)
    bits = {1: 1, 2: 1, 3: 2, 16: 4, 256: 8}.get(values, 16)
    assert stored.bits == bits
    table = 4 * values if values <= 256 else 0
    assert stored.nbytes == 2000 * bits // 8 + table
    noise = rng.standard_normal((30, 40)).astype(np.float32)
    assert np.array_equal(StoredWeights(noise).matrix(), noise)
