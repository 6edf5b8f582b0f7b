"""Seven hours of people's voices from Debian packages, as strings of speech.

> python recipes/Voices/voices_prepare.py debs --data_folder data/voices

The folder holds .deb files, or what was unpacked from them. Recordings are
decoded, checked, trimmed, brought to one level and joined within a talker to
strings of 3 to 5 seconds at 16 kHz. A talker is in one split only. What is
there already is kept. See README.md.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.noise import resampled
from speechbrain_mpq.simulation.recordings import (
    ffmpeg_program,
    first_line,
    limit_peak,
    run_jobs,
    seconds_of,
    set_level,
    write_flac,
    write_manifests,
)
from speechbrain_mpq.utils import SAMPLE_RATE, write_text

SUFFIXES = (".g722", ".gsm", ".wav", ".ogg", ".opus", ".flac", ".mp3")
RAW = {".g722": ["-f", "g722"], ".gsm": ["-f", "gsm"]}  # without a header
BELOW_PEAK = 30  # dB: what is softer at the ends is trimmed
SHORTEST, LONGEST = 0.2, 8.0  # seconds of a trimmed recording
PAUSE = (0.05, 0.3)  # seconds between two recordings
STRING = 3.0  # seconds that a string has at least
LOW_ENERGY = 0.15  # share of frames below half the mean RMS: less is no speech
JUDGED = 2.0  # seconds from which on that share means anything
LEAST = 8.0  # seconds of all recordings of a talker
FEWEST = 40  # strings of a talker, however little was recorded
MOST = 500  # of one talker, however much was

# Talkers of no other split. Where one language has a voice in two packages,
# it may be the same volunteer's: both are held out.
HELD_OUT = {
    "valid": (
        "asterisk_fr_CA_f_June",
        "asterisk_it_f_Menardi",
        "kde_fi",
        "kde_he",
        "kde_pt",
        "kde_uk",
    ),
    "test": (
        "asterisk_ru_RU_f_IvrvoiceRU",
        "asterisk_fr_armelle",
        "kde_ar",
        "kde_el",
        "kde_hu",
        "kde_ru",
        "pocketsphinx_librivox",
    ),
}


@dataclass(frozen=True)
class Corpus:
    """A package: where its recordings lie, who talks, and on what terms.

    Arguments
    ---------
    path : str
        Regular expression of a recording's path inside the package; its
        group "who" tells the talkers apart.
    talker : str
        Name of a talker, with {who} in it.
    license : str
        Of the recordings.
    attribution : str
        Who is to be named.
    """

    path: str
    talker: str
    license: str
    attribution: str


_PROMPTS = "Asterisk core sounds, Digium and its voices"
_DIGIUM = "CC-BY-SA-3.0"
CORPORA = {
    "asterisk-core-sounds-LANGUAGE-g722": Corpus(
        # Allison says the English and the Spanish prompts
        r"asterisk/sounds/(?P<who>[a-z]{2}_[A-Z]{2}_[fm]_\w+)/.*\.g722",
        "asterisk_{who}",
        _DIGIUM,
        _PROMPTS,
    ),
    "asterisk-prompt-it-menardi-wav": Corpus(
        r"asterisk/sounds/it_IT_(?P<who>f_Menardi)/.*\.wav",
        "asterisk_it_{who}",
        _DIGIUM,
        "Paola Menardi, Italian prompts for Asterisk",
    ),
    "asterisk-prompt-es-co": Corpus(
        r"asterisk/sounds/(?P<who>es)/.*\.gsm",
        "asterisk_{who}_co",
        "GPL-2+",
        "Colombian Spanish prompts for Asterisk",
    ),
    "asterisk-prompt-fr-armelle": Corpus(
        r"asterisk/sounds/(?P<who>fr)/.*\.gsm",
        "asterisk_{who}_armelle",
        "GPL-2+",
        "Armelle, French prompts for Asterisk",
    ),
    "fillets-ng-data-LANGUAGE": Corpus(
        # <room>-<role>-<line>: m and v are the two fish, the rest is minor
        r"fillets-ng/sound/[^/]+/(?P<who>(?:cs|nl)/[^/]+)\.ogg",
        "fillets_{who}",
        "GPL-2+",
        "Fish Fillets NG, ALTAR interactive and its translators",
    ),
    "klettres-data": Corpus(
        r"klettres/(?P<who>\w+)/(?:alpha|syllab)/.*\.ogg",
        "kde_{who}",
        "GPL-2+ and others (copyright file of the package)",
        "KLettres, KDE and its volunteers",
    ),
    "ktuberling-data": Corpus(
        r"ktuberling/sounds/(?P<who>\w+)/.*\.(?:ogg|wav|opus)",
        "kde_{who}",
        "GPL-2+, CC-BY-SA and others (copyright file of the package)",
        "KTuberling, KDE and its volunteers",
    ),
    "pocketsphinx-testdata": Corpus(
        r"pocketsphinx/test/data/(?P<who>librivox)/.*\.wav",
        "pocketsphinx_{who}",
        "BSD-2-Clause; the reading is in the public domain",
        "PocketSphinx, a LibriVox reader",
    ),
}
_FILLETS_ROLE = re.compile(r"(?P<language>\w+)/[^-]+-(?P<role>[a-z]+)-.*")
_ALLISON = re.compile(r"asterisk_(?:en_US|es_MX)_f_Allison")


@one_at_a_time
def prepare_voices(
    packages,
    data_folder,
    held_out=HELD_OUT,
    seed=1234,
    workers=2,
):
    """Write the strings and their manifests.

    Arguments
    ---------
    packages : str or Path
        Folder of .deb files, or of what they hold.
    data_folder : str or Path
        `strings/<talker>/*.flac`, `<split>_speech.json` and `licenses.json`
        go there.
    held_out : dict
        "valid" and "test" -> talkers of them; all others train.
    seed : int
        String i of a talker depends on it and on i alone.
    workers : int
        Processes.
    """
    ffmpeg_program()  # a missing program is reported before any work
    data_folder = Path(data_folder)
    folder = unpacked(Path(packages), data_folder / "unpacked")
    recordings = find_recordings(folder)
    talkers = {talker for talker, _ in recordings.values()}
    check_held_out(held_out, talkers)

    jobs = [
        (path, _clip(data_folder, path.relative_to(folder), talker))
        for path, (talker, _) in recordings.items()
    ]
    new = [job for job in jobs if not job[1].exists()]
    failures = run_jobs(_extract, new, workers, "recordings")
    _report(failures)

    clips = {}
    for path, clip in jobs:
        if clip.exists() and clip.stat().st_size:
            clips.setdefault(recordings[path][0], []).append(clip)
    plans = {t: plan_strings(t, files) for t, files in sorted(clips.items())}
    splits = {split: {} for split in ("train", "valid", "test")}
    _check_talkers(talkers, plans, held_out)
    work = []
    for talker, keys in plans.items():
        split = _split_of(talker, held_out)
        files = clips[talker]
        for key in keys:
            path = data_folder / f"strings/{talker}/{key}.flac"
            splits[split][key] = {
                "wav": f"{{data_root}}/strings/{talker}/{key}.flac",
                "words": "",
                "speaker": talker,
            }
            if not seconds_of(path):
                work.append((path, tuple(files), seed))
    failures = run_jobs(_join, work, workers, "strings")
    if failures:
        raise ValueError("\n".join(sorted(failures.values())))
    for entries in splits.values():
        for entry in entries.values():
            path = entry["wav"].replace("{data_root}", str(data_folder))
            entry["length"] = seconds_of(Path(path))
    write_manifests(data_folder, splits, transcribed=False)
    _write_licenses(data_folder, recordings)


def unpacked(packages, folder):
    """The folder to search: that of the packages, or what they unpack to.

    Arguments
    ---------
    packages : Path
        Folder of .deb files, or of what they hold.
    folder : Path
        Where to unpack; what is there already is kept.

    Returns
    -------
    Path
    """
    if not packages.is_dir():
        raise FileNotFoundError(
            f"no folder {packages}: get packages with `apt-get download "
            "NAME`, see recipes/Voices/README.md"
        )
    debs = sorted(packages.glob("*.deb"))
    if not debs:
        return packages
    if not shutil.which("dpkg-deb"):
        raise FileNotFoundError(
            "no dpkg-deb here to unpack .deb files with: unpack them "
            "elsewhere (`dpkg-deb -x`, or `ar x` and `tar x`) and name the "
            "folder"
        )
    for left in folder.glob("*.part"):  # of a package that was not whole
        shutil.rmtree(left)
    for deb in debs:
        name = deb.name.split("_")[0]
        done = folder / name
        if done.exists():
            continue
        part = folder / f"{name}.part"
        part.mkdir(parents=True)
        command = ["dpkg-deb", "-x", str(deb), str(part)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            problem = first_line(result)
            raise ValueError(f"{deb} cannot be unpacked: {problem}")
        part.rename(done)
    return folder


def find_recordings(folder):
    """All recordings below a folder whose layout is known.

    Arguments
    ---------
    folder : str or Path

    Returns
    -------
    recordings : dict
        Path -> (talker, name of the corpus).
    """
    recordings = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue  # a package may hold pipes, which would be waited for
        for name, corpus in CORPORA.items():
            match = re.search(corpus.path, path.as_posix())
            talker = match and talker_of(corpus, match["who"])
            if talker:
                recordings[path] = talker, name
    if not recordings:
        raise FileNotFoundError(
            f"{folder} holds neither .deb files nor recordings of any of "
            f"{', '.join(CORPORA)}: get them with `apt-get download NAME`"
        )
    return recordings


def talker_of(corpus, who):
    """Name of a talker, or None where nobody can be told.

    Arguments
    ---------
    corpus : Corpus
    who : str
        What its expression has found.

    Returns
    -------
    str or None

    Example
    -------
    >>> fish = CORPORA["fillets-ng-data-LANGUAGE"]
    >>> talker_of(fish, "cs/magnet-m-radio"), talker_of(fish, "cs/voda1")
    ('fillets_cs_m', None)
    >>> prompts = CORPORA["asterisk-core-sounds-LANGUAGE-g722"]
    >>> talker_of(prompts, "es_MX_f_Allison")
    'asterisk_f_Allison'
    """
    if "fillets" in corpus.talker:
        match = _FILLETS_ROLE.fullmatch(who)
        if not match:  # an effect or a song, by its name
            return None
        who = f"{match['language']}_{match['role']}"
    name = corpus.talker.format(who=who)
    return "asterisk_f_Allison" if _ALLISON.fullmatch(name) else name


def check_held_out(held_out, talkers):
    """Refuse splits that are empty or unknown.

    Arguments
    ---------
    held_out : dict
        "valid" and "test" -> talkers.
    talkers : set of str
        All there are.
    """
    for split, names in held_out.items():
        there = set(names) & talkers
        if len(there) < 2:
            raise ValueError(
                f"of the {split} talkers {', '.join(names)}, the packages hold "
                f"{sorted(there)}: mixtures need two; get more packages, or "
                f"name others with --{split}; there are {sorted(talkers)}"
            )
    both = set(held_out["valid"]) & set(held_out["test"])
    if both:
        raise ValueError(f"{sorted(both)} cannot be valid and test talkers")


def _split_of(talker, held_out):
    """The split that a talker is in."""
    return next((s for s in held_out if talker in held_out[s]), "train")


def _check_talkers(talkers, plans, held_out):
    """Tell whose recordings are too few; refuse splits that this leaves."""
    short = sorted(talker for talker in talkers if not plans.get(talker))
    if short:
        print(
            f"left out {len(short)} talkers, with less than {LEAST:g} s of "
            f"speech: {', '.join(short)}",
            file=sys.stderr,
        )
    for split in ("train", *held_out):
        there = sorted(talkers.difference(short))
        own = [t for t in there if _split_of(t, held_out) == split]
        if len(own) < 2:
            raise ValueError(
                f"of the {split} talkers {own} are left: mixtures need two; "
                "get more packages, or name others with --valid and --test; "
                f"there are {there}"
            )


def _clip(data_folder, path, talker):
    """Where a recording goes when it is decoded and trimmed."""
    key = f"{path.stem}_{zlib.crc32(path.as_posix().encode()):08x}"
    return data_folder / f"clips/{talker}/{key}.flac"


def _extract(job):
    """Decode, check and trim one recording; an empty file is left out."""
    path, clip = job
    samples = trim(decode(path))
    problem = what_is_wrong(samples)
    if problem:
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.touch()  # not to be judged again
        raise ValueError(f"{problem}: {path}")
    samples = set_level(samples[: round(LONGEST * SAMPLE_RATE)])
    write_flac(clip, limit_peak(samples))


def decode(path):
    """A recording, channels averaged, at 16 kHz.

    By libsndfile; what it does not know, telephones' codecs above all, by
    ffmpeg.

    Arguments
    ---------
    path : Path

    Returns
    -------
    samples : numpy.ndarray
        [samples], float.
    """
    if path.suffix.lower() not in RAW:
        try:
            samples, rate = soundfile.read(path, always_2d=True)
            if not np.isfinite(samples).all():
                raise ValueError(f"holds NaN or infinity: {path}")
            return resampled(samples.mean(1), rate)
        except RuntimeError:
            pass  # another codec in a known container
    command = [ffmpeg_program(), "-nostdin", "-v", "error"]
    command += [*RAW.get(path.suffix.lower(), []), "-i", str(path)]
    command += ["-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        problem = first_line(done)
        raise ValueError(f"cannot be decoded: {path} ({problem[:200]})")
    return np.frombuffer(done.stdout, np.int16) / 2**15


def trim(samples):
    """Cut off what lies 30 dB below the loudest at both ends.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples].

    Returns
    -------
    samples : numpy.ndarray
        A part of them.

    Example
    -------
    >>> tone = np.sin(np.arange(8000))
    >>> len(trim(np.concatenate([np.zeros(16000), tone, np.zeros(4000)])))
    8398
    """
    if not len(samples) or not samples.any():
        return samples[:0]
    size = round(0.025 * SAMPLE_RATE)
    power = np.convolve(np.square(samples), np.ones(size) / size, "same")
    loud = np.flatnonzero(power > power.max() * 10 ** (-BELOW_PEAK / 10))
    return samples[loud[0] : loud[-1] + 1]


def low_energy_share(samples):
    """Share of frames whose RMS is below half of the clip's mean.

    Speech has many, for it has pauses and closures; music and steady noise
    have few (Scheirer and Slaney, 1997).

    Arguments
    ---------
    samples : numpy.ndarray
        [samples] at 16 kHz.

    Returns
    -------
    share : float

    Example
    -------
    >>> low_energy_share(np.sin(np.arange(16000)))
    0.0
    """
    size = round(0.02 * SAMPLE_RATE)
    whole = len(samples) // size * size
    frames = np.sqrt(np.square(samples[:whole].reshape(-1, size)).mean(1))
    return float((frames < 0.5 * frames.mean()).mean())


def what_is_wrong(samples):
    """Why a trimmed recording is of no use, or None.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples].

    Returns
    -------
    str or None
    """
    seconds = len(samples) / SAMPLE_RATE
    if seconds < SHORTEST:
        return f"shorter than {SHORTEST} s"
    if seconds >= JUDGED and low_energy_share(samples) < LOW_ENERGY:
        return "music or noise, without pauses"
    return None


def plan_strings(talker, clips):
    """Names of a talker's strings: as many as the recordings are worth.

    None where there are fewer than `LEAST` seconds of them.

    Arguments
    ---------
    talker : str
    clips : list of Path
        Recordings.

    Returns
    -------
    keys : list of str
    """
    seconds = sum(soundfile.info(clip).duration for clip in clips)
    count = min(max(round(seconds / 4), FEWEST), MOST)
    count = count if seconds >= LEAST else 0
    return [f"{talker}_{index:04d}" for index in range(count)]


def _join(job):
    """Write one string of a talker's recordings in random order."""
    path, clips, seed = job
    rng = np.random.default_rng([seed, zlib.crc32(path.stem.encode())])
    pieces, samples = [], 0
    while samples < STRING * SAMPLE_RATE:
        pieces.append(soundfile.read(clips[rng.integers(len(clips))])[0])
        pieces.append(np.zeros(round(rng.uniform(*PAUSE) * SAMPLE_RATE)))
        samples += len(pieces[-2]) + len(pieces[-1])
    write_flac(path, np.concatenate(pieces[:-1]))


def _report(failures):
    """Say how many recordings were left out, and why, kind by kind."""
    kinds = {}
    for message in sorted(failures.values()):
        kinds.setdefault(message.split(":")[0], []).append(message)
    for kind, messages in kinds.items():
        example = messages[0].removeprefix(f"{kind}: ")
        print(
            f"left out {len(messages)} recordings, {kind}, such as {example}",
            file=sys.stderr,
        )


def _write_licenses(data_folder, recordings):
    """Say what the card of a model trained on this has to name."""
    used = sorted({name for _, name in recordings.values()})
    text = {
        name: {
            "license": CORPORA[name].license,
            "attribution": CORPORA[name].attribution,
        }
        for name in used
    }
    write_text(data_folder / "licenses.json", json.dumps(text, indent=1) + "\n")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", help="folder of .deb files, or unpacked")
    parser.add_argument("--data_folder", default="data/voices")
    for split, names in HELD_OUT.items():
        parser.add_argument(
            f"--{split}", nargs="+", default=names, metavar="TALKER"
        )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    held_out = {"valid": options.valid, "test": options.test}
    sys.exit(
        guarded(
            prepare_voices,
            options.packages,
            options.data_folder,
            held_out,
            options.seed,
            options.workers,
        )
    )
