"""Calibrated rounding of layers and of a whole network, without training.

Two looks at the calibration data: the full-precision network shows what every
layer should put out; then each layer is rounded on what it is given behind the
layers that are rounded already, to put out the same again. So it makes up for
their errors as well as for its own. Where each layer works once in a single
pass, it is rounded in the moment that its inputs arrive. A Brain's
`compute_forward` may use a layer many times, on batches of many sizes: then
there is a pass for every layer.

Layers are matrices here: outputs = weight x inputs + bias. A layer is one or
more separate problems of the same size: a linear layer or an ordinary
convolution is one with a row for each output channel, a grouped convolution or
a norm's scale and shift one for each channel. Layout: weights [problems, rows,
columns], inputs [problems, columns, samples], outputs [problems, rows,
samples]; inputs and outputs of a layer [items, ...], a pair for each of its
uses, which may differ in size.
"""

import copy
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from speechbrain.utils.logger import get_logger
from torch.func import functional_call
from tqdm import tqdm

from ..quantization.codebook import fit_scale, nearest_levels
from ..quantization.gptq import (
    calibrated_levels,
    calibrated_scale,
    damped_moment,
    regressed_weight,
)
from ..quantization.quant_api import dequantize_
from ..quantization.tensors import named_tensors
from .calibration import NetworkCalibration

DAMPINGS = (0.1, 1.0, 10.0)  # to choose from for each layer
logger = get_logger(__name__)
ROUNDINGS = ("calibrated", "nearest")


class NoMatrixError(ValueError):
    """A layer that looked like a matrix and is none."""


def is_matrix_layer(layer):
    """Whether a layer can be seen as a matrix.

    These are linear layers, one-dimensional convolutions and everything that
    scales and shifts channels: norms in eval mode, affine maps.
    """
    if isinstance(layer, nn.Linear | nn.Conv1d):
        return True
    own = {n: p.shape for n, p in layer.named_parameters(recurse=False)}
    return (
        set(own) == {"weight", "bias"}
        and len(own["weight"]) == 1
        and own["weight"] == own["bias"]
    )


def weight_matrix(layer, weight):
    """A layer's weight as matrices.

    Returns
    -------
    torch.Tensor
        [problems, rows, columns], a view.
    """
    rows = weight.reshape(len(weight), -1)
    return rows[:, None] if _is_split(layer) else rows[None]


