"""Fake quantization: forward, gradient and checkpoints.

Scales that are trained: gradients, packing, checkpoints.

Fake quantization with a scale that is trained as a logarithm.
"""

import copy
import subprocess
import sys

import pytest
import torch

from speechbrain_mpq.quantization.codebook import (
    dequantize,
    fit_scale,
    largest_level,
    nearest_levels,
    quantize_to_integers,
)
from speechbrain_mpq.quantization.fake_quant import (
    BLOCK,
    FakeQuantize,
    LearnedStep,
    LogStep,
    StepRounding,
    nearest_values,
)
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.parametrized import attach, detach
from speechbrain_mpq.quantization.quant_api import quantize_, requantize_


def quantized_linear(bits=4):
    """A linear layer with a quantized weight, and its float weight."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    weight = layer.weight.detach().clone()
    attach(layer, "weight", FakeQuantize(bits, 0.05))
    return layer, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.half])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_forward_is_the_dequantized_integers(bits, dtype):
    torch.manual_seed(0)
    weight = torch.randn(40).to(dtype)
    quantizer = FakeQuantize(bits, 0.3)
    integers = quantize_to_integers(weight, bits, quantizer.alpha)
    expected = dequantize(integers, quantizer.alpha, dtype)
    assert torch.equal(quantizer(weight), expected)
    assert quantizer(weight).dtype == dtype


@pytest.mark.parametrize("bits", [1, 1.6, 2, 4, 8])
def test_the_quantizer_knows_its_table(bits):
    torch.manual_seed(0)
    weight = torch.randn(40)
    quantizer = FakeQuantize(bits, 0.3, "midrise")
    integers = quantize_to_integers(weight, bits, quantizer.alpha, "midrise")
    assert torch.equal(quantizer(weight), dequantize(integers, 0.3))
    assert torch.equal(quantizer.levels(weight).int(), integers)
    assert quantizer.stored_bits == bits and quantizer.codebook == "midrise"
    assert f"bits={bits}, scales=1, codebook=midrise" in repr(quantizer)
    quantizer.set_codebook("midtread")
    expected = FakeQuantize(bits, 0.3)(weight)
    assert torch.equal(quantizer(weight), expected)


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="codebook must be one of"):
        FakeQuantize(2, 0.3, "other")


def test_gradient_passes_unchanged_also_where_the_table_clips():
    weight = torch.tensor([0.1, -0.7, 30.0], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 3.0])
    FakeQuantize(2, 0.5)(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_broken_weights_stay_visible():
    weight = torch.tensor([float("nan"), 1.0])
    assert FakeQuantize(1, 0.5)(weight).isnan().tolist() == [True, False]
    assert FakeQuantize(4, 0.5)(weight).isnan().tolist() == [True, False]


def test_training_moves_the_float_weight():
    layer, weight = quantized_linear(bits=2)
    original = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(original.detach(), weight - 0.1)


def test_detach_restores_the_float_or_keeps_the_quantized_weight():
    layer, weight = quantized_linear()
    quantized = layer.weight.detach().clone()
    assert not torch.equal(quantized, weight)
    kept = copy.deepcopy(layer)
    detach(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert type(layer) is torch.nn.Linear
    detach(kept, "weight", keep_quantized=True)
    assert torch.equal(kept.weight, quantized)


def test_assigning_a_weight_sets_the_float_weight():
    layer, _ = quantized_linear(bits=2)
    layer.weight = torch.full((3, 5), 0.04)
    assert torch.equal(layer.weight, torch.full((3, 5), 0.05))


def test_quantized_checkpoint_restores_bits_scale_and_output():
    layer, _ = quantized_linear(bits=3)
    other = torch.nn.Linear(5, 3)
    attach(other, "weight", FakeQuantize(8, 1.0))
    other.load_state_dict(layer.state_dict())
    assert int(other.parametrizations.weight[0].bits) == 3
    inputs = torch.randn(2, 5)
    assert torch.equal(other(inputs), layer(inputs))


def test_checkpoints_carry_the_table():
    state = FakeQuantize(1.6, 0.1).state_dict()
    other = FakeQuantize(8, 1.0, "midrise")
    other.load_state_dict(state)
    assert (other.stored_bits, other.codebook) == (1.6, "midtread")
    other.load_state_dict(FakeQuantize(3, 0.1, "midrise").state_dict())
    assert (other.stored_bits, other.codebook) == (3, "midrise")


def test_checkpoints_from_before_there_was_a_choice_have_the_papers_table():
    layer, _ = quantized_linear(bits=3)
    inside = "parametrizations.weight.0."
    state = layer.state_dict()
    old = {k: v for k, v in state.items() if k[len(inside) :] != "ternary"}
    old.pop(f"{inside}midrise")
    assert len(old) == len(state) - 2
    other = torch.nn.Linear(5, 3)
    attach(other, "weight", FakeQuantize(1.6, 1.0, "midrise"))
    other.load_state_dict(old)
    assert torch.equal(other.weight, layer.weight)


def test_full_precision_checkpoint_loads_into_a_quantized_layer():
    layer, _ = quantized_linear()
    model = torch.nn.Sequential(layer)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 3)).state_dict()
    keys = list(plain)
    result = model.load_state_dict(plain)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(plain) == keys, "the caller's dictionary must stay as it is"
    original = layer.parametrizations.weight.original
    assert torch.equal(original, plain["0.weight"])


def test_quantized_checkpoint_is_refused_by_a_plain_layer():
    layer, _ = quantized_linear()
    with pytest.raises(RuntimeError, match="parametrizations.weight.original"):
        torch.nn.Linear(5, 3).load_state_dict(layer.state_dict())


def test_detached_layer_loads_plain_checkpoints_again():
    layer, _ = quantized_linear()
    detach(layer, "weight")
    plain = torch.nn.Linear(5, 3)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    assert not layer._load_state_dict_pre_hooks


def test_speechbrain_checkpoints_carry_the_quantizer(tmp_path):
    checkpoints = pytest.importorskip("speechbrain.utils.checkpoints")
    layer, _ = quantized_linear(bits=3)
    keeper = checkpoints.Checkpointer(tmp_path, {"layer": layer})
    expected = layer.weight.detach().clone()
    keeper.save_checkpoint()
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
        layer.parametrizations.weight[0].alpha.fill_(9.0)
    keeper.recover_if_possible()
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("kind", ["midtread", "midrise"])
@pytest.mark.parametrize("bits", [1, 1.6, 2, 3, 8])
def test_gradients_are_those_of_the_paper_one_weight_at_a_time(bits, kind):
    """Esser et al., Eq. 3 and 5, written out as a loop."""
    torch.manual_seed(0)
    weight = torch.randn(50, requires_grad=True)
    upstream = torch.randn(50)
    alpha, largest = 0.3, largest_level(bits, kind)
    learned = LearnedStep(bits, alpha, kind)
    quantized = learned(weight)
    quantized.backward(upstream)

    expected_scale = 0.0
    for i in range(50):
        steps = weight[i].item() / alpha
        level = round(quantized[i].item() / alpha)
        inside = abs(steps) <= largest
        slope = level - steps if inside else level
        expected_scale += upstream[i].item() * slope
        expected = upstream[i].item() if inside else 0.0
        assert weight.grad[i].item() == pytest.approx(expected)
    # The trained parameter is the relative scale.
    measured = learned.stretch.grad.item() / alpha
    assert measured == pytest.approx(expected_scale, rel=1e-4)


def test_starts_where_fixed_scales_are():
    torch.manual_seed(0)
    weight = torch.randn(30)
    learned, fixed = LearnedStep(3, 0.4), FakeQuantize(3, 0.4)
    assert torch.equal(learned(weight), fixed(weight))


def test_training_lowers_the_error_of_a_bad_scale():
    torch.manual_seed(0)
    weight = torch.randn(200)
    learned = LearnedStep(3, 2.0)
    before = (learned(weight) - weight).square().mean()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        error = (learned(weight) - weight).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.2 * before
    assert learned.alpha > 0


def test_trained_scales_are_packed_and_saved(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    quantize_(layer, 3, estimator=LearnedStep, codebook="midrise")
    layer.parametrizations.weight[0].stretch.data.fill_(1.3)
    x = torch.randn(2, 6)
    expected = layer(x)
    save_packed(layer, tmp_path)
    assert torch.equal(
        load_packed_(torch.nn.Linear(6, 4), tmp_path)(x), expected
    )

    again = torch.nn.Linear(6, 4)
    quantize_(again, 3, estimator=LearnedStep)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), expected)

    requantize_(again)
    assert again.parametrizations.weight[0].stretch == 1
    assert not torch.equal(again(x), expected)


TABLES = [
    (1, "midtread"),
    (1.6, "midtread"),
    (2, "midtread"),
    (4, "midtread"),
    (16, "midtread"),
    (2, "midrise"),
    (4, "midrise"),
]


def weights(shape=(6, 50)):
    """Values inside, beyond and at the ends of the table."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "codebook"), TABLES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_same_values_and_gradients_as_learned_step(bits, codebook, granularity):
    alpha = 0.8 * fit_scale(weights(), bits, granularity, codebook)
    results = []
    for kind in (LearnedStep, LogStep):
        weight = weights().requires_grad_()
        quantizer = kind(bits, alpha, codebook)
        output = quantizer(weight)
        (output * torch.linspace(-1, 2, 300).view(6, 50)).sum().backward()
        scale = next(quantizer.parameters())
        # At the start d alpha / d stretch = d alpha / d log_stretch.
        results.append((output.detach(), weight.grad, scale.grad))
    for learned, logged in zip(*results):
        assert torch.allclose(learned, logged, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0])


