"""Calibrated rounding of a whole network, without training.

Two passes over the calibration inputs: the full-precision network shows what
every layer should put out, then the quantized one runs, and each layer is
rounded the moment its inputs arrive, which have passed through the quantized
layers before it. So it makes up for their errors as well as for its own.

Calibrated rounding by a Brain's own passes.

`compute_forward` may use a layer many times, on batches of many sizes. So the
full-precision network shows what every layer puts out; then, layer after
layer, the quantized one shows what the layer is given behind those that are
rounded already, and it is rounded to put out the same again.
"""

import copy
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..allocation.sweep import evaluating
from ..quantization.quant_api import dequantize_
from ..quantization.tensors import named_tensors
from .brain_network import BrainNetwork, ready_to_score
from .layer_rounding import (
    DAMPINGS,
    NoMatrixError,
    is_matrix_layer,
    round_layer_,
    tensors_by_owner,
)


def round_calibrated_(
    model, network_name, inputs, dampings=DAMPINGS, progress=True
):
    """Round the layers of a quantized network by their outputs, in place.

    Bits stay; integers and scales change, and so do the biases and norms that
    are left in float. Nearest rounding stays for what is no matrix (PReLU,
    recurrent layers) and for parameters that several modules share.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized, with its full-precision weights as the float values.
    network_name : str
        Submodule that maps the inputs to outputs; "" for the model itself.
    inputs : torch.Tensor
        Calibration inputs [items, ...], which pass in one batch. The outputs
        of all layers are held in memory.
    dampings : sequence of float
        How far to trust the calibration data, to choose from for each layer:
        added to the energy of every input, as a share of the mean. Large ones
        mean the trained weights and nearest rounding. The choice is made on
        every other item; one single value needs no choice.
    progress : bool
        Shows a progress bar.

    Returns
    -------
    rounded : list of str
        Names of the layers, in the order of their rounding.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.4]]))
    >>> _ = quantize_(layer, 1)
    >>> layer.weight.data
    tensor([[0.7000, 0.7000]])
    >>> inputs = torch.tensor([[1.0, 0.1], [1.0, 0.1], [2.0, 0.2]])
    >>> round_calibrated_(layer, "", inputs, progress=False)
    ['']
    >>> layer.weight.data
    tensor([[0.9100, 0.9100]])
    """
    network = model.get_submodule(network_name)
    tensors = tensors_by_owner(network)
    if len(inputs) < 2 or not torch.isfinite(inputs).all():
        raise ValueError(
            "calibrated rounding needs at least two items of input, without "
            "NaN or infinite values: check the calibration data"
        )
    if not dampings:
        raise ValueError("calibrated rounding needs at least one damping")
    reference = copy.deepcopy(network)
    dequantize_(reference)
    plain = {
        name: layer
        for name, layer in reference.named_modules()
        if is_matrix_layer(layer)
    }
    targets, rounded = {}, []

    def keep(name, layer, given, output):
        targets.setdefault(name, output)

    def round_now(name, layer, given):
        if name in targets:  # its first use
            pair = given[0], targets.pop(name)
            round_layer_(tensors, layer, plain[name], [pair], dampings)
            rounded.append(name)
            bar.update()

    inputs = inputs.to(next(network.parameters()).device)
    with torch.no_grad(), evaluating(network), evaluating(reference):
        with _hooked(reference, plain, "register_forward_hook", keep):
            reference(inputs)
        with (
            tqdm(total=len(targets), disable=not progress) as bar,
            _hooked(network, plain, "register_forward_pre_hook", round_now),
        ):
            bar.set_description("rounding")
            network(inputs)
    return rounded


@contextmanager
def _hooked(network, names, register, hook, **options):
    """Call a hook with the name of its layer as well, inside."""
    with ExitStack() as handles:
        for name in names:
            layer = network.get_submodule(name)
            handle = getattr(layer, register)(partial(hook, name), **options)
            handles.callback(handle.remove)
        yield


logger = get_logger(__name__)
ROUNDINGS = ("calibrated", "nearest")


