"""Calibrated rounding of a whole network, without training.

Two looks at the calibration data: the full-precision network shows what every
layer should put out; then each layer is rounded on what it is given behind the
layers that are rounded already, to put out the same again. So it makes up for
their errors as well as for its own. Where each layer works once in a single
pass, it is rounded in the moment that its inputs arrive. A Brain's
`compute_forward` may use a layer many times, on batches of many sizes: then
there is a pass for every layer.

Embeddings that an output layer shares come first, as the matrix of this layer
and on what it is given in full precision: all others then see what becomes of
them.
"""

import copy
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
import torch.nn as nn
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..quantization.quant_api import dequantize_
from ..quantization.tensors import named_tensors
from .attention_rounding import (
    OUTPUT,
    attended_by,
    count_items,
    is_attention,
    is_fitted,
    round_attention_,
)
from .calibration import NetworkCalibration
from .counted_steps import counted_steps
from .matrix_rounding import (
    DAMPINGS,
    NoMatrixError,
    is_matrix_layer,
    matched_items,
    round_layer_,
    round_matrix_,
)
from .recurrent_rounding import given_to, is_recurrent, round_recurrent_

logger = get_logger(__name__)
ROUNDINGS = ("calibrated", "nearest")
SINGLE = "a single item goes in: give more batches"


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
        tied = [_output_layer(t) for t in named_tensors(self.network).values()]
        with calibration.ready(), torch.no_grad():
            self.plain = {
                name: copy.deepcopy(layer)
                for name, layer in self.network.named_modules()
                if _is_rounded(layer)
            }
            modules = self.network.named_modules()
            # Output layers that have embeddings as their weights.
            self.tied = [n for n, m in modules if any(m is t for t in tied)]
            self.uses = {}  # name -> of each pass, (shape given, kept)s
            for index in range(calibration.passes):
                self._note_uses(index)
            self.counts = self._counted_steps()

    def apply_(self, progress=True):
        """Round the layers of the quantized network, in place."""
        self.tensors = tensors_by_owner(self.network)
        self.rounded, self.left = [], {}
        with (
            self.calibration.ready(),
            torch.no_grad(),
            tqdm(self.uses, "rounding", disable=not progress) as bar,
        ):
            self._round_tied()
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
        """Keep what the layers put out in one pass, or what they are given."""

        def note(name, layer, args, kwargs, output):
            lists = [[] for _ in range(self.calibration.passes)]
            uses = self.uses.setdefault(name, lists)[index]
            given = self._given(name, args, kwargs)
            # Recurrent layers and attention have more outputs than they show;
            # those of words are many. A copy: what comes next may be in place.
            kept = given if self._is_given(name) else output.detach()
            uses.append((given.shape, kept.to("cpu", copy=True)))

        with _hooked(self.network, self.plain, "register_forward_hook", note):
            self.calibration.run(index)

    def _is_given(self, name):
        """Whether what a layer is given is kept, not what it puts out."""
        plain = self.plain[name]
        return name in self.tied or is_recurrent(plain) or is_attention(plain)

    def _counted_steps(self):
        """Steps that count: name -> of each pass, one or None for each use."""
        layers = {
            name: self.network.get_submodule(name)
            for name in self.uses
            if self._is_given(name) and not is_attention(self.plain[name])
        }
        if not layers:
            return {}
        passes = []
        for index in range(self.calibration.passes):
            passes.append(counted_steps(self.calibration, layers, index))
            if passes[-1] is None:
                return {}
        counts = {name: [p.get(name, []) for p in passes] for name in layers}
        return {
            name: lists
            for name, lists in counts.items()
            if list(map(len, lists)) == list(map(len, self.uses[name]))
            and any(c.any() for uses in lists for use in uses for c in use)
        }

    def _round_tied(self):
        """Round embeddings by what the layer that shares them is given."""
        for name in self.tied:
            layer, plain = self.network.get_submodule(name), self.plain[name]
            weights = self.tensors.pop((layer, "weight"), [])
            quantized = weights and weights[0].fake_quantize
            if name not in self.uses or not quantized:
                continue
            given = [[kept for _, kept in uses] for uses in self.uses[name]]
            pairs = self._pairs(name, given)
            if sum(len(x) for x, _ in pairs) < 2:
                self.left[name] = SINGLE
                continue
            rounded = partial(getattr, layer, "weight")
            round_matrix_(weights, [], plain, rounded, pairs, self.dampings)
            self.rounded.append(name)

    def _round_in_one_pass(self, bar):
        """Round every layer in the moment that its inputs arrive."""

        def round_now(name, layer, args, kwargs):
            self._round(name, [[self._given(name, args, kwargs)]])
            bar.update()

        register = "register_forward_pre_hook"
        with _hooked(self.network, self.uses, register, round_now):
            self.calibration.run(0)

    def _given_now(self, name, index):
        """What a layer is given in a pass in all its uses, as it is now."""
        seen, expected = [], len(self.uses[name][index])

        def note(name, layer, args, kwargs):
            given = self._given(name, args, kwargs)
            seen.append(given.to(copy=True))
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

    def _given(self, name, args, kwargs):
        """What a layer works on."""
        plain = self.plain[name]
        if is_recurrent(plain):
            return given_to(plain, *args, **kwargs)
        if is_attention(plain):
            return attended_by(plain, *args, **kwargs)
        return args[0] if args else next(iter(kwargs.values()))

    def _round(self, name, inputs):
        """Round one layer, if there is something to round; or note why not."""
        layer = self.network.get_submodule(name)
        if not self._is_open(name, layer):
            return
        reason = self._round_layer(name, layer, inputs)
        if reason:
            self.left[name] = reason
        elif name not in self.rounded:
            self.rounded.append(name)

    def _is_open(self, name, layer):
        """Whether there is something in a layer that rounding may change."""
        if is_attention(self.plain[name]):
            return is_fitted(self.tensors, layer)
        own = [n for n, _ in self.plain[name].named_parameters(recurse=False)]
        rows = {attribute: self.tensors[layer, attribute] for attribute in own}
        return any(
            tensors and (tensors[0].fake_quantize or "bias" in attribute)
            for attribute, tensors in rows.items()
        )

    def _round_layer(self, name, layer, inputs):
        """Round a layer; or say why not."""
        for uses, now in zip(self.uses[name], inputs):
            if [shape for shape, _ in uses] != [given.shape for given in now]:
                return "used otherwise once quantized"
        plain = self.plain[name]
        place = next(plain.parameters())
        # Rounding needs its digits: no autocast here.
        with torch.autocast(place.device.type, enabled=False):
            if is_recurrent(plain):
                return self._round_recurrent(name, layer, inputs, place)
            if is_attention(plain):
                return self._round_attention(name, layer, inputs, place)
            pairs = self._pairs(name, inputs)
            if any(x.dim() < 2 for x, _ in pairs):
                return "no batch goes in"
            if sum(len(x) for x, _ in pairs) < 2:
                return SINGLE
            try:
                round_layer_(self.tensors, layer, plain, pairs, self.dampings)
            except NoMatrixError:
                return "no matrix"
        return ""

    def _pairs(self, name, inputs):
        """What a matrix is given now and what it put out, for each use."""
        plain, pairs = self.plain[name], []
        dtype = plain.weight.dtype  # autocast is over
        given = [x.to(dtype) for now in inputs for x in now]
        kept = [k.to(dtype) for uses in self.uses[name] for _, k in uses]
        if name not in self.tied:
            return [(x, y.to(x.device)) for x, y in zip(given, kept)]
        place, counts = plain.weight.device, self._counts_of(name)
        for x, before, count in zip(given, kept, counts):
            x, y = x.to(place), plain(before.to(place))
            if x.dim() == 3 and count is not None:
                pairs += matched_items(x, y, count)
            else:
                pairs.append((x, y))
        return pairs

    def _counts_of(self, name):
        """Which steps count, for each use; None: all."""
        if name in self.counts:
            return [use for uses in self.counts[name] for use in uses]
        return [None] * sum(map(len, self.uses[name]))

    def _round_recurrent(self, name, layer, inputs, place):
        """Round a recurrent layer; or say why not."""
        to = {"device": place.device, "dtype": place.dtype}
        now = [given.to(**to) for uses in inputs for given in uses]
        before = [k.to(**to) for uses in self.uses[name] for _, k in uses]
        counts = self._counts_of(name)
        items = sum(
            len(use.items) if kept is None else sum(bool(k.any()) for k in kept)
            for use, kept in zip(now, counts)
        )
        if items < 2:
            return SINGLE
        round_recurrent_(
            self.tensors,
            layer,
            self.plain[name],
            list(zip(now, before)),
            counts,
            self.dampings,
        )
        return ""

    def _round_attention(self, name, layer, inputs, place):
        """Round an attention's matrices; or say why not the first."""
        to = {"device": place.device, "dtype": place.dtype}
        now = [given.to(**to) for uses in inputs for given in uses]
        before = [k.to(**to) for uses in self.uses[name] for _, k in uses]
        plain, uses = self.plain[name], list(zip(now, before))
        if sum(count_items(plain, use) for use in now) < 2:
            self.left[f"{name}.{OUTPUT}"] = SINGLE
            return SINGLE
        reason = round_attention_(
            self.tensors, layer, plain, uses, self.dampings
        )
        self.rounded.append(f"{name}.{OUTPUT}")
        return reason

    def _report(self):
        """Log what was rounded to what, and why not otherwise."""
        reasons = defaultdict(set)
        paths = {id(m): name for name, m in self.network.named_modules()}
        for tensor in named_tensors(self.network).values():
            layer = tensor.name.rpartition(".")[0]
            if not tensor.fake_quantize:
                continue
            output = _output_layer(tensor)
            used_as = paths[id(output)] if output else layer
            if len(tensor.owners) > 1 and output is None:
                reasons["shared by several modules"].add(layer)
            elif used_as not in self.rounded:
                unused = used_as in self.plain and used_as not in self.uses
                reason = "not used as a layer" if unused else "no matrix"
                reasons[self.left.get(used_as, reason)].add(layer)
        logger.info(
            f"Fitted {len(self.rounded)} quantized layers to what they put "
            f"out in full precision, on {self.calibration.passes} batches"
        )
        for reason, layers in reasons.items():
            names = ", ".join(sorted(layers))
            logger.info(f"Nearest rounding stays ({reason}): {names}")