def test_half_precision_weights_keep_their_type():
    weight = weights().bfloat16().requires_grad_()
    output = LogStep(4, 0.3)(weight)
    output.float().square().sum().backward()
    assert output.dtype == weight.grad.dtype == torch.bfloat16


def test_values_are_those_that_are_packed():
    quantizer = LogStep(4, 0.3)
    quantizer.log_stretch.data.fill_(0.123)
    levels = quantizer.levels(weights())
    assert torch.equal(quantizer(weights()), levels * quantizer.alpha)


def test_weight_decay_pulls_to_the_fitted_scale():
    quantizer = LogStep(4, 0.5)
    quantizer.log_stretch.data.fill_(1.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1, weight_decay=0.5)
    quantizer.log_stretch.grad = torch.zeros(())
    for _ in range(60):
        optimizer.step()
    assert quantizer.alpha.item() == pytest.approx(0.5)


def train_bias(kind, steps):
    """A layer whose bias begins at zero and has to become 1, -0.5."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    layer.bias.data.zero_()
    quantize_(layer, 6, estimator=kind)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    inputs = torch.randn(32, 2)
    for _ in range(steps):
        target = inputs + torch.tensor([1.0, -0.5])
        (layer(inputs) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


def test_a_bias_that_begins_at_zero_is_trained():
    bias = train_bias(LogStep, 200).bias.detach()
    assert torch.allclose(bias, torch.tensor([1.0, -0.5]), atol=0.1)
    assert not train_bias(LearnedStep, 200).bias.any()


def test_late_scales_survive_a_checkpoint():
    one, other = train_bias(LogStep, 5), train_bias(LogStep, 0)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.bias, other.bias)
    assert other.parametrizations.bias[0].is_uninitialized
    assert not other.parametrizations.weight[0].is_uninitialized


def test_nothing_is_fitted_in_evaluation():
    layer = torch.nn.Linear(2, 2)
    layer.bias.data.zero_()
    quantize_(layer, 4, estimator=LogStep)
    layer.eval()
    original = layer.parametrizations.bias.original
    original.grad = -torch.ones(2)
    torch.optim.SGD([original], 1.0).step()
    assert not layer.bias.any()
    requantize_(layer)
    assert torch.allclose(layer.bias, torch.ones(2))


def test_bits_and_codebook_follow_what_is_loaded():
    quantizer, other = LogStep(4, 0.5), LogStep(2, 0.25, "midrise")
    assert (quantizer.stored_bits, quantizer.codebook) == (4, "midtread")
    quantizer.load_state_dict(other.state_dict())
    assert (quantizer.stored_bits, quantizer.codebook) == (2, "midrise")


@pytest.mark.parametrize("estimator", [FakeQuantize, LearnedStep, LogStep])
def test_a_scale_of_zero_gives_zeros_without_a_sign(estimator):
    """Trained from zero, and evaluated before a scale could be fitted."""
    quantizer = estimator(4, 0.0).eval()
    weight = torch.tensor([-0.3, -0.0, 0.2], requires_grad=True)
    integers = quantize_to_integers(weight.detach(), 4, quantizer.alpha)
    packed = dequantize(integers, quantizer.alpha)
    assert not packed.signbit().any()
    assert not quantizer(weight).signbit().any()


ALL_TABLES = [
    (1, "midtread"),
    (1.6, "midtread"),
    (4, "midtread"),
    (16, "midtread"),
    (2, "midrise"),
    (6, "midrise"),
]
SCALES = {"tensor": (), "rows": (24, 1, 1), "columns": (1, 10, 1)}
SHAPE = 24, 10, 3


class SlowStraightThrough(FakeQuantize):
    """Rounding as its formulas are written."""

    def forward(self, weight):
        """The gradient is the weight's: that of x + (q - x), q fixed."""
        quantized = slow_values(self, weight)

        class Pass(torch.autograd.Function):
            @staticmethod
            def forward(context, weight):
                return quantized

            @staticmethod
            def backward(context, gradient):
                return gradient

        return Pass.apply(weight)