def input_matrix(layer, inputs):
    """What a weight is multiplied with: [problems, columns, samples]."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2).mT[None]
    if isinstance(layer, nn.Conv1d):
        return _unfolded(layer, inputs)
    return _channels(layer, _unscaled(layer, inputs))


def output_matrix(layer, outputs):
    """What comes of it, in the same layout: [problems, rows, samples]."""
    if isinstance(layer, nn.Linear):
        return outputs.flatten(0, -2).mT[None]
    rows = _channels(layer, outputs)  # [channels, 1, samples]
    return rows if _is_split(layer) else rows.mT.reshape(1, len(rows), -1)


def _is_split(layer):
    """Whether every channel is a problem of its own."""
    if isinstance(layer, nn.Linear):
        return False
    return not isinstance(layer, nn.Conv1d) or layer.groups > 1


def _unscaled(layer, inputs):
    """What a norm or affine map scales and shifts."""
    ones, zeros = torch.ones_like(layer.weight), torch.zeros_like(layer.bias)
    plain = functional_call(layer, {"weight": ones, "bias": zeros}, (inputs,))
    expected = _channels(layer, plain) * layer.weight[:, None, None]
    expected = expected + layer.bias[:, None, None]
    unfolded = _channels(layer, layer(inputs))
    if not torch.allclose(unfolded, expected, rtol=1e-3, atol=1e-4):
        raise NoMatrixError(
            f"{type(layer).__name__} has a weight and a bias vector but does "
            "not scale and shift channels: leave its network in nearest "
            "rounding"
        )
    return plain


def _channels(layer, values):
    """Values of each channel, [channels, 1, samples]."""
    channels_last = isinstance(layer, nn.LayerNorm)
    return values.movedim(-1 if channels_last else 1, 0).flatten(1)[:, None]


def _unfolded(layer, inputs):
    """The stretch of input under the filter at every output frame."""
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    frames = F.pad(inputs, padding, mode=mode)
    size, stride, dilation = *layer.kernel_size, *layer.stride, *layer.dilation
    span = dilation * (size - 1) + 1
    windows = frames.unfold(-1, span, stride)[..., ::dilation]
    # [batch, groups, channels, frames, taps] -> [groups, columns, samples]
    windows = windows.unflatten(1, (layer.groups, -1))
    columns = windows.permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2)
    return columns.repeat_interleave(
        layer.out_channels // layer.groups if layer.groups > 1 else 1, 0
    )


def tensors_by_owner(network):
    """The tensors of a quantized network by the module that owns them."""
    tensors = named_tensors(network).values()
    if not any(tensor.fake_quantize for tensor in tensors):
        raise ValueError(
            "the network has no quantized parameter: call quantize_ first"
        )
    found = defaultdict(list)
    for tensor in tensors:
        # What results from parametrizations cannot be written to.
        if len(tensor.owners) == 1 and tensor.chain is None:
            found[tensor.owners[0]].append(tensor)
    return found


def round_layer_(tensors, layer, plain, uses, dampings=DAMPINGS):
    """Round a layer so that its outputs stay those of full precision."""
    halves = _halves(uses)
    means = _means(plain, halves)
    weights, biases = tensors[layer, "weight"], tensors[layer, "bias"]
    # Matrices in float stay as they are, norms in float do not.
    if weights and (weights[0].fake_quantize or plain.weight.dim() == 1):
        # A bias takes care of the means.
        shift = means if plain.bias is not None else (0.0, 0.0)
        moments = [_moments(plain, half, shift) for half in halves]
        moment, cross = (sum(both) for both in zip(*moments))
        fit = partial(_fitted, weights, weight_matrix(plain, plain.weight))
        damping = _best_damping(fit, moments, dampings)
        values, scales = fit(moment, cross, damping)
        values = values.reshape(plain.weight.shape)
        for tensor, alpha in zip(weights, scales):
            _store_(tensor, values[tensor.rows], alpha)
    for tensor in biases:
        weight = weight_matrix(plain, layer.weight).double()
        target = (means[1] - weight @ means[0]).flatten()
        _store_(tensor, *_nearest(tensor, target))


def _halves(uses):
    """Every other item of all uses, and those between."""
    halves, start = ([], []), 0
    for inputs, target in uses:
        for which, half in enumerate(halves):
            items = slice((start + which) % 2, None, 2)
            if len(inputs[items]):
                half.append((inputs[items], target[items]))
        start += len(inputs)
    return halves


def _matrices(plain, use):
    """What is given and wanted in a use, as float64 matrices."""
    inputs, target = use
    x, y = input_matrix(plain, inputs), output_matrix(plain, target)
    return x.double(), y.double()


def _means(plain, halves):
    """Mean of what is given and of what is wanted, over all samples."""
    sums, samples = [0.0, 0.0], 0
    for use in (use for half in halves for use in half):
        pair = _matrices(plain, use)
        sums = [s + m.sum(-1, keepdim=True) for s, m in zip(sums, pair)]
        samples += pair[0].shape[-1]
    return [total / samples for total in sums]


def _moments(plain, uses, shift):
    """X X^T and Y X^T of some uses, after a shift of X and Y."""
    moment, cross = 0.0, 0.0
    for use in uses:
        x, y = (m - s for m, s in zip(_matrices(plain, use), shift))
        moment, cross = moment + x @ x.mT, cross + y @ x.mT
    return moment, cross


def _best_damping(fit, moments, dampings):
    """What does best on every other item after a fit to those between."""
    if len(dampings) == 1:
        return dampings[0]
    fitted, (moment, cross) = moments

    def held_out_error(damping):
        values, _ = fit(*fitted, damping)
        return ((values @ moment - 2 * cross) * values).sum()

    return min(dampings, key=held_out_error)


def _fitted(weights, trained, moment, cross, damping):
    """New values of a weight as a matrix, and the scale of each slice."""
    values = regressed_weight(trained, cross, moment, damping)
    moment, scales = damped_moment(moment, damping), []
    one = len(values) == 1  # slices are rows of one problem, or problems
    for tensor in weights:
        alpha = None
        if tensor.fake_quantize:
            rows = (slice(None), tensor.rows) if one else tensor.rows
            own = moment if one else moment[tensor.rows]
            values[rows], alpha = _calibrated(tensor, values[rows], own)
        scales.append(alpha)
    return values, scales


def _calibrated(tensor, target, moment):
    """Values of a tensor at calibrated levels, as a matrix, and their scale."""
    fake_quantize, shape = tensor.fake_quantize, tensor.weight.shape
    bits, codebook = fake_quantize.stored_bits, fake_quantize.codebook
    granularity = "channel" if fake_quantize.alpha.dim() else "tensor"
    alpha = fit_scale(target.reshape(shape), bits, granularity, codebook)
    if alpha.dim():
        alpha = alpha.reshape(*target.shape[:-1], 1)
    if fake_quantize.codebook == "entropy":
        alpha = alpha.float()  # another step is another rate
    else:
        alpha = calibrated_scale(target, moment, bits, alpha, codebook)
        alpha = alpha.float()
    levels = calibrated_levels(target, moment, bits, alpha, codebook)
    return levels * alpha, alpha


def _nearest(tensor, target):
    """Values of a tensor at the nearest levels, and their scale."""
    if tensor.fake_quantize is None:
        return target, None
    fake_quantize = tensor.fake_quantize
    bits, codebook = fake_quantize.stored_bits, fake_quantize.codebook
    alpha = fit_scale(target, bits, codebook=codebook)
    return nearest_levels(target, bits, alpha, codebook) * alpha, alpha


def _store_(tensor, values, alpha):
    """Put values that lie on the levels of a scale into a tensor."""
    fake_quantize = tensor.fake_quantize
    if fake_quantize:
        fake_quantize.set_scale(alpha.reshape(fake_quantize.alpha.shape))
    tensor.weight.copy_(values)
    if fake_quantize is None:
        return
    if not torch.equal(fake_quantize(tensor.weight.float()), values.float()):
        raise ValueError(
            f"{tensor.name}: {tensor.weight.dtype} is too coarse for "
            f"{fake_quantize.stored_bits} bits: quantize a float32 model"
        )


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

    def _round(self, name, inputs):
        """Round one layer, if there is something to round; or note why not."""
        layer = self.network.get_submodule(name)
        if not _is_open(self.tensors, layer):
            return
        reason = self._round_layer(name, layer, inputs)
        if reason:
            self.left[name] = reason
        else:
            self.rounded.append(name)

    def _round_layer(self, name, layer, inputs):
        """Round a layer; or say why not."""
        pairs, dtype = [], self.plain[name].weight.dtype  # autocast is over
        for uses, now in zip(self.uses[name], inputs):
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
