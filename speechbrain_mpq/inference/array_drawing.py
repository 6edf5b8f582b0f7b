"""Draw a separator's microphone array as text, for cards and terminals.

The array is seen from above by somebody who stands behind it and looks ahead,
to 90 degrees: microphone 1 is to the left, 0 degrees to the right.
"""

from ..lobes.models.spatial_features import (
    LINEAR_15_SPACINGS,
    used_microphones,
)

COLUMNS = 56  # of the drawing at most; the shipped array has one a centimetre
USED, UNUSED = "#", "o"


def array_of(architecture):
    """Read a separator's array from its description."""
    arguments = (architecture or {}).get("arguments", {})
    features = arguments.get("features")
    if not isinstance(features, dict) or "pairs" not in features["arguments"]:
        return None
    settings = features["arguments"]
    spacings = settings.get("spacings_cm") or LINEAR_15_SPACINGS
    return {
        "spacings_cm": list(spacings),
        "microphones": used_microphones(settings["pairs"]),
    }


def draw_array(spacings_cm, microphones):
    """Draw an array with its directions, to scale."""
    places = [0.0]
    for gap in spacings_cm:
        places.append(places[-1] + gap)
    scale = COLUMNS / max(places[-1], 1e-9)
    columns = [round(place * scale) for place in places]
    row = ["-"] * (COLUMNS + 1)
    for number in range(1, len(columns) + 1):
        if number not in microphones:
            row[columns[number - 1]] = UNUSED
    for number in microphones:
        row[columns[number - 1]] = USED
    used = [(columns[n - 1], n, places[n - 1]) for n in microphones]
    ahead = "90° straight ahead"
    return [
        " " * 6 + ahead.center(COLUMNS + 1).rstrip(),
        f"180°  {''.join(row)}  0°",
        f"mic   {_labels((column, f'{n}') for column, n, _ in used)}",
        f"cm    {_labels((column, f'{cm:g}') for column, _, cm in used)}",
        "",
        f"Seen from above; {USED} used, {UNUSED} not used by this model.",
        *_in_words(spacings_cm, microphones),
    ]


def _labels(labels):
    """Words where they belong, as far as there is room."""
    row = ""
    for column, word in labels:
        if not row or column > len(row):
            row = row.ljust(column) + word
    return row


def _in_words(spacings_cm, microphones):
    """The numbers of the drawing, on lines of 80 columns."""
    from textwrap import wrap

    gaps = ", ".join(f"{gap:g}" for gap in spacings_cm)
    used = ", ".join(map(str, microphones))
    return wrap(
        f"{len(spacings_cm) + 1} microphones, {gaps} cm apart; used: {used}.",
        80,
    )