def _is_rounded(layer):
    """Whether calibrated rounding knows a layer that computes its weights."""
    if is_recurrent(layer) or is_attention(layer):
        return True
    return is_matrix_layer(layer) and "weight" in layer._parameters


def _output_layer(tensor):
    """The linear layer that has embeddings as its weight; None for others."""
    linear = [m for m, _ in tensor.owners if isinstance(m, nn.Linear)]
    others = [m for m, _ in tensor.owners if isinstance(m, nn.Embedding)]
    one = len(linear) == 1 and len(linear) + len(others) == len(tensor.owners)
    return linear[0] if others and one else None


def tensors_by_owner(network):
    """The tensors of a quantized network by the module that rounds them."""
    tensors = named_tensors(network).values()
    if not any(tensor.fake_quantize for tensor in tensors):
        raise ValueError(
            "the network has no quantized parameter: call quantize_ first"
        )
    found = defaultdict(list)
    for tensor in tensors:
        output = _output_layer(tensor)
        if tensor.chain is not None:
            continue  # what results from parametrizations cannot be written to
        if output is not None:
            found[output, "weight"].append(tensor)
        elif len(tensor.owners) == 1:
            found[tensor.owners[0]].append(tensor)
    return found


def round_calibrated_(
    model, network_name, inputs, dampings=DAMPINGS, progress=True
):
    """Round the layers of a quantized network by their outputs, in place.

    Bits stay; integers and scales change, and so do the biases and norms that
    are left in float. Nearest rounding stays for what is no matrix (PReLU)
    and for parameters that several modules share.

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
