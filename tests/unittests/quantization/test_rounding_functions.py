"""Rounding in few passes: the digits of the slow, obvious way."""

import copy
import subprocess
import sys

import pytest
import torch

from speechbrain_mpq.quantization.codebook import (
    dequantize,
    largest_level,
    nearest_levels,
)
from speechbrain_mpq.quantization.fake_quant import (
    FakeQuantize,
    LearnedStep,
    LogStep,
)
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.rounding_functions import (
    BLOCK,
    StepRounding,
    nearest_values,
)

TABLES = [
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
@pytest.mark.parametrize(("bits", "codebook"), TABLES)
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
    for bits, codebook in TABLES:
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
