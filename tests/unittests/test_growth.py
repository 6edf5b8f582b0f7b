"""A larger separator that begins as a smaller one."""

import pytest
import torch

from speechbrain_mpq.quantization.quantizer import quantize_
from speechbrain_mpq.separation.features import SpatialFeatures
from speechbrain_mpq.separation.growth import grow_, place_, shared_inputs
from speechbrain_mpq.separation.separator import Separator
from speechbrain_mpq.separation.tcn import ChannelAffine, fold_norms_

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
