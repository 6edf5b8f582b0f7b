"""hyperparams.yaml, written from the architecture that the weights carry.

SpeechBrain's `from_hparams` builds a model from this file. Our own
`from_pretrained` never reads it: YAML of this kind can execute anything, so
load it from people you trust only.
"""

_HEADER = """\
# ############################################################################
# Written by speechbrain_mpq from the architecture in model.safetensors, for
# SpeechBrain's from_hparams. Nothing else is built with other values.
# ############################################################################
"""
_LOADING = """\

# The packed weights have their BatchNorms folded.
__fold: !apply:speechbrain_mpq.separation.tcn.fold_norms_
    - !ref <separator>
"""
_MODULES = """\

modules:
    separator: !ref <separator>

pretrainer: !new:speechbrain_mpq.inference.pretrainer.PackedPretrainer
    loadables:
        separator: !ref <separator>
"""


def hyperparams(architecture):
    """The text of hyperparams.yaml.

    Arguments
    ---------
    architecture : dict
        Of a separator, from `registry.describe`.

    Returns
    -------
    str

    Example
    -------
    >>> features = {"class": "SpatialFeatures", "arguments": {"hop": 256}}
    >>> sizes = {"features": features, "channels": 8, "folded": False}
    >>> text = hyperparams({"class": "Separator", "arguments": sizes})
    >>> print(text[text.index("features") : text.index("modules")].rstrip())
    features: !new:speechbrain_mpq.separation.features.SpatialFeatures
        hop: 256
    <BLANKLINE>
    separator: !new:speechbrain_mpq.separation.separator.Separator
        features: !ref <features>
        channels: 8
    """
    arguments = dict(architecture["arguments"])
    features = arguments.pop("features")["arguments"]
    folded = arguments.pop("folded")
    separation = "!new:speechbrain_mpq.separation"
    lines = [
        f"features: {separation}.features.SpatialFeatures",
        *_entries(features),
        "",
        f"separator: {separation}.separator.Separator",
        "    features: !ref <features>",
        *_entries(arguments),
    ]
    text = _HEADER + "\n".join(lines) + "\n"
    return text + (_LOADING if folded else "") + _MODULES


def _entries(arguments, indent="    "):
    """Lines of a mapping."""
    for key, value in arguments.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _entries(value, indent + "    ")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value):
    """A plain value in YAML; the registry's strings need no quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return "null" if value is None else str(value)
