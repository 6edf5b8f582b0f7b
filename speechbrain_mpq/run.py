"""Runs an untouched SpeechBrain recipe with quantized modules.

The recipe's own script runs as it is. Where it calls `fit` for the first time,
bits are chosen on its own validation data and its modules are quantized; then
it goes on. At its end the modules are packed.
"""

import argparse
import inspect
import re
import runpy
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

EXAMPLE = (
    "python -m speechbrain_mpq.run train.py hparams/train.yaml --bits 4 "
    "--scores kl --data_folder DATA"
)


_NO_FOLDER = (
    "the hparams have no output_folder, so that there is no place for the "
    "plan and the packed model: name one with --folder"
)


_NO_CHECKPOINT = (
    "no checkpoint in {}: --weights wants a folder such as results/.../save"
)
ROUNDED = "rounded"  # name of the checkpoint where nothing is trained


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
    folder : str or None
        Of scores.json, plan.json and packed/; None: the hparams'
        output_folder.
    **options : dict
        More arguments of `choose_bits`.
    """

    def __init__(
        self, budget, brain=None, weights=None, folder=None, **options
    ):
        from .allocation.solver import parse_budget
        from .locks import check_folder
        from .quantization.plan import Scheme
        from .training.choose import check_scores, method_of, scorer_of

        scheme = options.get("scheme") or Scheme()
        # Now, not after the script has prepared its data.
        parse_budget(budget)
        scores = options.get("scores")
        if scores:
            check_scores(scores)
        self.method = method_of(options.get("method") or "log_step")
        self.method.check(
            scheme,
            options.get("rounding") or self.method.rounding,
            scores and scorer_of(scores, scheme),
        )
        _check_numbers(**options)
        if weights and not Path(weights).is_dir():
            raise ValueError(f"no folder {weights}: change --weights")
        if weights and not _checkpoints(weights):
            raise ValueError(_NO_CHECKPOINT.format(weights))
        if folder:
            check_folder(folder, "change --folder")
        self.budget = budget
        self.brain_name = brain
        self.weights = weights
        self.folder = folder
        self.options = options
        self.brain = None  # the one whose modules are quantized
        self.trained = False  # whether its fit has come to its end
        self._held = None  # lock of its folder

    def folder_of(self, brain):
        """Where files of a Brain go."""
        own = getattr(brain.hparams, "output_folder", None)
        if not (self.folder or own):
            raise UnsuitableScript(_NO_FOLDER)
        return Path(self.folder or own)

    def before_fit(self, brain, train_set, valid_set, loader_kwargs):
        """Choose bits, if this is the Brain and its first `fit`."""
        name = type(brain).__name__
        if brain is self.brain:
            return
        if self.brain_name not in (None, name):
            self._check_name(type(brain))
            return
        if self.brain is not None:
            raise UnsuitableScript(
                f"the script trains another Brain, {name}, after "
                f"{type(self.brain).__name__} was quantized: say which one "
                "with --brain, and give each a run of its own"
            )
        from .training.choose import choose_bits

        folder = self.folder_of(brain)
        folder.mkdir(parents=True, exist_ok=True)
        self._hold(folder)
        _save_whole(brain.checkpointer)
        if self.weights:
            _load_weights(brain, self.weights)
        data = train_set if valid_set is None else valid_set
        choose_bits(
            brain,
            data,
            budget=self.budget,
            loader_kwargs=None if valid_set is None else loader_kwargs,
            folder=folder,
            **self.options,
        )
        self.brain = brain

    def _hold(self, folder):
        """Refuse a folder that another process is at work in."""
        from speechbrain.utils.distributed import if_main_process

        from .locks import hold_folder

        if not if_main_process():
            return
        try:
            self._held = hold_folder(folder, again=True)
        except BlockingIOError as error:
            raise UnsuitableScript(
                f"{error} with --output_folder or --folder"
            ) from error

    def release(self):
        """Let others work in the folder."""
        if self._held is not None:
            self._held.close()

    def _check_name(self, kind):
        """Refuse a --brain that no class has, before one is trained."""
        from speechbrain import Brain

        from .utils import did_you_mean

        names, kinds = {"Brain"}, [Brain]
        while kinds:
            more = kinds.pop().__subclasses__()
            names.update(k.__name__ for k in more)
            kinds += more
        if self.brain_name not in names:
            raise UnsuitableScript(
                f"--brain {self.brain_name}: the script has no such class"
                f"{did_you_mean(self.brain_name, [kind.__name__])}"
            )

    def trains(self, brain):
        """Whether this Brain is to be trained after its bits are chosen."""
        return brain is not self.brain or self.method.trains

    def after_fit(self, brain):
        """Note that there is something to pack."""
        self.trained = self.trained or brain is self.brain

    def keep(self, brain):
        """Keep what was rounded as the checkpoint that is evaluated."""
        checkpointer = brain.checkpointer
        if checkpointer is None:
            return
        # An earlier start may have rounded it: then this one has not.
        if checkpointer.recover_if_possible() is None:
            checkpointer.save_checkpoint(name=ROUNDED)

    def before_evaluate(self, brain):
        """Refuse results of a Brain that is still in full precision."""
        name = type(brain).__name__
        is_ours = self.brain_name in (None, name)
        if is_ours and brain is not self.brain:
            raise UnsuitableScript(
                f"{name} is evaluated before Brain.fit was called on it, so "
                "that no bits have been chosen: add the line `choose_bits("
                "brain, valid_data, budget=...)` to the script instead"
            )

    def finish(self):
        """Pack what was trained; refuse a script that trained nothing."""
        if self.brain is None:
            brain_name = self.brain_name or "a Brain"
            raise UnsuitableScript(
                "the script ended without calling Brain.fit on "
                f"{brain_name}: its modules were not quantized. Scripts with "
                "a training loop of their own, or a Brain whose class "
                "replaces fit, need the line `choose_bits(brain, valid_data, "
                "budget=...)` instead"
            )
        from speechbrain.utils.distributed import if_main_process

        from .allocation.solver import over_budget
        from .training.quantizer import quantizer_of

        quantizer, folder = quantizer_of(self.brain), self.folder_of(self.brain)
        if quantizer.method:
            quantizer.method.finish(quantizer.model)
        if not if_main_process():
            return None
        if not self.method.keeps_plan:
            quantizer.plan.save(folder / "plan.json")
        path = quantizer.pack(folder / "packed")
        if told := over_budget(path.stat().st_size, self.budget):
            print(f"{path}: {told}", file=sys.stderr)
        return path


def _save_whole(checkpointer):
    """Let a recipe's Checkpointer leave no half checkpoint when it is killed.

    SpeechBrain's own names it first and writes it then: the same command would
    not go on from there.
    """
    from speechbrain.utils.checkpoints import Checkpointer

    from .training.checkpoints import AtomicCheckpointer

    if type(checkpointer) is Checkpointer:
        checkpointer.__class__ = AtomicCheckpointer


def _check_numbers(candidate_bits=None, min_bits=None, batches=None, **_):
    """Refuse what `choose_bits` would, before the script runs."""
    from .allocation.scores import check_candidates
    from .quantization.codebook import MAX_BITS

    if candidate_bits is not None:
        check_candidates(candidate_bits)
    if min_bits is not None and not 1 <= min_bits <= MAX_BITS:
        raise ValueError(f"--min_bits is {min_bits}: take 1 to {MAX_BITS}")
    if batches is not None and batches < 1:
        raise ValueError(f"--batches is {batches}: take at least 1")


def _checkpoints(folder):
    """Paths of the checkpoints in a folder, or of the one that it is."""
    if (Path(folder) / "CKPT.yaml").is_file():
        return [Path(folder)]
    return [path.parent for path in Path(folder).glob("CKPT*/CKPT.yaml")]


def _load_weights(brain, folder):
    """Loads the modules of a Brain's checkpointer from another folder."""
    import torch
    from speechbrain.utils.logger import get_logger

    from .training.checkpoints import AtomicCheckpointer

    own = brain.checkpointer.recoverables if brain.checkpointer else {}
    modules = {n: o for n, o in own.items() if isinstance(o, torch.nn.Module)}
    if not modules:
        raise UnsuitableScript(
            "--weights loads the modules that the recipe's checkpointer "
            "saves, and it saves none"
        )
    paths = {path.resolve() for path in _checkpoints(folder)}
    one = paths == {Path(folder).resolve()}
    source = AtomicCheckpointer(
        Path(folder).resolve().parent if one else folder, modules
    )
    taken = source.recover_if_possible(
        ckpt_predicate=lambda checkpoint: checkpoint.path.resolve() in paths
    )
    if taken is None:
        raise FileNotFoundError(_NO_CHECKPOINT.format(folder))
    if len(paths) > 1:
        get_logger(__name__).warning(
            f"--weights: {taken.path.name} is the latest of {len(paths)} "
            "checkpoints; the recipe's own test may take another, the best "
            f"one: to begin with that, --weights {folder}/CKPT+..."
        )


