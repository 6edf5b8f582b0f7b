"""Search for bottlenecks: known answers, interruption, files, bad input."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.experiments.bottleneck_search import (
    BottleneckSearch,
    choose,
    layer_parameters,
    mix,
    parameter_costs,
    supernet_,
    uniform_bottleneck,
    use_batch_statistics,
)
from speechbrain_mpq.lobes.models.tdnnf import (
    TDNNF,
    orthogonality_error,
    read_bottlenecks,
)

CANDIDATES = [2, 3, 4, 5, 6, 7, 8, 9]
BEST = [4, 7, 0, 2, 5, 3]


def network(bottlenecks=(4,) * 6):
    return TDNNF(5, 6, 16, bottlenecks, [1, 0, 3, 3, 3, 3], prefinal=4)


def make(**options):
    """A search, and a supernet for it."""
    options = {"epochs": 12, "lr": 3.0, "seed": 1} | options
    search = BottleneckSearch(CANDIDATES, **options)
    torch.manual_seed(0)
    model = network()
    search.prepare(model)
    return search, model


def run(search, model, folder, interrupt=None):
    """Run it with a loss that is least for BEST."""
    calls = []

    def loss(feats):
        calls.append(feats)
        if len(calls) == interrupt:
            raise KeyboardInterrupt
        model(feats)
        kept = [
            layer.mixture()[best] for layer, best in zip(model.layers, BEST)
        ]
        return feats.mean() - sum(kept)

    def batches(epoch):
        return [torch.full((2, 9, 5), float(epoch))] * 4

    return search.run(model, batches, loss, folder, progress=False)


def test_finds_what_is_best(tmp_path):
    search, model = make(penalties=[0.0])
    found = run(search, model, tmp_path)
    assert found == [[CANDIDATES[index] for index in BEST]]
    path = tmp_path / "searched_0.0.json"
    assert read_bottlenecks(path) == read_bottlenecks(str(path)) == found[0]


def test_penalty_makes_it_small(tmp_path):
    search, model = make(penalties=[0.5, 50.0])
    larger, smallest = run(search, model, tmp_path)
    assert smallest == [2] * 6
    assert sum(larger) > sum(smallest)


def test_files_have_controls_of_the_same_size(tmp_path):
    search, model = make(penalties=[0.0], controls=4)
    run(search, model, tmp_path)

    def parameters(bottlenecks):
        model = network(bottlenecks).without_xent()
        return sum(p.numel() for p in model.parameters())

    content = json.loads((tmp_path / "searched_0.0.json").read_text())
    count = parameters(content["bottlenecks"])
    assert content["parameters"] == count
    assert len(content["history"]) == 12
    assert torch.tensor(content["weights"]).argmax(1).tolist() == BEST
    uniform = read_bottlenecks(tmp_path / "uniform_0.0.json")
    assert len(set(uniform)) == 1
    nearby = [abs(parameters([n] * 6) - count) for n in range(1, 17)]
    assert abs(parameters(uniform) - count) == min(nearby)
    for i in range(1, 5):
        drawn = read_bottlenecks(tmp_path / f"random_0.0_{i}.json")
        assert set(drawn) <= set(CANDIDATES)
        assert abs(parameters(drawn) - count) <= 0.01 * count


def test_interrupted_search_goes_on_to_the_same_result(tmp_path):
    run(*make(penalties=[0.1]), tmp_path / "whole")
    search, model = make(penalties=[0.1])
    with pytest.raises(KeyboardInterrupt):
        run(search, model, tmp_path / "resumed", interrupt=4 * 5 + 2)
    assert not (tmp_path / "resumed/searched_0.1.json").exists()
    search, model = make(penalties=[0.1])
    with pytest.raises(KeyboardInterrupt):  # goes on behind the fifth epoch
        run(search, model, tmp_path / "resumed", interrupt=4 * 7)
    run(*make(penalties=[0.1]), tmp_path / "resumed")
    first, second = (
        (tmp_path / name / "searched_0.1.json").read_text()
        for name in ("whole", "resumed")
    )
    assert first == second


def test_supernet_is_left_as_it_was(tmp_path):
    search, model = make(penalties=[0.1], epochs=2)
    model.xent.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    run(search, model.eval(), tmp_path)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training and all(not m.training for m in model.modules())
    assert [layer.chosen for layer in model.layers] == [7] * 6
    assert all(layer.mixture is None for layer in model.layers)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_of_the_batch(training):
    """A norm's output has them, and its running ones stay."""
    _, model = make()
    model.train(training)
    use_batch_statistics(model)
    x = torch.randn(2, 16, 30) + 5
    assert model.first_norm(x).mean().item() == pytest.approx(0, abs=1e-5)
    assert not model.first_norm.running_mean.any()
    use_batch_statistics(model, False)
    assert model.first_norm.training == training
    mean = model.first_norm(x).mean().item()
    assert mean == pytest.approx(0 if training else 5, abs=0.1)
    assert model.first_norm.running_mean.any().item() == training


