"""Writes a tiny corpus in the layout of LRS3-TED (or LRS2), to try the recipe.

> python recipes/LRS3/tiny_corpus.py /tmp/lrs3

Voices and sentences are the embedded corpus's, faces are drawn: real .mp4
files with pictures and sound, and transcripts like the real ones. Word times
are spread evenly over each sentence.
"""

import argparse
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
from lrs3_layout import LRS2

from speechbrain_mpq.simulation.corpus import utterance
from speechbrain_mpq.simulation.faces import (
    CANVAS,
    draw_look,
    draw_talker,
    mouth_shapes,
)
from speechbrain_mpq.simulation.recordings import ffmpeg_program, write_flac
from speechbrain_mpq.utils import SAMPLE_RATE

FPS = 25
PAUSE = 0.6  # seconds between the sentences of a pretrain clip
SENTENCES = 3  # of a pretrain clip


def write_corpus(folder, layout="lrs3", clips=8, pixels=96):
    """Write clips of each part.

    Arguments
    ---------
    folder : str or Path
        Where pretrain/, trainval/, test/ go (LRS2: pretrain/, main/, lists).
    layout : str
        "lrs3" or "lrs2".
    clips : int
        Of each part, nearly all of another speaker.
    pixels : int
        Width and height of the pictures; 224 in LRS3, 160 in LRS2.
    """
    folder = Path(folder)
    parts = ("pretrain", "trainval", "test") if layout == "lrs3" else LRS2
    for number, part in enumerate(parts):
        names = []
        for index in range(clips):
            first = (number * clips + index) * SENTENCES
            count = SENTENCES if part == "pretrain" else 1
            sentences = [
                utterance("test" if part == "test" else "train", first + n)
                for n in range(count)
            ]
            place = part if layout == "lrs3" else LRS2[part][0]
            speaker = sentences[0][1]["speaker"]
            names.append(f"{speaker}/{index + 50001:05d}")
            write_clip(folder / place / names[-1], sentences, pixels)
        if layout == "lrs2":
            remark = " NF\n" if part == "test" else "\n"
            text = "".join(name + remark for name in names)
            (folder / f"{LRS2[part][1]}.txt").write_text(text)


def write_clip(stem, sentences, pixels):
    """Write a video and its transcript.

    Arguments
    ---------
    stem : Path
        Without an extension.
    sentences : list of (numpy.ndarray, dict)
        From `corpus.utterance`; with several, word times are written.
    pixels : int
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    pause = np.zeros(round(PAUSE * SAMPLE_RATE), np.int16)
    samples, phonemes, times = [], [], []
    begin = 0.0
    for sound, entry in sentences:
        phonemes += [
            (begin + a, begin + b, symbol) for a, b, symbol in entry["phonemes"]
        ]
        words = entry["words"].upper().split()
        ends = begin + np.linspace(0, entry["length"], len(words) + 1)
        times += list(zip(words, ends[:-1], ends[1:]))
        samples += [sound, pause]
        begin += entry["length"] + PAUSE
    samples = np.concatenate(samples[:-1])
    frames = draw_frames(phonemes, len(samples), pixels, stem.parent.name)
    write_video(stem.with_name(f"{stem.name}.mp4"), frames, samples)
    lines = [f"Text:  {' '.join(word for word, _, _ in times)}", "Conf:  4"]
    if len(sentences) > 1:
        lines += ["", "WORD START END ASDSCORE"]
        lines += [f"{word} {a:.2f} {b:.2f} 5.0" for word, a, b in times]
    text = "\n".join(lines) + "\n"
    stem.with_name(f"{stem.name}.txt").write_text(text)


def draw_frames(phonemes, samples, pixels, speaker):
    """Pictures of a talking face, [frames, pixels, pixels], bytes."""
    rng = np.random.default_rng(zlib.crc32(speaker.encode()))
    times = np.arange(samples * FPS // SAMPLE_RATE) / FPS
    shapes = mouth_shapes(phonemes, times)
    size = int(pixels / CANVAS)
    faces, cover = draw_talker(shapes, draw_look(rng), rng, size)
    faces = faces * cover + 0.5 * (1 - cover)
    frames = np.full((len(faces), pixels, pixels), 128, np.uint8)
    frames[:, : faces.shape[1], : faces.shape[2]] = np.rint(faces * 255)
    return frames


def write_video(path, frames, samples):
    """Write an .mp4 file with MPEG-4 pictures and AAC sound.

    Arguments
    ---------
    path : Path
    frames : numpy.ndarray
        [frames, height, width], bytes, grey, 25 a second.
    samples : numpy.ndarray
        [samples] at 16 kHz.
    """
    height, width = frames.shape[1:]
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound.flac"
        write_flac(sound, samples)
        command = [ffmpeg_program(), "-y", "-v", "error", "-f", "rawvideo"]
        command += ["-pix_fmt", "gray", "-s", f"{width}x{height}"]
        command += ["-r", str(FPS), "-i", "-", "-i", str(sound)]
        command += ["-c:v", "mpeg4", "-c:a", "aac", "-threads", "1", str(path)]
        subprocess.run(command, input=frames.tobytes(), check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--layout", choices=("lrs3", "lrs2"), default="lrs3")
    parser.add_argument("--clips", type=int, default=8, help="of each part")
    parser.add_argument("--pixels", type=int, default=224)
    write_corpus(**vars(parser.parse_args()))
