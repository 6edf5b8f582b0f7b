"""Runs an untouched SpeechBrain recipe with quantized modules.

The recipe's own script runs as it is. Where it calls `fit` for the first time,
bits are chosen on its own validation data and its modules are quantized; then
it goes on. At its end the modules are packed.
"""

import argparse
import inspect
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

EXAMPLE = (
    "python -m speechbrain_mpq.run train.py hparams/train.yaml --bits 4 "
    "--scores kl --data_folder DATA"
)


_NO_FOLDER = (
    "the hparams have no output_folder, so that there is no place for the "
    "packed model"
)


class UnsuitableScript(ValueError):
    """A script whose shape leaves no place to choose bits."""


class Runner:
    """What happens when the script calls `fit` and `evaluate`.

    Arguments
    ---------
    budget : str
        Bits or bytes, as for `choose_bits`.
    brain : str or None
        Name of the Brain class to quantize, where there are several.
    weights : str or None
        Folder of full-precision checkpoints to begin with.
    **options : dict
        More arguments of `choose_bits`.
    """

    def __init__(self, budget, brain=None, weights=None, **options):
        from .allocation.budget import parse_budget
        from .training.choose import check_scores, method_of

        # Now, not after the script has prepared its data.
        parse_budget(budget)
        if options.get("scores"):
            check_scores(options["scores"])
        if options.get("method"):
            options["method"] = method_of(options["method"])
        self.budget = budget
        self.brain_name = brain
        self.weights = weights
        self.options = options
        self.brain = None  # the one whose modules are quantized

    def before_fit(self, brain, train_set, valid_set, loader_kwargs):
        """Choose bits, if this is the Brain and its first `fit`."""
        name = type(brain).__name__
        if brain is self.brain:
            return
        if self.brain_name not in (None, name):
            return
        if self.brain is not None:
            raise UnsuitableScript(
                f"the script trains another Brain, {name}, after "
                f"{type(self.brain).__name__} was quantized: say which one "
                "with --brain, and give each a run of its own"
            )
        from .training.choose import choose_bits

        if getattr(brain.hparams, "output_folder", None) is None:
            raise UnsuitableScript(_NO_FOLDER)
        if self.weights:
            _load_weights(brain, self.weights)
        data = train_set if valid_set is None else valid_set
        choose_bits(
            brain,
            data,
            budget=self.budget,
            loader_kwargs=None if valid_set is None else loader_kwargs,
            **self.options,
        )
        self.brain = brain

    def trains(self, brain):
        """Whether this Brain is to be trained after its bits are chosen."""
        method = self.options.get("method")
        return brain is not self.brain or method is None or method.trains

    def keep(self, brain):
        """Save what was rounded as the checkpoint that is evaluated."""
        if brain.checkpointer is not None:
            brain.checkpointer.save_checkpoint(name="rounded")

    def before_evaluate(self, brain):
        """Refuse results of a Brain that is still in full precision."""
        name = type(brain).__name__
        wanted = self.brain_name in (None, name)
        if wanted and brain is not self.brain:
            raise UnsuitableScript(
                f"{name} is evaluated before Brain.fit was called on it, so "
                "that no bits have been chosen: add the line `choose_bits("
                "brain, valid_data, budget=...)` to the script instead"
            )

    def finish(self):
        """Pack what was trained; refuse a script that trained nothing."""
        if self.brain is None:
            wanted = self.brain_name or "a Brain"
            raise UnsuitableScript(
                f"the script ended without calling Brain.fit on {wanted}: its "
                "modules were not quantized. Scripts with a training loop of "
                "their own, or a Brain whose class replaces fit, need the "
                "line `choose_bits(brain, valid_data, budget=...)` instead"
            )
        from speechbrain.utils.distributed import if_main_process

        from .training.quantizer import quantizer_of

        if not if_main_process():
            return None
        folder = getattr(self.brain.hparams, "output_folder", None)
        if folder is None:
            raise UnsuitableScript(_NO_FOLDER)
        return quantizer_of(self.brain).pack(Path(folder) / "packed")


