"""Tell a recipe's train loggers (text, TensorBoard, W&B) of bits and scores."""

from pathlib import Path

from speechbrain.utils.distributed import main_process_only

from ..allocation.scores import ScoreTable


def _train_loggers(hparams):
    """The train loggers among a Brain's hyper-parameters, each once."""
    # Importing it says that there is no torchvision: the recipe does that
    from speechbrain.utils.train_logger import TrainLogger

    found = {
        id(value): value
        for value in hparams.values()
        if isinstance(value, TrainLogger)
    }
    return list(found.values())


@main_process_only
def log_stats(hparams, stats, test_stats=None):
    """Log statistics with all train loggers of a Brain's hyper-parameters.

    Arguments
    ---------
    hparams : dict or SimpleNamespace
        Of a Brain.
    stats : dict of str -> number
        Of the model: "bits", "bytes".
    test_stats : dict of str -> number or None
        What it was scored.
    """
    hparams = hparams if isinstance(hparams, dict) else vars(hparams)
    for logger in _train_loggers(hparams):
        file = getattr(logger, "save_file", None)
        if file:  # bits are chosen before some recipes make their folder
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        logger.log_stats(stats_meta=stats, test_stats=test_stats)


def plan_stats(plan, folder=None):
    """Compute what is logged of a bit plan.

    Arguments
    ---------
    plan : BitPlan
        What a model is quantized to.
    folder : str or Path or None
        Of a scores.json, where the bits were chosen by scores.

    Returns
    -------
    dict of str -> number
        "bits", average of a quantized weight; "bytes" of the weights; where
        there are scores, "score", their sum over the clusters at these bits.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import quantize_
    >>> plan_stats(quantize_(torch.nn.Linear(8, 4), 4, exclude="bias"))
    {'bits': 4.0, 'bytes': 36}
    """
    stats = {"bits": float(plan.average_bits), "bytes": plan.bytes}
    path = Path(folder, "scores.json") if folder else None
    if path is None or not path.exists():
        return stats
    scores = ScoreTable.load(path).scores
    chosen = {name: cluster.bits for name, cluster in plan.clusters.items()}
    if all(bits in scores.get(name, {}) for name, bits in chosen.items()):
        stats["score"] = sum(
            scores[name][bits] for name, bits in chosen.items()
        )
    return stats
