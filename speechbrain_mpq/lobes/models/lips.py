"""Pictures of a talker's mouth: their form, rate, number and pixels.

Layout: pictures are [batch, pictures, height, width], grey, 0 to 1, 25 a
second, the first one at the first sample. A picture that is all zeros stands
for none: a missing video needs no second array that says so.
"""

import torch

from ...utils import SAMPLE_RATE

FPS = 25  # pictures a second
PERIOD = SAMPLE_RATE // FPS  # samples from one picture to the next
CONTRAST = 0.02  # keeps a flat picture from being amplified to noise
SLACK = 5  # pictures that video and audio may differ in length,
SHARE = 0.1  # but not more of a short one


def picture_of_frames(frames, hop):
    """Find the picture on view at each audio frame.

    Returns
    -------
    index : torch.Tensor
        [frames], never falling.
    """
    return torch.arange(frames) * hop // PERIOD


def frame_of_pictures(frames, hop):
    """Find the first audio frame at which each picture is on view.

    Returns
    -------
    index : torch.Tensor
        [pictures].
    """
    pictures = (frames - 1) * hop // PERIOD + 1
    return -(-torch.arange(pictures) * PERIOD // hop)


def join(features, pictures, hop):
    """Lay the picture on view below the features of each audio frame.

    Whatever scores, rounds or measures a network then has one tensor to pass
    through it, items in front.

    Arguments
    ---------
    features : torch.Tensor
        [batch, inputs, frames].
    pictures : torch.Tensor
        [batch, pictures, height, width], one for each of
        `frame_of_pictures`.
    hop : int
        Samples from one audio frame to the next.

    Returns
    -------
    joined : torch.Tensor
        [batch, inputs + height * width, frames].

    Example
    -------
    >>> pictures = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    >>> join(torch.zeros(1, 1, 5), pictures, 256)
    tensor([[[0., 0., 0., 0., 0.],
             [1., 1., 1., 2., 2.]]])
    """
    index = picture_of_frames(features.shape[-1], hop).to(pictures.device)
    rows = pictures.flatten(2).transpose(1, 2)  # [batch, pixels, pictures]
    return torch.cat([features, rows[..., index].to(features.dtype)], dim=1)


def split(joined, size, hop):
    """Take joined features and pictures apart again.

    Arguments
    ---------
    joined : torch.Tensor
        From `join`.
    size : (int, int)
        Height and width of a picture.
    hop : int
        Samples from one audio frame to the next.

    Returns
    -------
    features : torch.Tensor
        [batch, inputs, frames].
    pictures : torch.Tensor
        [batch, pictures, height, width].

    Example
    -------
    >>> pictures = torch.rand(1, 3, 4, 5)
    >>> joined = join(torch.zeros(1, 2, 7), pictures, 256)
    >>> torch.equal(split(joined, (4, 5), 256)[1], pictures)
    True
    """
    height, width = size
    pixels = height * width
    index = frame_of_pictures(joined.shape[-1], hop).to(joined.device)
    rows = joined[:, -pixels:, index].transpose(1, 2)
    return joined[:, :-pixels], rows.unflatten(2, (height, width))


def upsample(values, frames, hop):
    """Interpolate values of the pictures at the audio frames.

    Arguments
    ---------
    values : torch.Tensor
        [batch, channels, pictures].

    Returns
    -------
    values : torch.Tensor
        [batch, channels, frames]; the last one is held at the end.
    """
    last = values.shape[-1] - 1
    samples = torch.arange(frames, device=values.device) * hop
    share = ((samples % PERIOD) / PERIOD).to(values.dtype)
    before = (samples // PERIOD).clamp_max(last)
    after = (before + 1).clamp_max(last)
    return torch.lerp(values[..., before], values[..., after], share)


def normalise(pictures):
    """Normalise every picture over its pixels.

    Lighting and skin go, shape stays.

    Arguments
    ---------
    pictures : torch.Tensor
        [batch, pictures, height, width].
    """
    centred = pictures - pictures.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    return centred / (deviation + CONTRAST)


def at_25_fps(pictures, rate):
    """Resample pictures of another frame rate to 25 a second.

    Arguments
    ---------
    pictures : torch.Tensor
        [..., pictures, height, width].
    rate : float
        Pictures a second in there.

    Returns
    -------
    pictures : torch.Tensor
        [..., pictures, height, width] at 25 a second.

    Example
    -------
    >>> pictures = torch.arange(6.0).view(6, 1, 1)
    >>> at_25_fps(pictures, 50).flatten()
    tensor([0., 2., 4.])
    """
    if not rate > 0:
        raise ValueError(f"a frame rate must be above 0, got {rate}")
    count = pictures.shape[-3]
    index = torch.arange(max(1, int(count * FPS / rate + 1e-6)))
    index = (index * rate / FPS + 1e-6).long().clamp_max(count - 1)
    return pictures[..., index.to(pictures.device), :, :]


def check_grey(lips):
    """Raise ValueError on pictures that are none."""
    if lips.dtype == torch.uint8:
        return
    if not lips.is_floating_point():
        raise ValueError(
            f"lips must be uint8 (0 to 255) or float (0 to 1), not {lips.dtype}"
        )
    if not torch.isfinite(lips).all():
        raise ValueError(
            "lips hold NaN or infinite pixels: set pictures that are missing "
            "to zero"
        )
    if lips.numel() and not 0 <= lips.min() <= lips.max() <= 1:
        raise ValueError(
            f"lips must lie in 0 to 1, found {lips.min():.3g} to "
            f"{lips.max():.3g}: divide pixels of 0 to 255 by 255"
        )


def as_grey(lips):
    """Convert pictures to numbers from 0 to 1."""
    check_grey(lips)
    return lips.float() / 255 if lips.dtype == torch.uint8 else lips.float()


def fit_pictures(lips, pictures):
    """Fit the length of a video to its audio, if they nearly agree.

    Up to five pictures too many (a tenth, if that is less) are cut; as many
    too few hold the last.

    Arguments
    ---------
    lips : torch.Tensor
        [batch, pictures, height, width].

    Returns
    -------
    lips : torch.Tensor
        [batch, pictures, height, width].
    """
    count = lips.shape[1]
    slack = min(SLACK, max(1, int(SHARE * pictures)))
    if not count or abs(count - pictures) > slack:
        rate = count * FPS / pictures
        raise ValueError(
            f"{count} pictures for audio that needs {pictures} at {FPS} a "
            f"second (that is {rate:.1f} a second): convert other frame rates "
            "with lobes.models.lips.at_25_fps; where video is missing, "
            "fill up with zeros"
        )
    index = torch.arange(pictures, device=lips.device)
    return lips[:, index.clamp_max(count - 1)]