def test_candidates_are_drawn_evenly():
    search, model = make()
    counts = Counter()
    for step in range(2000):
        search.draw(model, step)
        counts.update((i, la.chosen) for i, la in enumerate(model.layers))
    assert len(counts) == 6 * 8
    assert min(counts.values()) > 200 and max(counts.values()) < 300
    search.draw(model, 7)
    first = [layer.chosen for layer in model.layers]
    search.draw(model, 8)
    assert [layer.chosen for layer in model.layers] != first
    search.draw(model, 7)
    assert [layer.chosen for layer in model.layers] == first


def test_split():
    keys = [f"u{i}" for i in range(100)]
    trained, held_out = BottleneckSearch(CANDIDATES).split(reversed(keys))
    assert len(held_out) == 5
    assert sorted(trained + held_out) == sorted(keys)
    assert BottleneckSearch(CANDIDATES).split(keys) == (trained, held_out)
    assert BottleneckSearch(CANDIDATES, seed=1).split(keys)[1] != held_out
    with pytest.raises(ValueError, match="held_out 0.05 of 4 utterances"):
        BottleneckSearch(CANDIDATES).split(keys[:4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": (1, 0)}, "temperature must be positive"),
        ({"temperature": (-1, 0.03)}, "temperature must be positive"),
        ({"candidates": [4, 2]}, "whole numbers that increase"),
        ({"penalties": []}, "give one or more"),
        ({"penalties": [-0.1]}, "none below 0"),
        ({"held_out": 0}, "give a share"),
        ({"held_out": 1.5}, "give a share"),
        ({"epochs": 0}, "give 1 or more"),
    ],
)
def test_settings_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckSearch(**{"candidates": CANDIDATES} | options)


def test_candidate_that_is_larger_than_the_layer():
    search = BottleneckSearch([4, 17])
    with pytest.raises(ValueError, match="17 is more than the 16 dimensions"):
        search.prepare(network())


def test_state_of_another_search(tmp_path):
    run(*make(penalties=[0.1], epochs=2), tmp_path)
    with pytest.raises(ValueError, match="is of another search"):
        run(*make(penalties=[0.1], epochs=3), tmp_path)


SMALL_CANDIDATES = [2, 4, 6, 9]
CHOICE = [0, 3, 1, 2, 1]
STRIDES = [1, 1, 0, 3, 3]


def small(bottlenecks, **options):
    options = {"size": 24, "strides": STRIDES, "prefinal": 8} | options
    return TDNNF(5, 6, bottlenecks=bottlenecks, **options)


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    model = supernet_(small([6] * 5), SMALL_CANDIDATES)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    for head in (model.chain, model.xent):
        torch.nn.init.normal_(head.output.weight)
    return model


def derived(supernet, choice):
    """The network of a choice, by slices of the shared matrices."""
    bottlenecks = [SMALL_CANDIDATES[index] for index in choice]
    state = supernet.state_dict()
    for i, n in enumerate(bottlenecks):
        linear = state[f"layers.{i}.linear.weight"]
        affine = state[f"layers.{i}.affine.weight"]
        state[f"layers.{i}.linear.weight"] = linear[:n]
        state[f"layers.{i}.affine.weight"] = affine[:, :n]
    model = small(bottlenecks)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_one_hot_is_the_derived_network_bit_for_bit(supernet, training):
    model = derived(supernet, CHOICE).train(training)
    supernet.train(training)
    choose(supernet, CHOICE)
    feats = torch.randn(3, 31, 5)
    outputs = [net(feats, heads=True) for net in (supernet, model)]
    for mine, expected in zip(*outputs):
        assert torch.equal(mine, expected)
    for mine, _ in outputs:
        mine.square().sum().backward()
    for i, layer in enumerate(model.layers):
        n = SMALL_CANDIDATES[CHOICE[i]]
        gradient = supernet.layers[i].affine.weight.grad
        assert torch.equal(gradient[:, :n], layer.affine.weight.grad)
        assert not gradient[:, n:].any()


