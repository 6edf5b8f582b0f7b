"""From a source folder of a pretrained interface to a packed one.

The pipeline of `training.pipeline` on an interface's own outputs: there is no
training, so that rounding is all that finds weights.
"""

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..allocation.output_scores import KLScores, OutputErrorScores
from ..allocation.scores import check_candidates
from ..allocation.solver import over_budget, parse_budget
from ..allocation.sweep import OutputScores
from ..locks import alone_in, check_folder
from ..quantization.fake_quant import FakeQuantize
from ..quantization.packing import packed_file_bytes
from ..quantization.plan import Scheme, Selection, bit_plan
from ..quantization.quant_api import coverage, dequantize_, quantize_
from ..quantization.tensors import named_tensors, select
from ..training.calibration import Calibration
from ..training.choose import METHODS, scorer_of
from ..training.methods import EstimationMethod
from ..training.pipeline import Pipeline, PlanStore, logger
from ..training.rounding import check_rounding
from ..utils import plain_name, scratch_folder, write_text
from .calibration_data import (
    Example,
    check_files,
    evenly_spaced,
    read_items,
    read_manifest,
    read_texts,
    sample_rate_of,
)
from .interface_outputs import InterfaceOutputs, task_of
from .pretrained_folder import (
    HPARAMS_FILE,
    PTQReport,
    check_source,
    find_class,
    load_interface,
    model_card,
    packable,
    read_front_matter,
    shared_parameters,
    source_bytes,
    write_folder,
)
from .task_metrics import divergence


class _InterfaceScores(OutputScores):
    """Scores every cluster by what it does to an interface's outputs."""

    def __init__(self, comparison, **options):
        super().__init__(**options)
        self.method = comparison.method
        self.compared = comparison

    def comparison(self):
        """See `OutputScores`: item numbers are the inputs."""
        compared = self.compared
        return torch.arange(len(compared)), compared.error, compared.scale


class InterfaceCalibration(Calibration):
    """An interface's own passes over calibration items.

    Arguments
    ---------
    comparison : Comparison
        Of the interface that is quantized, in full precision.
    modules : dict
        Those that are packed, one file for each.
    prototypes : dict or None
        Bits -> packed folder of the uniform system of these bits.
    """

    def __init__(self, comparison, modules, prototypes=None):
        super().__init__(InterfaceOutputs(comparison))
        self.comparison = comparison
        self.modules = modules
        self.prototypes = prototypes
        self._layers = InterfaceOutputs(comparison, each_layer_once=True)

    @classmethod
    def of(cls, comparison, quantized, prototypes=None):
        """That of an interface which is compared with another's outputs."""
        modules, _ = packable(quantized)
        return cls(comparison.of(quantized), modules, prototypes)

    def chosen_names(self, include=("*",), exclude=(), vectors=False):
        """Name the parameters that are to be quantized."""
        tensors = named_tensors(self.model)
        chosen = select(tensors, include, exclude)
        if not vectors:
            chosen = [t for t in chosen if not t.is_vector]
        stored = set(shared_parameters(self.model, self.modules.values()))
        names = [t.name for t in chosen if t.name in stored]
        if not names:
            raise ValueError(
                "nothing to quantize: no parameter that the patterns leave is "
                "in a file of the source that can be packed "
                f"({list(self.modules)})"
            )
        return names

    def run(self, index):
        """Pass all items, each layer once."""
        self._layers(torch.arange(len(self.comparison)))

    def packed_bytes(self, plan):
        """Bytes of the files that the modules make with a plan."""
        quantize_(self.model, plan)
        try:
            return sum(map(packed_file_bytes, self.modules.values()))
        finally:
            dequantize_(self.model)

    def completed(self, table, scorer):
        """Refuse clusters that do not matter; count what is packed only."""
        rows = table.scores.items()
        silent = [name for name, row in rows if not any(row.values())]
        if silent:
            raise ValueError(
                f"{len(silent)} clusters do not change the outputs that are "
                "compared, so that nothing says how many bits they need: "
                "exclude them by patterns on their parameters, such as "
                f"'{silent[0]}.*'"
            )
        modules = self.modules.values()
        stored = {id(p): p for m in modules for p in m.parameters()}
        total = sum(p.numel() for p in stored.values())
        table.rest_parameters = total - sum(table.parameters.values())
        return table

    def prepared(self, scorer):
        """See `Calibration.prepared`; a loss is the change of the outputs."""
        compared = self.comparison
        if isinstance(scorer, KLScores | OutputErrorScores):
            scorer = _InterfaceScores(
                compared,
                candidate_bits=scorer.candidate_bits,
                scheme=scorer.scheme,
            )
        references = {}

        def loss(output, items):
            if items.start not in references:
                with torch.no_grad():
                    stop = min(items.stop, len(compared))
                    numbers = torch.arange(items.start, stop)
                    plain = compared.outputs(*compared.batch(numbers))
                references[items.start] = plain
            return compared.error(references[items.start], output, items)

        values = {
            "inputs": torch.arange(len(compared)),
            "loss": loss,
            "prototypes": self.prototypes,
        }
        return scorer, self.model, values


