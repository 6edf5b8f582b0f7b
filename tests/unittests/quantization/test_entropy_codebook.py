"""The entropy codebook: bits are what values cost, not how many there are."""

import math

import numpy as np
import pytest
import torch

from speechbrain_mpq.quantization.admm import ADMM
from speechbrain_mpq.quantization.codebook import (
    ROUND_UP,
    entropy_rate,
    fit_scale,
    largest_level,
    nearest_levels,
)
from speechbrain_mpq.quantization.fake_quant import (
    LearnedStep,
    LogStep,
    StraightThrough,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.plan import Scheme, bit_plan
from speechbrain_mpq.quantization.quant_api import fake_quantize, quantize_

SCHEME = Scheme(codebook="entropy")
RATES = (1, 1.6, 2, 3, 4, 5, 6, 8)


def laplacian(count=20000, seed=0):
    """Weights with a long tail."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.laplace(0, 0.1, count)).float()


def entropy(levels):
    """Bits a value, counted the slow way."""
    counts = {}
    for level in levels.tolist():
        counts[level] = counts.get(level, 0) + 1
    shares = [count / levels.numel() for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares)


@pytest.mark.parametrize("bits", RATES)
def test_the_step_has_the_rate_that_is_asked_for(bits):
    weight = laplacian()
    alpha = fit_scale(weight, bits, codebook="entropy")
    levels = nearest_levels(weight, bits, alpha, "entropy")
    assert entropy(levels) == pytest.approx(bits, abs=0.05)
    assert levels.abs().max() <= largest_level(bits, "entropy")


def test_levels_round_down_a_little_more_often():
    steps = torch.tensor([0.52, 0.54, -0.52, -0.54, 1.5, 2.6])
    levels = nearest_levels(steps, 4, torch.tensor(1.0), "entropy")
    assert ROUND_UP == 0.47
    assert levels.tolist() == [0, 1, 0, -1, 1, 3]
    again = nearest_levels(levels, 4, torch.tensor(1.0), "entropy")
    assert torch.equal(again, levels)


def test_the_rate_counts_signs_and_frequencies():
    steps = torch.tensor([0.0] * 500 + [1.0] * 300 + [2.0] * 200)
    signed = steps * torch.tensor([1.0, -1.0]).repeat(500)
    told = 4 / 2 / 1000 / math.log(2)  # five levels, a thousand values
    assert entropy_rate(steps) == pytest.approx(entropy(signed) + told)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_less_noise_than_the_best_table_of_as_many_bits(bits):
    for weight in (laplacian(), torch.randn(20000)):
        errors = {
            codebook: (fake_quantize(weight, bits, Scheme(codebook=codebook))
                       - weight).square().mean()
            for codebook in ("midtread", "midrise", "entropy")
        }  # fmt: skip
        others = min(errors["midtread"], errors["midrise"])
        assert errors["entropy"] < 0.85 * others


def test_tensors_of_few_values_are_kept_finely():
    for weight in (torch.tensor([0.25]), torch.tensor([0.1, -0.7, 0.3])):
        quantized = fake_quantize(weight, 4, SCHEME)
        torch.testing.assert_close(quantized, weight, rtol=0.02, atol=0.004)
    assert fake_quantize(torch.zeros(7), 4, SCHEME).abs().sum() == 0


def network(seed=0):
    """Some layers with weights like trained ones."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(8, 96, 5), torch.nn.PReLU(), torch.nn.Conv1d(96, 96, 3)
    )
    for parameter in model.parameters():
        values = torch.distributions.Laplace(0.0, 0.1).sample(parameter.shape)
        parameter.data.copy_(values)
    return model


@pytest.mark.parametrize("bits", [1, 1.6, 2, 4, 8])
@pytest.mark.parametrize("rows", [None, 32])
def test_a_file_is_the_model_and_has_the_bytes_of_its_rate(
    tmp_path, bits, rows
):
    model = network()
    plan = quantize_(model, bits, codebook="entropy", rows=rows)
    assert bit_plan(model) == plan and plan.codebook == "entropy"
    path = save_packed(model, tmp_path)
    packed = read_model(tmp_path)
    assert packed.version == 5 and packed.header["codebook"] == "entropy"
    assert path.stat().st_size == packed_file_bytes(model)
    asked = packed_file_bytes(network(), plan)
    assert path.stat().st_size == pytest.approx(asked, rel=0.06, abs=200)
    sound = torch.randn(2, 8, 30)
    loaded = load_packed_(network(1), tmp_path)
    assert torch.equal(loaded(sound), model(sound))


def test_straight_through_keeps_the_step_and_checkpoints_the_codebook():
    model, other = network(), network()
    for each in (model, other):
        quantize_(each, 2, codebook="entropy", estimator=StraightThrough)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 8, 30)).square().mean().backward()
    optimizer.step()
    other.load_state_dict(model.state_dict())
    sound = torch.randn(2, 8, 30)
    assert torch.equal(other(sound), model(sound))
    midtread = network()
    quantize_(midtread, 2)
    with pytest.raises(ValueError, match="another plan.*entropy"):
        from speechbrain_mpq.training.checkpoints import guard_loading

        guard_loading(midtread)
        midtread.load_state_dict(model.state_dict())


@pytest.mark.parametrize("estimator", [LearnedStep, LogStep, ADMM])
def test_estimators_that_move_scales_are_refused(estimator):
    model = network()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="StraightThrough"):
        quantize_(model, 2, codebook="entropy", estimator=estimator)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_one_scale_a_tensor():
    with pytest.raises(ValueError, match="granularity"):
        Scheme("channel", "entropy")
