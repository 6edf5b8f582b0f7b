"""Every layer class of SpeechBrain whose docstring builds one: packed, loaded.

The examples of the docstrings are run up to where they call what they build;
that is packed and loaded into a copy with other weights, and must put out the
same bits.
"""

import contextlib
import copy
import doctest
import importlib
import inspect
import io
import pkgutil
import sys

import pytest
import speechbrain.lobes.models
import speechbrain.nnet
import torch
from helpers import outputs, same_bits

from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    save_packed,
)
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    clusters,
    dequantize_,
    quantize_,
)
from speechbrain_mpq.quantization.state import made_alike, stored_buffers
from speechbrain_mpq.quantization.tensors import named_tensors

LARGEST = 100_000  # parameters; the larger ones consist of the others
ALL_BITS = (1, 1.6, *range(2, 17))


class Called(Exception):
    """Ends an example: what comes after the first call is not needed."""


class TooLarge(Exception):
    """Ends an example that builds a large model."""


def mixed_plan(model):
    """Bits of all sizes, other ones in every cluster."""
    tensors = named_tensors(model).items()
    sizes = {name: tensor.weight.numel() for name, tensor in tensors}
    plan, start = {}, len(type(model).__name__)
    for index, (cluster, names) in enumerate(clusters(model).items()):
        bits = ALL_BITS[(start + index) % len(ALL_BITS)]
        count = sum(sizes[name] for name in names)
        plan[cluster] = ClusterBits(bits, count, tuple(names))
    return BitPlan(plan)


def layer_classes():
    """All classes of layers and networks that can be imported here."""
    for package in (speechbrain.nnet, speechbrain.lobes.models):
        prefix = f"{package.__name__}."
        for found in pkgutil.walk_packages(package.__path__, prefix):
            try:
                module = importlib.import_module(found.name)
            except ImportError:  # needs what is not installed
                continue
            for name, kind in inspect.getmembers(module, inspect.isclass):
                own = kind.__module__ == found.name
                if own and issubclass(kind, torch.nn.Module):
                    yield pytest.param(kind, id=f"{found.name}.{name}")


def example_of(kind):
    """A module that a docstring builds, and what it calls it with."""
    called, building, sizes = [], [], []
    plain, init = torch.nn.Module.__call__, kind.__init__
    register = torch.nn.Module.register_parameter

    def build(self, *arguments, **keywords):
        if not building:
            sizes.clear()
        building.append(self)
        init(self, *arguments, **keywords)
        building.pop()

    def count(self, name, parameter):
        register(self, name, parameter)
        if building and parameter is not None:
            sizes.append(parameter.numel())
            if sum(sizes) > 4 * LARGEST:  # parametrized, they count twice
                raise TooLarge

    def call(self, *arguments, **keywords):
        if type(self) is kind and not building:
            called.append((self, copy.deepcopy((arguments, keywords))))
            raise Called
        return plain(self, *arguments, **keywords)

    examples = doctest.DocTestParser().get_examples(kind.__doc__ or "")
    names = dict(vars(sys.modules[kind.__module__]))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", call)
        patch.setattr(kind, "__init__", build)
        patch.setattr(torch.nn.Module, "register_parameter", count)
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(Exception):
                for example in examples:
                    exec(compile(example.source, "example", "single"), names)
    if called:
        return called[0]
    if building:  # it was ended there
        pytest.skip("large")
    built = [value for value in names.values() if type(value) is kind]
    return (built[0], None) if built else (None, None)


def with_other_weights(model):
    """A copy that differs in all that is stored."""
    other, alike = copy.deepcopy(model), made_alike(model)
    with torch.no_grad():
        values = [*other.parameters()]
        buffers = stored_buffers(other).items()
        values += [value for name, value in buffers if name not in alike]
        for value in values:
            if value.is_floating_point():
                value.add_(1)
    return other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(layer_classes()))
def test_what_is_packed_is_the_layer(tmp_path, kind):
    model, given = example_of(kind)
    if model is None:
        pytest.skip("its docstring builds none")
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        pytest.skip("large")
    try:
        model = copy.deepcopy(model.eval())
    except RuntimeError:
        pytest.skip("it holds what cannot be copied")
    for parameter in model.parameters():
        # Some biases are never set: memory as it was.
        if parameter.is_floating_point() and not (parameter.abs() < 1e6).all():
            parameter.data.normal_()
    settings = {"float": None}
    if any(p.is_floating_point() for p in model.parameters()):
        settings["mixed"] = {"plan_or_bits": mixed_plan(model)}
        settings["channel"] = {"plan_or_bits": 5, "granularity": "channel"}
    for name, options in settings.items():
        quantized = copy.deepcopy(model)
        if options:
            quantize_(quantized, **options)
        other = with_other_weights(model)
        path = save_packed(quantized, tmp_path / name)
        assert path.stat().st_size == packed_file_bytes(quantized)
        load_packed_(other, tmp_path / name)
        if given:
            check_outputs(quantized, other, given)
        dequantize_(quantized, keep_quantized=True)
        expected = quantized.state_dict()
        state = other.state_dict()
        assert sorted(state) == sorted(expected)
        if not given:
            assert all(same_bits(state[n], expected[n]) for n in state)


def check_outputs(quantized, other, given):
    """The same bits from both."""

    def call(model, given):
        arguments, keywords = copy.deepcopy(given)
        return model(*arguments, **keywords)

    pairs = zip(
        outputs(quantized, given, call),
        outputs(other, given, call),
        strict=True,
    )
    assert all(same_bits(one, two) for one, two in pairs)
