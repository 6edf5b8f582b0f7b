"""What the lips are worth: the same test mixtures with other pictures.

> python benchmarks/lips.py results/pretrain_av_32bit/1234/packed

Scores a packed separator with a lip stream on the embedded test set: with the
talker's own lips as a camera delivers them, with perfect ones, late ones, none,
a frozen picture, those of another utterance and those of the talker beside.
`--audio_only` is scored next to it. `--camera True` adds the whole chain: a
panorama of drawn faces is rendered, the faces are found by the detector,
their track gives the direction and the boxes the lips; nothing else is known
but which face is meant; how that ends where the face followed was another one
is told apart. `--every N` takes one of N mixtures, `--bucket 0-15` those of
talkers so many degrees apart.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from panorama import Panorama
from tqdm import tqdm

from speechbrain_mpq.evaluation.results import score_separation
from speechbrain_mpq.evaluation.runs import summarise
from speechbrain_mpq.evaluation.signal_tasks import BUCKET_NAMES, bucket_of
from speechbrain_mpq.inference.loading import build_separator
from speechbrain_mpq.inference.speech_recognition import Recognizer
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import load_packed_
from speechbrain_mpq.simulation.dataio import listed_mixtures
from speechbrain_mpq.simulation.lip_videos import PERFECT, Corruption, LipVideos
from speechbrain_mpq.simulation.mixtures import (
    MixtureMaker,
    fixed_mixtures,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank
from speechbrain_mpq.training.experiment import read_hparams
from speechbrain_mpq.vision.face_tracking import centers

HPARAMS = "hparams/pretrain_av.yaml"
CONDITIONS = {  # name: what is shown, which faults
    "own lips": ("own", None),
    "perfect lips": ("own", PERFECT),
    "lips 0.3 s late": ("own", Corruption((0.3, 0.3))),
    "no lips": ("none", None),
    "frozen lips": ("frozen", None),
    "other lips": ("other", None),
    "interferer's lips": ("interferer", None),
}
LOOKS = 3  # frames from one look at the scene to the next
SMALLEST = 0.085  # of the picture's height: 27 of 320 pixels
NEAR = 3.0  # degrees: a face farther from the talker is another one
ROLES = ("target", "interferer")


def test_set(hparams, every, bucket=None):
    """Maker and list of the test mixtures, all or those of a bucket."""
    folder = hparams["data_folder"]
    maker = MixtureMaker(
        load_speech(hparams["test_speech"], folder),
        RoomBank(folder, "test", hparams["rooms"]["test"]),
        seed=hparams["corpus_seed"],
        doa_error=hparams["doa_error"],
    )
    mixtures = fixed_mixtures(maker, hparams["mixtures"]["test"])
    # All four buckets stay: they take turns
    kept = {
        k: m for i, (k, m) in enumerate(mixtures.items()) if _kept(i, every)
    }
    if bucket is not None:
        kept = {k: m for k, m in kept.items() if bucket_of(angle(m)) == bucket}
    return maker, kept


def angle(mixture):
    """Degrees between the talkers."""
    return abs(mixture["doa"] - mixture["doa_interferer"])


def _kept(index, every):
    """Whether a mixture is among those looked at, four at a time."""
    return index // 4 % every == 0


def load(folder):
    """A packed separator in eval mode."""
    separator = build_separator(Path(folder) / "hyperparams.yaml").eval()
    fold_norms_(separator)
    return load_packed_(separator, folder)


def through_the_camera(item, panorama, detector, size):
    """The item with direction and lips from a video of the scene.

    Returns None where the target's face is not found.
    """
    from speechbrain_mpq.vision.face_tracking import frame_doas, track_boxes
    from speechbrain_mpq.vision.video import mouth_pictures

    drawn = item["drawn"]
    frames, faces = panorama.render(drawn)
    found = [
        [] if number % LOOKS else detector(frame)
        for number, frame in enumerate(frames)
    ]
    try:
        track = track_boxes(
            found, 25, frames.shape[:0:-1], near=drawn["doa_given"]
        )
    except ValueError:  # no face at all
        return None
    if abs(track.doa - drawn["doa_given"]) > NEAR:
        return None
    lips = mouth_pictures(frames, track.boxes, size)
    steps = len(item["mixture"]) // 256 + 1
    doa = torch.from_numpy(frame_doas(track, steps))[None]  # [1, frames]
    return {
        **item,
        "doa": doa,
        "lips": torch.from_numpy(lips)[None],
        "error": abs(track.doa - drawn["doa"]),
        "followed": followed(track, faces),
    }


def followed(track, faces):
    """Whose face is nearer to the track's boxes, "target" or "interferer"."""
    seen = track.visible
    apart = centers(faces[:, seen]) - centers(track.boxes[seen])
    return ROLES[np.linalg.norm(apart, axis=-1).mean(1).argmin()]


