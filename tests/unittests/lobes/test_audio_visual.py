"""The separator with lips: structure, equations, missing video, bits."""

import copy

import pytest
import torch
from torch import nn

from speechbrain_mpq import (
    KLScores,
    allocate_bits,
    coverage,
    load_packed_,
    quantize_,
    save_packed,
)
from speechbrain_mpq.lobes.models.audio_visual import (
    FactorisedAttention,
    ResNet18FrontEnd,
    VisualStream,
    begin_with_audio_,
    over_places,
)
from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import equalize_inputs_, fold_norms_
from speechbrain_mpq.quantization.gptq import PostTraining
from speechbrain_mpq.training.rounding import round_calibrated_

LIGHT = {
    "front_end": "light",
    "height": 12,
    "width": 16,
    "channels": 8,
    "hidden": 12,
    "blocks": 2,
    "filters": 2,
    "residual": True,
}


SIZE = {"channels": 8, "hidden": 12, "blocks": 2, "layers": 2}
PAIR = [[8, 1]]


def build(visual=LIGHT):
    """A tiny separator whose norms have seen something."""
    torch.manual_seed(0)
    separator = Separator(SpatialFeatures(PAIR), **SIZE, visual=visual)
    lips = None if visual is None else torch.rand(2, 25, 12, 16)
    separator(torch.randn(2, 16000, 2), torch.tensor([50.0, 90]), lips)
    return separator.eval()


@pytest.fixture(scope="module")
def separator():
    return build()


@pytest.fixture
def given():
    torch.manual_seed(1)
    return (
        torch.randn(2, 16000, 2),
        torch.tensor([30.0, 120.0]),
        torch.rand(2, 25, 12, 16),
    )


def test_audio_only_is_a_chain_of_the_papers_size():
    separator = build_separator("hparams/models/separator_paper.yaml")
    assert type(separator.mask_net) is nn.Sequential
    assert separator.lips_size is None
    # with running statistics: see tests of the separator
    parameters = sum(p.numel() for p in separator.parameters())
    statistics = 2 * 64 * 512  # mean and variance of 64 norms
    assert (parameters + statistics) * 4 / 2**20 == pytest.approx(
        35.2, abs=0.05
    )


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_model_files_build_and_switch_the_lips_off(name):
    path = f"hparams/models/separator_av_{name}.yaml"
    separator = build_separator(path)
    without = build_separator(path, visual=None)
    plain = build_separator(f"hparams/models/separator_{name}.yaml")
    assert list(without.state_dict()) == list(plain.state_dict())
    audio = {
        key: value.shape
        for key, value in separator.state_dict().items()
        if key.split(".")[1] not in ("visual", "fusion")
    }
    assert audio == {k: v.shape for k, v in plain.state_dict().items()}


def test_papers_visual_side():
    separator = build_separator("hparams/models/separator_av_paper.yaml")
    visual = separator.mask_net.visual
    assert visual.size == (112, 112) and len(visual.tcn) == 5
    convs = [
        layer
        for layer in visual.front_end.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    ]
    assert len(convs) == 16  # ResNet-18: these, the first and the last layer


def test_resnet_shapes_and_norms():
    torch.manual_seed(0)
    front_end = ResNet18FrontEnd(32, 32, channels=5, filters=2).eval()
    pictures = torch.randn(2, 1, 3, 32, 32)
    assert front_end(pictures).shape == (2, 5, 3)
    alone = front_end(pictures[:1])  # an item does not see its neighbours
    torch.testing.assert_close(alone, front_end(pictures)[:1])
    with pytest.raises(ValueError, match="32 x 32 or more"):
        ResNet18FrontEnd(24, 32, channels=5)


def test_flattened_norm_is_the_three_dimensional_one():
    torch.manual_seed(0)
    flat, volume = nn.BatchNorm1d(3), nn.BatchNorm3d(3)
    x = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(over_places(flat, x), volume(x))
    torch.testing.assert_close(flat.running_var, volume.running_var)


