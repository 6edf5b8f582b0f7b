"""Turn a face's track into the directions that the separator takes.

A video frame stands at its number divided by the frame rate; the frame t of
the spectrogram has its middle at t hops. Tracks of any frame rate fit.
"""

import numpy as np

FRAME_RATE = 62.5  # spectrogram frames per second: hop of 256 at 16 kHz
SLACK = 0.5  # seconds that sound and picture may differ in length
TOLERANCE = 15.0  # degrees: the width of the paper's nearest angle bucket


def _doa_at(track, times):
    """Direction at any time; before and after the track its ends."""
    return np.interp(times, np.arange(len(track.doas)) / track.fps, track.doas)


def frame_doas(track, frames, frame_rate=FRAME_RATE, slack=SLACK):
    """Interpolate a direction for every frame of the spectrogram.

    Arguments
    ---------
    track : FaceTrack
        Of the target.
    frames : int
        Frames of the spectrogram: samples // hop + 1.
    frame_rate : float
        Of the spectrogram, Hz.
    slack : float
        Seconds that sound and picture may differ in length.

    Returns
    -------
    doa : np.ndarray
        [frames], degrees, float32.

    Example
    -------
    >>> from speechbrain_mpq.vision.face_track import FaceTrack
    >>> track = FaceTrack(np.full(25, 70.0), np.ones((25, 4)), 25, 360, 288)
    >>> frame_doas(track, frames=63).shape
    (63,)
    """
    check_length(track, (frames - 1) / frame_rate, slack)
    return _doa_at(track, np.arange(frames) / frame_rate).astype(np.float32)


def check_length(track, seconds, slack=SLACK):
    """Raise ValueError unless sound and picture are about equally long.

    Arguments
    ---------
    seconds : float
        Duration of the sound.
    """
    if abs(track.seconds - seconds) > slack:
        raise ValueError(
            f"the sound lasts {seconds:.2f} s, the face's track "
            f"{track.seconds:.2f} s: give the video that belongs to the "
            f"sound, or cut one of them (up to {slack:g} s may be missing)"
        )


def check_agreement(track, doa, tolerance=TOLERANCE):
    """Raise ValueError where a known direction is not the face's.

    Arguments
    ---------
    track : FaceTrack
        Of the target.
    doa : float
        Direction from elsewhere, degrees.
    tolerance : float
        Degrees by which they may differ.

    Example
    -------
    >>> from speechbrain_mpq.vision.face_track import FaceTrack
    >>> track = FaceTrack(np.full(25, 70.0), np.ones((25, 4)), 25, 360, 288)
    >>> check_agreement(track, 75.0)
    >>> check_agreement(track, 110.0)
    Traceback (most recent call last):
    ValueError: the face is at 70 degrees, the given direction is 110: ...
    """
    if not abs(track.doa - doa) <= tolerance:
        raise ValueError(
            f"the face is at {track.doa:.0f} degrees, the given direction is "
            f"{doa:.0f}: more than {tolerance:g} apart. Is it another face, "
            "is the array the other way round (reverse), or is the camera "
            "turned (yaw) or of another kind?"
        )