class SlowLearnedStep(LearnedStep):
    """Learned steps as autograd has them, from which results were published."""

    def forward(self, weight):
        """The sum has the value of its first and the gradient of its second."""
        alpha = self.alpha
        with torch.no_grad():
            levels = self.levels(weight)
            quantized = slow_values(self, weight)
            largest = largest_level(self.stored_bits, self.codebook)
        steps = weight / alpha.clamp_min(torch.finfo(alpha.dtype).tiny)
        inside = steps.clamp(-largest, largest)
        smooth = (inside + (levels - inside).detach()) * alpha
        return quantized + (smooth - smooth.detach()).to(weight.dtype)


class SlowRounding(torch.autograd.Function):
    """Gradients of learned steps, written out."""

    @staticmethod
    def forward(context, weight, log_scale, quantized, alpha, largest):
        context.largest = largest
        context.save_for_backward(weight, quantized, alpha)
        return quantized.clone()

    @staticmethod
    def backward(context, gradient):
        weight, quantized, alpha = context.saved_tensors
        inside = weight.abs() <= context.largest * alpha
        by_weight = torch.where(inside, gradient, 0.0)

        def products(one, other):
            if not alpha.dim():
                one, other = one.float().reshape(-1), other.float().reshape(-1)
                return torch.dot(one, other)
            return (one.float() * other.float()).sum_to_size(alpha.shape)

        by_scale = products(gradient, quantized) - products(by_weight, weight)
        return by_weight, by_scale, None, None, None


