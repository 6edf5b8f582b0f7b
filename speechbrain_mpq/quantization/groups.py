"""Groups of output channels of a weight, each with bits of its own.

A weight is divided along its first dimension, that of the output channels in
linear, convolutional and recurrent layers, into groups of about equal size. A
group is named like its tensor with its channels behind it,
"conv.weight[0:32]", and counts as a tensor of its own in clusters, plans,
score tables and packed files. Transposed convolutions have their output
channels elsewhere and stay whole.

PyTorch keeps the weights of all gates of a recurrent layer on top of each
other. Each gate of each layer can be a cluster of its own: its rows of the
input and of the recurrent weights and of both biases, "rnn.forget_l0".
"""

import re
from collections import Counter
from dataclasses import replace

import torch

# In the order of PyTorch's rows.
LSTM_GATES = ("input", "forget", "cell", "output")
GRU_GATES = ("reset", "update", "new")
_KINDS = (
    ((torch.nn.LSTM, torch.nn.LSTMCell), LSTM_GATES),
    ((torch.nn.GRU, torch.nn.GRUCell), GRU_GATES),
)
_ATTRIBUTE = re.compile(r"(?:weight|bias)_[ih]h(_l\d+(?:_reverse)?)?")


def gates_of(module, attribute):
    """Gates whose rows lie on top of each other in a weight.

    Arguments
    ---------
    module : torch.nn.Module
    attribute : str
        Name of one of its parameters.

    Returns
    -------
    tuple of str
        In the order of their rows; empty where the weight has no gates.

    Example
    -------
    >>> gates_of(torch.nn.GRU(2, 3), "weight_hh_l0")
    ('reset', 'update', 'new')
    >>> gates_of(torch.nn.Linear(2, 3), "weight")
    ()
    """
    if not _ATTRIBUTE.fullmatch(attribute):
        return ()
    for kinds, gates in _KINDS:
        if isinstance(module, kinds):
            return gates
    return ()


def gate_cluster(path, module, attribute, rows):
    """Name of the cluster of a gate.

    Arguments
    ---------
    path : str
        Of the module in its model.
    module : torch.nn.Module
    attribute : str
        Name of one of its parameters.
    rows : slice
        The gate's rows.

    Returns
    -------
    str

    Example
    -------
    >>> layer = torch.nn.LSTM(2, 3, bidirectional=True)
    >>> gate_cluster("enc.rnn", layer, "bias_ih_l0_reverse", slice(3, 6))
    'enc.rnn.forget_l0_reverse'
    """
    return _named(path, gates_of(module, attribute), attribute, rows)


def stored_cluster(path, attribute, rows, groups):
    """Name of the cluster of a group of rows in a file, which has no modules.

    Arguments
    ---------
    path : str
        Of the module that owns the weight.
    attribute : str
        Name of the weight in it.
    rows : slice
    groups : int
        How many the weight has.

    Returns
    -------
    str or None
        None where these can be no gates.

    Example
    -------
    >>> stored_cluster("enc.rnn", "weight_ih_l1", slice(4, 6), groups=3)
    'enc.rnn.new_l1'
    >>> stored_cluster("conv", "weight", slice(4, 6), groups=3) is None
    True
    """
    gates = {4: LSTM_GATES, 3: GRU_GATES}.get(groups)
    if gates is None or not _ATTRIBUTE.fullmatch(attribute):
        return None
    return _named(path, gates, attribute, rows)


def _named(path, gates, attribute, rows):
    """Module, gate and layer of some rows of a weight."""
    gate = gates[rows.start // (rows.stop - rows.start)]
    layer = _ATTRIBUTE.fullmatch(attribute)[1] or ""
    # A module that is the whole model has the path ".".
    return f"{path.strip('.')}.{gate}{layer}".lstrip(".")


NAME = re.compile(r"(.*)\[(\d+):(\d+)\]")


def row_slices(length, count):
    """Rows of every slice, of sizes that differ by one at most."""
    ends = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:])]


