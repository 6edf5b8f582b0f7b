"""Bits for the modules of a pretrained interface, within a budget.

From a source folder to a packed one that the same class loads.
"""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from ..allocation.analysis import expected_gain
from ..allocation.scores import check_candidates
from ..allocation.solver import allocate_bits
from ..allocation.sweep import OutputScores
from ..quantization.packing import save_packed
from ..quantization.quant_api import coverage, dequantize_, quantize_
from ..quantization.tensors import named_tensors, select
from ..training.choose import parse_budget
from ..training.rounding import check_rounding, round_calibrated_
from .calibration_data import (
    evenly_spaced,
    read_items,
    read_manifest,
    sample_rate_of,
)
from .pretrained_folder import (
    PTQReport,
    model_card,
    packable,
    shared_parameters,
    source_bytes,
    write_folder,
)
from .pretrained_interfaces import (
    InterfaceOutputs,
    divergence,
    find_class,
    load_interface,
    task_of,
)

ROUNDS = 4  # until the packed files fit: names and headers take bytes, too


class InterfaceScores(OutputScores):
    """Scores every cluster by what it does to an interface's outputs.

    Arguments
    ---------
    comparison : Comparison
        Of the interface, in full precision.
    **options
        See ``OutputScores``.
    """

    def __init__(self, comparison, **options):
        super().__init__(**options)
        self.method = comparison.method
        self.compared = comparison

    def comparison(self):
        """See ``OutputScores``: item numbers are the inputs."""
        compared = self.compared
        return torch.arange(len(compared)), compared.error, compared.scale


def chosen_names(network, modules, include=("*",), exclude=(), vectors=False):
    """Parameters of an interface that are to be quantized."""
    tensors = named_tensors(network)
    chosen = select(tensors, include, exclude)
    if not vectors:
        chosen = [t for t in chosen if t.weight.dim() > 1]
    stored = set(shared_parameters(network, modules.values()))
    names = [t.name for t in chosen if t.name in stored]
    if not names:
        raise ValueError(
            "nothing to quantize: no parameter that the patterns leave is in "
            f"a file of the source that can be packed ({list(modules)})"
        )
    return names


def _check_budget(network, modules, names, budget, candidate_bits, codebook):
    """Refuse a budget that no bits can keep, before any scoring."""
    low, high = min(candidate_bits), max(candidate_bits)
    average = budget.get("average_bits", low)
    if not low <= average <= high:
        raise ValueError(
            f"a budget of {average} bits is out of reach: the candidates are "
            f"{low} to {high} bits"
        )
    if "budget_bytes" not in budget:
        return
    plan = quantize_(network, low, include=names, codebook=codebook)
    dequantize_(network)
    least = _packed_bytes(network, modules, plan)
    if least > budget["budget_bytes"]:
        whole = sum(c.bytes for c in plan.clusters.values())
        raise ValueError(
            f"a budget of {budget['budget_bytes']} bytes is out of reach: the "
            f"files take at least {least} bytes, {whole} for weights of {low} "
            f"bits and {least - whole} for what stays in float, buffers and "
            "headers; exclude less, allow fewer bits, or allow more bytes"
        )


def score_interface(comparison, modules, names, progress=True, **options):
    """Score the clusters of an interface."""
    network = InterfaceOutputs(comparison)
    scores = InterfaceScores(comparison, **options)
    table = scores(network, include=names, prefix="", progress=progress)
    stored = {id(p): p for m in modules.values() for p in m.parameters()}
    total = sum(p.numel() for p in stored.values())
    table.rest_parameters = total - sum(table.parameters.values())
    return table


def _plan_interface(table, network, modules, budget, min_bits=2):
    """The best plan for a budget; one in bytes holds for the packed files."""
    if "average_bits" in budget:
        return allocate_bits(table, min_bits=min_bits, **budget)
    asked = budget["budget_bytes"]
    most = allocate_bits(table, average_bits=max(table.candidate_bits))
    allowed = min(asked, most.bytes)
    for _ in range(ROUNDS):
        plan = allocate_bits(table, min_bits=min_bits, budget_bytes=allowed)
        stored = _packed_bytes(network, modules, plan)
        if stored <= asked:
            return plan
        allowed = min(allowed - 1, asked - (stored - plan.bytes))
    raise ValueError(
        f"no plan found whose files take at most {asked} bytes: the last one "
        f"takes {stored}"
    )


