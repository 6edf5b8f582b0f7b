"""Architecture search: by hand, known answers, interruption, controls."""

import pytest
import torch

from speechbrain_mpq.allocation.architecture_search import (
    ArchitectureSearch,
    ArchitectureWeights,
    annealed,
    entropy,
    expected_cost,
    random_architectures,
)

COSTS = torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])


def test_draws_are_gumbel_and_stay_until_the_next():
    choice = ArchitectureWeights(2)
    choice.logits.data.copy_(torch.tensor([1.0, 0.0]))
    choice.temperature.fill_(0.01)  # nearly one-hot
    generator = torch.Generator().manual_seed(3)
    picked = []
    for _ in range(3000):
        choice.draw(generator)
        first = choice.weights()[0].item()
        assert choice.weights()[0].item() == first
        picked.append(first)
    # The Gumbel-max trick: candidate 0 wins with its softmax probability.
    assert sum(picked) / 3000 == pytest.approx(0.731, abs=0.03)


def test_entropy_is_zero_when_decided():
    assert entropy(torch.eye(3)) == 0
    assert entropy(torch.full((2, 8), 1 / 8)) == pytest.approx(3)


def test_cost_is_the_mean_over_architectures():
    weights = torch.rand(2, 3).softmax(1)
    expected = 0.0
    for i, first in enumerate(weights[0]):
        for j, second in enumerate(weights[1]):
            cost = COSTS[0, i] + COSTS[1, j]
            expected += (first * second * cost).item()
    assert expected_cost(weights, COSTS).item() == pytest.approx(expected)


def test_temperatures():
    fall = annealed(1, 0.03, 50)
    assert (fall[0], fall[-1]) == (1, pytest.approx(0.03))
    ratios = [b / a for a, b in zip(fall, fall[1:])]
    assert ratios == pytest.approx([ratios[0]] * 49)
    for wrong in ((1, 0), (0, 1), (1, -0.03)):
        with pytest.raises(ValueError, match="temperature must be positive"):
            annealed(*wrong, 3)


def make(penalty=0.0, epochs=20, **options):
    """A search over two choices, and the loss of not being at (2, 0)."""
    choices = [ArchitectureWeights(3) for _ in range(2)]
    search = ArchitectureSearch(
        choices,
        lambda weights: penalty * expected_cost(weights, COSTS),
        temperatures=annealed(1, 0.03, 4 * epochs),
        **{"lr": 2.0, "gumbel": True} | options,
    )

    def loss(scale):
        first, second = (choice.weights() for choice in choices)
        return scale * (1 - first[2]) + scale * (1 - second[0]), 1

    return search, loss


@pytest.mark.parametrize("gumbel", [False, True])
def test_finds_what_is_best(gumbel):
    search, loss = make(gumbel=gumbel)
    for _ in range(20):
        summary = search.epoch([1.0] * 4, loss)
    assert search.weights().argmax(1).tolist() == [2, 0]
    assert summary["loss"] < search.history[0]["loss"]
    assert summary["entropy"] < search.history[0]["entropy"]


def test_penalty_outweighs_the_loss():
    search, loss = make(penalty=2.0)
    for _ in range(20):
        search.epoch([1.0] * 4, loss)
    assert search.weights().argmax(1).tolist() == [0, 0]


def test_interrupted_search_comes_to_the_same():
    whole, loss = make()
    for _ in range(5):
        whole.epoch([1.0, 0.5, 2.0, 1.0], loss)
    first, loss = make()
    for _ in range(2):
        first.epoch([1.0, 0.5, 2.0, 1.0], loss)
    second, loss = make()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.epoch([1.0, 0.5, 2.0, 1.0], loss)
    assert torch.equal(second.weights(), whole.weights())
    assert second.history == whole.history


def test_random_architectures_cost_the_same():
    costs = torch.arange(1, 9).repeat(6, 1) * torch.arange(1, 7)[:, None]
    drawn = random_architectures(costs, 100, 5, seed=1, tolerance=0.02)
    assert len(set(map(tuple, drawn))) == 5
    for choice in drawn:
        assert abs(costs[range(6), choice].sum() - 100) <= 2
    assert drawn == random_architectures(costs, 100, 5, seed=1, tolerance=0.02)
    assert drawn != random_architectures(costs, 100, 5, seed=2, tolerance=0.02)
    with pytest.raises(ValueError, match="1 of .*widen the tolerance"):
        random_architectures(costs, 21, 2)
