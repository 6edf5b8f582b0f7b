"""Pictures beside audio frames: times, lengths, bad input."""

import pytest
import torch

from speechbrain_mpq.lobes.models.lips import (
    as_grey,
    at_25_fps,
    fit_pictures,
    frame_of_pictures,
    join,
    normalise,
    picture_of_frames,
    split,
    upsample,
)


@pytest.mark.parametrize("hop", [128, 256, 320, 640])
@pytest.mark.parametrize("frames", [1, 2, 63, 188])
def test_each_picture_is_first_on_view_where_it_is_said(frames, hop):
    shown = picture_of_frames(frames, hop).tolist()
    # Witness: on the clock, picture v is on view from v/25 to (v+1)/25 s
    assert shown == [int(t * hop / 16000 * 25 + 1e-9) for t in range(frames)]
    first = frame_of_pictures(frames, hop).tolist()
    assert first == [shown.index(v) for v in range(shown[-1] + 1)]


@pytest.mark.parametrize("frames", [1, 5, 63])
def test_split_takes_apart_what_join_laid_together(frames):
    features = torch.randn(2, 7, frames)
    pictures = torch.rand(2, len(frame_of_pictures(frames, 256)), 4, 6)
    joined = join(features, pictures, 256)
    assert joined.shape == (2, 7 + 24, frames)
    back = split(joined, (4, 6), 256)
    assert torch.equal(back[0], features) and torch.equal(back[1], pictures)


def test_upsampling_is_linear_on_the_clock():
    pictures = 75
    times = torch.arange(pictures) / 25
    at_frames = upsample(times.view(1, 1, -1), 186, 256)[0, 0]
    torch.testing.assert_close(at_frames, torch.arange(186) * 0.016)


def test_normalising_removes_light_and_skin():
    pictures = torch.rand(1, 3, 6, 8) * 0.4 + 0.1
    brighter = 1.5 * pictures + 0.2
    torch.testing.assert_close(
        normalise(pictures), normalise(brighter), atol=0.15, rtol=0.1
    )
    assert not normalise(torch.zeros(1, 1, 6, 8)).any()


def test_other_frame_rates_show_what_is_on_view():
    clip = torch.arange(60.0).view(60, 1, 1)  # two seconds at 30 a second
    shown = at_25_fps(clip, 30).flatten()
    assert len(shown) == 50
    assert shown.tolist() == [int(v / 25 * 30 + 1e-9) for v in range(50)]
    with pytest.raises(ValueError, match="above 0"):
        at_25_fps(clip, 0)


def test_small_differences_in_length_are_filled_or_cut():
    clip = torch.rand(1, 75, 2, 2)
    longer = fit_pictures(clip, 78)
    assert torch.equal(longer[:, :75], clip)
    assert torch.equal(longer[:, 75:], clip[:, -1:].expand(-1, 3, -1, -1))
    assert torch.equal(fit_pictures(clip, 71), clip[:, :71])


@pytest.mark.parametrize("found", [0, 69, 81, 90])
def test_large_differences_in_length_name_the_rate(found):
    with pytest.raises(ValueError, match=f"{found / 3:.1f} a second"):
        fit_pictures(torch.rand(1, found, 2, 2), 75)


@pytest.mark.parametrize(
    ("lips", "message"),
    [
        (torch.tensor([0.5, float("nan")]), "NaN"),
        (torch.tensor([0.0, 200.0]), "divide"),
        (torch.tensor([-0.5, 0.5]), "divide"),
        (torch.tensor([1, 2]), "uint8"),
    ],
)
def test_wrong_pixels_are_refused(lips, message):
    with pytest.raises(ValueError, match=message):
        as_grey(lips)
