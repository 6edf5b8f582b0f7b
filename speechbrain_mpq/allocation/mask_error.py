"""Weighted squared error of the output as a score.

The output is compared where it matters: a mask, for example, counts in each
time-frequency bin with the energy of the signal that it is applied to.
"""

import torch

from .sweep import OutputScores


def weighted_error(reference, output, weights):
    """Sum of w |output - reference|^2 over groups of channels.

    Arguments
    ---------
    reference : torch.Tensor
        [items, groups x bins, frames], for example all real parts and then
        all imaginary parts.
    output : torch.Tensor
        Same shape.
    weights : torch.Tensor
        [items, bins, frames], the same for every group.

    Returns
    -------
    total : torch.Tensor
        One value, float64.

    Example
    -------
    >>> output = torch.tensor([[[1.0], [2.0], [3.0], [0.0]]])
    >>> weights = torch.tensor([[[10.0], [1.0]]])
    >>> weighted_error(torch.zeros(1, 4, 1), output, weights).item()
    104.0
    """
    error = (output - reference).unflatten(1, (-1, weights.shape[1])).square_()
    return (error * weights[:, None]).sum(dtype=torch.float64)


class MaskErrorScores(OutputScores):
    """Scores every cluster by the weighted squared error of the output.

    The score is the error's share in the weighted energy of the
    full-precision output: sum w |m_q - m|^2 / sum w |m|^2 over all items.

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
    codebook : str
        Kind of quantization table, "midtread" or "midrise".
    rows : int or None
        Most output channels of a cluster (see `clusters`).

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> scores = MaskErrorScores((2, 3))
    >>> inputs, weights = torch.ones(1, 1, 5), torch.ones(1, 1, 5)
    >>> table = scores(network, inputs, weights, progress=False)
    >>> table.scores  # 2 bits: (0, 3) or (2, 2) for (1, 3), 3 bits: exact
    {'mask_net.0': {2: 0.1, 3: 0.0}}
    """

    method = "weighted_output_error"

    needs = ("inputs", "weights")  # what a calibration has to provide

    def comparison(self, inputs, weights):
        """How outputs are compared.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, channels, frames].
        weights : torch.Tensor
            [items, bins, frames], not negative. The output has a whole number
            of groups of `bins` channels, which share the weights.

        Returns
        -------
        inputs, error, scale : tuple
            As `OutputScores.table` takes them.
        """
        if len(weights) != len(inputs):
            raise ValueError(
                f"{len(inputs)} items of input need as many items of weights, "
                f"not {len(weights)}"
            )

        def error(reference, output, items):
            _check_shapes(reference, weights)
            own = weights[items].to(reference.device)
            return weighted_error(reference, output, own)

        def energy(reference, items):
            return error(torch.zeros_like(reference), reference, items)

        return inputs, error, energy


def _check_shapes(output, weights):
    """Refuses weights that would broadcast to something else."""
    _, channels, frames = output.shape
    _, bins, weighted_frames = weights.shape
    if channels % bins or frames != weighted_frames:
        raise ValueError(
            f"weights of {bins} bins x {weighted_frames} frames do not fit an "
            f"output of {channels} channels x {frames} frames; channels must "
            "be a multiple of bins"
        )