def test_mixture_is_the_sum_over_candidates(supernet):
    """One layer against four layers with slices of its matrices."""
    layer = supernet.layers[1].eval()
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3])
    x = torch.randn(2, 24, 20)
    expected = 0
    for index, weight in enumerate(weights):
        one = derived(supernet, [index] * 5).layers[1].eval()
        one.bypass = 0
        expected = expected + weight * one(x)
    expected = expected + layer.bypass * x[:, :, 1:-1]
    layer.mixture = lambda: weights
    torch.testing.assert_close(layer(x), expected)


def test_mixture_of_one_is_the_choice(supernet):
    supernet.eval()
    feats = torch.randn(2, 31, 5)
    choose(supernet, CHOICE)
    expected = supernet(feats)
    one_hot = torch.eye(len(SMALL_CANDIDATES))
    mix(supernet, [one_hot[index].clone for index in CHOICE])
    torch.testing.assert_close(supernet(feats), expected)


def test_constraint_of_the_large_matrix_is_that_of_every_candidate(supernet):
    for _ in range(400):
        supernet.constrain()
    for layer, n in itertools.product(supernet.layers, SMALL_CANDIDATES):
        assert orthogonality_error(layer.linear.weight[:n].flatten(1)) < 1e-3
    torch.nn.init.normal_(supernet.layers[0].linear.weight)
    error = orthogonality_error(supernet.layers[0].linear.weight.flatten(1))
    for _ in range(400):
        supernet.constrain()
    matrix = supernet.layers[0].linear.weight.flatten(1)
    assert orthogonality_error(matrix) < 1e-3 < error


def test_costs_are_those_of_built_networks(supernet):
    costs, others = parameter_costs(supernet)
    for choice in ([0] * 5, [3] * 5, CHOICE):
        network = small([SMALL_CANDIDATES[i] for i in choice]).without_xent()
        counted = sum(p.numel() for p in network.parameters())
        assert others + sum(costs[range(5), choice]).item() == counted
    layers = small([4] * 5).layers
    for layer, stride in zip(layers, STRIDES):
        counted = sum(p.numel() for p in layer.parameters())
        assert counted == layer_parameters(24, 4, stride)


def test_costs_of_the_paper():
    """PipeGumbel of its table, by the indices of eight candidates."""
    path = "recipes/Switchboard/ASR/TDNNF/hparams/models/tdnnf.yaml"
    with open(Path(__file__).parents[3] / path, encoding="utf-8") as fin:
        model = load_hyperpyyaml(fin, {"bottlenecks": [160] * 14})["model"]
    supernet_(model, [25, 50, 80, 100, 120, 160, 200, 240])
    costs, others = parameter_costs(model)
    others += sum(p.numel() for p in model.xent.parameters())
    choice = [2, 3, 2, 0, 2, 2, 2, 1, 2, 1, 0, 3, 5, 5]
    assert others + costs[range(14), choice].sum() == 12_469_008
    assert others + costs[:, 5].sum() == 18_751_248


def test_uniform_network_of_the_same_size(supernet):
    costs, _ = parameter_costs(supernet)
    assert uniform_bottleneck(supernet, int(costs[:, 2].sum())) == 6
    assert uniform_bottleneck(supernet, int(costs[:, 2].sum()) + 3) == 6


@pytest.mark.parametrize(
    "candidates, message",
    [
        ([4, 2, 6], "whole numbers that increase"),
        ([4, 4], "whole numbers that increase"),
        ([4], "two bottlenecks or more"),
        ([], "two bottlenecks or more"),
        ([0, 4], "whole numbers"),
        ([2.5, 4], "whole numbers"),
        ([4, 30], "candidate 30 is more than the 24 dimensions"),
    ],
)
def test_candidates_that_are_none(candidates, message):
    with pytest.raises(ValueError, match=message):
        supernet_(small([4] * 5), candidates)
