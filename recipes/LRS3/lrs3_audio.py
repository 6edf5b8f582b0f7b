"""The sound of clips: taken out of their videos, and described in manifests."""

from collections import defaultdict
from pathlib import Path

from lrs3_transcripts import MARGIN

from speechbrain_mpq.simulation.mixtures import MIN_SAMPLES
from speechbrain_mpq.simulation.recordings import (
    read_sound,
    run_jobs,
    seconds_of,
    write_flac,
)
from speechbrain_mpq.utils import SAMPLE_RATE

SLACK = 0.1  # seconds that a video may end before its last word


def audio_name(utterance):
    """Where an utterance's audio is, from the data folder."""
    clip = utterance["clip"]
    name = clip.name
    if utterance["end"] is not None:
        ends = (round(1000 * utterance[end]) for end in ("start", "end"))
        name = "_".join([name, *(f"{end:06d}" for end in ends)])
    return f"speech/{clip.part}/{clip.speaker}/{name}.flac"


def extract(data_folder, utterances, part, workers):
    """Write the audio that is missing.

    Arguments
    ---------
    data_folder : Path
    utterances : list of dict
        From `read_transcripts`.
    part : str
        For the progress bar.
    workers : int

    Returns
    -------
    failures : dict
        Job -> what is wrong.
    """
    jobs = defaultdict(list)
    for utterance in utterances:
        path = data_folder / audio_name(utterance)
        if not seconds_of(path):
            span = (path, utterance["start"], utterance["end"])
            jobs[utterance["clip"]].append(span)
    jobs = [(clip, tuple(spans)) for clip, spans in jobs.items()]
    return run_jobs(extract_clip, jobs, workers, f"sound of {part}")


def extract_clip(job):
    """Decode a video once and write its utterances.

    Arguments
    ---------
    job : (Clip, tuple)
        With (path, start, end) of each utterance.
    """
    clip, spans = job
    samples = read_sound(clip.video)
    seconds = len(samples) / SAMPLE_RATE
    for path, start, end in spans:
        if end is not None and seconds < end - MARGIN - SLACK:
            raise ValueError(
                f"{clip.video} is {seconds:.2f} s long, but its transcript has "
                f"words until {end - MARGIN:.2f} s: one of them is cut short"
            )
        last = None if end is None else round(end * SAMPLE_RATE)
        piece = samples[round(start * SAMPLE_RATE) : last]
        if len(piece) < MIN_SAMPLES or not piece.any():
            raise ValueError(f"{clip.video} is silent from {start} to {end} s")
        write_flac(path, piece)


def described(data_folder, utterances):
    """Manifest entries of the utterances whose audio is there.

    Arguments
    ---------
    data_folder : Path
    utterances : list of dict

    Returns
    -------
    entries : dict
        id -> entry.
    """
    entries = {}
    for utterance in utterances:
        name, clip = audio_name(utterance), utterance["clip"]
        length = seconds_of(data_folder / name)
        if length:  # else it is among the broken ones
            key = "_".join([clip.part, clip.speaker, Path(name).stem])
            entries[key] = {
                "wav": f"{{data_root}}/{name}",
                "length": length,
                "words": utterance["words"],
                "speaker": clip.speaker,
                "video": str(clip.video),
                "video_start": utterance["start"],
            }
    return entries
