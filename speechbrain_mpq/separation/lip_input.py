"""Making pictures of lips fit: their frame rate, pixels and number."""

import torch

from .lips import FPS

SLACK = 5  # pictures that video and audio may differ in length,
SHARE = 0.1  # but not more of a short one


def at_25_fps(pictures, rate):
    """Take the pictures of another frame rate that are on view at 25 a second.

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
    """Raise ValueError on pictures that are none.

    Arguments
    ---------
    lips : torch.Tensor
        uint8 from 0 to 255, or float from 0 to 1.
    """
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
    """Pictures as numbers from 0 to 1, refused where they are not.

    Arguments
    ---------
    lips : torch.Tensor
        See `check_grey`.

    Returns
    -------
    lips : torch.Tensor
        float32.

    Example
    -------
    >>> as_grey(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    check_grey(lips)
    return lips.float() / 255 if lips.dtype == torch.uint8 else lips.float()


def fit_pictures(lips, pictures):
    """Give a video the length of its audio, if they nearly agree.

    Up to five pictures too many (a tenth, if that is less) are cut; as many
    too few hold the last.

    Arguments
    ---------
    lips : torch.Tensor
        [batch, pictures, height, width].
    pictures : int
        How many there should be.

    Returns
    -------
    lips : torch.Tensor
        [batch, pictures, height, width].

    Example
    -------
    >>> fit_pictures(torch.ones(1, 74, 2, 3), 75).shape
    torch.Size([1, 75, 2, 3])
    """
    found = lips.shape[1]
    slack = min(SLACK, max(1, int(SHARE * pictures)))
    if not found or abs(found - pictures) > slack:
        rate = found * FPS / pictures
        raise ValueError(
            f"{found} pictures for audio that needs {pictures} at {FPS} a "
            f"second (that is {rate:.1f} a second): convert other frame rates "
            "with separation.lip_input.at_25_fps; where video is missing, "
            "fill up with zeros"
        )
    index = torch.arange(pictures, device=lips.device)
    return lips[:, index.clamp_max(found - 1)]
