"""What a camera of 180 degrees over the array sees of a mixture.

Every talker stands at the horizontal position that belongs to the direction
of arrival, x / width * 180 degrees, and is as large as the distance makes it.
"""

import zlib

import numpy as np

from speechbrain_mpq.simulation.faces import (
    CANVAS,
    draw_look,
    draw_talker,
    mouth_shapes,
)
from speechbrain_mpq.simulation.lip_videos import draw_pose

FIELD = 180.0  # degrees from edge to edge
FACE = 0.22  # metres, width of a face box


class Panorama:
    """Renders the pictures of a wide-angle camera.

    Arguments
    ---------
    videos : LipVideos
        Its maker, its phonemes, what it shows.
    width, height : int
        Of a picture, pixels.
    noise : float
        Deviation of the pixels' noise, 0 to 1.

    Example
    -------
    >>> panorama = Panorama(LipVideos(maker, (24, 32)))  # doctest: +SKIP
    >>> frames, boxes = panorama.render(mixture)  # doctest: +SKIP
    """

    def __init__(self, videos, width=1920, height=320, noise=0.01):
        self.videos = videos
        self.width = width
        self.height = height
        self.noise = noise

    def render(self, mixture):
        """All pictures of a mixture.

        Arguments
        ---------
        mixture : dict
            From `MixtureMaker.draw`.

        Returns
        -------
        frames : numpy.ndarray
            [pictures, height, width], bytes, grey, 25 a second.
        boxes : numpy.ndarray
            [2, pictures, 4], x, y, width and height of the faces of target
            and interferer in pixels.
        """
        name = f"panorama {mixture['target']} {mixture['interferer']}"
        maker = self.videos.maker
        rng = np.random.default_rng([maker.seed, zlib.crc32(name.encode())])
        backdrop = self._backdrop(rng)
        count = len(self.videos.times(mixture, "target"))
        frames = np.repeat(backdrop[None], count, axis=0)
        # The nearer face covers the other one
        talkers = sorted(
            ("target", "interferer"),
            key=lambda role: -self._distance(mixture, role),
        )
        boxes = {
            role: self._place_(frames, mixture, role, rng) for role in talkers
        }
        noise = rng.standard_normal(backdrop.shape, np.float32) * self.noise
        frames = np.clip((frames + noise) * 255, 0, 255).astype(np.uint8)
        return frames, np.stack([boxes["target"], boxes["interferer"]])

    def _place_(self, frames, mixture, role, rng):
        """Draw a talker into all frames; the boxes of the face."""
        size = self._size(mixture, role)
        key = mixture[role]
        entry = self.videos.maker.speech[key]
        own = np.random.default_rng(zlib.crc32(entry["speaker"].encode()))
        look = draw_look(own)
        times = self.videos.times(mixture, role)
        shapes = mouth_shapes(entry["phonemes"], times)
        faces, cover = draw_talker(shapes, look, own, size)
        doa = mixture["doa" if role == "target" else "doa_interferer"]
        pose = draw_pose(rng, len(times), 0.02)
        x = doa / FIELD * self.width + pose.x * size
        y = self.height * 0.5 + pose.y * size
        for frame, face, column, row in zip(frames, faces, x, y):
            _paste_(frame, face, cover, column, row)
        corner = np.rint(np.stack([x, y], 1) - size / 2)
        return np.concatenate([corner, np.full_like(corner, size)], axis=1)

    def _distance(self, mixture, role):
        """Metres from the array to a talker."""
        talker = mixture["talkers"][role == "interferer"]
        info = self.videos.maker.rooms.info[mixture["room"]]
        return float(info[5 + talker])  # after T60s and dimensions

    def _size(self, mixture, role):
        """Pixels of a face box at a talker's distance."""
        angle = 2 * np.arctan(FACE / 2 / self._distance(mixture, role))
        pixels = np.degrees(angle) / FIELD * self.width
        return round(float(np.clip(pixels, 48, self.height / CANVAS)))

    def _backdrop(self, rng):
        """A wall with soft large and small patches."""
        rows, columns = self.height // 32 + 2, self.width // 32 + 2
        coarse = rng.uniform(0.35, 0.65, (rows, columns))
        y = np.linspace(0, rows - 1.001, self.height)[:, None]
        x = np.linspace(0, columns - 1.001, self.width)[None]
        top, left = y.astype(int), x.astype(int)
        down, right = y - top, x - left
        upper = coarse[top, left] * (1 - right) + coarse[top, left + 1] * right
        lower = (
            coarse[top + 1, left] * (1 - right)
            + coarse[top + 1, left + 1] * right
        )
        return (upper * (1 - down) + lower * down).astype(np.float32)


def _paste_(frame, face, cover, x, y):
    """Lay a face over a frame, its middle at (x, y); what is outside is cut."""
    height, width = frame.shape
    size = len(face)
    left, top = round(x - size / 2), round(y - size / 2)
    rows = slice(max(top, 0), min(top + size, height))
    columns = slice(max(left, 0), min(left + size, width))
    inside = (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    part = frame[rows, columns]
    part += (face[inside] - part) * cover[inside]
