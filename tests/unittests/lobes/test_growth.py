"""Separators that begin with a smaller one, or listen to other features."""

import numpy as np
import pytest
import torch

from speechbrain_mpq.lobes.models.growth import (
    channels_of,
    grow_,
    place_,
    refit,
    ridge_regression,
    shared_inputs,
)
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import ChannelAffine, fold_norms_
from speechbrain_mpq.quantization.quant_api import quantize_

SMALL = {"channels": 6, "hidden": 8, "blocks": 2, "layers": 2}
LARGE = {"channels": 9, "hidden": 13, "blocks": 4, "layers": 3}


def made(phase="steered", seed=0, pairs=((8, 1), (12, 4)), **size):
    torch.manual_seed(seed)
    features = SpatialFeatures(pairs, phase)
    return Separator(features, **{**SMALL, **size})


def trained(phase="steered", **size):
    """A separator with norms and slopes that are not the initial ones."""
    separator = made(phase, **size).eval()
    fold_norms_(separator)
    for module in separator.modules():
        if isinstance(module, ChannelAffine | torch.nn.PReLU):
            for parameter in module.parameters():
                parameter.data.uniform_(0.5, 1.5)
    return separator


@pytest.fixture
def scene():
    torch.manual_seed(1)
    return torch.randn(3, 4000, 4), torch.tensor([[20.0, 90.0]] * 3)


@pytest.mark.parametrize("size", [LARGE, SMALL, {**SMALL, "hidden": 9}])
def test_both_compute_the_same(scene, size):
    smaller, larger = trained(), made(seed=2, **size).eval()
    with torch.no_grad():
        assert not torch.allclose(larger(*scene), smaller(*scene), atol=0.1)
        grow_(larger, smaller, *scene)
        torch.testing.assert_close(
            larger(*scene), smaller(*scene), rtol=1e-4, atol=1e-4
        )
        other = torch.randn(1, 3000, 4), torch.tensor([150.0])
        torch.testing.assert_close(
            larger(*other), smaller(*other), rtol=1e-4, atol=1e-4
        )


def test_new_units_are_heard_from_and_learn(scene):
    smaller, larger = trained(), made(seed=2, **LARGE).eval()
    grow_(larger, smaller, *scene)
    silent = larger.mask_net.conv_out.weight[:, SMALL["channels"] :]
    assert not silent.any()
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        larger(*scene).square().mean().backward()
        optimizer.step()
    # After one step the outgoing weights are not zero, and so all learn
    assert silent.any()
    without = [n for n, p in larger.named_parameters() if not p.grad.any()]
    assert without == []


def test_new_hidden_units_have_zero_mean_and_unit_variance(scene):
    smaller, larger = trained(), made(seed=2, **LARGE).eval()
    grow_(larger, smaller, *scene)
    known = {"tcn_0_0": SMALL["hidden"], "tcn_1_0": 0}  # a new block
    for name, count in known.items():
        norm = larger.mask_net.get_submodule(name).norm_in
        outputs = []
        hook = norm.register_forward_hook(
            lambda module, given, output, kept=outputs: kept.append(output)
        )
        larger(*scene)
        hook.remove()
        deviation, mean = torch.std_mean(
            outputs[0][:, count:], (0, 2), correction=0
        )
        torch.testing.assert_close(
            deviation, torch.ones_like(deviation), rtol=0, atol=1e-3
        )
        assert mean.abs().max() < 1e-3


def test_inputs_are_found_by_what_they_are():
    steered = SpatialFeatures([(8, 1), (12, 4)], "steered")
    cosine = SpatialFeatures([(12, 4), (8, 1)], "cosine")
    index = shared_inputs(cosine, steered)
    assert steered.maps == [
        *("lps", "cosine 8-1", "cosine 12-4", "sine 8-1", "sine 12-4", "af")
    ]
    assert cosine.maps == ["lps", "cosine 12-4", "cosine 8-1", "af"]
    torch.manual_seed(0)
    mixture, doa = torch.randn(1, 4000, 4), torch.tensor([[50.0]])
    few = cosine(cosine.stft(mixture), doa)
    many = steered(steered.stft(mixture), doa)
    assert torch.equal(few, many[:, :, index])
    unknown = shared_inputs(SpatialFeatures([(3, 2)], "cosine"), steered)
    assert unknown.unflatten(0, (3, -1))[:, 0].tolist() == [0, -1, 5 * 257]