def _start_fit(brain, name):
    """Run a Brain's on_fit_start, which SpeechBrain leaves out in a test."""
    from speechbrain.utils.logger import get_logger

    get_logger(__name__).warning(
        f"--test_only: {type(brain).__name__} has no {name!r} where it is not "
        "trained: on_fit_start is run, and the evaluation begins anew"
    )
    brain.on_fit_start()
    brain.step = 0


@contextmanager
def quantized_fit(runner):
    """Brain.fit and Brain.evaluate that tell a runner, inside the block."""
    import speechbrain as sb

    fit, evaluate = sb.Brain.fit, sb.Brain.evaluate

    def quantize_and_fit(brain, *args, **kwargs):
        bound = inspect.signature(fit).bind(brain, *args, **kwargs).arguments
        runner.before_fit(
            brain,
            bound["train_set"],
            bound.get("valid_set"),
            bound.get("valid_loader_kwargs", {}),
        )
        if runner.trains(brain):
            fit(brain, *args, **kwargs)
        else:
            runner.keep(brain)
        runner.after_fit(brain)

    def check_and_evaluate(brain, *args, **kwargs):
        runner.before_evaluate(brain)
        try:
            return evaluate(brain, *args, **kwargs)
        except AttributeError as error:
            if not (brain.test_only and error.obj is brain):
                raise
            _start_fit(brain, error.name)
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
    from .allocation.sharing import leave
    from .signals import exit_on_signals

    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    _suggest_options(parser, rest)
    script = Path(options.script).resolve()
    if not script.is_file():
        raise SystemExit(f"no script {options.script}")
    runner = _runner(options)
    before = sys.argv, list(sys.path)
    sys.argv = [str(options.script), *rest]
    sys.path.insert(0, str(script.parent))  # as `python train.py` has it
    try:
        with exit_on_signals(), quantized_fit(runner):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    except Exception:
        if runner.trained:  # what comes later must not cost the training
            _finish(runner)
        raise
    finally:
        sys.argv, sys.path[:] = before
        runner.release()
    path = _finish(runner)
    leave()
    return path


