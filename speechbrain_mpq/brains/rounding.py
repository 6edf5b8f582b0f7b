"""Calibrated rounding of a whole network, without training.

Two passes over the calibration inputs: the full-precision network shows what
every layer should put out, then the quantized one runs, and each layer is
rounded the moment its inputs arrive, which have passed through the quantized
layers before it. So it makes up for their errors as well as for its own.
"""

import copy
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from tqdm import tqdm

from ..allocation.chain import evaluating
from ..quantization.quantizer import dequantize_
from .layer_matrices import is_matrix_layer
from .layer_rounding import DAMPINGS, round_layer_, tensors_by_owner


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
        with hooked(reference, plain, "register_forward_hook", keep):
            reference(inputs)
        with (
            tqdm(total=len(targets), disable=not progress) as bar,
            hooked(network, plain, "register_forward_pre_hook", round_now),
        ):
            bar.set_description("rounding")
            network(inputs)
    return rounded


@contextmanager
def hooked(network, names, register, hook, **options):
    """Has a hook of some layers called with the layer's name as well, inside.

    Arguments
    ---------
    network : torch.nn.Module
        Has the layers.
    names : iterable of str
        Of submodules.
    register : str
        Method of a module that takes the hook.
    hook : callable
        Gets the name in front of what torch gives it.
    **options
        For the method.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.PReLU())
    >>> def hook(name, layer, given, output):
    ...     print(name, output.shape)
    >>> with hooked(network, ["0"], "register_forward_hook", hook):
    ...     _ = network(torch.ones(2, 3))
    0 torch.Size([2, 3])
    """
    with ExitStack() as handles:
        for name in names:
            layer = network.get_submodule(name)
            handle = getattr(layer, register)(partial(hook, name), **options)
            handles.callback(handle.remove)
        yield
