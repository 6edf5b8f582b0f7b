"""Calibrated rounding of a whole network, without training.

Two passes over the calibration inputs: the full-precision network shows what
every layer should put out, then the quantized one runs, and each layer is
rounded the moment its inputs arrive, which have passed through the quantized
layers before it. So it makes up for their errors as well as for its own.
"""

import copy
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from tqdm import tqdm

from ..allocation.chain import evaluating
from ..quantization.codebook import fit_scale, nearest_levels
from ..quantization.moments import damped_moment, regressed_weight
from ..quantization.quantizer import dequantize_
from ..quantization.rounding import calibrated_levels, calibrated_scale
from ..quantization.tensors import named_tensors
from .layer_matrices import (
    input_matrix,
    is_matrix_layer,
    output_matrix,
    weight_matrix,
)


def round_calibrated_(
    model, network_name, inputs, dampings=(0.1, 1.0, 10.0), progress=True
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
    tensors = _by_owner(network)
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
            _round_layer_(tensors, layer, plain[name], *pair, dampings)
            rounded.append(name)
            bar.update()

    inputs = inputs.to(next(network.parameters()).device)
    with torch.no_grad(), evaluating(network), evaluating(reference):
        with _hooks(reference, plain, "register_forward_hook", keep):
            reference(inputs)
        with (
            tqdm(total=len(targets), disable=not progress) as bar,
            _hooks(network, plain, "register_forward_pre_hook", round_now),
        ):
            bar.set_description("rounding")
            network(inputs)
    return rounded


def _by_owner(network):
    """(module, attribute) -> its tensor or slices; without shared ones."""
    tensors = named_tensors(network).values()
    if not any(tensor.fake_quantize for tensor in tensors):
        raise ValueError(
            "the network has no quantized parameter: call quantize_ first"
        )
    found = defaultdict(list)
    for tensor in tensors:
        if len(tensor.owners) == 1:
            found[tensor.owners[0]].append(tensor)
    return found


@contextmanager
def _hooks(network, names, register, hook):
    """Has a hook called with the layer's name as well, inside."""
    with ExitStack() as handles:
        for name in names:
            layer = network.get_submodule(name)
            handle = getattr(layer, register)(partial(hook, name))
            handles.callback(handle.remove)
        yield


def _round_layer_(tensors, layer, plain, given, target, dampings):
    """Bring a layer's output for what it is given close to a target."""
    pairs = [
        (input_matrix(plain, x).double(), output_matrix(plain, y).double())
        for x, y in ((given[i::2], target[i::2]) for i in range(2))
    ]
    means = [torch.cat(half, -1).mean(-1, keepdim=True) for half in zip(*pairs)]
    if plain.bias is not None:  # it takes care of the means
        pairs = [(x - means[0], y - means[1]) for x, y in pairs]
    weights, biases = tensors[layer, "weight"], tensors[layer, "bias"]
    # Matrices in float stay as they are, norms in float do not.
    if weights and (weights[0].fake_quantize or plain.weight.dim() == 1):
        halves = [(x @ x.mT, y @ x.mT) for x, y in pairs]
        moment, cross = (sum(both) for both in zip(*halves))
        fit = partial(_fitted, weights, weight_matrix(plain, plain.weight))
        damping = _best_damping(fit, halves, dampings)
        values, scales = fit(moment, cross, damping)
        values = values.reshape(plain.weight.shape)
        for tensor, alpha in zip(weights, scales):
            _store_(tensor, values[tensor.rows], alpha)
    for tensor in biases:
        weight = weight_matrix(plain, layer.weight).double()
        wanted = (means[1] - weight @ means[0]).flatten()
        _store_(tensor, *_nearest(tensor, wanted))


def _best_damping(fit, halves, dampings):
    """What does best on every other item after a fit to those between."""
    if len(dampings) == 1:
        return dampings[0]
    fitted, (moment, cross) = halves

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


def _calibrated(tensor, wanted, moment):
    """Values of a tensor at calibrated levels, as a matrix, and their scale."""
    fake_quantize, shape = tensor.fake_quantize, tensor.weight.shape
    bits, codebook = fake_quantize.stored_bits, fake_quantize.codebook
    granularity = "channel" if fake_quantize.alpha.dim() else "tensor"
    alpha = fit_scale(wanted.reshape(shape), bits, granularity, codebook)
    if alpha.dim():
        alpha = alpha.reshape(*wanted.shape[:-1], 1)
    alpha = calibrated_scale(wanted, moment, bits, alpha, codebook).float()
    levels = calibrated_levels(wanted, moment, bits, alpha, codebook)
    return levels * alpha, alpha


def _nearest(tensor, wanted):
    """Values of a tensor at the nearest levels, and their scale."""
    if tensor.fake_quantize is None:
        return wanted, None
    fake_quantize = tensor.fake_quantize
    bits, codebook = fake_quantize.stored_bits, fake_quantize.codebook
    alpha = fit_scale(wanted, bits, codebook=codebook)
    return nearest_levels(wanted, bits, alpha, codebook) * alpha, alpha


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