def test_unknown_inputs_begin_without_a_say(scene):
    smaller = trained("cosine")
    larger = made("steered", seed=2, **LARGE).eval()
    grow_(larger, smaller, *scene)
    torch.testing.assert_close(
        larger(*scene), smaller(*scene), rtol=1e-4, atol=1e-4
    )


def test_new_outputs_keep_their_weights():
    weight = torch.arange(6.0).view(3, 2)
    place_(weight, torch.tensor([[9.0]]))
    assert weight.tolist() == [[9, 0], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    "smaller, larger, said",
    [
        ({"hidden": 20}, LARGE, "do not fit into"),
        ({}, {**LARGE, "kernel_size": 5}, "same kernel_size"),
        ({"scale_inputs": True}, LARGE, "before their inputs are equalized"),
        (
            {},
            {**LARGE, "visual": {"front_end": "light"}},
            "leave `visual` out",
        ),
    ],
)
def test_what_cannot_grow_is_refused(scene, smaller, larger, said):
    larger = made(seed=2, **larger).eval()
    before = {n: t.clone() for n, t in larger.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        grow_(larger, trained(**smaller), *scene)
    for name, tensor in larger.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_norms_that_are_not_folded_are_refused(scene):
    with pytest.raises(ValueError, match="fold_norms_"):
        grow_(made(seed=2, **LARGE).eval(), made(), *scene)


@pytest.mark.parametrize(
    "changed",
    [
        {"hop": 128},
        {"pairs": [(8, 1), (12, 4), (12, 8)]},  # another mean over the pairs
        {"pairs": [(1, 8), (12, 4)]},
        {"spacings_cm": [3.0] * 14},
    ],
)
def test_other_inputs_under_the_same_names_are_refused(scene, changed):
    settings = {"pairs": [(8, 1), (12, 4)], "phase": "cosine", **changed}
    larger = Separator(SpatialFeatures(**settings), **LARGE).eval()
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"`{name}` of the features differs"):
        grow_(larger, trained(), *scene)


def test_quantized_weights_are_refused(scene):
    smaller = trained()
    quantize_(smaller, 4)
    with pytest.raises(ValueError, match="full-precision weights"):
        grow_(made(seed=2, **LARGE).eval(), smaller, *scene)


def test_an_error_leaves_no_hooks(scene):
    larger = made(seed=2, **LARGE).eval()
    with pytest.raises(ValueError, match="expected waveforms"):
        grow_(larger, trained(), scene[0][..., :2], scene[1])
    assert not any(m._forward_pre_hooks for m in larger.modules())


MICROPHONES = [1, 2, 4, 8, 12]