class SlowLogStep(LogStep):
    """Learned logarithms of steps, written out."""

    def forward(self, weight):
        """The gradients are those of `SlowRounding`."""
        if self.is_uninitialized and self.training:
            self._fit_late(weight.detach())
        with torch.no_grad():
            table = slow_values(self, weight), self.alpha
            largest = largest_level(self.stored_bits, self.codebook)
        return SlowRounding.apply(weight, self.log_stretch, *table, largest)


SLOW = {
    FakeQuantize: SlowStraightThrough,
    LearnedStep: SlowLearnedStep,
    LogStep: SlowLogStep,
}


def slow_values(quantizer, weight):
    """What a packed file would hold, as floats."""
    with torch.no_grad():
        alpha, table = quantizer.alpha, quantizer.codebook
        levels = nearest_levels(weight, quantizer.stored_bits, alpha, table)
        return dequantize(levels, alpha, weight.dtype)


def example(shape, scales, dtype=torch.float32):
    """A weight with values at the ends and in the middle, and its scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.view(-1)[:6] = torch.tensor([0.0, -0.0, 3.5, -3.5, 0.7, 1e-4])
    alpha = 0.1 + torch.rand(scales, generator=generator)
    return weight, alpha


def gradients_of(kind, bits, codebook, weight, alpha, gradient):
    """Output, gradients and output without gradients of an estimator."""
    quantizer = kind(bits, alpha, codebook)
    trained = list(quantizer.parameters())
    for parameter in trained:
        parameter.data.mul_(1.03).add_(0.01)
    weight = weight.clone().requires_grad_()
    output = quantizer(weight)
    output.backward(gradient)
    with torch.no_grad():
        again = quantizer(weight)
    grads = [weight.grad, *(p.grad for p in trained)]
    return [output.detach(), again, *grads]


def assert_same_digits(one, other):
    """The same bits, and the same type."""
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(one[0].signbit(), other[0].signbit())


@pytest.mark.parametrize("kind", SLOW, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("bits", "codebook"), ALL_TABLES)
def test_outputs_and_gradients_have_the_same_digits(
    kind, scales, bits, codebook
):
    torch.manual_seed(1)
    gradients = {
        "as the weight": torch.randn(SHAPE),
        "transposed": torch.randn(SHAPE[::-1]).permute(2, 1, 0),
        "expanded": torch.ones(()).expand(SHAPE),
    }
    weight, alpha = example(SHAPE, SCALES[scales])
    if scales == "rows":
        alpha[2] = 0.0  # a row that was all zero when it was fitted
    for gradient in gradients.values():
        given = bits, codebook, weight, alpha, gradient
        assert_same_digits(
            gradients_of(kind, *given), gradients_of(SLOW[kind], *given)
        )


@pytest.mark.parametrize("kind", SLOW, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scales", [(), (8, 1)], ids=["tensor", "rows"])
def test_large_weights_are_rounded_in_blocks_to_the_same_digits(kind, scales):
    shape = 8, BLOCK // 2 + 3
    weight, alpha = example(shape, scales)
    gradient = torch.randn(shape)
    for codebook in ("midtread", "midrise"):
        given = 4, codebook, weight, alpha, gradient
        assert_same_digits(
            gradients_of(kind, *given), gradients_of(SLOW[kind], *given)
        )
    columns = torch.rand(1, shape[1]) + 0.1
    for one, scale in ((weight.T, columns.T), (weight, columns)):
        levels = nearest_levels(one, 4, scale)
        expected = dequantize(levels, scale)
        assert torch.equal(nearest_values(one, 4, scale), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [FakeQuantize, LearnedStep])
def test_other_types_have_the_same_digits(kind, dtype):
    weight, alpha = example(SHAPE, (), dtype)
    gradient = torch.randn(SHAPE).to(dtype)
    given = 4, "midtread", weight, alpha, gradient
    assert_same_digits(
        gradients_of(kind, *given), gradients_of(SLOW[kind], *given)
    )


def network():
    """Recurrent, tied, shared and plain layers."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(12, 8)
            self.rnn = torch.nn.LSTM(8, 8, num_layers=2, batch_first=True)
            self.shared = torch.nn.Linear(8, 8)
            self.norm = torch.nn.LayerNorm(8)
            self.out = torch.nn.Linear(8, 12)
            self.out.weight = self.embed.weight

        def forward(self, words):
            x, _ = self.rnn(self.embed(words))
            x = self.shared(self.shared(x).tanh())
            return self.out(self.norm(x))

    return Net()