CANDIDATES = (1.6, 2, 3, 4, 5, 6, 8, 16)


def quantize_pretrained(
    source,
    class_name,
    calibration,
    budget,
    output,
    test=None,
    data_root=None,
    items=32,
    test_items=None,
    audio_key="wav",
    text_key=None,
    reference=None,
    include=("*",),
    exclude=(),
    vectors=False,
    candidate_bits=CANDIDATES,
    codebook="midrise",
    gates=False,
    rounding="calibrated",
    scores="kl",
    method="post_training",
    prototypes=None,
    device="cpu",
    progress=True,
) -> PTQReport:
    """Quantize a pretrained interface after training, without its data.

    Scores every layer by what its quantization does to the outputs on some
    audio, finds the best bits for the budget, rounds layer by layer and
    writes a folder that the same class loads with stock ``from_hparams``.

    Arguments
    ---------
    source : str or Path
        Folder, or name on the Hugging Face hub.
    class_name : str
        Class in speechbrain.inference, or your own with its module.
    calibration : str or Path
        Manifest of audio such as the model was trained on, JSON or CSV.
    budget : str
        Average bits, "4bit", or bytes of the packed files, "2.5MB".
    output : str or Path
        Folder to write, or a link to one; empty, or not there.
    test : str, Path or None
        Manifest for the quality before and after; None: the calibration's.
    data_root : str, Path or None
        What "{data_root}" stands for in manifests; None: their own folders.
    items : int
        Calibration items, evenly spread over the manifest.
    test_items : int or None
        As many of the test items; None: all.
    audio_key : str
        Key of a manifest entry that names its audio file.
    text_key : str or None
        Key of its text, for classes that read; None: txt, text, words, label
        or char.
    reference : str or None
        Key that holds the truth: words, label or s1_wav, ... by default.
    include, exclude : sequence of str
        fnmatch patterns on parameter names; each must match something.
    vectors : bool
        Quantize biases, norms and all else of one dimension as well.
    candidate_bits : sequence of int or float
        Bits to choose from.
    codebook : str
        Kind of all quantization tables: "midrise", "midtread", "entropy".
    gates : bool
        Each gate of each layer of an LSTM or GRU has bits of its own.
    rounding : str
        "calibrated", layer by layer on the calibration items, or "nearest".
    scores : str or Scorer
        "kl", the change of the outputs; or others, as for `choose_bits`.
    method : str
        "post_training"; others train, and are refused.
    prototypes : dict or None
        Bits -> packed folder of a uniform system, for the scores "nas".
    device : str
        Where to compute.
    progress : bool
        Shows progress bars.

    Example
    -------
    >>> outcome = quantize_pretrained(
    ...     "pretrained/asr_mini",
    ...     "EncoderASR",
    ...     "data/embedded/train_speech.json",
    ...     budget="4bit",
    ...     output="asr_4bit",
    ... )  # doctest: +SKIP
    >>> outcome.plan.average_bits  # doctest: +SKIP
    3.99
    """
    options = _plan_options(budget, candidate_bits, scores, codebook, gates)
    _check_ways(rounding, method)
    output, cls = _empty_folder(output), find_class(class_name)
    check_source(source)
    with alone_in(output, beside=True):
        # What may be wrong with the data is found before anything is loaded.
        keys, counts = (audio_key, text_key), (items, test_items)
        data = _Data.of(cls, (calibration, test, data_root), keys, counts)
        measure = _measurable(task_of(cls)[1], data.tested, reference)
        # There are two of it: one is quantized and compared with the other.
        interface, hparams_path = load_interface(cls, source, device)
        comparison, tests = data.read(interface, progress)
        if measure:
            _begin_measuring(measure, interface, tests, progress)
        quantized, _ = load_interface(cls, source, device)
        calibration = InterfaceCalibration.of(comparison, quantized, prototypes)
        names = calibration.chosen_names(include, exclude, vectors)
        _quantize(calibration, names, progress, rounding=rounding, **options)
        evaluate = partial(_quality, measure, interface, tests, progress)
        origin = {"source": str(source), "budget": budget}
        return _written(
            comparison, calibration, hparams_path, output, evaluate, origin
        )