def camera_items(items, panorama, size):
    """All items through the camera; those without a face have no lips."""
    from speechbrain_mpq.vision.video import CascadeDetector

    detector, seen = CascadeDetector(SMALLEST), []
    for item in tqdm(items, desc="camera", disable=not sys.stderr.isatty()):
        seen.append(through_the_camera(item, panorama, detector, size))
    errors = [item["error"] for item in seen if item]
    print(
        f"Camera: {len(errors)} of {len(items)} targets found, "
        f"{np.median(errors):.2f} degrees off in the median; the others keep "
        "their direction and have no lips"
    )
    blank = [{k: v for k, v in item.items() if k != "lips"} for item in items]
    return [item or other for item, other in zip(seen, blank)]


def by_face(seen, decibels):
    """SI-SNR in all conditions, by whose face was followed.

    Arguments
    ---------
    seen : list of dict
        Items through the camera.
    decibels : dict of str -> dict of str -> float
        Condition -> item -> SI-SNR in dB.

    Returns
    -------
    means : dict of str -> dict of str -> float
        Whose face -> condition -> mean, and "n".
    """
    means = {}
    for whose in (*ROLES, "nobody"):
        names = [i["id"] for i in seen if i.get("followed", "nobody") == whose]
        means[whose] = {"n": len(names)}
        if names:
            means[whose] |= {
                condition: float(np.mean([values[name] for name in names]))
                for condition, values in decibels.items()
            }
    return means


def _cell(value, width, digits):
    """A number of the table, a dash where there is none."""
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"


def line(name, summary):
    """One line of the table."""
    rows = [*summary["buckets"].values(), summary["average"]]
    decibels = "".join(_cell(row["si_snr"], 8, 2) for row in rows)
    words = "".join(_cell(row["wer"], 7, 1) for row in rows)
    return f"{name:20}{decibels}  {words}"


def main():
    """Score every condition and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packed", help="packed folder, with a lip stream")
    parser.add_argument("--audio_only", default="pretrained/separator_mini")
    parser.add_argument("--camera", default="False")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--bucket", choices=BUCKET_NAMES)
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS))
    parser.add_argument("--overrides", default="", help="YAML text")
    parser.add_argument("--out", default="", help="JSON file of the numbers")
    arguments = parser.parse_args()
    hparams = read_hparams(HPARAMS, arguments.overrides)
    torch.set_num_threads(hparams["threads"])
    separator = load(arguments.packed)
    if separator.lips_size is None:
        raise SystemExit(f"{arguments.packed} has no lip stream")
    maker, mixtures = test_set(hparams, arguments.every, arguments.bucket)
    recognize, summaries = Recognizer(hparams["asr_source"]), {}
    decibels = {}

    def score(name, model, items):
        """Score one condition and print its line at once."""
        scored = score_separation(
            model, items, recognize, hparams["workers"], keep=0
        )
        summaries[name] = summarise(scored.items)
        decibels[name] = {item["id"]: item["si_snr"] for item in scored.items}
        print(line(name, summaries[name]), flush=True)

    print(f"{'':20}{'SI-SNR in dB by bucket, avg.':>40}  {'WER in %':>35}")
    items = list(listed_mixtures(maker, mixtures))
    if arguments.audio_only:
        score("audio only", load(arguments.audio_only), items)
    for name in arguments.only:
        shown, faults = CONDITIONS[name]
        videos = LipVideos(maker, separator.lips_size, faults, shown)
        score(name, separator, list(listed_mixtures(maker, mixtures, videos)))
    if arguments.camera == "True":
        videos = LipVideos(maker, separator.lips_size)
        seen = camera_items(items, Panorama(videos), separator.lips_size)
        score("through the camera", separator, seen)
        summaries["by face"] = by_face(seen, decibels)
        print("SI-SNR in dB by whose face was followed:")
        for whose, means in summaries["by face"].items():
            count, *rest = means.items()
            shown = ", ".join(f"{name} {value:.2f}" for name, value in rest)
            print(f"{whose:12}{count[1]:4} mixtures  {shown}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(summaries, indent=1) + "\n")


if __name__ == "__main__":
    main()
