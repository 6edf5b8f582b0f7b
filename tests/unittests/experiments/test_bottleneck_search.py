"""Search for bottlenecks: known answers, interruption, files, bad input."""

import json
from collections import Counter

import pytest
import torch

from speechbrain_mpq.experiments.bottleneck_search import (
    BottleneckSearch,
    use_batch_statistics,
)
from speechbrain_mpq.lobes.models.tdnnf import TDNNF, read_bottlenecks

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
