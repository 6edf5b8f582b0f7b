"""Increase of the task's own loss as a score."""

from .sweep import OutputScores


class LossScores(OutputScores):
    """Scores every cluster by what its quantization adds to the task's loss.

    The score is the mean increase over the items, in the loss's own unit: dB
    for a negative SI-SNR. It is negative where quantization helps these items:
    with many bits the change is first of all the slope of the loss, whose sign
    is an accident of the items, so that this score needs more of them than one
    that compares outputs.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    granularity : str
        Scales of a tensor, "tensor" or "channel" (see `quantize_`).
    chunk : int
        Items that go through the network at a time; bounds the memory.
    given : BitPlan or int or None
        Bits of the other clusters while one is tried; None: full precision.

    Example
    -------
    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> def loss(output, items):
    ...     return (output - 1).square().sum()
    >>> scores = LossScores((2, 3))
    >>> table = scores(network, torch.ones(4, 1, 5), loss, progress=False)
    >>> table.scores  # 5 frames of (0 - 1)^2 + (3 - 1)^2 against 0 + (3 - 1)^2
    {'mask_net.0': {2: 5.0, 3: 0.0}}
    """

    method = "loss_increase"
    signed = True

    needs = ("inputs", "loss")  # what a calibration has to provide

    def comparison(self, inputs, loss):
        """How outputs are compared.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, ...].
        loss : callable
            `loss(output, items)`: the summed loss of an output, a tensor of
            one value; `items` is the slice of the inputs that it belongs to.

        Returns
        -------
        inputs, error, scale : tuple
            As `OutputScores.table` takes them.
        """
        unquantized = {}  # first item of a chunk -> its loss

        def count(reference, items):
            unquantized[items.start] = loss(reference, items).double()
            return len(reference)

        def increase(_, output, items):
            return loss(output, items).double() - unquantized[items.start]

        return inputs, increase, count
