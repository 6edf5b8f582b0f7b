"""Pictures of the lips for manifests that name videos (LRS3, LRS2, GRID).

> python recipes/LRS3/lrs3_lips.py data/lrs3 --size 24 32

Finds the largest face of each video, cuts out its mouth at 25 pictures a
second and puts the files' names into the manifests ("lips"), as the
separators with a lip stream take them. The same command continues.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.recordings import run_jobs, write_manifests
from speechbrain_mpq.utils import atomic_write, read_json
from speechbrain_mpq.vision.face_tracking import track_video
from speechbrain_mpq.vision.video import (
    FPS,
    CascadeDetector,
    Video,
    import_opencv,
    mouth_pictures,
)

SMALLEST_FACE = 0.2  # of the picture's height: these videos are close-ups
SHOWN = 5  # failures named in an error


@one_at_a_time
def prepare_lips(data_folder, size=(24, 32), workers=4, blank=False):
    """Write the pictures that are missing, and name them in the manifests.

    Arguments
    ---------
    data_folder : str or Path
        With `<split>_speech.json` whose entries have "video" and "length",
        and "video_start" where they begin later.
    size : (int, int)
        Height and width of a picture, as the separator's lips_size.
    workers : int
        Processes.
    blank : bool
        Utterances whose face is not found get blank pictures, which stand for
        no picture, instead of raising a ValueError.
    """
    import_opencv()  # a missing package is reported before any work
    data_folder = Path(data_folder).resolve()
    manifests = sorted(data_folder.glob("*_speech.json"))
    if not manifests:
        raise FileNotFoundError(f"no manifests in {data_folder}: prepare first")
    splits = {
        path.name.removesuffix("_speech.json"): read_json(
            path, broken="prepare the corpus again"
        )
        for path in manifests
    }
    name = "lips_{}x{}".format(*size)
    jobs = defaultdict(list)
    for entries in splits.values():
        for key, entry in entries.items():
            entry["lips"] = str(data_folder / name / f"{key}.npy")
            if not Path(entry["lips"]).exists():
                start = entry.get("video_start", 0.0)
                span = (entry["lips"], start, entry["length"])
                jobs[entry["video"]].append(span)
    jobs = [(video, tuple(spans), tuple(size)) for video, spans in jobs.items()]
    failures = run_jobs(cut_lips, jobs, workers, "lips")
    _handle(failures, data_folder / "no_lips.txt", blank)
    write_manifests(data_folder, splits)


def cut_lips(job):
    """Find the mouth in a video once, and write it for its utterances.

    Arguments
    ---------
    job : (str, tuple, tuple)
        Video; (path, start, seconds) of each utterance; size.
    """
    path, spans, size = job
    video = Video(path)
    detector = CascadeDetector(smallest=SMALLEST_FACE)
    track = track_video(video, detector, target="largest")
    pictures = mouth_pictures(video, track.boxes, size, video.fps)
    for name, start, seconds in spans:
        write_pictures(name, span_of(pictures, start, seconds))


def span_of(pictures, start, seconds):
    """The pictures of an utterance; what the video lacks is blank.

    Arguments
    ---------
    pictures : numpy.ndarray
        [pictures, height, width], 25 a second.
    start, seconds : float

    Returns
    -------
    pictures : numpy.ndarray
        As many as the utterance needs.

    Example
    -------
    >>> pictures = np.arange(1, 51, dtype=np.uint8)[:, None, None]
    >>> span_of(pictures, 1.0, 0.1).ravel(), len(span_of(pictures, 1.9, 1.0))
    (array([26, 27, 28], dtype=uint8), 25)
    """
    first, count = round(start * FPS), int(np.ceil(seconds * FPS - 1e-6))
    span = pictures[first : first + count]
    missing = [(0, count - len(span)), (0, 0), (0, 0)]
    return np.pad(span, missing)


def write_pictures(name, pictures):
    """Write a .npy file whole or not at all."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, open(part, "wb") as file:
        np.save(file, pictures)


def _handle(failures, report, blank):
    """Blank pictures or an error for videos without a face."""
    report.unlink(missing_ok=True)
    if not failures:
        return
    report.write_text("\n".join(sorted(failures.values())) + "\n")
    if not blank:
        shown = "\n".join(sorted(failures.values())[:SHOWN])
        raise ValueError(
            f"no lips in {len(failures)} videos, all of them in {report}:\n"
            f"{shown}\nRepair them, or go on without their lips by --blank"
        )
    for _, spans, size in failures:
        for name, _, seconds in spans:
            count = int(np.ceil(seconds * FPS - 1e-6))
            write_pictures(name, np.zeros((count, *size), np.uint8))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_folder")
    parser.add_argument("--size", type=int, nargs=2, default=(24, 32))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--blank", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    prepare_lips(**vars(arguments()))
