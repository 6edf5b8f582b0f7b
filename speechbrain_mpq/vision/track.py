"""From the faces of all frames to the track of the talker that is wanted."""

import numpy as np

from .camera import PanoramaCamera
from .face_track import FaceTrack
from .linking import centers, link_faces
from .smoothing import bend_penalty, smooth
from .target import choose_face


def track_boxes(
    detections,
    fps,
    size,
    camera=None,
    target=None,
    near=None,
    bandwidth=1.0,
    source="boxes",
):
    """Boxes of all frames to the track of the target's face.

    Arguments
    ---------
    detections : sequence of np.ndarray
        For each frame [boxes, 4]: x, y, width, height in pixels.
    fps : float
        Frames per second.
    size : (int, int)
        Width and height of the picture in pixels.
    camera : Camera | None
        The paper's 180-degree camera if not given.
    target, near : int | str | None, float | None
        Which face, see `target.choose_face`.
    bandwidth : float
        Hz: sways of this frequency are halved, slower ones stay.
    source : str
        What to call it in errors and in the track file.

    Returns
    -------
    track : FaceTrack
        Of the target.

    Example
    -------
    >>> boxes = [np.array([[80.0 + t, 50, 20, 20]]) for t in range(3)]
    >>> track = track_boxes(boxes, fps=25, size=(360, 288))
    >>> track.doas.round(6)  # x / width * 180
    array([45. , 45.5, 46. ])
    """
    camera = PanoramaCamera(size[0]) if camera is None else camera
    penalty = _penalty(bandwidth, fps, source)
    faces = link_faces(detections, fps)  # [faces, frames, 4]
    if not len(faces):
        raise ValueError(
            f"{source}: no face in any of its {len(detections)} frames (or "
            "in too few of them to be one)"
        )
    points = centers(faces)  # [faces, frames, 2]
    _check_inside(points, size, source)
    doas = camera.doa(points[..., 0], points[..., 1])  # [faces, frames]
    try:
        chosen = choose_face(
            np.nanmedian(doas, axis=1),
            np.nanmedian(faces[:, :, 2], axis=1),
            target,
            near,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return FaceTrack(
        doas=np.clip(smooth(doas[chosen], penalty), 0, 180),
        boxes=faces[chosen],
        fps=fps,
        width=int(size[0]),
        height=int(size[1]),
        faces=len(faces),
        target=chosen + 1,
        source=source,
    )


def track_video(video, detector, bandwidth=1.0, **kwargs):
    """Find the faces in a video and follow the target's.

    Arguments
    ---------
    video : Video
        The file.
    detector : callable
        From a frame [height, width, 3] to boxes [faces, 4].
    bandwidth : float
        See `track_boxes`.
    **kwargs
        See `track_boxes`.

    Returns
    -------
    track : FaceTrack
        Of the target.
    """
    source = str(video.path)
    _penalty(bandwidth, video.fps, source)  # complain before the long part
    return track_boxes(
        [detector(frame) for frame in video],
        video.fps,
        size=(video.width, video.height),
        bandwidth=bandwidth,
        source=source,
        **kwargs,
    )


def _penalty(bandwidth, fps, source):
    """The smoother's penalty, errors with the video's name."""
    if not 1 <= fps <= 1000:
        raise ValueError(f"{source}: {fps} is no number of frames per second")
    try:
        return bend_penalty(bandwidth, fps)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_inside(points, size, source):
    """Faces outside of the picture: boxes and size are of two videos."""
    if (points < 0).any() or (points > size).any():
        x, y = np.nanmax(np.abs(points), axis=(0, 1))
        raise ValueError(
            f"{source}: a face is centred at ({x:.0f}, {y:.0f}) or so, which "
            f"is not in a picture of {size[0]:g} x {size[1]:g} pixels: give "
            "the size of the video that the boxes are from"
        )
