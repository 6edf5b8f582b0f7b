"""The quantizer of a Brain's modules, wherever it comes from."""

from .quantizer import Quantizer
from .quantizer_options import as_list


def quantizer_of(brain, quantizer=None, include=("*",), exclude=()):
    """The quantizer of a Brain's modules; a new one where there is none.

    Arguments
    ---------
    brain : speechbrain.Brain
        Its hparams are looked at, and what `choose_bits` left.
    quantizer : Quantizer or None
        Goes before both.
    include, exclude : sequence of str
        For a new one.

    Returns
    -------
    quantizer : Quantizer
    """
    own = getattr(getattr(brain, "hparams", None), "quantizer", None)
    quantizer = quantizer or own or getattr(brain, "chosen_quantizer", None)
    if quantizer is None:
        patterns = {"include": include, "exclude": exclude}
        quantizer = Quantizer(brain.modules, bits=None, **patterns)
        # Nothing else holds it, and the hooks are its own.
        brain.chosen_quantizer = quantizer
    elif not isinstance(quantizer, Quantizer):
        raise TypeError(
            "the hparams' quantizer must be a speechbrain_mpq.Quantizer, not "
            f"a {type(quantizer).__name__}"
        )
    elif not _agree(quantizer.patterns, include, exclude):
        raise ValueError(
            "include and exclude are the quantizer's, which is there already: "
            "give them in its block, or the same at every call"
        )
    if quantizer.any_bits:
        raise ValueError(
            "the quantizer learns its bits in training: name a Quantizer, not "
            "LearnedBits, where choose_bits chooses them"
        )
    return quantizer


def _agree(patterns, include, exclude):
    """Whether patterns are those that were asked for, or none were."""
    own = [as_list(patterns[key]) for key in ("include", "exclude")]
    asked = [as_list(include), as_list(exclude)]
    return asked in (own, [["*"], []])
