"""Where the clips of LRS3-TED and LRS2 are, and which belong to what.

LRS3: pretrain/, trainval/ and test/, each <speaker>/<clip>.mp4 and .txt.
LRS2: pretrain/ and main/, each <programme>/<clip>.mp4 and .txt, and the lists
pretrain.txt, train.txt, val.txt and test.txt in the same folder or above it.
"""

from dataclasses import dataclass
from pathlib import Path

LRS3 = ("pretrain", "trainval", "test")
LRS2 = {  # part -> folder, list
    "pretrain": ("pretrain", "pretrain"),
    "train": ("main", "train"),
    "valid": ("main", "val"),
    "test": ("main", "test"),
}


@dataclass(frozen=True, order=True)
class Clip:
    """One video with its transcript.

    Arguments
    ---------
    part : str
        Of the corpus, as pretrain.
    speaker : str
        Its folder: a speaker in LRS3, a programme in LRS2.
    name : str
    video, transcript : Path
    """

    part: str
    speaker: str
    name: str
    video: Path
    transcript: Path

    @property
    def key(self):
        """Name in a manifest."""
        return f"{self.part}_{self.speaker}_{self.name}"


def find_clips(corpus, layout, parts):
    """All clips of some parts.

    Arguments
    ---------
    corpus : Path
    layout : str
        "lrs3" or "lrs2".
    parts : sequence of str
        As they are called in that corpus, see above.

    Returns
    -------
    clips : list of Clip
    failures : dict
        Clip -> which of its two files is missing.
    """
    if not corpus.is_dir():
        raise FileNotFoundError(f"no folder {corpus}")
    listed = {"lrs3": _lrs3_clips, "lrs2": _lrs2_clips}[layout]
    clips, failures = [], {}
    for part in parts:
        present = sorted(listed(corpus, part))
        if not present:
            raise FileNotFoundError(
                f"{corpus} has no clips of {part}: {layout} is expected to "
                f"hold\n{__doc__.split(chr(10), 2)[2]}"
            )
        for clip in present:
            missing = [
                path
                for path in (clip.video, clip.transcript)
                if not path.is_file()
            ]
            if missing:
                failures[clip] = f"no {missing[0]}"
            else:
                clips.append(clip)
    return clips, failures


def _lrs3_clips(corpus, part):
    """Every pair of files, also where one of the two is missing."""
    files = [
        *corpus.glob(f"{part}/*/*.mp4"),
        *corpus.glob(f"{part}/*/*.txt"),
    ]
    for stem in {path.with_suffix("") for path in files}:
        yield _clip(part, stem)


def _lrs2_clips(corpus, part):
    """Every line of a list; what follows the name is a remark."""
    folder, name = LRS2[part]
    places = [corpus / f"{name}.txt", corpus.parent / f"{name}.txt"]
    lists = [path for path in places if path.is_file()]
    if not lists:
        raise FileNotFoundError(f"no list {places[0]}, nor {places[1]}")
    for line in lists[0].read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield _clip(part, corpus / folder / line.split()[0])


def _clip(part, stem):
    """The clip of a path without an extension."""
    return Clip(
        part=part,
        speaker=stem.parent.name,
        name=stem.name,
        video=stem.with_name(f"{stem.name}.mp4"),
        transcript=stem.with_name(f"{stem.name}.txt"),
    )
