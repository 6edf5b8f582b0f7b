"""Calibrated rounding of a whole network, without training.

Two looks at the calibration data: the full-precision network shows what every
layer should put out; then each layer is rounded on what it is given behind the
layers that are rounded already, to put out the same again. So it makes up for
their errors as well as for its own.

Where each layer works once in a single pass, it is rounded in the moment that
its inputs arrive. A Brain's `compute_forward` may use a layer many times, on
batches of many sizes: then there is a pass for every layer.
"""

import copy
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..quantization.quant_api import dequantize_
from ..quantization.tensors import named_tensors
from .calibration import NetworkCalibration
from .layer_rounding import (
    DAMPINGS,
    NoMatrixError,
    is_matrix_layer,
    round_layer_,
    tensors_by_owner,
)

logger = get_logger(__name__)
ROUNDINGS = ("calibrated", "nearest")


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


class CalibratedRounding:
    """What the layers of a network put out, and rounding that keeps it.

    The outputs of all layers are held in memory.

    Arguments
    ---------
    calibration : Calibration
        Its model is in full precision, and quantized in place before `apply_`
        is called.
    dampings : sequence of float
        How far to trust the calibration data, to choose from for each layer:
        added to the energy of every input, as a share of the mean. Large ones
        mean the trained weights and nearest rounding. The choice is made on
        every other item; one single value needs no choice.
    """

    def __init__(self, calibration, dampings=DAMPINGS):
        if not dampings:
            raise ValueError("calibrated rounding needs at least one damping")
        self.calibration = calibration
        self.dampings = dampings
        self.network = calibration.model.get_submodule(calibration.prefix)
        with calibration.ready(), torch.no_grad():
            self.plain = {
                name: copy.deepcopy(layer)
                for name, layer in self.network.named_modules()
                if is_matrix_layer(layer) and "weight" in layer._parameters
            }
            self.uses = {}  # name -> of each pass, (shape given, output)s
            for index in range(calibration.passes):
                self._note_uses(index)

    def apply_(self, progress=True):
        """Round the layers of the quantized network, in place."""
        self.tensors = tensors_by_owner(self.network)
        self.rounded, self.left = [], {}
        with (
            self.calibration.ready(),
            torch.no_grad(),
            tqdm(self.uses, "rounding", disable=not progress) as bar,
        ):
            uses = [len(u) for lists in self.uses.values() for u in lists]
            if self.calibration.passes == 1 and set(uses) <= {1}:
                self._round_in_one_pass(bar)
            else:
                for name in bar:
                    given = [
                        self._given_now(name, index)
                        for index in range(self.calibration.passes)
                    ]
                    self._round(name, given)
        self._report()
        return self.rounded

    def _note_uses(self, index):
        """Keep what the layers put out in one pass."""

        def note(name, layer, args, kwargs, output):
            lists = [[] for _ in range(self.calibration.passes)]
            uses = self.uses.setdefault(name, lists)[index]
            # A copy: what comes next may be in place.
            output = output.detach().to("cpu", copy=True)
            uses.append((_given(args, kwargs).shape, output))

        with _hooked(self.network, self.plain, "register_forward_hook", note):
            self.calibration.run(index)

    def _round_in_one_pass(self, bar):
        """Round every layer in the moment that its inputs arrive."""

        def round_now(name, layer, args, kwargs):
            self._round(name, [[_given(args, kwargs)]])
            bar.update()

        register = "register_forward_pre_hook"
        with _hooked(self.network, self.uses, register, round_now):
            self.calibration.run(0)

    def _given_now(self, name, index):
        """What a layer is given in a pass in all its uses, as it is now."""
        seen, expected = [], len(self.uses[name][index])

        def note(name, layer, args, kwargs):
            seen.append(_given(args, kwargs).clone())
            if len(seen) == expected:
                raise _Enough

        register = "register_forward_pre_hook"
        if expected:
            with (
                suppress(_Enough),
                _hooked(self.network, [name], register, note),
            ):
                self.calibration.run(index)
        return seen

    def _round(self, name, given):
        """Round one layer, if there is something to round; or note why not."""
        layer = self.network.get_submodule(name)
        if not _is_open(self.tensors, layer):
            return
        reason = self._round_layer(name, layer, given)
        if reason:
            self.left[name] = reason
        else:
            self.rounded.append(name)

    def _round_layer(self, name, layer, given):
        """Round a layer; or say why not."""
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
                plain = self.plain[name]
                round_layer_(self.tensors, layer, plain, pairs, self.dampings)
            except NoMatrixError:
                return "no matrix"
        return ""

    def _report(self):
        """Log what was rounded to what, and why not otherwise."""
        reasons = defaultdict(set)
        for tensor in named_tensors(self.network).values():
            layer = tensor.name.rpartition(".")[0]
            if not tensor.fake_quantize:
                continue
            if len(tensor.owners) > 1:
                reasons["shared by several modules"].add(layer)
            elif layer not in self.rounded:
                unused = layer in self.plain and layer not in self.uses
                reason = "not used as a layer" if unused else "no matrix"
                reasons[self.left.get(layer, reason)].add(layer)
        logger.info(
            f"Fitted {len(self.rounded)} quantized layers to what they put "
            f"out in full precision, on {self.calibration.passes} batches"
        )
        for reason, layers in reasons.items():
            names = ", ".join(sorted(layers))
            logger.info(f"Nearest rounding stays ({reason}): {names}")


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
        See `CalibratedRounding`.
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
    if len(inputs) < 2 or not torch.isfinite(inputs).all():
        raise ValueError(
            "calibrated rounding needs at least two items of input, without "
            "NaN or infinite values: check the calibration data"
        )
    tensors_by_owner(model.get_submodule(network_name))  # there must be some
    reference = copy.deepcopy(model)
    dequantize_(reference)
    load = partial(dict, inputs=inputs)
    rounding = CalibratedRounding(
        NetworkCalibration(reference, network_name, load), dampings
    )
    rounding.calibration = NetworkCalibration(model, network_name, load)
    rounding.network = rounding.calibration.network
    return rounding.apply_(progress)


@contextmanager
def _hooked(network, names, register, hook):
    """Call a hook with the name of its layer as well, inside."""
    with ExitStack() as handles:
        for name in names:
            layer = network.get_submodule(name)
            register_hook = getattr(layer, register)
            handle = register_hook(partial(hook, name), with_kwargs=True)
            handles.callback(handle.remove)
        yield


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
