"""Pictures of a talker's mouth, and how they stand beside the audio frames.

Layout: pictures are [batch, pictures, height, width], grey, 0 to 1, 25 a
second, the first one at the first sample. A picture that is all zeros stands
for none: a missing video needs no second array that says so.
"""

import torch

from .features import SAMPLE_RATE

FPS = 25  # pictures a second
PERIOD = SAMPLE_RATE // FPS  # samples from one picture to the next
CONTRAST = 0.02  # keeps a flat picture from being amplified to noise


def picture_of_frames(frames, hop):
    """The picture that is on view at each audio frame.

    Arguments
    ---------
    frames : int
        Audio frames.
    hop : int
        Samples from one to the next.

    Returns
    -------
    index : torch.Tensor
        [frames], never falling.

    Example
    -------
    >>> picture_of_frames(7, 256)  # 16 ms and 40 ms
    tensor([0, 0, 0, 1, 1, 2, 2])
    """
    return torch.arange(frames) * hop // PERIOD


def frame_of_pictures(frames, hop):
    """The first audio frame at which each picture is on view.

    Arguments
    ---------
    frames : int
        Audio frames.
    hop : int
        Samples from one to the next, at most 640: no picture is skipped.

    Returns
    -------
    index : torch.Tensor
        [pictures].

    Example
    -------
    >>> frame_of_pictures(7, 256)
    tensor([0, 3, 5])
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
    """Values of the pictures at the audio frames, linear in between.

    Arguments
    ---------
    values : torch.Tensor
        [batch, channels, pictures].
    frames : int
        Audio frames.
    hop : int
        Samples from one to the next.

    Returns
    -------
    values : torch.Tensor
        [batch, channels, frames]; the last one is held at the end.

    Example
    -------
    >>> upsample(torch.tensor([[[0.0, 1.0]]]), 5, 256)
    tensor([[[0.0000, 0.4000, 0.8000, 1.0000, 1.0000]]])
    """
    last = values.shape[-1] - 1
    samples = torch.arange(frames, device=values.device) * hop
    share = ((samples % PERIOD) / PERIOD).to(values.dtype)
    before = (samples // PERIOD).clamp_max(last)
    after = (before + 1).clamp_max(last)
    return torch.lerp(values[..., before], values[..., after], share)


def normalise(pictures):
    """Give every picture zero mean and unit deviation over its pixels.

    Lighting and skin go, shape stays.

    Arguments
    ---------
    pictures : torch.Tensor
        [batch, pictures, height, width].

    Returns
    -------
    pictures : torch.Tensor
        Same shape; zeros stay zeros.

    Example
    -------
    >>> normalise(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)).flatten()
    tensor([-0.9615,  0.9615])
    """
    centred = pictures - pictures.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    return centred / (deviation + CONTRAST)