def scenes(count, seed):
    """Mixtures of five microphones [2, samples, 5], two DOAs each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        mixtures = torch.randn(2, 16000, 5, generator=generator)
        yield mixtures, 180 * torch.rand(2, 2, generator=generator)


def small(scene, wanted=(1, 4, 8, 12)):
    """A scene with the channels of some microphones only."""
    return channels_of(scene[0], MICROPHONES, wanted), scene[1]


def heard(model, scene):
    """What a separator makes of its channels of a scene."""
    with torch.no_grad():
        return model(*small(scene, model.features.microphones))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_regression_is_the_least_squares_solution(ridge):
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    y = torch.randn(50, 3, dtype=torch.float64)
    batches = zip(x.split(20), y.split(20), strict=True)
    weight, bias = ridge_regression(batches, ridge)
    # The penalty as four more rows, on which the offset does not act
    strength = np.sqrt(ridge * x.square().sum(0).mean().item())
    rows = np.block(
        [
            [x.numpy(), np.ones((50, 1))],
            [strength * np.eye(4), np.zeros((4, 1))],
        ]
    )
    wanted = np.vstack([y.numpy(), np.zeros((4, 3))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(weight.T, expected[:4], rtol=1e-9)
    np.testing.assert_allclose(bias, expected[4], rtol=1e-9)


def test_nothing_to_fit_to_is_refused():
    with pytest.raises(ValueError, match="no mixtures"):
        ridge_regression([])


@pytest.mark.parametrize(
    "pairs, phase",
    [
        ([(12, 4), (8, 1)], "cosine"),  # the same in another order
        ([(8, 1), (12, 4)], "steered"),  # more than was there
        ([(8, 1), (12, 4), (12, 2)], "cosine"),  # and another microphone
    ],
)
def test_features_that_hold_the_old_ones_change_nothing(pairs, phase):
    separator = trained("cosine")
    features = SpatialFeatures(pairs, phase)
    refitted = refit(separator, features, scenes(12, 0), MICROPHONES)
    assert refitted.features is features
    scene = next(scenes(1, 1))  # none of those
    old, new = heard(separator, scene), heard(refitted, scene)
    assert (new - old).std() < 0.02 * old.std()


def test_a_fit_is_better_than_what_both_features_have():
    separator = trained("cosine")
    features = SpatialFeatures([(8, 1), (12, 4)], "ipd")
    fitted = refit(separator, features, scenes(60, 0), MICROPHONES)
    shared = made("ipd").eval()
    grow_(shared, separator, *small(next(scenes(1, 0))))
    scene = next(scenes(1, 1))  # none of those
    old = heard(separator, scene)
    error = [(heard(m, scene) - old).std() for m in (fitted, shared)]
    assert error[0] < 0.9 * error[1]


def test_all_behind_the_first_layer_is_a_copy():
    separator = trained("cosine")
    features = SpatialFeatures([(8, 1)], "ipd")
    refitted = refit(separator, features, scenes(2, 0), MICROPHONES)
    new = dict(refitted.mask_net.named_parameters())
    for name, parameter in separator.mask_net.named_parameters():
        if not name.startswith("conv_in"):
            assert torch.equal(new[name], parameter)
            assert new[name] is not parameter
    assert all(parameter.requires_grad for parameter in new.values())


def test_what_was_refitted_grows():
    features = SpatialFeatures([(8, 1)], "ipd")
    refitted = refit(trained("cosine"), features, scenes(2, 0), MICROPHONES)
    larger = made("ipd", seed=2, pairs=[(8, 1)], channels=9, hidden=13).eval()
    scene = next(scenes(1, 1))
    grow_(
        larger, refitted, channels_of(scene[0], MICROPHONES, [1, 8]), scene[1]
    )
    torch.testing.assert_close(
        heard(larger, scene), heard(refitted, scene), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hop": 128}, "`hop` of the features differs, 256 and 128"),
        ({"spacings_cm": [3.0] * 14}, "`spacings_cm` of the features differs"),
        ({"pairs": [(6, 1)]}, r"no channel of microphones \[6\]"),
    ],
)
def test_features_that_do_not_fit_are_refused(change, said):
    features = SpatialFeatures(**{"pairs": [(8, 1)], "phase": "ipd", **change})
    with pytest.raises(ValueError, match=said):
        refit(trained("cosine"), features, scenes(2, 0), MICROPHONES)


def test_channels_are_as_many_as_microphones():
    with pytest.raises(ValueError, match="4 channels of 3 microphones"):
        channels_of(torch.zeros(1, 9, 4), [1, 2, 3], [1])


def test_separators_that_cannot_be_refitted_are_refused():
    features = SpatialFeatures([(8, 1)], "ipd")
    quantized = trained("cosine")
    quantize_(quantized, 4)
    for separator, said in {
        made("cosine"): "fold_norms_",
        made("cosine", scale_inputs=True): "equalized",
        quantized: "full-precision weights",
        made("cosine", visual={"front_end": "light"}): "audio-only",
    }.items():
        with pytest.raises(ValueError, match=said):
            refit(separator, features, scenes(2, 0), MICROPHONES)