@dataclass
class _Data:
    """Manifest entries to calibrate with and to measure the quality on."""

    entries: dict
    tested: dict
    reads: str  # "audio" or "text"
    key: str | None

    @classmethod
    def of(cls, interface, manifests, keys, counts):
        """Those of the manifests; all of their files are there."""
        (calibration, test, root), (items, test_items) = manifests, counts
        reads = task_of(interface)[0].reads
        key = keys[reads == "text"]
        entries = read_manifest(calibration, root)
        tested = read_manifest(test, root) if test else entries
        entries = evenly_spaced(entries, items)
        tested = evenly_spaced(tested, test_items)
        both = {**entries, **tested}
        if reads == "text":
            read_texts(both, key)
        else:
            check_files(both, key)
        return cls(entries, tested, reads, key)

    def read(self, interface, progress):
        """The comparison with an interface's outputs, and the test items."""
        if self.reads == "text":
            items = read_texts(self.entries, self.key)
            tests = read_texts(self.tested, self.key)
        else:
            options = {
                "sample_rate": sample_rate_of(interface),
                "key": self.key,
            }
            items = read_items(self.entries, **options)
            tests = read_items(
                self.tested, keep=False, progress=progress, **options
            )
        outputs, _ = task_of(type(interface))
        return outputs(interface, items), tests


def _plan_options(budget, candidate_bits, scores, codebook, gates):
    """Scheme, limits and scorer of the plan; a scorer None: uniform bits."""
    scheme = Scheme(codebook=codebook, gates=gates)
    limits = parse_budget(budget)
    limits["min_bits"] = check_candidates(candidate_bits)[0]
    scorer = scorer_of(scores, scheme, candidate_bits)
    return {"limits": limits, "scorer": scorer, "scheme": scheme}


def _quantize(calibration, names, progress, scheme, **options):
    """Quantize an interface, whose weights no training will find."""
    network = calibration.model
    Pipeline(
        calibration=calibration,
        quantize=partial(quantize_, network, include=names, scheme=scheme),
        selection=Selection(names),
        scheme=scheme,
        store=PlanStore(None, tell=_tell if progress else logger.info),
        method=EstimationMethod(FakeQuantize),
        **options,
    ).run(progress)


def _begin_measuring(measure, interface, tests, progress):
    """Refuse what is no use for it; tell what it will take."""
    measure.check_audio(tests)
    if progress:
        _tell(measure.cost(interface, tests))


