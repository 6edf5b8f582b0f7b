"""Gates of recurrent layers: which rows of their weights compute which gate.

PyTorch keeps the weights of all gates of a layer on top of each other. Each
gate of each layer can be a cluster of its own: its rows of the input and of the
recurrent weights and of both biases, "rnn.forget_l0".
"""

import re

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