def _packed_bytes(network, modules, plan):
    """Bytes of the files that a plan makes."""
    quantize_(network, plan)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return sum(
                save_packed(module, folder).stat().st_size
                for module in modules.values()
            )
    finally:
        dequantize_(network)


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
    reference=None,
    include=("*",),
    exclude=(),
    vectors=False,
    candidate_bits=CANDIDATES,
    codebook="midrise",
    rounding="calibrated",
    device="cpu",
    progress=True,
):
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
        Folder to write; it must be empty or not there.
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
    reference : str or None
        Key that holds the truth: words, label or s1_wav, ... by default.
    include, exclude : sequence of str
        fnmatch patterns on parameter names; each must match something.
    vectors : bool
        Quantize biases, norms and all else of one dimension as well.
    candidate_bits : sequence of int or float
        Bits to choose from.
    codebook : str
        Kind of all quantization tables, "midrise" or "midtread".
    rounding : str
        "calibrated", layer by layer on the calibration items, or "nearest".
    device : str
        Where to compute.
    progress : bool
        Shows progress bars.

    Returns
    -------
    Outcome

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
    budget, asked = parse_budget(budget), budget
    check_rounding(rounding)
    check_candidates(candidate_bits)
    output, cls = _empty_folder(output), find_class(class_name)
    entries = read_manifest(calibration, data_root)
    tested = read_manifest(test, data_root) if test else entries
    entries, tested = (
        evenly_spaced(entries, items),
        evenly_spaced(tested, test_items),
    )
    interface, hparams_path = load_interface(cls, source, device)
    rate = sample_rate_of(interface)
    tests = read_items(tested, rate, audio_key)
    outputs, measure = task_of(cls)
    measure = _measurable(measure and measure(reference), tests, reference)
    comparison = outputs(interface, read_items(entries, rate, audio_key))
    patterns = {"include": include, "exclude": exclude, "vectors": vectors}
    tables = {"candidate_bits": candidate_bits, "codebook": codebook}
    plan = _best_plan(comparison, budget, patterns, tables, progress)
    quantized, _ = load_interface(cls, source, device)
    round_interface_(comparison.of(quantized), plan, rounding, progress)
    evaluate = partial(_quality, measure, interface, tests, progress)
    known = {"source": str(source), "asked": asked, "plan": plan}
    return _written(
        comparison, quantized, hparams_path, output, evaluate, known
    )


def round_interface_(comparison, plan, rounding="calibrated", progress=True):
    """Quantize an interface to a plan, in place."""
    quantize_(InterfaceOutputs(comparison), plan)
    if rounding == "calibrated":
        round_calibrated_(
            InterfaceOutputs(comparison, each_layer_once=True),
            "",
            torch.arange(len(comparison)),
            progress=progress,
        )


def _best_plan(comparison, budget, patterns, tables, progress):
    """The plan for a budget; every cluster must matter to the outputs."""
    modules, _ = packable(comparison.interface)
    network = InterfaceOutputs(comparison)
    names = chosen_names(network, modules, **patterns)
    _check_budget(network, modules, names, budget, **tables)
    table = score_interface(comparison, modules, names, progress, **tables)
    silent = [n for n, row in table.scores.items() if not any(row.values())]
    if silent:
        raise ValueError(
            f"{len(silent)} clusters do not change the outputs that are "
            f"compared, so that nothing says how many bits they need: exclude "
            f"them by patterns on their parameters, such as '{silent[0]}.*'"
        )
    plan = _plan_interface(
        table, network, modules, budget, min(table.candidate_bits)
    )
    if progress and len(table.candidate_bits) > 1:
        print(expected_gain(table, plan)[1], file=sys.stderr)
    return plan


def _written(comparison, quantized, hparams_path, output, evaluate, known):
    """Write the folder, load it again, and say how good the loaded one is."""
    source, cls = comparison.interface, type(quantized)
    modules, reasons = packable(quantized)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        folder = Path(scratch) / output.name
        stored = write_folder(quantized, hparams_path, modules, folder)
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
            **known,
        )
        card = model_card(outcome)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        shutil.move(folder, output)
    return outcome


def _quality(measure, interface, tests, progress, packed):
    """Of both interfaces; empty where there is nothing to measure by."""
    if measure is None:
        return {}
    return {
        "source": measure(interface, tests, progress),
        "packed": measure(packed, tests, progress),
    }


def _empty_folder(output):
    """The output folder's path, where nothing is lost by writing to it."""
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def _measurable(measure, items, asked):
    """The measure, or None where the manifest has no truth to measure by."""
    if measure is None:
        if asked:
            raise ValueError(
                f"reference {asked!r}: this class has no measure that needs "
                "one; leave it out"
            )
        return None
    for item in items:
        missing = [k for k in measure.keys(items) if k not in item.entry]
        if missing and asked:
            raise ValueError(
                f"manifest entry {item.key!r} has no key {missing[0]!r}, only "
                f"{sorted(item.entry)}"
            )
        if missing:
            return None
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
            elif tensor.weight.dim() < 2:
                row["reason"] = "biases, norms and other vectors"
            row["tensor"] = f"{loadable}.{row['tensor']}"
            rows.append(row)
    return rows