def _suggest_options(parser, rest):
    """Warn of what looks like a mistyped option of its own."""
    # It may be the script's: that is for the script to refuse.
    hparams = next((text for text in rest if Path(text).is_file()), None)
    if hparams is None:
        return
    from dataclasses import fields

    import yaml
    from speechbrain.core import RunOptions

    from .training.hparams_source import hparams_text
    from .utils import did_you_mean

    try:
        text = hparams_text(hparams)  # with that of its base
    except (OSError, ValueError, yaml.YAMLError):
        return  # which the script has to refuse
    keys = set(re.findall(r"^(\w+)\s*:", text, re.MULTILINE))
    keys |= {option.name for option in fields(RunOptions)}
    own = [name for name in parser._option_string_actions if name[:2] == "--"]
    for word in rest:
        name = word.partition("=")[0]
        hint = did_you_mean(name, own)
        if name[:2] == "--" and name[2:] not in keys and "mean" in hint:
            print(f"{hparams} has no key for {name}{hint}", file=sys.stderr)


def _finish(runner):
    """Pack what was trained, and say where."""
    path = runner.finish()
    if path:
        from .quantization.plan import bit_plan

        plan = bit_plan(runner.brain.modules)
        print(
            f"Packed: {path}, {path.stat().st_size} bytes; "
            f"{len(plan.tensors)} tensors have {plan.average_bits:.2f} bits on "
            f"average, {plan.rest_parameters} parameters stay in float"
        )
    return path


