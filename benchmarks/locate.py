"""How well talkers are located, and what directions found so cost.

> python benchmarks/locate.py

Both talkers of the test mixtures of the embedded corpus are located from the
sound alone: with their number known, with it found, and by SpeechBrain's
SRP-PHAT and MUSIC, whose direction of every frame gives a histogram. (Their
grid is a sphere; a half circle of degrees takes its place. MUSIC is given two
sources and averages over 16 frames.) Then the target is separated in the
direction found for it: of the assignments of directions to talkers the one with
the smallest error, as a user would choose by ear. And how often `separate`
would warn that a direction has little sound: a true one, and ones far from both
talkers.

Needs the corpus in data/embedded (`make demo` makes it, or --prepare, which
makes the part that is needed here).
"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import torch

from speechbrain_mpq.commands.separate import LITTLE
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.evaluation.signal_tasks import BUCKET_NAMES, bucket_of
from speechbrain_mpq.inference.interfaces import LightSeparator
from speechbrain_mpq.inference.localization import (
    DIRECTIONS,
    Localizer,
    find_talkers,
)
from speechbrain_mpq.simulation.corpus import prepare_speech
from speechbrain_mpq.simulation.mixtures import (
    MixtureMaker,
    fixed_mixtures,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms
from speechbrain_mpq.utils import SAMPLE_RATE, write_json

ROOT = Path(__file__).parents[1]
CLOSE = 5.0  # degrees that count as found
ROOMS = {"valid": 50, "test": 100}
MUSIC_FRAMES = 16
ALONE = 80.0  # dB below which nobody is heard
ELSEWHERE = 25.0  # degrees from both talkers
OWN = ("number known", "number found")
THEIRS = ("SRP-PHAT", "MUSIC")


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "pretrained/separator_mini")
    parser.add_argument("--data", type=Path, default=ROOT / "data/embedded")
    parser.add_argument("--split", choices=ROOMS, default="test")
    parser.add_argument("--mixtures", type=int, default=200)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--quick", action="store_true", help="locate only")
    parser.add_argument("--theirs", action="store_true", help="SpeechBrain's")
    parser.add_argument(
        "--alone", action="store_true", help="the target alone talks"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def prepare(options, microphones):
    """Make what is missing of the corpus: speech and rooms."""
    if not (options.data / f"{options.split}_speech.json").exists():
        prepare_speech(options.data, train=0, valid=100, test=400)
    prepare_rooms(options.data, ROOMS, microphones)


def mixtures(options):
    """What was drawn, and its signals."""
    speech = load_speech(
        options.data / f"{options.split}_speech.json", options.data
    )
    bank = RoomBank(options.data, options.split, ROOMS[options.split])
    maker = MixtureMaker(speech, bank)
    for drawn in fixed_mixtures(maker, options.mixtures).values():
        if options.alone:
            drawn = {**drawn, "sir": ALONE}
        signals = maker.render(drawn)
        names = ("mixture", "target")
        yield drawn, *(torch.from_numpy(signals[name]) for name in names)


def speechbrain_ways(positions):
    """SpeechBrain's two ways to locate, on a half circle of directions."""
    from speechbrain.processing.multi_mic import Music, SrpPhat, doas2taus

    angles = torch.deg2rad(DIRECTIONS)
    circle = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)
    mics = torch.zeros(len(positions), 3)
    mics[:, 0] = positions.float()
    ways = SrpPhat(mics), Music(mics, n_sig=2)
    for way in ways:
        way.doas, way.taus = circle, doas2taus(circle, mics, SAMPLE_RATE)
    return dict(zip(THEIRS, ways))


def by_speechbrain(name, way, mixture):
    """Two directions by the histogram of a direction for every frame."""
    from speechbrain.processing.features import STFT
    from speechbrain.processing.multi_mic import Covariance

    spectra = STFT(sample_rate=SAMPLE_RATE, n_fft=512)(mixture[None])
    covariance = Covariance(average=False)(spectra)
    if name == "MUSIC":
        frames = covariance.shape[1] // MUSIC_FRAMES * MUSIC_FRAMES
        blocks = covariance[:, :frames].unflatten(1, (-1, MUSIC_FRAMES))
        covariance = blocks.mean(2)
    found = way(covariance)[0, :, 0].clamp(-1, 1).acos().rad2deg()
    counts = found.round().long().bincount(minlength=len(DIRECTIONS))
    return [t.doa for t in find_talkers(counts / counts.sum(), 2)]


def errors(found, true):
    """Errors in degrees of both talkers, target first, and its direction."""
    if not found:
        return [180.0, 180.0], None
    pairs = [(a, b) for a in found for b in found if a != b]
    pairs = pairs or [(found[0], found[0])]
    best = min(pairs, key=lambda p: sum(abs(a - b) for a, b in zip(p, true)))
    wrong = [abs(a - b) for a, b in zip(best, true)]
    if len(found) == 1:  # the other one is missing
        wrong[wrong.index(max(wrong))] = 180.0
    return wrong, best[0]