def trained(kind, granularity, restored=None):
    """States and losses of three steps of two accumulated batches."""
    net = network()
    quantize_(net, 4, estimator=kind, granularity=granularity)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    if restored:
        net.load_state_dict(restored[0])
        optimizer.load_state_dict(copy.deepcopy(restored[1]))
    losses, generator = [], torch.Generator().manual_seed(3)
    for _ in range(3):
        for _ in range(2):
            words = torch.randint(12, (4, 6), generator=generator)
            scores = net(words).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, words.flatten())
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, net.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", SLOW, ids=lambda kind: kind.__name__)
def test_steps_of_tied_and_shared_layers_have_the_same_digits(
    kind, granularity
):
    losses, state, steps = trained(kind, granularity)
    others, other, _ = trained(SLOW[kind], granularity)
    assert torch.equal(torch.stack(losses), torch.stack(others))
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    # Resumed in the other way, it goes on with the same digits.
    resumed = trained(SLOW[kind], granularity, (state, steps))[0]
    again = trained(kind, granularity, (state, steps))[0]
    assert torch.equal(torch.stack(resumed), torch.stack(again))


def test_gradients_of_gradients_are_those_of_the_formula():
    def second(kind):
        weight, alpha = example((40,), ())
        weight = weight.double().requires_grad_()
        quantizer = kind(3, alpha).double()
        power = quantizer(weight).pow(3).sum()
        inputs = [weight, quantizer.stretch]
        first = torch.autograd.grad(power, inputs, create_graph=True)
        total = first[0].square().sum() + first[1].square()
        return torch.autograd.grad(total, inputs)

    for one, other in zip(second(LearnedStep), second(SlowLearnedStep)):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0


