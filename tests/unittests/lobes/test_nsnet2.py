"""nsNet2: sizes, exits, the loss, and streaming."""

import pytest
import torch

from speechbrain_mpq.lobes.models.exit_rules import (
    EnhancerStream,
    FixedExit,
    MovingMask,
    RandomExit,
    UncertainMask,
    exit_rule,
    frame_rule,
    threshold_for,
)
from speechbrain_mpq.lobes.models.nsnet2 import (
    EarlyExitNsNet2,
    NsNet2,
    compressed_loss,
    istft,
    log_power,
    stft,
    suppression_network,
)


def parameters(network):
    """How many values it learns."""
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def network():
    """A small one, in float64."""
    torch.manual_seed(0)
    return EarlyExitNsNet2(side=8).double().eval()


def test_published_sizes():
    # 2.78 M; 1.62 M (6.48 MB) split; 1.88 M (7.54 MB) concatenated
    assert parameters(NsNet2()) == 2_783_657
    assert parameters(EarlyExitNsNet2(concat=False)) == 1_621_152
    assert parameters(EarlyExitNsNet2()) == 1_884_320


def test_what_an_hparams_file_asks_for():
    options = {"widths": (300, 300, 300, 400, 400), "exits": [0, 5]}
    assert parameters(suppression_network(False, **options)) > 10**6
    assert suppression_network(side=8, **options).exits == (0, 5)


def test_macs():
    full = NsNet2(exits=range(6))
    assert full.macs() == 2_777_000
    assert full.macs(1) == 257 * 400 + 3 * 400 * 800
    split = EarlyExitNsNet2(exits=range(6))
    # an exit needs no carrying part of its own layer
    assert split.macs(0) == 257 * 257
    assert split.macs(1) == 257 * 385 + 3 * 257 * (385 + 257)
    counts = [split.macs(exit) for exit in split.exits]
    assert counts == sorted(counts)
    with pytest.raises(ValueError, match=r"no exits \[2\]"):
        EarlyExitNsNet2().macs(2)


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("exits", [range(6), (0, 1, 3, 5), (1,)])
def test_exits(exits, concat):
    torch.manual_seed(0)
    network = EarlyExitNsNet2(bins=9, side=4, concat=concat, exits=exits)
    masks = network(torch.randn(2, 7, 9))
    assert list(masks) == list(exits)
    for mask in masks.values():
        assert mask.shape == (2, 7, 9)
        assert 0 <= mask.min() and mask.max() <= 1
    only = network(torch.randn(2, 7, 9), exits=exits[:1])
    assert list(only) == list(exits[:1])


def test_joint_training_reaches_every_layer():
    torch.manual_seed(0)
    network = EarlyExitNsNet2(side=8)
    spectrum = stft(torch.randn(2, 4000))
    masks = network(log_power(spectrum))
    target = torch.roll(spectrum, 1, 0)
    loss = sum(
        compressed_loss(mask * spectrum, target).mean()
        for mask in masks.values()
    )
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_layers_that_an_exit_needs(network):
    features = torch.randn(1, 5, 257, dtype=torch.double)
    network(features, exits=(1,))[1].sum().backward()
    needed = {id(p) for part in network.parts_of(1) for p in part.parameters()}
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in needed), name


@pytest.mark.parametrize("samples", [1, 255, 256, 257, 1000, 1024])
def test_perfect_reconstruction(samples):
    waveform = torch.randn(2, samples, dtype=torch.double)
    assert torch.allclose(istft(stft(waveform), samples), waveform)


@pytest.mark.parametrize("exit", [0, 1, 3, 5])
@pytest.mark.parametrize("concat", [False, True])
def test_stream_equals_the_whole_file(exit, concat):
    torch.manual_seed(0)
    network = EarlyExitNsNet2(side=8, concat=concat).double().eval()
    waveform = torch.randn(3001, dtype=torch.double)
    stream = EnhancerStream(network, FixedExit(exit))
    with torch.no_grad():
        whole = network.enhance(waveform[None], exit)[0]
    for sizes in ([3001], [1, 700, 0, 300, 2000], [256] * 11 + [185]):
        blocks = waveform.split(sizes)
        parts = [stream.feed(block) for block in blocks]
        parts.append(stream.flush())
        assert torch.allclose(torch.cat(parts), whole, atol=1e-10)
        assert stream.exits == [exit] * 13
        assert stream.mean_macs() == network.macs(exit)


def test_stream_of_the_baseline_in_float32():
    torch.manual_seed(0)
    network = NsNet2().eval()
    waveform = 0.1 * torch.randn(2000)
    stream = EnhancerStream(network)
    parts = torch.cat([stream.feed(waveform), stream.flush()])
    with torch.no_grad():
        whole = network.enhance(waveform[None])[0]
    assert torch.allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_short_streams(samples, network):
    stream = EnhancerStream(network)
    waveform = torch.randn(samples, dtype=torch.double)
    parts = torch.cat([stream.feed(waveform), stream.flush().double()])
    assert parts.shape == (samples,)


def test_rules_stop_where_they_say(network):
    torch.manual_seed(0)
    waveform = torch.randn(8000, dtype=torch.double)

    def exits(rule):
        stream = EnhancerStream(network, rule)
        stream.feed(waveform)
        return stream.exits

    assert set(exits(UncertainMask(0))) == {5}
    assert set(exits(UncertainMask(1e9))) == {0}
    assert set(exits(UncertainMask(1e9, first=1))) == {1}
    mixed = exits(RandomExit(1, 5, share=0.5))
    assert set(mixed) == {1, 5}
    assert mixed == exits(RandomExit(1, 5, share=0.5))