def score(model, mixture, target, doa):
    """SI-SNR of the target, separated at a direction."""
    estimate = model.separate_batch(mixture[None], [doa])[0, 0]
    return si_snr(estimate, target).item()


def measure(model, items, options):
    """A row for every mixture."""
    localizer = Localizer(model.separator.features.positions)
    theirs = speechbrain_ways(localizer.positions) if options.theirs else {}
    rows = []
    for drawn, mixture, target in items:
        true = drawn["doa"], drawn["doa_interferer"]
        started = time.process_time()
        found = localizer.locate(mixture)
        seconds = time.process_time() - started
        ways = {
            "number known": [t.doa for t in find_talkers(found.curve, 2)],
            "number found": [t.doa for t in found.talkers],
        }
        for name, way in theirs.items():
            ways[name] = by_speechbrain(name, way, mixture)
        row = {
            "angle": drawn["angle"],
            "talkers": len(found.talkers),
            "warned": found.share_at(true[0]) < LITTLE,
            "warned_elsewhere": [
                found.share_at(doa) < LITTLE
                for doa in range(10, 180, 20)
                if min(abs(doa - d) for d in true) > ELSEWHERE
            ],
            "cpu": seconds / (len(mixture) / SAMPLE_RATE),
        }
        for name, doas in ways.items():
            wrong, doa = errors(doas, true)
            row[name] = {"errors": wrong}
            if not options.quick and doa is not None and name in OWN:
                row[name]["si_snr"] = score(model, mixture, target, doa)
        if not options.quick:
            row["si_snr"] = score(model, mixture, target, true[0])
        rows.append(row)
    return rows


def summary(rows, name):
    """Shares that are found, errors, and SI-SNR below that of true ones."""
    wrong = np.array([row[name]["errors"] for row in rows])
    result = {
        "n": len(rows),
        "both": float((wrong.max(1) <= CLOSE).mean()),
        "target": float((wrong[:, 0] <= CLOSE).mean()),
        "median_error": median(wrong.ravel().tolist()),
    }
    scored = [row for row in rows if "si_snr" in row[name]]
    lost = [row["si_snr"] - row[name]["si_snr"] for row in scored]
    if lost:
        near = [
            one
            for one, row in zip(lost, scored)
            if row[name]["errors"][0] <= CLOSE
        ]
        result["lost_where_found"] = fmean(near)
        result["true"] = fmean(row["si_snr"] for row in rows)
        result["lost"] = fmean(lost)
        result["standard_error"] = stdev(lost) / len(lost) ** 0.5
    return result


def show(label, result):
    """Print one line."""
    line = (
        f"{label:24}{result['n']:4}  both {100 * result['both']:5.1f} %  "
        f"target {100 * result['target']:5.1f} %  median "
        f"{result['median_error']:5.2f} deg"
    )
    if "lost" in result:
        line += (
            f"  SI-SNR {result['true']:5.2f} -> {-result['lost']:+.2f} "
            f"± {result['standard_error']:.2f} dB, "
            f"{-result['lost_where_found']:+.2f} where found"
        )
    print(line, flush=True)


def main(arguments=None):
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(1)
    model = LightSeparator(options.model)
    if options.prepare:
        prepare(options, model.microphones)
    rows = measure(model, mixtures(options), options)
    groups = {"over 15 degrees": [r for r in rows if r["angle"] > 15]}
    for name in BUCKET_NAMES:
        groups[name] = [r for r in rows if bucket_of(r["angle"]) == name]
    groups["all"] = rows
    results = {}
    for name in (*OWN, *(THEIRS if options.theirs else ())):
        for group, some in groups.items():
            result = results[f"{name}, {group}"] = summary(some, name)
            show(f"{name}, {group}", result)
    for group, some in groups.items():
        counts = np.bincount([r["talkers"] for r in some], minlength=5)
        results[f"talkers, {group}"] = counts.tolist()
        print(f"talkers found, {group}: {dict(enumerate(counts.tolist()))}")
    warned = fmean(row["warned"] for row in rows)
    elsewhere = fmean(w for row in rows for w in row["warned_elsewhere"])
    print(f"`separate` warns of {100 * warned:.1f} % of the true directions,")
    print(f"of {100 * elsewhere:.1f} % of those far from both talkers")
    cpu = median(row["cpu"] for row in rows)
    print(f"{cpu:.4f} CPU s per s of sound")
    if options.out:
        about = {
            "command": "python benchmarks/locate.py "
            + " ".join(sys.argv[1:] if arguments is None else arguments),
            "date": str(date.today()),
            "split": options.split,
            "cpu_per_second": cpu,
            "warned": warned,
            "warned_elsewhere": elsewhere,
        }
        write_json(options.out, {**about, "results": results})


if __name__ == "__main__":
    main()
