"""What an experiment costs, told before it runs.

Seconds on two CPU cores, for the small separator of 0.93 M parameters; other
sizes are scaled. Scores by KL and the Hessian are measured alone and the whole
main job as well (docs/results.md); what is told of an experiment adds parts
that are not, and so is called estimated.
"""

from dataclasses import dataclass
from pathlib import Path

MEASURED_PARAMETERS = 0.93e6
PREPARE = 75  # estimated: speech and rooms of all splits, once
TEST = 0.4  # estimated: a mixture separated, recognized and scored
STEP = 0.06  # from the main job: a mixture in a training step
ROUNDING = 20  # estimated: of all layers, on 16 mixtures
# Scores of 100 clusters, by the scorer's class; others as KL. The first and the
# third are measured, the others from runs beside others.
SCORES = {
    "KLScores": 20,
    "MaskErrorScores": 40,
    "HessianScores": 80,
    "NASScores": 80,
}


@dataclass
class Cost:
    """What one experiment does, and how long that takes.

    Arguments
    ---------
    parts : list of str
        Stages, in words.
    seconds : float
        In all.
    measured : bool
        Whether it was, at these sizes.

    Example
    -------
    >>> str(Cost(["test only"], 45, True))
    'test only, about 1 min (measured)'
    """

    parts: list
    seconds: float
    measured: bool
    corpus: float = 0.0  # of these seconds, for what is made once

    def without_corpus(self):
        """Take away what an earlier experiment does."""
        self.seconds -= self.corpus
        self.corpus = 0.0

    def __str__(self):
        how = "measured" if self.measured else "estimated"
        parts = ["speech and rooms"] * bool(self.corpus) + self.parts
        return f"{', '.join(parts)}, {duration(self.seconds)} ({how})"


def duration(seconds):
    """Minutes or hours, in words.

    Example
    -------
    >>> duration(20), duration(250), duration(8000)
    ('about 1 min', 'about 4 min', 'about 2.2 h')
    """
    minutes = max(1, round(seconds / 60))
    if minutes < 120:
        return f"about {minutes} min"
    return f"about {seconds / 3600:.1f} h"


def cost_of(hparams, parameters, trains):
    """Tell what an experiment costs."""
    size = max(parameters / MEASURED_PARAMETERS, 0.05)
    parts, seconds = [], TEST * hparams["mixtures"]["test"] * max(1, size / 4)
    epochs = hparams["number_of_epochs"]
    if hparams["bits"] != 32:
        if hparams["scores"] is not None:
            kind = type(hparams["scores"]).__name__
            parts.append("scores")
            seconds += SCORES.get(kind, SCORES["KLScores"]) * size
        if hparams["round_calibrated"]:
            share = hparams["calibration_mixtures"] / 16
            parts.append("rounding")
            seconds += ROUNDING * size * share**0.5
    if trains and epochs:
        steps = epochs * hparams["mixtures"]["train"] // hparams["batch_size"]
        parts.append(f"{steps} training steps")
        # The larger network is used better by the processor.
        seconds += STEP * hparams["batch_size"] * steps * size**0.5
    parts.append("test" if parts else "test only")
    corpus = 0.0
    if not Path(hparams["test_speech"]).exists() and not hparams["skip_prep"]:
        corpus = PREPARE * hparams["utterances"]["train"] / 1600
    return Cost(parts, seconds + corpus, False, corpus)
