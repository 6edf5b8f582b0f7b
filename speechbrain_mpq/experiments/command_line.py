"""The command line of train.py: what it may say, and what is said back.

Everything that can be found wrong is found before any work, and answered in
one line; then it is told which experiments there are and what they cost.

Costs are seconds of `make demo` on a 2-core AVX-512 machine with nothing beside
it (2026-11-30), for the small separator of 0.93 M parameters. Other sizes are
scaled, and other machines by how long a matrix product takes them; so what is
told is called estimated.
"""

import contextlib
import io
import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

import speechbrain as sb
import torch
import yaml
from speechbrain.core import DEFAULT_LOG_CONFIG, RunOptions
from speechbrain.utils.distributed import ddp_init_group, if_main_process

import speechbrain_mpq

from ..allocation.sharing import leave
from ..signals import exit_on_signals
from ..training.brain import check_average_bits
from ..training.choose import CANDIDATES, SCORERS
from ..training.experiment import plan_steps
from ..training.hparams_source import (
    ROOT,
    HparamsSource,
    entries,
    find_file,
    hparams_text,
    overrides_text,
    unread,
)
from ..utils import (
    did_you_mean,
    duration,
    error_text,
    scratch_folder,
)

USAGE = "python train.py hparams/kl_4bit.yaml --bits 3"
BASE = "base.yaml"  # what the files of methods begin with
REFUSED = 2  # exit status
OWN_FLAGS = ("wide", "dry_run")
OTHER_SCORERS = {"mask_error": "MaskErrorScores"}  # of separators only
ESTIMATORS = ("LearnedStep", "StraightThrough", "LogStep", "PostTraining")
CHOICES = {
    "granularity": ("tensor", "channel"),
    "codebook": ("midtread", "midrise", "entropy"),
}
FRACTIONS = ("bits", "min_bits", "chunk_seconds")  # written whole in the files
OBJECTS = {  # key -> a file that has such an object
    "admm": "hparams/admm_4bit.yaml",
    "one_stage": "hparams/one_stage_4bit.yaml",
    "scores": "hparams/kl_4bit.yaml",
}
FOLDERS = ("train_corpora",)  # maps of anybody's folders, not of known keys
_YAML = "tag:yaml.org,2002:"
_TRAINING = unread({"number_of_epochs": 0, "bits": 4, "scores": True})
MEASURED_PARAMETERS = 0.93e6
PREPARE = 112  # speech and rooms of all splits, once
TEST = 0.145  # a mixture separated, recognized and scored
STEP = 0.118  # a mixture in a training step
ROUNDING = 40  # of all layers, on 16 mixtures; a guess
# Scores of 100 clusters, by the scorer's class; others as KL. KL's are of that
# run, the others of runs on another machine, as many times KL's there.
SCORES = {
    "KLScores": 41,
    "MaskErrorScores": 80,
    "HessianScores": 160,
    "NASScores": 160,
}
PRODUCT = 0.0056  # a product of PRODUCT_SIZE on one core of that machine
PRODUCT_SIZE = 768
PROBED, MOST_PROBES = 0.3, 100  # seconds, products

# Before there is a log file SpeechBrain has nothing to say that is needed.
logging.getLogger("speechbrain").addHandler(logging.NullHandler())
logger = logging.getLogger(__name__)


class Refusal(ValueError):
    """What a command line cannot mean; nothing was run."""


@dataclass
class CommandLine:
    """What a command line asks for, checked.

    Example
    -------
    >>> CommandLine(None, [], []).wide
    False
    """

    run_opts: RunOptions  # SpeechBrain's
    # list of Step: experiments in their order; the one asked for is the last
    steps: list
    costs: list  # list of Cost: of each
    wide: bool = False  # whether the table shows every condition
    dry_run: bool = False  # whether to tell only what would be run


def read_command_line(arguments, check):
    """Read and check a command line; nothing is run or written."""
    with _refusing():
        return _read(arguments, check)


def _read(arguments, check):
    """What a command line asks for."""
    own = {name: f"--{name}" in arguments for name in OWN_FLAGS}
    rest = [text for text in arguments if text.lstrip("-") not in OWN_FLAGS]
    if not rest or rest[0].startswith("-"):
        raise ValueError(f"which experiment? The file comes first: {USAGE}")
    path = _hparams_file(rest[0])
    text = hparams_text(path)
    _check_keys(rest[1:], entries(text))
    run_opts, overrides = _parsed(rest)
    _check_device(run_opts.device)
    nodes = entries(overrides)
    resolved = entries(HparamsSource(path).resolved)
    for key, node in nodes.items():
        nodes[key] = _in_full(key, node, text)
        _check_value(key, nodes[key], resolved[key])
    source = HparamsSource(path, overrides_text(nodes))
    ddp_init_group(run_opts)  # a Brain asks for it, also one to check
    steps = plan_steps(source)
    costs = [check(step.hparams, run_opts) for step in steps]
    return CommandLine(run_opts, steps, costs, **own)


