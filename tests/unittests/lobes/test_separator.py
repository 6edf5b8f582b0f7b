"""The separator as a whole."""

import pytest
import torch

from speechbrain_mpq.lobes.models.separator import (
    Separator,
    apply_mask,
    build_separator,
    match_level,
)
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return Separator(
        SpatialFeatures(), channels=8, hidden=16, blocks=1, layers=2
    ).eval()


def test_mask_of_one_returns_the_reference_channel(separator):
    waveforms = torch.randn(2, 6000, 7)
    conv_out = separator.mask_net.conv_out
    saved = {k: v.clone() for k, v in conv_out.state_dict().items()}
    conv_out.weight.data.zero_()
    conv_out.bias.data.copy_(torch.tensor([1.0, 0.0]).repeat_interleave(257))
    estimate = separator(waveforms, torch.tensor([20.0, 100.0]))
    conv_out.load_state_dict(saved)
    torch.testing.assert_close(
        estimate, waveforms[..., 0], rtol=1e-4, atol=1e-4
    )


def test_complex_mask_is_a_complex_product():
    mask = torch.randn(2, 6, 5)
    reference = torch.randn(2, 3, 5, dtype=torch.complex64)
    expected = (mask[:, :3] + 1j * mask[:, 3:]) * reference
    torch.testing.assert_close(apply_mask(mask, reference), expected)


def test_level_of_the_input_carries_over(separator):
    waveforms, doa = torch.randn(1, 6000, 7), torch.tensor([50.0])
    quiet = separator(0.01 * waveforms, doa)
    torch.testing.assert_close(
        quiet, 0.01 * separator(waveforms, doa), rtol=1e-3, atol=1e-5
    )


def test_output_has_the_level_of_the_talker(separator):
    torch.manual_seed(1)
    talker, other = torch.randn(2, 16000)
    mixture = talker + other
    estimate = match_level(300 * talker + other, mixture)
    assert 0.9 < estimate.std() / talker.std() < 1.1
    assert torch.equal(match_level(0 * talker, mixture), 0 * talker)


def test_two_targets_of_one_mixture(separator):
    waveforms = torch.randn(1, 6000, 7)
    both = separator(waveforms, torch.tensor([[20.0, 100.0]]))
    assert both.shape == (1, 2, 6000)
    alone = separator(waveforms, torch.tensor([100.0]))
    torch.testing.assert_close(both[:, 1], alone)


def test_talkers_who_stand_still_may_be_given_frame_by_frame(separator):
    waveforms = torch.randn(2, 6000, 7)
    doa = torch.tensor([[20.0, 100.0], [30.0, 40.0]])
    frames = 6000 // separator.features.hop + 1
    still = doa[..., None].expand(-1, -1, frames)
    fixed = separator(waveforms, doa)
    assert torch.equal(separator(waveforms, still), fixed)
    moving = still + torch.linspace(0, 50, frames)
    assert (separator(waveforms, moving) - fixed).abs().max() > 1e-3


def test_silence_gives_silence(separator):
    estimate = separator(torch.zeros(1, 4000, 7), torch.tensor([50.0]))
    assert torch.isfinite(estimate).all() and estimate.abs().max() < 1e-4


@pytest.mark.parametrize(
    "waveforms, doa, message",
    [
        (torch.zeros(1, 4000, 2), torch.zeros(1), "7.*of microphones"),
        (torch.zeros(4000, 7), torch.zeros(1), "expected waveforms"),
        (torch.zeros(1, 400, 7), torch.zeros(1), "shorter than one window"),
        (torch.zeros(2, 4000, 7), torch.zeros(1), "expected DOAs"),
        (torch.zeros(1, 4000, 7), torch.zeros(1, 1, 15), "targets, 16"),
        (torch.zeros(2, 4000, 7), torch.zeros(1, 1, 16), "expected DOAs"),
        (torch.full((1, 4000, 7), torch.nan), torch.zeros(1), "NaN"),
        (torch.zeros(1, 4000, 7), torch.tensor([200.0]), "0 to 180"),
    ],
)
def test_bad_input_is_refused(separator, waveforms, doa, message):
    with pytest.raises(ValueError, match=message):
        separator(waveforms, doa)


def test_missing_and_foreign_model_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="--separator_file"):
        build_separator(tmp_path / "none.yaml")
    foreign = tmp_path / "foreign.yaml"
    foreign.write_text("lr: 3\n")
    with pytest.raises(ValueError, match="separator"):
        build_separator(foreign)
