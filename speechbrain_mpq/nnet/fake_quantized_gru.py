"""Training a GRU with the roundings that its integers will make."""

import torch

from .gru_calibration import fit_rows
from .gru_operations import (
    INPUT_BITS,
    LINEAR,
    Cell,
    check_plan,
    gru_cells,
    named_matrices,
    run_gru,
)


class FakeQuantizedGRU(torch.nn.Module):
    """A GRU that rounds in floating point as the integers will.

    Training it trains the parameters of the GRU it was made from, and a step
    for each row of its matrices (as in Learned Step Size Quantization,
    https://arxiv.org/abs/1902.08153). Convert afterwards with the same plan
    and calibration and with `row_scales()`. Differences to the integers
    remain where a 15-bit multiplier rounds the other way.

    Arguments
    ---------
    gru : torch.nn.GRU or speechbrain.nnet.RNN.GRU
    plan : dict of str -> int
        Operation -> bits.
    calibration : Calibration

    Example
    -------
    >>> from speechbrain_mpq.nnet.gru_calibration import calibrate
    >>> from speechbrain_mpq.nnet.gru_operations import operations
    >>> gru, inputs = torch.nn.GRU(2, 3), torch.randn(4, 5, 2)
    >>> plan = dict.fromkeys(operations(["l0"]), 8)
    >>> fake = FakeQuantizedGRU(gru, plan, calibrate(gru, [inputs]))
    >>> outputs, states = fake(inputs)
    >>> outputs.shape, states.shape
    (torch.Size([4, 5, 3]), torch.Size([1, 4, 3]))
    """

    def __init__(self, gru, plan, calibration):
        super().__init__()
        check_plan(plan, gru_cells(gru))
        self.gru, self.plan, self.calibration = gru, plan, calibration
        self.log_scales = torch.nn.ParameterDict()
        for name, weight, bias in named_matrices(gru):
            floor = bias.detach().double().abs() / 2**29
            _, scales = fit_rows(weight, plan[name], floor)
            key = name.replace(".", "_")
            self.log_scales[key] = scales.to(weight).log()

    def row_scales(self):
        """Learned scales of the rows of each matrix, for `convert`.

        Returns
        -------
        dict of str -> torch.Tensor
            Operation -> [hidden].
        """
        return {
            name: self.log_scales[name.replace(".", "_")].detach().exp()
            for name, _, _ in named_matrices(self.gru)
        }

    def forward(self, inputs, lengths=None):
        """Outputs [batch, time, hidden] and last states [cells, batch, hidden].

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, time, features].
        lengths : torch.Tensor or None
            [batch], integers.
        """
        return run_gru(self._rounded(), inputs, lengths, self._round)

    def _round(self, name, values, valid):
        """The result of an operation, rounded."""
        bits = self.plan.get(name, INPUT_BITS)
        if name.split(".")[-1] in LINEAR:
            bits = self.calibration.result_width(bits)
        return self.calibration.affine(name, bits).fake_quantize(values)

    def _rounded(self):
        """Cells with rounded matrices."""
        rounded = {}
        for name, weight, _ in named_matrices(self.gru):
            scales = self.log_scales[name.replace(".", "_")].exp()[:, None]
            highest = 2 ** (self.plan[name] - 1) - 1
            inside = (weight / scales).clamp(-highest, highest)
            codes = inside + (inside.round() - inside).detach()
            rounded.setdefault(name.split(".")[0], []).append(codes * scales)
        return {
            name: Cell(torch.cat(parts[:3]), torch.cat(parts[3:]), *cell[2:])
            for (name, cell), parts in zip(
                gru_cells(self.gru).items(), rounded.values()
            )
        }
