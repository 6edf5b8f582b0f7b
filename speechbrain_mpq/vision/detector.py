"""Find faces in a picture by the cascade that comes with OpenCV.

This is the detector of Viola and Jones (2001) with OpenCV's trained file
`haarcascade_frontalface_alt2`, which needs no download. It finds upright
faces that look at the camera to about 30 degrees; it is no neural network,
and faces in profile or behind a hand are lost. Whoever has a better detector
gives its boxes, or any function from a frame to boxes, instead.
"""

from pathlib import Path

import numpy as np

from .video import HINT, import_opencv

CASCADE = "haarcascade_frontalface_alt2.xml"
FACE = 24  # pixels: pictures are shrunk until the smallest face is this wide


class CascadeDetector:
    """Find faces by OpenCV's bundled frontal-face cascade.

    Arguments
    ---------
    smallest : float
        Width of the smallest face, as a part of the picture's height. The
        time for a picture grows with its inverse square, and does not depend
        on the picture's size.
    neighbours : int
        Hits that must overlap for a face: more misses more faces and finds
        fewer false ones.

    Example
    -------
    >>> detector = CascadeDetector()
    >>> detector(np.zeros((288, 360, 3), np.uint8)).shape  # no face
    (0, 4)
    """

    def __init__(self, smallest=0.1, neighbours=5):
        if not 0 < smallest <= 1:
            raise ValueError(
                "smallest is a part of the picture's height, 0 to 1, got "
                f"{smallest}"
            )
        self.smallest = smallest
        self.neighbours = neighbours
        self.cascade = _load_cascade()

    def __call__(self, frame):
        """Find the faces.

        Arguments
        ---------
        frame : np.ndarray
            [height, width, 3] or [height, width], bytes.

        Returns
        -------
        boxes : np.ndarray
            [faces, 4], x, y, width and height in pixels of the frame, from
            left to right.
        """
        cv2 = import_opencv()
        if frame.ndim == 3:
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        scale = min(1.0, FACE / (self.smallest * frame.shape[0]))
        if scale < 1:
            frame = cv2.resize(
                frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA
            )
        boxes = self.cascade.detectMultiScale(
            frame,
            scaleFactor=1.1,
            minNeighbors=self.neighbours,
            minSize=(FACE - 4, FACE - 4),  # steps of 10 % may jump over it
        )
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) / scale
        return boxes[np.argsort(boxes[:, 0])]


def _load_cascade():
    """The classifier; OpenCV 5 has moved it out of its main package."""
    cv2 = import_opencv()
    path = Path(cv2.data.haarcascades) / CASCADE
    if not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise ImportError(
            f"OpenCV {cv2.__version__} comes without the face cascade: {HINT}"
        )
    return cv2.CascadeClassifier(str(path))
