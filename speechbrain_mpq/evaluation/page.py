"""Build an HTML page: its skeleton and style, pictures and sounds inside it.

There is no script. An item is shown with where the speakers are, spectrograms,
players and the transcripts with their errors marked.
"""

import base64
import io
from functools import partial
from html import escape
from inspect import signature

import numpy as np
from matplotlib import colormaps, rc_context
from PIL import Image
from scipy.signal import stft

from .plots import top_view
from .wer import CORRECT, DELETION, INSERTION, WordErrors, align, word_errors

PHONE = "(max-width: 640px)"
CSS = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #667079;
  --paper: #ffffff; --card: #f5f7f9; --line: #dde2e7; --accent: #c2410c;
  --bad: #b42318; --odd: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #d7dce3;
  --soft: #97a1ad; --paper: #14181d; --card: #1c2229; --line: #313943;
  --accent: #ff8a5c; --bad: #ff8f85; --odd: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem; }
h1 small { display: block; font-size: .8rem; font-weight: 600;
  letter-spacing: .08em; text-transform: uppercase; color: var(--accent); }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; }
h4 { font-size: .95rem; margin: 0; }
p, ul { margin: .4rem 0 .8rem; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .4rem .42rem; text-align: right;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
thead tr:first-child:not(:last-child) th { text-align: center;
  border-bottom: 0; padding-bottom: 0; }
.results td:nth-child(2), .results tr:last-child th:nth-child(2) {
  text-align: left; }
tr.ours td { font-weight: 700; background: var(--card); }
td.first, th.first { border-left: 1px solid var(--line); }
.example { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 1.1rem; margin: 1.25rem 0; }
.head { display: flex; flex-wrap: wrap; gap: 1rem 2rem;
  justify-content: space-between; align-items: flex-start; }
.head picture { flex: 0 1 300px; }
.signals { display: grid; gap: 1.1rem; margin-top: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.signal header { display: flex; justify-content: space-between;
  align-items: baseline; gap: .5rem; margin-bottom: .3rem; }
.spectrogram { display: block; width: 100%; height: 130px;
  border-radius: 5px; image-rendering: auto; }
.axes { position: relative; }
.hertz { position: absolute; inset: 4px auto 4px 6px; display: flex;
  flex-direction: column; justify-content: space-between; color: #fff;
  font-size: .68rem; line-height: 1; text-shadow: 0 0 3px #000, 0 0 3px #000; }
.time { display: flex; justify-content: space-between; color: var(--soft);
  font-size: .68rem; line-height: 1.3; padding: 2px 4px 0;
  font-variant-numeric: tabular-nums; }
audio { width: 100%; height: 36px; margin: .4rem 0 .2rem; }
.words { margin: .2rem 0; font-size: .92rem; }
.words del { color: var(--bad); }
.words ins { color: var(--odd); text-decoration: none;
  border-bottom: 2px dotted var(--odd); }
.words mark { background: none; color: var(--bad);
  border-bottom: 2px solid var(--bad); }
.words mark s { color: var(--soft); font-size: .85em; }
.phone { display: none; }
@media PHONE { .phone { display: block; } .desk { display: none; }
  main { padding: 1.25rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  table { font-size: .8rem; } th, td { padding: .35rem .3rem; }
  .phone table { font-size: .72rem; } .phone th { white-space: normal; }
  .phone th, .phone td { padding: .35rem .22rem; }
  .phone th:last-child, .phone td:last-child { display: none; }
  .example { padding: .8rem; } .signals { grid-template-columns: 1fr; } }
""".replace("PHONE", PHONE)
# What matplotlib draws lines and text with on a light and on a dark page.
THEMES = {"light": ("#24292f", "#d5d9df"), "dark": ("#d7dce3", "#3a414b")}
DYNAMIC_RANGE = 70  # dB that a spectrogram shows
COLOURS = 64  # of a spectrogram; more make the file larger, not clearer
PEAK = 0.9  # of full scale, the loudest sample of an example


def tag(element, content=None, /, **attributes):
    """Write an HTML element.

    Example
    -------
    >>> tag("p", text("a < b"), class_="soft")
    '<p class="soft">a &lt; b</p>'
    """
    pairs = "".join(
        f' {key.rstrip("_")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    if content is None:
        return f"<{element}{pairs}>"
    return f"<{element}{pairs}>{content}</{element}>"


def text(value):
    """Escape any value as text.

    Arguments
    ---------
    value : object
        What to show.

    Returns
    -------
    str
        HTML that shows it as it is.

    Example
    -------
    >>> text("<b>")
    '&lt;b&gt;'
    """
    return escape(str(value))


def page(title, body):
    """Write a whole HTML page.

    Arguments
    ---------
    title : str
        Plain text.
    body : str
        Inner HTML.

    Returns
    -------
    str
        The page, without any link to another file.

    Example
    -------
    >>> page("Report", tag("p", "hello")).splitlines()[0]
    '<!DOCTYPE html>'
    """
    head = (
        tag("meta", charset="utf-8")
        + tag(
            "meta",
            name="viewport",
            content="width=device-width, initial-scale=1",
        )
        + tag("title", text(title))
        + tag("style", CSS)
    )
    html = tag("head", head) + "\n" + tag("body", tag("main", body))
    return "<!DOCTYPE html>\n" + tag("html", html, lang="en") + "\n"


def picture(draw, text):
    """Embed a figure that follows the page's light or dark and its width.

    Arguments
    ---------
    draw : callable
        Gives a matplotlib figure; called once per theme. Where it takes
        `narrow`, there is a figure for phones as well.
    text : str
        What the figure shows, for those who cannot see it.

    Returns
    -------
    str
        A `<picture>` element with all images inside.
    """
    light, dark = (_draw_png(draw, *colours) for colours in THEMES.values())
    sources = []
    if "narrow" in signature(draw).parameters:
        small = partial(draw, narrow=True)
        for theme, colours in reversed(THEMES.items()):
            media = f"{PHONE} and (prefers-color-scheme: {theme})"
            image = _draw_png(small, *colours)
            sources.append(tag("source", srcset=image, media=media))
    sources.append(
        tag("source", srcset=dark, media="(prefers-color-scheme: dark)")
    )
    return tag("picture", "".join(sources) + tag("img", src=light, alt=text))


def spectrogram(waveform, sample_rate, loudest, text):
    """Embed the log-magnitude spectrogram of a waveform.

    Arguments
    ---------
    waveform : numpy.ndarray
        Samples [time].
    sample_rate : int
        Hz.
    loudest : float
        Magnitude that gets the brightest colour, see `_loudest_magnitude`.
    text : str
        What it shows.

    Returns
    -------
    str
        An `<img>` element; low frequencies are at the bottom.
    """
    level = 20 * np.log10(_magnitudes(waveform, sample_rate) / loudest + 1e-9)
    shade = np.clip(level / DYNAMIC_RANGE + 1, 0, 1) * (COLOURS - 1)
    # A palette image is a fraction of the size of a full-colour one.
    image = Image.fromarray(np.flipud(shade).round().astype(np.uint8), "L")
    image = image.convert("P")
    colours = colormaps["magma"](np.linspace(0, 1, COLOURS))[:, :3]
    image.putpalette((colours * 255).round().astype(np.uint8).tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    source = _data_address("image/png", stream.getvalue())
    return tag("img", src=source, alt=text, class_="spectrogram")


def _loudest_magnitude(waveforms, sample_rate):
    """Largest magnitude in the spectrograms of some waveforms."""
    peaks = [_magnitudes(x, sample_rate).max() for x in waveforms]
    return float(max([*peaks, 1e-9]))


def _player(waveform, sample_rate):
    """An audio player that holds the sound itself, 16-bit FLAC."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(
        stream, waveform, sample_rate, format="FLAC", subtype="PCM_16"
    )
    source = _data_address("audio/flac", stream.getvalue())
    return tag("audio", "", controls="", preload="metadata", src=source)


def _equal_loudness(waveforms):
    """Waveforms at one energy, as a separator's scale is free."""
    scaled = {}
    for name, samples in waveforms.items():
        samples = np.asarray(samples, dtype=np.float64)
        if samples.ndim != 1 or not samples.size:
            raise ValueError(f"{name} is not [time] but {samples.shape}")
        if not np.isfinite(samples).all():
            raise ValueError(f"{name} holds NaN or infinity")
        energy = np.sqrt(np.mean(samples**2))
        scaled[name] = samples / energy if energy else samples
    peak = max(np.abs(samples).max() for samples in scaled.values())
    gain = PEAK / peak if peak else 1.0
    return {name: gain * samples for name, samples in scaled.items()}


def _data_address(kind, content):
    """Bytes as an address that holds them itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _draw_png(draw, text_colour, grid_colour):
    """Address of a figure drawn with the colours of one theme."""
    names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {
        **dict.fromkeys(names, text_colour),
        "axes.edgecolor": grid_colour,
        "grid.color": grid_colour,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.titlesize": 10,
        "font.size": 9,
    }
    stream = io.BytesIO()
    with rc_context(style):
        # Without metadata, as matplotlib would write its address there.
        draw().savefig(
            stream, dpi=110, transparent=True, metadata={"Software": None}
        )
    return _data_address("image/png", stream.getvalue())


def _magnitudes(waveform, sample_rate):
    """Magnitudes [frequency, time] in windows of 32 ms, one every 10 ms."""
    window = min(int(0.032 * sample_rate), len(waveform))
    hop = min(int(0.010 * sample_rate), window)
    _, _, spectrum = stft(
        waveform, nperseg=window, noverlap=window - hop, nfft=512
    )
    return np.abs(spectrum)


def example_section(example, measure):
    """Write the HTML of one test item with all of its signals.

    Arguments
    ---------
    measure : Measure
        What each signal is scored by, with values in `example[measure.key]`.
    """
    rate = example["sample_rate"]
    try:
        signals = _equal_loudness(example["signals"])
    except ValueError as error:
        raise ValueError(f"example {example['id']}: {error}") from error
    loudest = _loudest_magnitude(signals.values(), rate)
    cards = "".join(
        _signal_card(example, name, samples, loudest, measure)
        for name, samples in signals.items()
    )
    head = tag("div", _head(example) + _directions(example), class_="head")
    return tag(
        "section",
        head + tag("div", cards, class_="signals"),
        class_="example",
    )


def _marked_words(reference, hypothesis):
    """A transcript with its errors marked, as HTML."""
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
    head = tag("h3", text(f"{example['id']}{apart}"))
    if "reference" in example:
        head += tag("p", "said: " + tag("b", text(example["reference"])))
    return tag("div", head)


def _directions(example):
    """Top view of the array and the speakers, where they are known."""
    target = example.get("doa_target")
    other = example.get("doa_interferer")
    if target is None:
        return ""
    caption = f"target at {target:.0f} degrees"
    if other is not None:
        caption += f", interferer at {other:.0f} degrees"
    return picture(partial(top_view, target, other), caption)


def _signal_card(example, name, samples, loudest, measure):
    """Spectrogram, player, quality and transcript of one signal."""
    rate = example["sample_rate"]
    quality = example.get(measure.key, {}).get(name)
    value = "" if quality is None else f"{quality:.1f} {measure.unit}".rstrip()
    header = tag("h4", text(name)) + tag("span", text(value), class_="soft")
    caption = f"spectrogram of {name}, {len(samples) / rate:.1f} s"
    parts = [
        tag("header", header),
        _with_axes(
            spectrogram(samples, rate, loudest, caption),
            len(samples) / rate,
            rate / 2000,
        ),
        _player(samples, rate),
    ]
    hypothesis = example.get("hypotheses", {}).get(name)
    if hypothesis is not None:
        parts.append(_transcript(example["reference"], hypothesis))
    return tag("div", "".join(parts), class_="signal")


def _with_axes(image, seconds, kilohertz):
    """A spectrogram with marks of time and frequency."""
    heights = f"{kilohertz:g} kHz", f"{kilohertz / 2:g}", "0"
    marks = "".join(tag("span", text(height)) for height in heights)
    times = [f"{share * seconds:.1f}" for share in (0, 0.25, 0.5, 0.75, 1)]
    row = "".join(
        tag("span", text(time)) for time in [*times[:-1], f"{times[-1]} s"]
    )
    inner = image + tag("div", marks, class_="hertz")
    return tag("div", inner, class_="axes") + tag("div", row, class_="time")


def _transcript(reference, hypothesis):
    """Marked words with the number of errors."""
    counts = word_errors(reference, hypothesis)
    marked = _marked_words(reference, hypothesis)
    return tag("p", marked, class_="words") + tag(
        "p", text(_count(counts)), class_="soft"
    )


def _count(counts: WordErrors):
    """Number of errors in words."""
    if not counts.errors:
        return "no error"
    plural = "error" if counts.errors == 1 else "errors"
    return f"{counts.errors} {plural} in {counts.words} words"