def _load_weights(brain, folder):
    """Loads the modules of a Brain's checkpointer from another folder."""
    import torch
    from speechbrain.utils.checkpoints import Checkpointer

    own = brain.checkpointer.recoverables if brain.checkpointer else {}
    modules = {n: o for n, o in own.items() if isinstance(o, torch.nn.Module)}
    if not modules:
        raise UnsuitableScript(
            "--weights loads the modules that the recipe's checkpointer "
            "saves, and it saves none"
        )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}: change --weights")
    source = Checkpointer(folder, modules)
    if source.recover_if_possible() is None:
        raise FileNotFoundError(
            f"no checkpoint in {folder}: --weights wants a folder such as "
            "results/.../save"
        )


@contextmanager
def quantized_fit(runner):
    """Brain.fit and Brain.evaluate that tell a runner, inside the block."""
    import speechbrain as sb

    fit, evaluate = sb.Brain.fit, sb.Brain.evaluate

    def quantize_and_fit(brain, *args, **kwargs):
        given = inspect.signature(fit).bind(brain, *args, **kwargs).arguments
        runner.before_fit(
            brain,
            given["train_set"],
            given.get("valid_set"),
            given.get("valid_loader_kwargs", {}),
        )
        if runner.trains(brain):
            return fit(brain, *args, **kwargs)
        return runner.keep(brain)

    def check_and_evaluate(brain, *args, **kwargs):
        runner.before_evaluate(brain)
        return evaluate(brain, *args, **kwargs)

    sb.Brain.fit, sb.Brain.evaluate = quantize_and_fit, check_and_evaluate
    try:
        yield
    finally:
        sb.Brain.fit, sb.Brain.evaluate = fit, evaluate


def main(arguments=None):
    """Runs a script under the options of the command line.

    Arguments
    ---------
    arguments : list of str or None
        Those of the command line if not given.

    Returns
    -------
    path : Path or None
        The packed model.
    """
    options, rest = _parser().parse_known_args(arguments)
    script = Path(options.script).resolve()
    if not script.is_file():
        raise SystemExit(f"no script {options.script}")
    runner = _runner(options)
    before = sys.argv, list(sys.path)
    sys.argv = [str(options.script), *rest]
    sys.path.insert(0, str(script.parent))  # as `python train.py` has it
    try:
        with quantized_fit(runner):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.argv, sys.path[:] = before
    path = runner.finish()
    if path:
        print(f"Packed: {path}, {path.stat().st_size} bytes")
    return path


def _runner(options):
    """The runner of the command line; what it cannot mean ends the program."""
    known = vars(options).copy()
    del known["script"]
    try:
        return Runner(known.pop("bits"), **known)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def _prototype(text):
    """Bits and folder of BITS=FOLDER."""
    bits, equals, folder = text.partition("=")
    if not equals or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not BITS=FOLDER with a packed folder, such as "
            "4=results/uniform/packed"
        )
    return (float(bits) if "." in bits else int(bits)), folder


class _Prototypes(argparse.Action):
    """Keeps pairs as a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, dict(values))


def _parser():
    """Own options; whatever else there is belongs to the script."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_mpq.run",
        description=__doc__,
        epilog=f"example: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("script", help="the recipe's train.py; its own arguments follow")
    add("--bits", default="4", help='budget: 4, "2.5 bit", "350 KiB"')
    add("--scores", help="kl (the default), hessian, loss, nas, uniform, ...")
    add(
        "--method",
        help="how weights are found: log_step (the default), learned_step, "
        "straight_through, admm, one_stage, or post_training, without fit",
    )
    add(
        "--prototypes",
        nargs="+",
        type=_prototype,
        action=_Prototypes,
        metavar="BITS=FOLDER",
        help="packed uniform systems that clusters inherit from",
    )
    add("--include", nargs="+", default=("*",), help="patterns")
    add("--exclude", nargs="+", default=(), help="patterns")
    add("--batches", type=int, default=8, help="of validation data")
    add("--min_bits", type=int, default=2, help="of any cluster")
    add("--equal_bits", nargs="+", default=(), help="qkv, gates, patterns")
    add(
        "--rounding",
        choices=("calibrated", "nearest"),
        help="calibrated: layers are fitted to their outputs in float; the "
        "default where training begins at rounded weights",
    )
    add("--brain", help="class to quantize, where there are several")
    add("--weights", help="full-precision checkpoints to begin with")
    return parser


if __name__ == "__main__":
    main()
