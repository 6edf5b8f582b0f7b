"""A trained separator that listens to other features."""

import numpy as np
import pytest
import torch
from test_growth import made, trained

from speechbrain_mpq.quantization.quantizer import quantize_
from speechbrain_mpq.separation.features import SpatialFeatures
from speechbrain_mpq.separation.growth import grow_
from speechbrain_mpq.separation.refit import (
    channels_of,
    refit,
    ridge_regression,
)

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