def test_what_needs_no_gradient_gets_none():
    for needs in ((True, False), (False, True)):
        weight, alpha = example(SHAPE, ())
        weight.requires_grad_(needs[0])
        alpha.requires_grad_(needs[1])
        StepRounding.apply(weight, alpha, 4, "midtread").sum().backward()
        assert (weight.grad is not None, alpha.grad is not None) == needs


def test_weights_that_are_not_numbers_stay_visible():
    weight = torch.tensor([float("nan"), 1.0, -1.0])
    for bits, codebook in ALL_TABLES:
        for alpha in (0.5, 0.0):
            values = nearest_values(weight, bits, torch.tensor(alpha), codebook)
            assert values.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("kind", SLOW, ids=lambda kind: kind.__name__)
def test_a_table_that_changes_is_noticed(kind):
    quantizer, weight = kind(2, 0.5), torch.tensor([0.1, 0.9])
    assert quantizer(weight).tolist() == [0.0, 0.5]
    quantizer.load_state_dict(kind(3, 0.5).state_dict())
    assert quantizer(weight).tolist() == [0.0, 1.0]
    quantizer.set_codebook("midrise")
    assert quantizer(weight).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", ["tensor", "rows"])
@pytest.mark.parametrize("kind", SLOW, ids=lambda kind: kind.__name__)
def test_compiled_estimators_have_the_same_gradients(kind, scale):
    weight, alpha = example(SHAPE, SCALES[scale])
    gradient = torch.randn(SHAPE)

    def run(compiled):
        quantizer, own = kind(4, alpha), weight.clone().requires_grad_()
        call = quantizer.forward
        if compiled:
            torch.compiler.reset()
            call = torch.compile(call, backend="aot_eager")
        call(own).backward(gradient)
        return [own.grad, *(p.grad for p in quantizer.parameters())]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other)


def test_importing_does_not_load_the_compiler():
    """Which takes a second that every command would pay."""
    code = (
        "import sys, speechbrain_mpq.quantization.fake_quant as own; "
        "assert own.LogStep and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
