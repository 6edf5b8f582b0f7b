"""A module with many kinds of layers, and its packed model, for tests."""

import torch

from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.quantizer import quantize_


class Net(torch.nn.Module):
    """Convolution, recurrence, attention, norm and a persistent buffer."""

    def __init__(self, hidden=6):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, hidden, 3, padding=1)
        self.norm = torch.nn.BatchNorm1d(hidden)
        self.prelu = torch.nn.PReLU()
        self.lstm = torch.nn.LSTM(hidden, 4, batch_first=True)
        self.gru = torch.nn.GRU(4, 4, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("window", torch.hann_window(5))

    def forward(self, x):
        """[batch, 3, time] to [batch, time, 4]."""
        x = self.prelu(self.norm(self.conv(x))).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        return self.attention(x, x, x)[0] * self.window.sum()


def net(seed=0, **sizes):
    """A model in eval mode."""
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def packed(folder, bits=3, **arguments):
    """A packed model, and the quantized model that it came from."""
    model = net()
    quantize_(model, bits, **arguments)
    return save_packed(model, folder), model
