"""The recipe in tests/data/tiny_recipe, for the tests of the plugin."""

import importlib.util
from pathlib import Path

from hyperpyyaml import load_hyperpyyaml

FOLDER = Path(__file__).parents[1] / "data/tiny_recipe"
PLAIN = (FOLDER / "train.yaml").read_text(encoding="utf-8")
UNIFORM = """
quantizer: !new:speechbrain_mpq.Quantizer
    targets: !ref <modules>
    bits: 4
"""
LEARNED = """
quantizer: !new:speechbrain_mpq.LearnedBits
    targets: !ref <modules>
    bits: 4
    interval: 2
    decisions: 2
"""
OPTIMIZER = "opt_class: !name:torch.optim.AdamW\n"
LEARNING = """opt_class: !name:speechbrain_mpq.learn_bits
    quantizer: !ref <quantizer>
    opt_class: !name:torch.optim.AdamW
"""


def script():
    """The recipe's train.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "tiny_train", FOLDER / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantized_yaml(kind):
    """Text of the hparams file: plain, uniform or learned."""
    if kind == "learned":
        assert OPTIMIZER in PLAIN
        return PLAIN.replace(OPTIMIZER, LEARNING) + LEARNED
    return PLAIN + {"plain": "", "uniform": UNIFORM}[kind]


def hparams_of(kind, folder, **overrides):
    """Freshly built hparams of the recipe."""
    overrides["output_folder"] = str(folder)
    return load_hyperpyyaml(quantized_yaml(kind), overrides)


def brain_of(hparams, **run_opts):
    """A Brain as the script makes it."""
    return script().TinyASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True, **run_opts},
        checkpointer=hparams["checkpointer"],
    )


def train(kind, folder, epochs=2, run_opts=None, **overrides):
    """A trained Brain, and its hparams."""
    hparams = hparams_of(kind, folder, epochs=epochs, **overrides)
    brain = brain_of(hparams, **(run_opts or {}))
    fit(brain, hparams)
    return brain, hparams


def fit(brain, hparams):
    """Train as the script does."""
    dataset, options = script().dataset, {"batch_size": 4}
    brain.fit(
        hparams["epoch_counter"],
        dataset(hparams["items"], seed=1),
        dataset(4, seed=2),
        train_loader_kwargs=dict(options),
        valid_loader_kwargs=dict(options),
    )
