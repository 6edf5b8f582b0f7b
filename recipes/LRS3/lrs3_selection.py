"""Which clips are trained on: the paper's hours, drawn with a seed."""

import numpy as np


def draw_speakers(seconds, hours, rng):
    """Speakers who together talk for some hours, to be held out.

    Arguments
    ---------
    seconds : dict
        Speaker -> seconds.
    hours : float
        How much is wanted; the last speaker drawn may exceed it.
    rng : numpy.random.Generator

    Returns
    -------
    speakers : set of str

    Example
    -------
    >>> speakers = {"a": 1800, "b": 1800, "c": 3600}
    >>> sorted(draw_speakers(speakers, 1.0, np.random.default_rng(0)))
    ['c']
    """
    _check_hours(sum(seconds.values()) / 3600, hours, "--valid_hours")
    chosen, total = set(), 0.0
    for speaker in rng.permutation(sorted(seconds)):
        if total >= 3600 * hours:
            break
        chosen.add(str(speaker))
        total += seconds[speaker]
    return chosen


def draw_clips(seconds, hours, known, count, rng):
    """Clips at random, of as many hours and speakers as asked for.

    Speakers who are not known yet are drawn first, one clip of each, until
    there are `count`; then clips of all those speakers.

    Arguments
    ---------
    seconds : dict
        (speaker, clip) -> seconds.
    hours : float
        How much is wanted; the last clip drawn may exceed it.
    known : set of str
        Speakers who are trained on anyway.
    count : int
        Speakers in all, with those; 0: as they come.
    rng : numpy.random.Generator

    Returns
    -------
    clips : list of (str, str)
    """
    order = [tuple(clip) for clip in rng.permutation(sorted(seconds)).tolist()]
    if not hours:
        return []
    if count:
        allowed = known | _new_speakers(order, known, count)
        order = [clip for clip in order if clip[0] in allowed]
        order = _each_once_first(order, allowed - known)
    hours_there = sum(seconds[clip] for clip in order) / 3600
    _check_hours(hours_there, hours, "--pretrain_hours")
    ends = np.cumsum([seconds[clip] for clip in order])
    taken = int(np.searchsorted(ends, 3600 * hours)) + 1
    return order[:taken]


def _new_speakers(order, known, count):
    """Speakers to add, in the order in which they come."""
    new = list(dict.fromkeys(speaker for speaker, _ in order))
    new = [speaker for speaker in new if speaker not in known]
    missing = count - len(known)
    if missing > len(new):
        raise ValueError(
            f"{count} speakers asked for, trainval and pretrain have "
            f"{len(known) + len(new)} that are not held out: give another "
            "number with --speakers, or 0 for all"
        )
    return set(new[: max(missing, 0)])


def _each_once_first(order, speakers):
    """The first clip of each of some speakers, then all others."""
    first = {}
    for clip in order:
        if clip[0] in speakers:
            first.setdefault(clip[0], clip)
    heads = set(first.values())
    return [*first.values(), *(clip for clip in order if clip not in heads)]


def _check_hours(hours_there, hours, option):
    """Refuse to give less than asked for."""
    if hours_there < hours:
        raise ValueError(
            f"{hours:g} h asked for, {hours_there:.4g} h found: is the corpus "
            f"whole? Give another number with {option}"
        )
