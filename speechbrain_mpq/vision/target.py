"""Which of several faces is the talker that is wanted."""

import numpy as np


def choose_face(doas, widths, target=None, near=None):
    """Index of the target's face.

    Arguments
    ---------
    doas : sequence of float
        Direction of each face in degrees, faces from left to right.
    widths : sequence of float
        Width of each face in pixels.
    target : int | str | None
        Number of the face in the picture, from the left, from 1; or
        "largest". None: there must be one face only.
    near : float | None
        Instead of `target`: the face nearest to this direction, in degrees.

    Returns
    -------
    index : int
        From 0.

    Example
    -------
    >>> doas, widths = [30.0, 80.0, 140.0], [50.0, 60.0, 40.0]
    >>> choose_face(doas, widths, target=3)
    2
    >>> choose_face(doas, widths, target="largest")
    1
    >>> choose_face(doas, widths, near=40.0)
    0
    """
    if target is not None and near is not None:
        raise ValueError("give a target or a direction near it, not both")
    if near is not None:
        return int(np.argmin(np.abs(np.asarray(doas) - near)))
    if target == "largest":
        return int(np.argmax(widths))
    listed = ", ".join(f"{doa:.0f}" for doa in doas)
    if target is None:
        if len(doas) > 1:
            raise ValueError(
                f"{len(doas)} faces, from left to right at {listed} degrees: "
                'say which one is the target, by its number, "largest", or '
                "the direction that it is near to"
            )
        return 0
    if not isinstance(target, int) or not 1 <= target <= len(doas):
        raise ValueError(
            f'target must be "largest" or a number from 1 to {len(doas)} '
            f"(faces from left to right at {listed} degrees), got {target!r}"
        )
    return target - 1
