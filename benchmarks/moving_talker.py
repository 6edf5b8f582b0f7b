"""What a direction for every frame is worth when the talker walks.

> python benchmarks/moving_talker.py

Free-field mixtures of the embedded test speech: the target walks 45 degrees
within the utterance, the other talker stands 35 to 50 degrees beside its
middle, equally loud. The shipped separator is given the median direction, the
true one of every frame, and what a camera of 720 pixels with boxes that
jitter by 1.5 pixels makes of it; beside it a target who stands still.
"""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly

from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.spatial_features import (
    SPEED_OF_SOUND,
    linear_array,
)
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import load_packed_
from speechbrain_mpq.utils import SAMPLE_RATE
from speechbrain_mpq.vision.face_tracking import frame_doas, track_boxes

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "pretrained" / "separator_mini"
CORPUS = ROOT / "data" / "embedded"
OVERSAMPLING = 16  # before the delays are interpolated
WALK = 45.0  # degrees
NOISE = -35.0  # dB below a talker
WIDTH = 720  # of the camera's picture, pixels


def shipped_separator():
    """The pretrained separator in full precision."""
    separator = build_separator(MODEL / "hyperparams.yaml").eval()
    fold_norms_(separator)
    load_packed_(separator, MODEL)
    return separator


def plane_wave(speech, doa, positions):
    """[samples, mics] of a talker whose direction is given for each sample."""
    fine = resample_poly(speech, OVERSAMPLING, 1)
    advance = np.cos(np.radians(doa))[:, None] * positions / SPEED_OF_SOUND
    times = np.arange(len(speech))[:, None] + advance * SAMPLE_RATE
    return np.interp(times * OVERSAMPLING, np.arange(len(fine)), fine)


def camera_track(doa, rng):
    """What a camera at 25 fps would make of the true directions."""
    places = doa[:: SAMPLE_RATE // 25] / 180 * WIDTH
    jitter = rng.normal(0, 1.5, len(places))
    boxes = [np.array([[x - 20, 100, 40, 40]]) for x in places + jitter]
    return track_boxes(boxes, 25, (WIDTH, 288))


def draw_speech(manifest, rng):
    """Two utterances of equal length and level."""
    chosen = rng.choice(sorted(manifest), 2, replace=False)
    paths = [
        manifest[k]["wav"].replace("{data_root}", str(CORPUS)) for k in chosen
    ]
    both = [soundfile.read(path)[0] for path in paths]
    samples = min(map(len, both))
    return [s[:samples] / s[:samples].std() * 0.05 for s in both]


def scores(separator, manifest, rng):
    """SI-SNR in dB of one drawn scene, under all conditions."""
    positions = linear_array().numpy()
    positions = positions[np.array(separator.features.microphones) - 1]
    target, other = draw_speech(manifest, rng)
    samples = len(target)
    middle = rng.uniform(55, 125)
    walk = middle + WALK * rng.choice((-1, 1)) * np.linspace(-0.5, 0.5, samples)
    beside = middle + rng.choice((-1, 1)) * rng.uniform(35, 50)
    rest = plane_wave(other, np.full(samples, beside), positions)
    rest += rng.normal(0, 0.05 * 10 ** (NOISE / 20), rest.shape)
    frames = samples // separator.features.hop + 1
    track = camera_track(walk, rng)
    scene = plane_wave(target, walk, positions)
    still = plane_wave(target, np.full(samples, middle), positions)
    hops = np.arange(frames) * separator.features.hop
    per_frame = np.interp(hops, np.arange(samples), walk)
    conditions = {
        "stands, its direction": (still, np.full(frames, middle)),
        "walks, median direction": (scene, np.full(frames, middle)),
        "walks, true directions": (scene, per_frame),
        "walks, camera's track": (scene, frame_doas(track, frames)),
    }
    return {
        name: score(separator, image, rest, doas)
        for name, (image, doas) in conditions.items()
    }


@torch.no_grad()
def score(separator, image, rest, doas):
    """SI-SNR of the target at microphone 1."""
    mixture = torch.from_numpy(image + rest).float()[None]
    doa = torch.from_numpy(np.asarray(doas, np.float32))[None, None]
    estimate = separator(mixture, doa)[:, 0]
    return si_snr(estimate, torch.from_numpy(image[:, 0]).float()[None]).item()


def main(count=24):
    """Print the mean of each condition."""
    rng = np.random.default_rng(1234)
    manifest = json.loads((CORPUS / "test_speech.json").read_text("utf-8"))
    separator = shipped_separator()
    rows = [scores(separator, manifest, rng) for _ in range(int(count))]
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:24s} {np.mean(values):6.2f} dB")


if __name__ == "__main__":
    main(*sys.argv[1:])