def say(text="", end="\n"):
    """Print a line on the terminal, of one process only."""
    if if_main_process():
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # not all have †
        print(text, end=end, flush=True)


def tell_plan(line, input_files):
    """Say which experiments there are, what they do and cost."""
    left, folders, corpora = 0.0, set(), set()
    for number, (step, cost) in enumerate(zip(line.steps, line.costs), 1):
        experiment = step.begin(input_files)
        state = "finished already" if experiment.finished else cost
        if not experiment.finished:
            if step.hparams["data_folder"] in corpora:
                cost.without_corpus()  # an earlier one makes it
            corpora.add(step.hparams["data_folder"])
            left += cost.seconds
        name = f"{_count_of(number, line.steps)} {_step_name(step.hparams)}"
        say(f"{name}: {state}")
        if line.dry_run:
            beside = ", or beside it" if experiment.folder in folders else ""
            say(f"      in {experiment.folder}{beside}")
        folders.add(experiment.folder)
    if len(line.steps) > 1 and left:
        say(f"{duration(left).capitalize()} in all, on two cores like these.")
    last = line.steps[-1]
    for key in sorted(unread(last.source.settings) & last.source.overridden):
        why = "nothing is trained" if key in _TRAINING else "of full precision"
        say(f"--{key} changes nothing here: {why}")


def tell_step(number, line):
    """Say which experiment is running."""
    count = _count_of(number, line.steps)
    say(f"{count} {_step_name(line.steps[number - 1].hparams)}")


def _count_of(number, steps):
    """As "[1/3]"."""
    return f"[{number}/{len(steps)}]"


def _step_name(hparams):
    """A system, its bits and how its weights are found."""
    if hparams["bits"] == 32:
        return hparams["system"]
    estimator = hparams["estimator"].__name__
    return f"{hparams['system']}, {hparams['bits']:g} bit, {estimator}"


@contextlib.contextmanager
def chatter_to_log():
    """What libraries in C print goes to a file, not to the terminal.

    `sys.stdout` goes on to the terminal. Gives a function that takes the file.
    """
    try:
        terminal = sys.stdout.fileno() == 1 and os.dup(1)
    except (OSError, ValueError, AttributeError):
        terminal = None  # captured, as in a notebook
    if not terminal:
        yield lambda path: None
        return
    sys.stdout.flush()
    before = sys.stdout

    def into(path):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.close(target)

    with os.fdopen(terminal, "w", buffering=1, closefd=False) as sys.stdout:
        into(os.devnull)
        try:
            yield into
        finally:
            sys.stdout.flush()
            sys.stdout = before
            os.dup2(terminal, 1)
            os.close(terminal)


@contextlib.contextmanager
def quiet_log_config(own=None):
    """A configuration of SpeechBrain's logging: all of it goes to the file.

    On the terminal are this package's warnings only.

    Example
    -------
    >>> with quiet_log_config() as path:
    ...     Path(path).suffix
    '.yaml'
    """
    if own:
        yield own
        return
    config = yaml.safe_load(Path(DEFAULT_LOG_CONFIG).read_text("utf-8"))
    config["filters"] = {"ours": {"name": __package__.partition(".")[0]}}
    config["formatters"]["console"]["format"] = "note: %(message)s"
    # Its search for fonts, line by line, is nobody's business.
    config["loggers"] = {"matplotlib": {"level": "WARNING"}}
    config["handlers"]["console"] |= {"level": "WARNING", "filters": ["ours"]}
    with scratch_folder() as folder:
        path = Path(folder, "log-config.yaml")
        path.write_text(yaml.safe_dump(config), "utf-8")
        yield str(path)


def guarded(program, *arguments):
    """Run a program; what it refuses is one line on the terminal."""
    try:
        with exit_on_signals():
            program(*arguments)
        leave()
        sys.stdout.flush()
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        logger.debug("Refused:", exc_info=True)  # into the log file
        print(error_text(error), file=sys.stderr)
        return REFUSED if isinstance(error, Refusal) else 1
    except Exception:
        # SpeechBrain's hook writes to the log only.
        logger.error("Exception:", exc_info=True)
        traceback.print_exc()
        return 1
    return 0


