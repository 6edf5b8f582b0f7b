"""The folder of one experiment: what it was asked, whether it is finished.

A folder belongs to one set of hyper-parameters. Starting the same again
continues or does nothing; starting another in it is refused, so that no
result can come from a mixture of two.
"""

import json
from pathlib import Path

from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_logger

from .files import write_json
from .settings import (
    REPORTED,
    differing,
    digest,
    resolved_text,
    settings_of,
    text_digest,
)

logger = get_logger(__name__)


def read_hparams(path, overrides=""):
    """Load a hyper-parameter file.

    Arguments
    ---------
    path : str
        HyperPyYAML file.
    overrides : str
        YAML text of what to change.

    Returns
    -------
    hparams : dict
    """
    with open(path, encoding="utf-8") as source:
        return load_hyperpyyaml(source, overrides)


class Experiment:
    """Output folder of one experiment.

    Arguments
    ---------
    hparams : dict
        Loaded hyper-parameters; `output_folder` is used.
    hparams_file : str
        Where they come from.
    overrides : str
        YAML text of the overrides.
    inputs : sequence of str or Path
        Files that the result depends on too, such as the weights to start
        from; what is missing is left out.
    """

    def __init__(self, hparams, hparams_file, overrides="", inputs=()):
        self.folder = Path(hparams["output_folder"])
        text = resolved_text(hparams_file, overrides)
        self.asked = {"settings": settings_of(text), "inputs": digest(inputs)}
        stored = self._stored(text, inputs) or self.asked
        keys = differing(stored["settings"], self.asked["settings"])
        self.report_differs = [key for key in keys if key in REPORTED]
        keys = [key for key in keys if key not in REPORTED]
        if stored["inputs"] != self.asked["inputs"]:
            keys.append("weights or architecture to start from")
        if keys:
            raise self._refusal(f"settings: {', '.join(keys)}")

    @property
    def finished(self):
        """Whether its metrics are there."""
        return (self.folder / "metrics.json").exists()

    @property
    def state(self):
        """One sentence on a finished experiment."""
        said = f"{self.folder} is finished already"
        if self.report_differs:
            said += (
                f"; its report was made with another "
                f"{' and '.join(self.report_differs)}: delete its "
                "metrics.json to have it scored and written again"
            )
        return said

    def say_finished(self):
        """Log so; a warning, which is seen, where its report is another."""
        log = logger.warning if self.report_differs else logger.info
        log(self.state)

    def start(self):
        """Make the folder and note whose it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", self.asked)

    def _stored(self, text, inputs):
        """What the folder's run was asked; None without one."""
        path = self.folder / "settings.json"
        if not path.exists():
            if self.finished:
                raise self._refusal("settings, or none: no settings.json")
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "settings" in stored:
            return stored
        # An older run left a hash: of these settings, or of those it saved?
        saved = self.folder / "hyperparams.yaml"
        texts = [text]
        if saved.exists():
            texts.append(saved.read_text(encoding="utf-8"))
        for candidate in texts:
            if text_digest(candidate, inputs) == stored["sha256"]:
                settings = settings_of(candidate)
                return {"settings": settings, "inputs": digest(inputs)}
        raise self._refusal("settings or weights (see its hyperparams.yaml)")

    def _refusal(self, difference):
        """An error for a folder that belongs to another experiment."""
        return ValueError(
            f"{self.folder} holds a run with other {difference}. Delete it, "
            "or choose another place with --results_folder"
        )