def _runner(options):
    """The runner of the command line; what it cannot mean ends the program."""
    from .quantization.plan import Scheme

    settings = vars(options).copy()
    del settings["script"]
    scheme_options = {
        field.name: settings.pop(field.name) for field in fields(Scheme)
    }
    try:
        # What is not asked for is left to a quantizer of the recipe's own.
        scheme = Scheme(**scheme_options)
        settings["scheme"] = scheme if scheme != Scheme() else None
        if settings["candidate_bits"] is None:
            del settings["candidate_bits"]
        return Runner(settings.pop("bits"), **settings)
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
    from .commands.arguments import Parser

    parser = Parser(
        prog="python -m speechbrain_mpq.run",
        description=__doc__,
        epilog=f"example: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("script", help="the recipe's train.py; its own arguments follow")
    _add_choices(add)
    _add_scheme(add)
    _add_places(add)
    return parser


def _add_choices(add):
    """Which bits, for what, and how weights are found."""
    add("--bits", default="4", help='budget: 4, "2.5 bit", "350 KiB"')
    add(
        "--scores",
        help="what bits are chosen by: kl (the default), output_error, "
        "hessian, loss, nas, weight_error, size, random, reversed, table, "
        "uniform; settings behind a colon: random:seed=3, "
        "table:file=results/kl_4bit/scores.json",
    )
    add(
        "--method",
        help="how weights are found: log_step (the default), learned_step, "
        "straight_through, admm, admm_printed, one_stage, or post_training, "
        "without fit; settings behind a colon: admm:penalty=0.01,growth=1.2",
    )
    add(
        "--prototypes",
        nargs="+",
        type=_prototype,
        action=_Prototypes,
        metavar="BITS=FOLDER",
        help="packed uniform systems that clusters inherit from",
    )


def _add_scheme(add):
    """What is quantized, and to which bits."""
    from .commands.arguments import bits_number

    add("--include", nargs="+", default=("*",), help="patterns")
    add("--exclude", nargs="+", default=(), help="patterns")
    add(
        "--float_vectors",
        dest="vectors",
        action="store_false",
        help="leave biases, norms and all else of one dimension in float",
    )
    add(
        "--gates",
        action="store_true",
        help="bits of its own for each gate of each layer of LSTMs and GRUs",
    )
    add(
        "--granularity",
        default="tensor",
        help="one table a tensor, or channel: one a row",
    )
    add("--codebook", default="midtread", help="or midrise, without a zero")
    add("--rows", type=int, help="most output channels that share their bits")
    add(
        "--candidate_bits",
        type=bits_number,
        nargs="+",
        help="bits to choose from",
    )
    add("--batches", type=int, default=8, help="of validation data")
    add("--min_bits", type=bits_number, default=2, help="of any cluster")
    add("--equal_bits", nargs="+", default=(), help="qkv, gates, patterns")
    add(
        "--rounding",
        choices=("calibrated", "nearest"),
        help="calibrated: layers are fitted to their outputs in float; the "
        "default where training begins at rounded weights",
    )


def _add_places(add):
    """What is read and written."""
    add(
        "--folder",
        help="of scores.json, plan.json and packed/ (default: the hparams' "
        "output_folder)",
    )
    add("--brain", help="class to quantize, where there are several")
    add("--weights", help="full-precision checkpoints to begin with")


if __name__ == "__main__":
    main()