def _hparams_file(text):
    """The file of a command line; a near miss is told."""
    path = find_file(text)
    if path.is_file() and path.name != BASE:
        return path
    folder = path.parent if path.parent.is_dir() else ROOT / "hparams"
    files = [file for file in folder.glob("*.yaml") if file.name != BASE]
    if text in {file.stem for file in files}:
        return folder / f"{text}.yaml"
    names = [str(file.relative_to(folder)) for file in sorted(files)]
    names = [str(Path(text).parent / name) for name in names]
    what = "experiment" if path.is_file() else "file"
    raise ValueError(f"no {what} {text}{did_you_mean(text, names)}")


def _check_keys(arguments, keys):
    """Refuse options that neither the file nor SpeechBrain has."""
    run_options = {option.name for option in fields(RunOptions)}
    names = [*keys, *run_options - {"param_file", "overridden_args"}]
    flags = {f.name for f in fields(RunOptions) if f.default is False}
    after = None
    for text in arguments:
        if not text.startswith("--"):
            if after is None or after in flags:
                raise ValueError(
                    f"what is {text!r}? Options are --key value: {USAGE}"
                )
            continue
        name = text[2:].partition("=")[0]
        if name not in names:
            # SpeechBrain would take beginnings of its options for them.
            options = [f"--{known_name}" for known_name in names]
            close = did_you_mean(text, options).partition(": there are")[0]
            hint = close or "; the file's own keys are the options"
            raise ValueError(f"unknown option --{name}{hint}")
        after = name


def _parsed(arguments):
    """SpeechBrain's options, and the overrides as YAML text."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            _, run_opts, overrides = sb.parse_arguments(arguments)
    except SystemExit as ended:
        lines = complaint.getvalue().strip().splitlines()[-1:]
        raise ValueError(" ".join(lines).rpartition("error: ")[2]) from ended
    try:
        entries(overrides)
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        for line in overrides.splitlines():
            key, _, value = line.partition(": ")
            try:
                entries(line)
            except yaml.YAMLError:
                raise ValueError(
                    f"--{key} {value} is no YAML: look at its brackets, and "
                    "put quotes around it"
                ) from error
        raise ValueError(f"overrides are no YAML: {overrides}") from error
    return run_opts, overrides


def _check_device(device):
    """Refuse a GPU that is not there."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"no GPU for --device {device}: leave it out, or --device cpu"
        )


def _in_full(key, node, text):
    """What a word such as `kl` or `PostTraining` stands for, as a node."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != _YAML + "str":
        return node
    word = node.value
    if key == "estimator":
        if word not in ESTIMATORS:
            close = did_you_mean(word, ESTIMATORS)
            raise ValueError(f"no estimator {word!r}{close}")
        return yaml.compose(f"!name:speechbrain_mpq.{word}")
    if key != "scores":
        return node
    words = {**SCORERS, **OTHER_SCORERS}
    if word == "uniform":
        return yaml.compose("null")
    if word not in words:
        close = did_you_mean(word, [*words, "uniform"])
        raise ValueError(f"no scores {word!r}{close}")
    return _scorer_node(words[word], entries(text)["scores"])


def _scorer_node(scorer, own):
    """The node of a scorer; the file's own where it is the same class."""
    options = scorer.keywords if isinstance(scorer, partial) else {}
    scorer = scorer.func if isinstance(scorer, partial) else scorer
    name = scorer if isinstance(scorer, str) else scorer.__name__
    module = "speechbrain_mpq"
    if not hasattr(speechbrain_mpq, name):
        module = scorer.__module__
    tag = f"!new:{module}.{name}"
    if own.tag == tag:
        return own
    bits = list(CANDIDATES)
    if isinstance(own, yaml.MappingNode):
        values = {key.value: value for key, value in own.value}
        bits = [
            yaml.safe_load(item.value)
            for item in values["candidate_bits"].value
        ]
    arguments = {"candidate_bits": bits, **options}
    flow = yaml.safe_dump(arguments, default_flow_style=True, width=1000)
    return yaml.compose(f"{tag} {flow}")


