"""The files that tell a resumed training which bits were chosen, and why."""

import json
from pathlib import Path

import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..allocation.analysis import expected_gain, write_expected_gain
from ..quantization.plan import BitPlan
from ..utils import write_json

logger = get_logger(__name__)
SETTINGS = "chosen.json"  # beside plan.json: what the plan was asked for


class PlanStore:
    """What is left in the output folder, and found there again.

    Arguments
    ---------
    folder : str or Path or None
        Of scores.json, plan.json and what a report needs; None: no files.
    checkpointer : speechbrain.utils.checkpoints.Checkpointer or None
        Of the training that follows.
    settings : dict or None
        What a plan depends on, for JSON; None: whoever has the folder takes
        care that it is of the same settings.
    tell : callable
        Takes the sentence on what mixed precision can win.
    """

    def __init__(
        self, folder, checkpointer=None, settings=None, tell=logger.info
    ):
        self.tell = tell
        self.folder = Path(folder) if folder else None
        self.checkpointer = checkpointer
        self.settings = settings

    def earlier_plan(self):
        """The plan of an earlier start with the same settings, or None."""
        path = self.folder and self.folder / "plan.json"
        if not path or not path.exists():
            self._refuse_checkpoints()
            return None
        if self.settings is not None:
            self._check_settings(path)
        logger.info(f"Continuing with the bit plan in {path}")
        return BitPlan.load(path)

    def begin(self):
        """Note what a training is asked for that finds its plan itself.

        Refused where an earlier start was asked for something else.
        """
        if self.folder is None or self.settings is None:
            return
        path = self.folder / SETTINGS
        if path.exists():
            self._check_settings(path)
            return
        self._refuse_checkpoints()
        if if_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.settings)

    def _refuse_checkpoints(self):
        """Refuse checkpoints of a training that was not quantized."""
        if self.settings is None or not self.checkpointer:
            return
        if self.checkpointer.find_checkpoint():
            raise ValueError(
                f"{self.checkpointer.checkpoints_dir} holds checkpoints "
                "but no plan.json is beside them: fit would load weights "
                "that the bits were not chosen for. Load them with a "
                "Pretrainer instead, and train in another output_folder"
            )

    def _check_settings(self, path):
        """Refuse a plan that was chosen with others."""
        # Older files do not tell these.
        older = {"candidate_bits": self.settings.get("candidate_bits")}
        stored = {
            "rounding": "nearest",
            **older,
            **earlier_settings(self.folder),
        }
        stored.setdefault("method", self.settings.get("method"))
        if stored != self.settings:
            raise ValueError(
                f"{path} was chosen with {stored}, asked for is "
                f"{self.settings}: train in another output_folder"
            )

    def weights_follow(self, model):
        """Whether `fit` will load all weights of a model from a checkpoint."""
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
        """Keep the scores, from which other budgets can be solved."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            table.save(self.folder / "scores.json")

    def save_gain(self, table, plan, limits):
        """Log what mixed precision can win, and keep it for the report."""
        if self.folder and "average_bits" in limits:
            bits, least = limits["average_bits"], limits["min_bits"]
            write_expected_gain(self.folder, table, plan, bits, least)
        else:
            self.tell(expected_gain(table, plan)[1])

    def save_plan(self, plan):
        """Keep the plan, which a resumed training needs."""
        if self.folder and if_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.settings is not None:
                write_json(self.folder / SETTINGS, self.settings)
            plan.save(self.folder / "plan.json")


def earlier_settings(folder):
    """What the plan in a folder was asked for."""
    path = Path(folder) / SETTINGS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not tell what the plan.json beside it was asked "
            f"for ({error}): train in another output_folder"
        ) from error