def test_lips_change_the_estimate_and_their_order_counts(separator, given):
    mixture, doa, lips = given
    estimate = separator(mixture, doa, lips)
    assert estimate.shape == (2, 16000)
    assert not torch.allclose(estimate, separator(mixture, doa, lips.flip(0)))
    assert not torch.allclose(estimate, separator(mixture, doa, lips.flip(1)))


def test_no_video_is_a_video_of_zeros(separator, given):
    mixture, doa, lips = given
    without = separator(mixture, doa)
    zeros = separator(mixture, doa, torch.zeros_like(lips))
    torch.testing.assert_close(without, zeros)
    assert torch.isfinite(without).all()


def test_a_batch_may_mix_items_with_and_without_video(separator, given):
    mixture, doa, lips = given
    lips[1] = 0
    mixed = separator(mixture, doa, lips)
    seen = separator(mixture[:1], doa[:1], lips[:1])
    unseen = separator(mixture[1:], doa[1:])
    torch.testing.assert_close(mixed, torch.cat([seen, unseen]))


def test_missing_pictures_are_the_learned_embedding(separator, given):
    visual, lips = separator.mask_net.visual, given[2]
    lips[:, 5:9] = 0
    before = visual(lips)
    saved = visual.absent.data.clone()
    visual.absent.data += 1
    after = visual(lips)
    visual.absent.data.copy_(saved)
    receptive_field = 1 + 2  # visual ConvBlocks of dilation 1 and 2
    changed = (before != after).any(1)[0].nonzero().flatten()
    assert (
        changed.min() == 5 - receptive_field
        and changed.max() == 8 + receptive_field
    )


def test_both_targets_of_one_mixture(separator, given):
    mixture, _, lips = given
    doa = torch.tensor([[30.0, 120.0]])
    both = separator(mixture[:1], doa, lips[None])
    for i in range(2):
        alone = separator(mixture[:1], doa[:, i], lips[None, i])
        torch.testing.assert_close(both[:, i], alone, rtol=1e-3, atol=1e-5)


def test_bytes_and_floats_are_the_same_pictures(separator, given):
    mixture, doa, lips = given
    pixels = (lips * 255).round()
    as_bytes = separator(mixture, doa, pixels.to(torch.uint8))
    torch.testing.assert_close(as_bytes, separator(mixture, doa, pixels / 255))


@pytest.mark.parametrize(
    ("lips", "message"),
    [
        (torch.rand(2, 25, 16, 12), "12 x 16 pixels"),
        (torch.rand(25, 12, 16), "expected lips"),
        (torch.rand(1, 25, 12, 16), "expected lips"),
        (torch.rand(2, 1, 25, 12, 16), "expected lips"),
        (torch.rand(2, 30, 12, 16), "30.0 a second"),
        (torch.rand(2, 12, 12, 16), "12.0 a second"),
        (torch.full((2, 25, 12, 16), torch.nan), "NaN"),
        (255 * torch.rand(2, 25, 12, 16), "divide"),
    ],
)
def test_wrong_lips_are_refused(separator, given, lips, message):
    with pytest.raises(ValueError, match=message):
        separator(given[0], given[1], lips)


def test_lips_for_an_audio_only_separator_are_refused(given):
    with pytest.raises(ValueError, match="no lip stream"):
        build(visual=None)(*given)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="front_end must be one of"):
        VisualStream("vgg")
    with pytest.raises(ValueError, match="the network has 2"):
        build({**LIGHT, "after": 3})


def test_it_begins_with_the_weights_of_an_audio_only_network(given):
    audio = build(visual=None)
    fold_norms_(audio)
    separator = build()
    begin_with_audio_(separator.mask_net, audio.mask_net)
    separator.mask_net.fusion.views.weight.data.zero_()
    separator.mask_net.fusion.views.bias.data.zero_()
    torch.testing.assert_close(separator(*given), audio(*given[:2]))
    norms = [
        name
        for name, layer in separator.named_modules()
        if isinstance(layer, nn.BatchNorm1d)
    ]
    assert norms and all("visual" in name for name in norms)


