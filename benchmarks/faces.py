"""How well and how fast real faces are found, and what direction they give.

> python benchmarks/faces.py clips/

Any folder with talking-head clips will do; the table of docs/camera.md is of
six clips of the GRID corpus (25 fps, 360x288). First the clips as they are;
then two of them at a time, made smaller, are carried through a panorama of
180 degrees, so that the directions are known. The time is CPU time of one
thread.
"""

import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np

from speechbrain_mpq.vision.face_tracking import centers, track_boxes
from speechbrain_mpq.vision.video import CascadeDetector, Video, import_opencv

PANORAMA = 1440, 400  # pixels
SCALES = (0.25, 0.35, 0.5)  # of the clips
WALKS = (  # degrees at the start and at the end, two talkers
    ((50, 50), (130, 130)),
    ((40, 100), (150, 150)),
    ((60, 120), (120, 60)),  # they pass each other
)


def timed(detector, frames):
    """Boxes of all frames, and the CPU seconds for them."""
    start = time.process_time()
    boxes = [detector(frame) for frame in frames]
    return boxes, time.process_time() - start


def panorama(clips, places, scale, rng):
    """A frame of a panorama with a frame of each clip at its place."""
    cv2 = import_opencv()
    width, height = PANORAMA
    picture = rng.integers(90, 110, (height, width, 3), dtype=np.uint8)
    for frame, place in zip(clips, places):
        small = cv2.resize(
            frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA
        )
        left, right = max(0, place), min(width, place + small.shape[1])
        rows = slice(60, 60 + small.shape[0])
        picture[rows, left:right] = small[:, left - place : right - place]
    return picture


def carried(detector, pair, walk, scale, rng):
    """Tracks, true directions and CPU seconds of one scene."""
    clips = [list(Video(path)) for path in pair]
    middles = [centers(detector(c[0]))[0, 0] * scale for c in clips]
    count = min(map(len, clips))
    # What the middle of the clip's first face should be at, pixels
    aims = [np.linspace(*ends, count) / 180 * PANORAMA[0] for ends in walk]
    places = np.array([np.rint(a - m) for a, m in zip(aims, middles)], int)
    truth = (places.T + middles) / PANORAMA[0] * 180  # [frames, talkers]
    frames = (
        panorama(now, places[:, t], scale, rng)
        for t, now in enumerate(zip(*clips))
    )
    pictures = list(frames)
    boxes, seconds = timed(detector, pictures)
    tracks = [track_boxes(boxes, 25, PANORAMA, target=k) for k in (1, 2)]
    return tracks, truth, seconds


def errors(tracks, truth):
    """Degrees that each track is off, from the talker that it began with."""
    for track in tracks:
        first = np.argmax(track.visible)
        talker = np.argmin(np.abs(truth[first] - track.doas[first]))
        yield np.abs(track.doas - truth[:, talker])


def main(folder):
    """Print both tables."""
    import_opencv().setNumThreads(1)
    detector, rng = CascadeDetector(), np.random.default_rng(1234)
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix != ".align")
    found = total = spent = 0
    for path in paths:
        start = time.process_time()  # with reading the video
        boxes = [detector(frame) for frame in Video(path)]
        spent += time.process_time() - start
        found += sum(len(b) == 1 for b in boxes)
        total += len(boxes)
    print(f"one face in {found} of {total} frames, {total / spent:.0f} fps")
    pairs = list(islice(zip(paths[::2], paths[1::2]), 3))
    for scale in SCALES:
        scenes = [
            carried(detector, pair, walk, scale, rng)
            for pair, walk in zip(pairs, WALKS)
        ]
        off = [e for s in scenes for e in errors(*s[:2])]
        seen = np.mean([t.visible.mean() for s in scenes for t in s[0]])
        fps = sum(len(s[1]) for s in scenes) / sum(s[2] for s in scenes)
        print(
            f"faces x {scale}: visible {seen:.3f}, off by "
            f"{np.mean(np.concatenate(off)):.2f} degrees (at most "
            f"{max(e.max() for e in off):.2f}), {fps:.0f} fps"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