class CalibratedRounding:
    """What the layers of a Brain put out, and rounding that keeps it.

    Made while the modules are in full precision. The outputs of all layers
    are held in memory.

    Arguments
    ---------
    model : torch.nn.Module
        Parameters have the names that the log tells.
    brain : speechbrain.Brain
        Runs the passes.
    batches : list
        Batches of calibration data.
    stage : speechbrain.Stage
        That the Brain is told.
    """

    def __init__(self, model, brain, batches, stage):
        self.model = model
        self.count = len(batches)
        self.run = BrainNetwork(model, brain, batches, stage).run
        self.ready = partial(ready_to_score, brain, stage)
        with self.ready(), torch.no_grad():
            self.plain = {
                name: copy.deepcopy(layer)
                for name, layer in model.named_modules()
                if is_matrix_layer(layer) and "weight" in layer._parameters
            }
            self.uses = {}  # name -> of each batch, (shape given, output)s
            for index in range(self.count):
                self._note_uses(index)

    def apply_(self, progress=True):
        """Round the layers of the quantized model, in place."""
        tensors, rounded, left = tensors_by_owner(self.model), [], {}
        with self.ready(), torch.no_grad():
            for name in tqdm(self.uses, "rounding", disable=not progress):
                layer = self.model.get_submodule(name)
                if not _is_open(tensors, layer):
                    continue
                reason = self._round_(tensors, name, layer)
                if reason:
                    left[name] = reason
                else:
                    rounded.append(name)
        self._report(rounded, left)
        return rounded

    def _note_uses(self, index):
        """Keep what the layers put out on one batch."""

        def note(name, layer, args, kwargs, output):
            lists = [[] for _ in range(self.count)]
            uses = self.uses.setdefault(name, lists)[index]
            # A copy: what comes next may be in place.
            output = output.detach().to("cpu", copy=True)
            uses.append((_given(args, kwargs).shape, output))

        register = "register_forward_hook"
        with _hooked(self.model, self.plain, register, note, with_kwargs=True):
            self.run(index)

    def _round_(self, tensors, name, layer):
        """Round one layer; or say why not."""
        given = [self._given_now(name, index) for index in range(self.count)]
        pairs, dtype = [], self.plain[name].weight.dtype  # autocast is over
        for uses, now in zip(self.uses[name], given):
            shapes = [shape for shape, _ in uses]
            if shapes != [tensor.shape for tensor in now]:
                return "used otherwise once quantized"
            pairs += [
                (x.to(dtype), y.to(x.device)) for x, (_, y) in zip(now, uses)
            ]
        if any(x.dim() < 2 for x, _ in pairs):
            return "no batch goes in"
        if sum(len(x) for x, _ in pairs) < 2:
            return "a single item goes in: give more batches"
        # Rounding needs its digits: no autocast here.
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            try:
                round_layer_(tensors, layer, self.plain[name], pairs)
            except NoMatrixError:
                return "no matrix"
        return ""

    def _given_now(self, name, index):
        """What a layer is given on a batch in all its uses, as it is now."""
        seen, expected = [], len(self.uses[name][index])

        def note(name, layer, args, kwargs):
            seen.append(_given(args, kwargs).clone())
            if len(seen) == expected:
                raise _Enough

        register = "register_forward_pre_hook"
        if expected:
            with (
                suppress(_Enough),
                _hooked(self.model, [name], register, note, with_kwargs=True),
            ):
                self.run(index)
        return seen

    def _report(self, rounded, left):
        """Log what was rounded to what, and why not otherwise."""
        reasons = defaultdict(set)
        for tensor in named_tensors(self.model).values():
            layer = tensor.name.rpartition(".")[0]
            if not tensor.fake_quantize:
                continue
            if len(tensor.owners) > 1:
                reasons["shared by several modules"].add(layer)
            elif layer not in rounded:
                unused = layer in self.plain and layer not in self.uses
                reason = "not used as a layer" if unused else "no matrix"
                reasons[left.get(layer, reason)].add(layer)
        logger.info(
            f"Fitted {len(rounded)} quantized layers to what they put out in "
            f"full precision, on {self.count} batches"
        )
        for reason, layers in reasons.items():
            names = ", ".join(sorted(layers))
            logger.info(f"Nearest rounding stays ({reason}): {names}")


def check_rounding(rounding):
    """Refuse what is no way of rounding.

    Example
    -------
    >>> check_rounding("up")
    Traceback (most recent call last):
    ...
    ValueError: rounding 'up' is none of ('calibrated', 'nearest')
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is none of {ROUNDINGS}")


def quantize_by_plan(quantizer, plan, brain, batches, stage, progress=True):
    """Quantize a Brain's modules, to the same values in all processes."""
    calibrated = None
    if batches:
        place = quantizer.model, brain, batches, stage
        calibrated = CalibratedRounding(*place)
    quantizer.quantize(plan)
    if calibrated:
        calibrated.apply_(progress)
    if torch.distributed.is_initialized():
        for tensor in quantizer.model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


class _Enough(Exception):
    """A pass has shown what it was run for."""


def _given(args, kwargs):
    """What a layer works on."""
    return args[0] if args else next(iter(kwargs.values()))


def _is_open(tensors, layer):
    """Whether there is something in a layer that rounding may change."""
    weights = tensors[layer, "weight"]
    quantized = weights and weights[0].fake_quantize
    return bool(quantized or tensors[layer, "bias"])
