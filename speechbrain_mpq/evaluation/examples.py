"""Test items of the report: where the speakers are, what is heard."""

from functools import partial

from .media import (
    equal_loudness,
    loudest_magnitude,
    picture,
    player,
    spectrogram,
)
from .page import tag, text
from .plots import top_view
from .wer import (
    CORRECT,
    DELETION,
    INSERTION,
    WordErrors,
    align,
    word_errors,
)


def example_section(example):
    """HTML of one test item with all of its signals.

    Arguments
    ---------
    example : dict
        See `write_report`.

    Returns
    -------
    str
        A `<section>` element.
    """
    rate = example["sample_rate"]
    try:
        signals = equal_loudness(example["signals"])
    except ValueError as error:
        raise ValueError(f"example {example['id']}: {error}") from error
    loudest = loudest_magnitude(signals.values(), rate)
    cards = "".join(
        _signal_card(example, name, samples, rate, loudest)
        for name, samples in signals.items()
    )
    head = tag("div", _head(example) + _directions(example), class_="head")
    return tag(
        "section",
        head + tag("div", cards, class_="signals"),
        class_="example",
    )


def marked_words(reference, hypothesis):
    """A transcript with its errors marked, as HTML.

    Arguments
    ---------
    reference : str
        Words that were said.
    hypothesis : str
        Words that were recognised.

    Returns
    -------
    str
        Deletions in `<del>`, insertions in `<ins>`, substitutions in `<mark>`
        with the right word struck out behind them.

    Example
    -------
    >>> marked_words("set nine now", "set five now please")
    'set <mark>five <s>nine</s></mark> now <ins>please</ins>'
    """
    words = []
    for edit in align(reference, hypothesis):
        if edit.kind == CORRECT:
            words.append(text(edit.hypothesis))
        elif edit.kind == DELETION:
            words.append(tag("del", text(edit.reference)))
        elif edit.kind == INSERTION:
            words.append(tag("ins", text(edit.hypothesis)))
        else:
            right = tag("s", text(edit.reference))
            words.append(tag("mark", f"{text(edit.hypothesis)} {right}"))
    return " ".join(words)


def _head(example):
    """Name, angle and reference of an item."""
    angle = example.get("angle")
    apart = "" if angle is None else f": speakers {angle:.0f}° apart"
    return tag(
        "div",
        tag("h3", text(f"{example['id']}{apart}"))
        + tag("p", "said: " + tag("b", text(example["reference"]))),
    )


def _directions(example):
    """Top view of the array and the speakers, where they are known."""
    target = example.get("doa_target")
    other = example.get("doa_interferer")
    if target is None:
        return ""
    described = f"target at {target:.0f} degrees"
    if other is not None:
        described += f", interferer at {other:.0f} degrees"
    return picture(partial(top_view, target, other), described)


def _signal_card(example, name, samples, rate, loudest):
    """Spectrogram, player, SI-SNR and transcript of one signal."""
    si_snr = example.get("si_snr", {}).get(name)
    value = "" if si_snr is None else f"{si_snr:.1f} dB"
    header = tag("h4", text(name)) + tag("span", text(value), class_="soft")
    described = f"spectrogram of {name}, {len(samples) / rate:.1f} s"
    parts = [
        tag("header", header),
        spectrogram(samples, rate, loudest, described),
        player(samples, rate),
    ]
    hypothesis = example.get("hypotheses", {}).get(name)
    if hypothesis is not None:
        parts.append(_transcript(example["reference"], hypothesis))
    return tag("div", "".join(parts), class_="signal")


def _transcript(reference, hypothesis):
    """Marked words with the number of errors."""
    counts = word_errors(reference, hypothesis)
    marked = marked_words(reference, hypothesis)
    return tag("p", marked, class_="words") + tag(
        "p", text(_count(counts)), class_="soft"
    )


def _count(counts: WordErrors):
    """Number of errors in words."""
    if not counts.errors:
        return "no error"
    plural = "error" if counts.errors == 1 else "errors"
    return f"{counts.errors} {plural} in {counts.words} words"