@pytest.mark.parametrize("kind", [MovingMask, UncertainMask])
def test_threshold_keeps_to_a_budget(network, kind):
    torch.manual_seed(0)
    waveforms = list(torch.randn(2, 4000, dtype=torch.double))
    budget = (network.macs(1) + network.macs(3)) / 2
    threshold = threshold_for(network, waveforms, budget, kind)

    def spent(threshold):
        rule = frame_rule(network, threshold, kind)
        streams = [EnhancerStream(network, rule) for _ in waveforms]
        for stream, waveform in zip(streams, waveforms):
            stream.feed(waveform)
            stream.flush()
        return sum(stream.mean_macs() for stream in streams) / len(streams)

    assert network.macs(0) < spent(threshold) <= budget
    assert spent(0.99 * threshold) > budget  # no more than it has to
    with pytest.raises(ValueError, match="no threshold of .* keeps to 10 "):
        threshold_for(network, waveforms, 10, kind)


def test_rules_that_are_asked_for():
    network = EarlyExitNsNet2(side=8, thresholds=[[5e5, 0.4], [7e5, 0.2]])
    assert exit_rule(network).exit == 5
    assert exit_rule(network, 3).exit == 3
    assert exit_rule(network, macs=network.macs(1)).exit == 1
    assert exit_rule(network, "auto").threshold == 0.4  # half of 1.09 M
    assert exit_rule(network, "auto", 8e5).threshold == 0.2
    assert exit_rule(network, "auto", 4.8e5).exit == 1
    assert exit_rule(network, "auto", 1e9).exit == 5
    with pytest.raises(ValueError, match="give an exit, or a budget"):
        exit_rule(network, 3, 8e5)
    network.deepest = 3
    assert exit_rule(network, "auto", 1e9).exit == 3
    assert exit_rule(network, "auto", 8e5).last == 3
    with pytest.raises(ValueError, match=r"no exits \[2\]"):
        EarlyExitNsNet2(side=8, deepest=2)
    with pytest.raises(ValueError, match="no thresholds"):
        exit_rule(EarlyExitNsNet2(side=8), "auto")
    for bad in ([[7e5, 0.2], [5e5, 0.4]], [[5e5, 0.2], [7e5, 0.4]]):
        with pytest.raises(ValueError, match="ascending"):
            EarlyExitNsNet2(side=8, thresholds=bad)


def test_baseline_is_the_published_network():
    """As its weights are used by others: no activation behind layer 0."""
    torch.manual_seed(0)
    network = NsNet2(bins=5, widths=(6, 6, 6, 7, 7)).double()
    x = torch.randn(1, 4, 5, dtype=torch.double)
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def dense(index, y):
        layer = f"layers.{index}"
        return weights[f"{layer}.weight"] @ y + weights[f"{layer}.bias"]

    def gru(index, y, h):
        def gates(side, v):
            weight = weights[f"layers.{index}.weight_{side}_l0"]
            return (
                weight @ v + weights[f"layers.{index}.bias_{side}_l0"]
            ).split(6)

        (r, z, n), (r_h, z_h, n_h) = gates("ih", y), gates("hh", h)
        r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
        return (1 - z) * (n + r * n_h).tanh() + z * h

    states = {1: torch.zeros(6).double(), 2: torch.zeros(6).double()}
    for frame, found in zip(x[0], network(x)[5][0]):
        y = dense(0, frame)
        for index in states:
            y = states[index] = gru(index, y, states[index])
        y = dense(4, dense(3, y).relu()).relu()
        assert torch.allclose(dense(5, y).sigmoid(), found)


def test_a_frame_that_exits_early_leaves_deeper_states(network):
    state, features = {}, torch.randn(1, 257, dtype=torch.double)
    network.step(features, state, lambda exit, mask: False)
    kept = {key: value for key, value in state.items() if key[1] > 1}
    network.step(features, state, lambda exit, mask: exit == 1)
    assert all(state[key] is value for key, value in kept.items())


def test_bad_input(network):
    with pytest.raises(ValueError, match="NaN"):
        network.enhance(torch.full((1, 900), torch.nan).double())
    with pytest.raises(ValueError, match=r"\[batch, samples\]"):
        network.enhance(torch.ones(900).double())
    with pytest.raises(ValueError, match="are not layers 0 to 5"):
        EarlyExitNsNet2(exits=(0, 7))
    with pytest.raises(ValueError, match="too narrow for an exit"):
        NsNet2(widths=(100, 400, 400, 600, 600), exits=(0, 5))
    with pytest.raises(ValueError, match="no exits"):
        network.enhance(torch.ones(1, 900).double(), exit=2)
    silent = network.enhance(torch.zeros(1, 900).double())
    assert not silent.any()


def test_rules_go_no_deeper_than_the_best_exit():
    network = EarlyExitNsNet2(side=8, deepest=0)
    rule = frame_rule(network, 0.0)  # never content
    assert (rule.first, rule.last) == (0, 0)


def test_loss_is_the_formula():
    torch.manual_seed(0)
    target, estimate = torch.randn(2, 3, 6, 257, dtype=torch.cdouble)
    level = target.abs().square().mean((1, 2), keepdim=True).sqrt()
    s, e = target / level, estimate / level
    s_c, e_c = s.abs() ** 0.3, e.abs() ** 0.3
    phases = (s_c * s / s.abs() - e_c * e / e.abs()).abs().square()
    expected = 0.3 * phases + 0.7 * (s_c - e_c).square()
    found = compressed_loss(estimate, target)
    assert torch.allclose(found, expected.mean((1, 2)), rtol=1e-3)
    louder = compressed_loss(10 * estimate, 10 * target)
    assert torch.allclose(found, louder)
    silent = torch.zeros_like(target)
    for pair in ((silent, silent), (estimate, silent), (silent, target)):
        assert compressed_loss(*pair).isfinite().all()
