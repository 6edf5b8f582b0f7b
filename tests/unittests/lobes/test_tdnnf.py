"""TDNN-F: sizes, semi-orthogonality, context, and that it learns."""

from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.decoders.chain_graphs import (
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.lobes.models.tdnnf import (
    TDNNF,
    ContinuousDropout,
    DropoutSchedule,
    TDNNFLayer,
    orthogonality_error,
    read_bottlenecks,
    semi_orthogonal_step,
)
from speechbrain_mpq.nnet.lf_mmi import LFMMILoss

SWITCHBOARD = "recipes/Switchboard/ASR/TDNNF/hparams/models/tdnnf.yaml"
SEARCHED = [80, 100, 80, 25, 80, 80, 80, 50, 80, 50, 25, 100, 160, 160]


def small(**options):
    torch.manual_seed(0)
    options = {
        "size": 24,
        "bottlenecks": [6] * 5,
        "strides": [1, 1, 0, 3, 3],
        "prefinal": 8,
    } | options
    return TDNNF(5, 6, **options)


@pytest.mark.parametrize(
    "bottlenecks, million, exact",
    [([160] * 14, 18.6, 18_751_248), (SEARCHED, 12.4, 12_469_008)],
)
def test_sizes_of_the_paper(bottlenecks, million, exact):
    path = Path(__file__).parents[3] / SWITCHBOARD
    with open(path, encoding="utf-8") as fin:
        model = load_hyperpyyaml(fin, {"bottlenecks": bottlenecks})["model"]
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == exact
    assert parameters / 1e6 == pytest.approx(million, rel=0.01)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_steps_lead_to_semi_orthogonal(scale, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight *= 8**0.5 / weight.norm()  # rows of about one
    before = weight.norm()
    for _ in range(60):
        weight = semi_orthogonal_step(weight, scale)
    assert orthogonality_error(weight) < 1e-4
    if scale:
        assert weight.norm() ** 2 == pytest.approx(8, rel=1e-3)
    else:
        assert weight.norm() == pytest.approx(before.item(), rel=0.3)


def test_semi_orthogonal_stays():
    weight = 3 * torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))[0].T
    torch.testing.assert_close(semi_orthogonal_step(weight), weight)


def test_dropout_schedule():
    schedule = DropoutSchedule("0,0@0.20,0.5@0.50,0")
    assert schedule(0) == schedule(0.2) == schedule(1) == 0
    assert schedule(0.5) == 0.5
    assert DropoutSchedule("0.2")(0.7) == 0.2
    for wrong in ("0,1@x,0", "0,0.3,0", "0,0.3@0.5,0.1@0.4,0", ""):
        with pytest.raises(ValueError, match="dropout schedule"):
            DropoutSchedule(wrong)


def test_dropout_is_shared_over_time():
    torch.manual_seed(0)
    noisy = ContinuousDropout(0.25)(torch.ones(50, 20, 4))
    assert (noisy == noisy[:, :, :1]).all()
    assert noisy.min() >= 0.5 and noisy.max() <= 1.5
    assert noisy.mean() == pytest.approx(1, abs=0.05)
    assert noisy.std() > 0.2


def test_layer_sees_its_stride():
    layer = TDNNFLayer(4, 2, stride=3).eval()
    x = torch.zeros(1, 4, 30)
    x[:, :, 15] = 1
    changed = (layer(x) - layer(torch.zeros_like(x))).abs().sum(1)[0] > 1e-9
    frames = changed.nonzero().flatten() + 3
    assert set(frames.tolist()) <= {12, 15, 18}
    assert 15 in frames


def test_subsampled_layers_are_the_same_as_dilated_ones():
    fast = small(subsampling=1).eval()
    slow = small(subsampling=3).eval()
    slow.load_state_dict(fast.state_dict())
    for model in (fast, slow):
        torch.manual_seed(1)
        torch.nn.init.normal_(model.chain.output.weight)
    assert [layer.stride for layer in slow.layers] == [1, 1, 0, 1, 1]
    feats = torch.randn(2, 31, 5)
    torch.testing.assert_close(slow(feats), fast(feats)[:, ::3])


def test_padding_has_no_influence():
    model = small().eval()
    torch.nn.init.normal_(model.chain.output.weight)
    feats = torch.randn(2, 30, 5)
    alone = model(feats[1:, :21])
    feats[1, 21:] = 1e6
    together = model(feats, torch.tensor([1.0, 0.7]))
    torch.testing.assert_close(together[1, :7], alone[0])


def test_speaker_and_heads():
    model = small(speaker_size=3)
    feats, speaker = torch.randn(2, 10, 5), torch.randn(2, 3)
    outputs, xent = model(feats, speaker=speaker, heads=True)
    assert outputs.shape == xent.shape == (2, 4, 6)
    model = small(xent=False)
    with pytest.raises(ValueError, match="xent: True"):
        model(feats, heads=True)


def test_constrain_every_fourth_step():
    model = small()
    torch.nn.init.normal_(model.prefinal.weight)
    before = model.prefinal.weight.clone()
    for _ in range(3):
        model.constrain()
    assert torch.equal(model.prefinal.weight, before)
    model.constrain()
    assert not torch.equal(model.prefinal.weight, before)
    errors = [
        orthogonality_error(module.weight.flatten(1))
        for module in model.semi_orthogonal()
    ]
    assert len(errors) == 5 + 3
    for _ in range(400):
        model.constrain()
    for module in model.semi_orthogonal():
        assert orthogonality_error(module.weight.flatten(1)) < 1e-3


class Halved(torch.nn.Module):
    """Stands for a quantizer."""

    def forward(self, weight):
        return weight / 2


def test_constrain_reaches_the_weights_below_a_quantizer():
    model = small()
    torch.nn.init.normal_(model.prefinal.weight)
    torch.nn.utils.parametrize.register_parametrization(
        model.prefinal, "weight", Halved()
    )
    for _ in range(400):
        model.constrain()
    original = model.prefinal.parametrizations.weight.original
    assert orthogonality_error(original.flatten(1)) < 1e-3


def test_wrong_sizes():
    with pytest.raises(ValueError, match="4 bottlenecks and 5 strides"):
        small(bottlenecks=[6] * 4)
    with pytest.raises(ValueError, match="bottleneck 99 of a layer of 24"):
        small(bottlenecks=[99] * 5)


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"bottlenecks": [1.5]}', '{"bottlenecks": 3}', "{}"]
)
def test_file_without_bottlenecks(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.json has no list.*of a search"):
        read_bottlenecks(path)
    with pytest.raises(FileNotFoundError, match="the file of a search"):
        read_bottlenecks(tmp_path / "missing.json")


def test_learns_by_lf_mmi():
    """Phones that are told by one feature each; the loss goes down."""
    generator = torch.Generator().manual_seed(0)
    said = torch.randint(3, (4, 6), generator=generator).tolist()
    lattices = [phone_lattice([[phones]]) for phones in said]
    ngram = estimate_ngram(lattices, phones=3)
    numerators = [numerator_graph(lattice, ngram) for lattice in lattices]
    feats = torch.randn(4, 6 * 9, 5, generator=generator)
    for row, phones in enumerate(said):
        feats[
            row, torch.arange(54), torch.tensor(phones).repeat_interleave(9)
        ] += 5
    model = small()
    loss = LFMMILoss(denominator_graph(ngram), xent=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    for _ in range(25):
        outputs, xent = model(feats, heads=True)
        value = loss(outputs, numerators, torch.ones(4), xent)
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        model.constrain()
    assert values[-1] < 0.3 * values[0]