def test_an_audio_only_network_of_another_size_is_refused():
    audio = Separator(SpatialFeatures(PAIR), **{**SIZE, "channels": 4})
    fold_norms_(audio)
    with pytest.raises(ValueError, match="another size"):
        begin_with_audio_(build().mask_net, audio.mask_net)


def test_folding_and_equalizing_change_nothing(given):
    separator = build()
    before = separator(*given)
    assert fold_norms_(separator) > 8
    torch.testing.assert_close(separator(*given), before, rtol=1e-3, atol=1e-4)
    equalize_inputs_(separator)
    assert next(iter(separator.mask_net.named_children()))[0] == "scale_in"
    torch.testing.assert_close(separator(*given), before, rtol=1e-3, atol=1e-4)


def test_bits_scores_rounding_and_packing_cover_the_lips(given, tmp_path):
    separator = build()
    fold_norms_(separator)
    plain = copy.deepcopy(separator)
    inputs, _ = separator.analyse(*given)
    scores = KLScores((2, 8))(
        separator.mask_net, inputs, prefix="mask_net", progress=False
    )
    plan = allocate_bits(scores, average_bits=4)
    quantize_(separator, plan, estimator=PostTraining)
    rounded = round_calibrated_(
        separator, "mask_net", inputs, dampings=(1.0,), progress=False
    )
    assert "fusion.views" in rounded and "visual.front_end.project" in rounded
    bits = {r["tensor"]: r["stored_bits"] for r in coverage(separator)}
    for name in (
        *("front_end.conv_3d.weight", "front_end.conv_1.weight", "absent"),
        "tcn.0.conv_1x1_in.weight",
    ):
        assert bits[f"mask_net.visual.{name}"] <= 8
    assert bits["mask_net.fusion.views.weight"] <= 8
    save_packed(separator, tmp_path)
    load_packed_(plain, tmp_path)
    assert torch.equal(plain(*given), separator(*given))


def test_gradients_reach_every_weight(given):
    separator = build().train()
    given[2][1, :5] = 0  # some pictures are missing
    separator(*given).square().mean().backward()
    without = [n for n, p in separator.named_parameters() if p.grad is None]
    assert not without
    assert separator.mask_net.visual.absent.grad.abs().sum() > 0


def test_published_form_against_a_slow_one():
    torch.manual_seed(0)
    fusion = FactorisedAttention(6, 4, factors=3)
    audio, visual = torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    views = fusion.views.weight.view(3, 6, 6)  # P_k
    choose = fusion.weights.weight[..., 0]  # P^V
    expected = torch.empty_like(audio)
    for b in range(2):
        for t in range(5):
            v = torch.softmax(choose @ visual[b, :, t], 0)
            total = sum(v[k] * (views[k] @ audio[b, :, t]) for k in range(3))
            expected[b, :, t] = torch.sigmoid(total)
    torch.testing.assert_close(fusion(audio, visual), expected)
    assert fusion.views.bias is None  # 256 x 256 matrices, nothing else


def test_residual_form_begins_near_the_audio():
    torch.manual_seed(0)
    fusion = FactorisedAttention(16, 8, factors=10, residual=True)
    audio, visual = torch.randn(2, 16, 50), torch.randn(2, 8, 50)
    change = fusion(audio, visual) - audio
    assert 0 < change.std() < 0.1 * audio.std()


def test_lips_alone_can_change_a_silent_frame():
    torch.manual_seed(0)
    fusion = FactorisedAttention(8, 4, factors=5, residual=True)
    silent = torch.zeros(1, 8, 1)
    one, other = torch.randn(2, 1, 4, 1)
    assert not torch.equal(fusion(silent, one), fusion(silent, other))
