"""Turn points of a picture into directions of arrival.

Points are (x, y) in pixels from the upper left corner, x to the right and y
down. Azimuth and elevation are measured from the optical axis, positive to the
right and upwards. The camera stands at the middle of the array and looks
straight ahead, at 90 degrees; its left edge is the side of 0 degrees. A linear
array cannot tell directions on a cone around its axis apart: a talker at
azimuth `a` and elevation `e` has cos(doa) = cos(e) * cos(a).
"""

import math

import numpy as np


def _panorama_angle(x, width, field_of_view=180.0):
    """Angle from the optical axis, proportional to the horizontal position."""
    return (x / width - 0.5) * field_of_view


def _pinhole_angles(x, y, focal, center):
    """Azimuth and elevation behind a lens without distortion."""
    right = (np.asarray(x) - center[0]) / focal
    up = (center[1] - np.asarray(y)) / focal
    azimuth = np.arctan(right)
    elevation = np.arctan(up * np.cos(azimuth))
    return np.degrees(azimuth), np.degrees(elevation)


def _fisheye_angles(x, y, focal, center):
    """Azimuth and elevation behind an equidistant fisheye."""
    right, up = np.asarray(x) - center[0], center[1] - np.asarray(y)
    radius = np.hypot(right, up)
    polar = radius / focal
    if np.any(polar > math.pi):
        raise ValueError(
            f"a point lies {np.nanmax(radius):.0f} pixels from the principal "
            f"point: with a focal length of {focal:g} pixels a fisheye's "
            f"picture ends at {math.pi * focal:.0f}"
        )
    # sin(t) / t, which is 1 on the optical axis
    bend = np.sinc(polar / math.pi) / focal
    azimuth = np.arctan2(right * bend, np.cos(polar))
    elevation = np.arcsin(np.clip(up * bend, -1, 1))
    return np.degrees(azimuth), np.degrees(elevation)


def _cone_angle(azimuth, elevation):
    """Direction of arrival at a linear array: acos(cos(e) * cos(a))."""
    cosine = np.cos(np.radians(elevation)) * np.cos(np.radians(azimuth))
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


class Camera:
    """Base of all cameras: where they look, which side is 0 degrees.

    Arguments
    ---------
    yaw : float
        Degrees by which the camera is turned to its right, away from
        straight ahead.
    reverse : bool
        The last microphone is at the right of the picture (or the picture is
        mirrored): the right edge is the side of 0 degrees.
    """

    def __init__(self, yaw=0.0, reverse=False):
        if not -180 <= yaw <= 180:
            raise ValueError(f"yaw must lie in -180 to 180 degrees, got {yaw}")
        self.yaw = yaw
        self.reverse = reverse

    def angles(self, x, y):
        """Compute azimuth and elevation from the optical axis, in degrees."""
        raise NotImplementedError

    def doa(self, x, y):
        """Compute the direction of arrival of points of the picture."""
        azimuth, elevation = self.angles(np.asarray(x), np.asarray(y))
        doa = _cone_angle(90 + self.yaw + azimuth, elevation)
        return 180 - doa if self.reverse else doa


class PanoramaCamera(Camera):
    """The paper's wide-angle camera: angle proportional to the position.

    Arguments
    ---------
    width : float
        Of the picture, pixels.
    field_of_view : float
        Degrees from its left to its right edge, at most 360.
    **kwargs
        `yaw` and `reverse`, see `Camera`.

    Example
    -------
    >>> camera = PanoramaCamera(width=360)
    >>> camera.doa([0, 90, 180, 360], 100).round(6)
    array([  0.,  45.,  90., 180.])
    """

    def __init__(self, width, field_of_view=180.0, **kwargs):
        super().__init__(**kwargs)
        if not 0 < width < math.inf:
            raise ValueError(f"width must be positive, got {width}")
        if not 0 < field_of_view <= 360:
            raise ValueError(
                "field_of_view must lie in 0 to 360 degrees, got "
                f"{field_of_view}"
            )
        self.width = width
        self.field_of_view = field_of_view

    def angles(self, x, y):
        """See `Camera.angles`; the height in the picture says nothing."""
        return _panorama_angle(x, self.width, self.field_of_view), 0.0


class _CalibratedCamera(Camera):
    """A camera with focal length and principal point."""

    def __init__(self, focal, center, **kwargs):
        super().__init__(**kwargs)
        if not 0 < focal < math.inf:
            raise ValueError(f"focal must be positive (pixels), got {focal}")
        if not np.isfinite(center).all():
            raise ValueError(f"center must be a place (pixels), got {center}")
        self.focal = focal
        self.center = center


class PinholeCamera(_CalibratedCamera):
    """A calibrated camera without distortion.

    Arguments
    ---------
    focal : float
        Focal length in pixels.
    center : (float, float)
        Principal point in pixels, about the middle of the picture.
    **kwargs
        `yaw` and `reverse`, see `Camera`.

    Example
    -------
    >>> camera = PinholeCamera(focal=100, center=(320, 240))
    >>> camera.doa([220, 320, 420], 240).round(6)
    array([ 45.,  90., 135.])
    """

    def angles(self, x, y):
        """See `Camera.angles`."""
        return _pinhole_angles(x, y, self.focal, self.center)


class FisheyeCamera(_CalibratedCamera):
    """A calibrated equidistant fisheye.

    Arguments
    ---------
    focal : float
        Focal length in pixels: pixels per radian.
    center : (float, float)
        Principal point in pixels, about the middle of the picture.
    **kwargs
        `yaw` and `reverse`, see `Camera`.

    Example
    -------
    >>> camera = FisheyeCamera(focal=360 / np.pi, center=(180, 144))
    >>> camera.doa([0, 180, 270], 144).round(6)
    array([  0.,  90., 135.])
    """

    def angles(self, x, y):
        """See `Camera.angles`."""
        return _fisheye_angles(x, y, self.focal, self.center)