def _check_value(key, node, usual):
    """Refuse a value of another kind than the file's."""
    text = yaml.serialize(node).strip().removesuffix("...").strip()
    kind = usual.tag.removeprefix(_YAML)
    own = node.tag.removeprefix(_YAML)
    problem = f"--{key} {text}: "
    if node.tag.startswith("!") or key in FOLDERS:
        return  # judged where it is used
    if isinstance(usual, yaml.MappingNode):
        if isinstance(node, yaml.MappingNode):
            _check_within(key, node, usual)
        elif key not in OBJECTS or own != "null":
            first = usual.value[0][0].value
            raise ValueError(
                f'{problem}say which, as --{key} "{{{first}: ..}}"'
            )
        return
    if isinstance(node, yaml.MappingNode):
        where = OBJECTS.get(key)
        hint = f"use {where}, which has one" if where else "one value is needed"
        raise ValueError(
            f"{problem}there is nothing to change in it here: {hint}"
        )
    if kind == "bool" and own != "bool":
        close = did_you_mean(text, ["True", "False"])
        raise ValueError(f"{problem}True or False{close}")
    if kind in ("int", "float"):
        _check_number(key, text, own, kind)
    if kind == "seq" and own != "seq":
        raise ValueError(f'{problem}a list is needed, as "[a, b]" or []')
    if key in CHOICES and text not in CHOICES[key]:
        raise ValueError(f"--{key} {text}{did_you_mean(text, CHOICES[key])}")
    _check_paths(key, node)


def _check_number(key, text, own, kind):
    """Refuse what is no number, or no whole one where it has to be."""
    try:
        value = float(text) if own not in ("bool", "null") else None
    except ValueError:
        value = None
    if value is None:
        raise ValueError(f"--{key} {text}: a number is needed")
    if kind == "int" and key not in FRACTIONS and value != int(value):
        raise ValueError(f"--{key} {text}: a whole number is needed")
    if value < 0:
        raise ValueError(f"--{key} {text}: it cannot be below 0")
    if key == "bits":
        check_average_bits(int(value) if value == int(value) else value)


def _check_within(key, node, usual):
    """Refuse keys that the file's mapping has not."""
    usual_names = [name.value for name, _ in usual.value]
    for name, _ in node.value:
        if name.value not in usual_names:
            close = did_you_mean(name.value, usual_names)
            raise ValueError(f"--{key} has no {name.value!r} here{close}")


def _check_paths(key, node):
    """Refuse files and folders that are not there."""
    paths = {
        "separator_file": ("hparams/models", "*.yaml"),
        "pretrained_separator": ("pretrained", "separator_*"),
        "prototypes": ("hparams", "*.yaml"),
        "against": ("hparams", "*.yaml"),
    }
    if key not in paths or node.tag == _YAML + "null":
        return
    several = isinstance(node, yaml.SequenceNode)
    folder, pattern = paths[key]
    for item in node.value if several else [node]:
        if not find_file(item.value).exists():
            there = sorted((ROOT / folder).glob(pattern))
            names = [f"{folder}/{path.name}" for path in there]
            close = did_you_mean(item.value, names).partition(": there are")[0]
            made = " `python train.py hparams/pretrain.yaml` makes weights"
            made = made if key == "pretrained_separator" and not close else ""
            raise ValueError(
                f"--{key}: there is no {item.value}{close or ';'}{made}".rstrip(
                    ";"
                )
            )


@contextlib.contextmanager
def _refusing():
    """Whatever is wrong with a command line as a Refusal, in one line."""
    try:
        yield
    except KeyError as error:
        raise Refusal(str(error.args[0])) from error
    except yaml.YAMLError as error:
        raise Refusal(f"the file is no YAML: {error}") from error
    except TypeError as error:
        # An object that was made of other arguments than it takes.
        raise Refusal(str(error).splitlines()[0]) from error
    except (ValueError, OSError, ImportError) as error:
        raise Refusal(error_text(error)) from error


@dataclass
class Cost:
    """What one experiment does, and how long that takes.

    Example
    -------
    >>> str(Cost(["test only"], 45, True))
    'test only, about 1 min (measured)'
    """

    parts: list  # list of str: stages, in words
    seconds: float  # in all
    measured: bool  # whether it was, at these sizes
    corpus: float = 0.0  # of these seconds, for what is made once

    def without_corpus(self):
        """Take away what an earlier experiment does."""
        self.seconds -= self.corpus
        self.corpus = 0.0

    def __str__(self):
        how = "measured" if self.measured else "estimated"
        parts = ["speech and rooms"] * bool(self.corpus) + self.parts
        return f"{', '.join(parts)}, {duration(self.seconds)} ({how})"


@cache
def slowness():
    """How many times as long as the measured machine this one takes.

    Example
    -------
    >>> 0.01 < slowness() < 100
    True
    """
    matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.float32)
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        # The least of many: others may have the core in between.
        while sum(times) < PROBED and len(times) < MOST_PROBES:
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times) / PRODUCT


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
    slow = slowness()
    return Cost(parts, slow * (seconds + corpus), False, slow * corpus)
