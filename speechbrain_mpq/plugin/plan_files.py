"""The files that tell a resumed training which bits were chosen."""

import json
from pathlib import Path

import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..brains.files import write_json
from ..quantization.plan import BitPlan

logger = get_logger(__name__)

SETTINGS = "chosen.json"  # beside plan.json: what the plan was asked for


class PlanFiles:
    """What is left in the output folder, and found there again.

    Arguments
    ---------
    brain : speechbrain.Brain
        Its hparams' output_folder and its checkpointer are looked at.
    folder : str or Path or None
        Instead of the output_folder; no files where there is neither.
    scores : str or object
        What the bits are chosen by.
    **settings : dict
        What else a plan depends on, for JSON.
    """

    def __init__(self, brain, folder, scores, **settings):
        own = getattr(getattr(brain, "hparams", None), "output_folder", None)
        folder = folder or own
        self.folder = Path(folder) if folder else None
        self.checkpointer = brain.checkpointer
        name = scores if isinstance(scores, str) else type(scores).__name__
        self.settings = {"scores": name, **settings}

    def earlier_plan(self):
        """The plan of an earlier start with the same settings, or None.

        Returns
        -------
        plan : BitPlan or None
        """
        path = self.folder and self.folder / "plan.json"
        if not path or not path.exists():
            if self.checkpointer and self.checkpointer.find_checkpoint():
                raise ValueError(
                    f"{self.checkpointer.checkpoints_dir} holds checkpoints "
                    "but no plan.json is beside them: fit would load weights "
                    "that the bits were not chosen for. Load them with a "
                    "Pretrainer instead, and train in another output_folder"
                )
            return None
        # Older files do not tell these.
        older = {"candidate_bits": self.settings.get("candidate_bits")}
        found = {"rounding": "nearest", **older, **self._earlier_settings()}
        if found != self.settings:
            raise ValueError(
                f"{path} was chosen with {found}, asked for is {self.settings}"
                ": train in another output_folder"
            )
        logger.info(f"Continuing with the bit plan in {path}")
        return BitPlan.load(path)

    def _earlier_settings(self):
        """What the plan in the folder was asked for."""
        path = self.folder / SETTINGS
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not tell what the plan.json beside it was asked "
                f"for ({error}): train in another output_folder"
            ) from error

    def weights_follow(self, model):
        """Whether `fit` will load all weights of a model from a checkpoint.

        Arguments
        ---------
        model : torch.nn.Module

        Returns
        -------
        bool
        """
        if not (self.checkpointer and self.checkpointer.find_checkpoint()):
            return False
        loaded = {
            id(parameter)
            for saved in self.checkpointer.recoverables.values()
            if isinstance(saved, torch.nn.Module)
            for parameter in saved.parameters()
        }
        return all(id(parameter) in loaded for parameter in model.parameters())

    def save_table(self, table):
        """Keep the scores, from which other budgets can be solved.

        Arguments
        ---------
        table : ScoreTable
        """
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            table.save(self.folder / "scores.json")

    def save_plan(self, plan):
        """Keep the plan, which a resumed training needs.

        Arguments
        ---------
        plan : BitPlan
        """
        if self.folder and if_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, self.settings)
            plan.save(self.folder / "plan.json")
