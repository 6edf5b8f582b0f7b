"""Where targets are, from whatever a caller says it with."""

import numpy as np
import torch

from ..separation.array import check_doa


def doa_from_face(x, width):
    """Direction of a talker from where a camera sees the face.

    The camera stands above the array's centre and sees half a turn, as the
    paper has it: its left edge is 0 degrees.

    Arguments
    ---------
    x : float
        Horizontal position of the face in pixels.
    width : float
        Of the picture in pixels.

    Returns
    -------
    doa : float
        Degrees from the array's axis, 0 to 180.

    Example
    -------
    >>> doa_from_face(320, width=640)
    90.0
    """
    if not (width > 0 and 0 <= x <= width):
        raise ValueError(
            f"a face at {x} is not in a picture {width} pixels wide: x must "
            "lie in 0 to width"
        )
    return x / width * 180


def as_directions(doa):
    """Directions as a tensor, refused where they cannot be some.

    Arguments
    ---------
    doa : float, sequence or array
        One target; one for each target; or [targets, frames].

    Returns
    -------
    directions : torch.Tensor
        [], [targets] or [targets, frames], degrees.

    Example
    -------
    >>> as_directions([60, 112.5])
    tensor([ 60.0000, 112.5000])
    >>> as_directions([[60, 61, 62], [90]])
    Traceback (most recent call last):
    ValueError: doa must be degrees: a number, a sequence of one for each ...
    """
    try:
        if isinstance(doa, torch.Tensor):
            directions = doa.float()
        elif isinstance(doa, list | tuple):
            doa = [torch.as_tensor(one, dtype=torch.float32) for one in doa]
            directions = torch.stack(doa)
        else:
            # A copy: other strides and read-only arrays are no matter then
            directions = torch.as_tensor(np.array(doa, dtype=np.float32))
        if directions.dim() > 2 or not directions.numel():
            raise ValueError(f"got {list(directions.shape)}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "doa must be degrees: a number, a sequence of one for each target, "
            f"or [targets, frames] for targets that move ({error})"
        ) from error
    check_doa(directions)
    return directions


def check_moving(directions, frames):
    """Raise ValueError unless talkers who move have one DOA a frame.

    Arguments
    ---------
    directions : torch.Tensor
        [targets] or [targets, frames].
    frames : int
        Of the recording's spectrogram.
    """
    found = directions.shape[-1]
    if directions.dim() == 2 and found != frames:
        raise ValueError(
            f"a recording of {frames} frames needs as many directions for "
            f"each target who moves, got {found}: see "
            "vision.direction.frame_doas"
        )
    if directions.dim() == 1 and found == frames:
        raise ValueError(
            f"{frames} directions for a recording of {frames} frames are "
            f"taken for so many targets: give [1, {frames}] for one who moves"
        )


def middles(directions):
    """One direction for each target, to name it by.

    Arguments
    ---------
    directions : torch.Tensor
        [targets] or [targets, frames].

    Returns
    -------
    doas : list of float
        Those that move: their median, to a tenth of a degree.

    Example
    -------
    >>> middles(torch.tensor([[50.0, 60.04, 90.0]]))
    [60.0]
    """
    if directions.dim() == 1:
        return directions.tolist()
    return [round(d, 1) for d in directions.median(1).values.tolist()]