def _tell(sentence):
    """Print beside the progress bars."""
    print(sentence, file=sys.stderr)


def _written(comparison, calibration, hparams_path, output, evaluate, origin):
    """Write the folder, load it again, and say how good the loaded one is."""
    source, quantized = comparison.interface, calibration.comparison.interface
    cls = type(quantized)
    modules, reasons = packable(quantized)
    with scratch_folder(output.parent) as scratch:
        folder = Path(scratch) / output.name
        stored = write_folder(quantized, hparams_path, modules, folder)
        if told := over_budget(stored, origin["budget"]):
            logger.warning(told)
        options = {"device": source.device}
        packed = cls.from_hparams(source=str(folder), run_opts=options)
        outcome = PTQReport(
            folder=output,
            cls=cls,
            bytes={"source": source_bytes(source, modules), "packed": stored},
            divergence=divergence(comparison, packed),
            unit=comparison.unit,
            quality=evaluate(packed),
            left_alone=_left_alone(modules, quantized.mods),
            reasons=reasons,
            card=read_front_matter(hparams_path.parent),
            plan=bit_plan(calibration.model),
            **origin,
        )
        card = model_card(outcome)
        write_text(folder / "README.md", plain_name(card))
        _move(folder, output)
    return outcome


def _quality(measure, interface, tests, progress, packed):
    """Of both interfaces; empty where there is nothing to measure by."""
    if measure is None:
        return {}
    return {
        "source": measure(interface, tests, progress),
        "packed": measure(packed, tests, progress),
    }


def _check_ways(rounding, method):
    """Refuse estimation that a folder without a recipe has no data for."""
    check_rounding(rounding)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {tuple(METHODS)}")
    if method != "post_training":
        raise ValueError(
            f"{method} trains, which takes a recipe with its data and its "
            "loss, and an interface has none: run its recipe, `python -m "
            "speechbrain_mpq.run train.py hparams/train.yaml --method "
            f"{method} --weights results/.../save`; without training there is "
            "post_training"
        )


def _empty_folder(output):
    """The output folder's path, where nothing is lost by writing to it."""
    output = check_folder(output)  # a link stays one
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_folder(output.parent)
    return output


def _move(folder, output):
    """Move a folder to where there is none or an empty one."""
    if not output.exists():
        shutil.move(folder, output)
        return
    # It may be where the user is, or where something is mounted. What makes
    # it a model comes last, so that a part of one is none.
    for path in sorted(folder.iterdir(), key=lambda p: p.name == HPARAMS_FILE):
        shutil.move(path, output / path.name)


def _measurable(kind, entries, reference):
    """The measure, or None where the manifest has no truth to measure by."""
    measure = kind and kind(reference)
    if measure is None:
        if reference:
            raise ValueError(
                f"reference {reference!r}: this class has no measure that "
                "needs one; leave it out"
            )
        return None
    items = [Example(key, None, entry) for key, entry in entries.items()]
    for item in items:
        missing = [k for k in measure.keys(items) if k not in item.entry]
        if missing and reference:
            raise ValueError(
                f"manifest entry {item.key!r} has no key {missing[0]!r}, only "
                f"{sorted(item.entry)}"
            )
        if missing:
            return None
    measure.check(items)
    return measure


def _left_alone(modules, network):
    """Coverage rows of the parameters that are stored in float, and why."""
    used = {id(p) for p in network.parameters()}
    rows = []
    for loadable, module in modules.items():
        tensors = named_tensors(module)
        for row in coverage(module):
            tensor = tensors.get(row["tensor"])
            if row["asked_bits"] is not None or tensor is None:
                continue
            if id(tensor.parameter) not in used:
                row["reason"] = "no module of the interface holds them"
            elif tensor.is_vector:
                row["reason"] = "biases, norms and other vectors"
            row["tensor"] = f"{loadable}.{row['tensor']}"
            rows.append(row)
    return rows
