"""What not every processor can do."""

import pytest
import torch


def _has_bf16_lstm():
    """Whether PyTorch has an LSTM in bfloat16 here: not on AVX2 alone."""
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.nn.LSTM(8, 12)(torch.zeros(2, 1, 8))
    except RuntimeError:
        return False
    return True


needs_bf16_lstm = pytest.mark.skipif(
    not _has_bf16_lstm(),
    reason="PyTorch has no bfloat16 LSTM for this processor",
)