def count_slices(shape, rows):
    """How many slices keep within so many rows each.

    Vectors and single values are never cut: a scale for a few values costs
    more than it saves.
    """
    if rows is None or len(shape) < 2:
        return 1
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(
            f"rows must be a positive number of output channels, or None, "
            f"not {rows!r}"
        )
    return max(1, -(-shape[0] // rows))


def slice_name(name, rows):
    """Name of a slice, or of the cluster that it is in."""
    return name if rows is ... else f"{name}[{rows.start}:{rows.stop}]"


def split_name(name):
    """Undoes ``slice_name``.

    Returns
    -------
    rows : slice or Ellipsis
        ``tensor[rows]`` are the slice's values.
    """
    match = NAME.fullmatch(name)
    if not match:
        return name, ...
    name, start, stop = match.groups()
    return name, slice(int(start), int(stop))


def first_row(rows):
    """Where in its tensor a slice begins, to sort slices by.

    Example
    -------
    >>> first_row(slice(32, 64)), first_row(...)
    (32, 0)
    """
    return 0 if rows is ... else rows.start


class RowGroups(torch.nn.Module):
    """Passes every slice of a tensor through a quantizer of its own.

    Arguments
    ---------
    quantizers : list of FakeQuantize
        One for each slice of ``row_slices``, in order.
    gated : bool
        Whether the slices are gates of a recurrent layer.

    Example
    -------
    >>> from speechbrain_mpq.quantization.fake_quant import FakeQuantize
    >>> groups = RowGroups([FakeQuantize(1, 0.5), FakeQuantize(2, 0.25)])
    >>> groups(torch.tensor([[0.1], [0.1], [0.9]]))
    tensor([[0.5000],
            [0.0000],
            [0.2500]])
    """

    def __init__(self, quantizers, gated=False):
        super().__init__()
        self.gated = gated
        self.quantizers = torch.nn.ModuleList(quantizers)

    def slices(self, length):
        """Pairs of rows and quantizer, for a tensor of so many rows."""
        return zip(row_slices(length, len(self.quantizers)), self.quantizers)

    def forward(self, weight):
        """The quantized weight.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight [output channels, ...].
        """
        slices = self.slices(len(weight))
        return torch.cat([quantize(weight[rows]) for rows, quantize in slices])

    def right_inverse(self, weight):
        """What ``module.weight = value`` stores: what the quantizers say."""
        slices = self.slices(len(weight))
        return torch.cat([q.right_inverse(weight[rows]) for rows, q in slices])

    def refit(self, weight):
        """Fits the scales anew to a float weight."""
        for rows, quantizer in self.slices(len(weight)):
            quantizer.refit(weight[rows])


def split_groups(tensors, rows, gates=False):
    """Cuts large matrices and filters into slices of rows.

    Arguments
    ---------
    tensors : dict of str -> NamedTensor
        As made by ``named_tensors``.
    rows : int or None
        Most output channels of one slice; None leaves all as it is.
    gates : bool
        Cut recurrent layers into their gates instead, biases as well.

    Returns
    -------
    dict of str -> NamedTensor

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.tensors import named_tensors
    >>> list(split_groups(named_tensors(torch.nn.Linear(2, 5)), 3))
    ['weight[0:2]', 'weight[2:5]', 'bias']
    """
    counts = {
        name: count_slices(tuple(tensor.shape), rows)
        for name, tensor in tensors.items()
        if tensor.axes == (0,)
    }
    count_slices((1, 1), rows)  # refuses what is no number of channels
    gated = {}
    if gates:
        gated = {n: len(_gates(t)) for n, t in tensors.items() if _gates(t)}
    return _split(tensors, counts | gated, gated)


def split_as_named(tensors, names, gated=()):
    """Cuts tensors into as many slices as names tell; some into gates.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.tensors import named_tensors
    >>> tensors = named_tensors(torch.nn.Linear(2, 5))
    >>> list(split_as_named(tensors, ["weight[0:2]", "weight[2:5]"]))
    ['weight[0:2]', 'weight[2:5]', 'bias']
    """
    names = [split_name(name) for name in names]
    counts = Counter(name for name, rows in names if rows != ...)
    gated = [n for n in gated if n in tensors]
    gated = [n for n in gated if counts[n] == len(_gates(tensors[n]))]
    return _split(tensors, counts, gated)


def _gates(tensor):
    """Gates of a tensor; none where its module has no say in its values."""
    if tensor.chain is not None or not tensor.owners:
        return ()
    return gates_of(*tensor.owners[0])


def _split(tensors, counts, gated=()):
    """Slices of the tensors that more than one are wanted of."""
    groups = []
    for name, tensor in tensors.items():
        if name in gated:
            tensor = replace(tensor, gated=True)
        count = counts.get(name, 1)
        if count == 1 or tensor.reason:
            groups.append(tensor)
        else:
            length = tensor.shape[0]
            groups += [tensor.slice(r) for r in row_slices(length, count)]
    return {group.name: group for group in groups}
