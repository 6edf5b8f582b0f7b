"""optimum-quanto, with the Conv1d that it lacks registered by its own means.

Groups of 128 to 32 weights share a float32 scale and shift at 2 and 4 bits
where they divide the row, else whole rows do; 8 bits have a scale per row.
Its HqqOptimizer gives every weight of an ungrouped Conv1d a shift of its own,
2.6 MB of them here, so that it gets the 1x1 convolutions as linear layers.
"""

import json

import torch
from linear_form import convolutions, to_linear_
from optimum.quanto import HqqOptimizer, freeze, quantization_map, quantize
from optimum.quanto.nn import QModuleMixin, register_qmodule
from safetensors.torch import save_file
from stored import System, fill_, safetensors_bytes

POST_TRAINING = True
PACKAGES = ("optimum-quanto",)
LEAVES = "norms, PReLUs, biases"
SETTINGS = {
    "qint2": {"weights": "qint2"},
    "qint4": {"weights": "qint4"},
    "qint8": {"weights": "qint8"},
    "qint2 hqq": {"weights": "qint2", "optimizer": HqqOptimizer},
    "qint4 hqq": {"weights": "qint4", "optimizer": HqqOptimizer},
    # Mixed by hand, as it has no search: the depthwise filters, 1 % of the
    # weights, and the last layer get 8 bits.
    "qint2 + qint8": {"weights": "qint2", "spared": ("*d_conv", "conv_out")},
}


@register_qmodule(torch.nn.Conv1d)
class QConv1d(QModuleMixin, torch.nn.Conv1d):
    """A quantized Conv1d."""

    @classmethod
    def qcreate(
        cls, module, weights, activations=None, optimizer=None, device=None
    ):
        """Like a module, with quantized weights."""
        own = ("in_channels", "out_channels", "kernel_size", "stride")
        own += ("padding", "dilation", "groups", "padding_mode")
        return cls(
            **{name: getattr(module, name) for name in own},
            bias=module.bias is not None,
            dtype=module.weight.dtype,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            device=device,
        )

    def forward(self, x):
        """Apply to [batch, channels, frames]."""
        return self._conv_forward(x, self.qweight, self.bias)


def build(bench, weights, optimizer=None, spared=()):
    """Quantize, freeze, save as quanto's documentation says."""
    quantized = bench.separator().mask_net
    options = {"optimizer": optimizer()} if optimizer else {}
    if optimizer:
        to_linear_(quantized)
    if spared:
        quantize(quantized, weights="qint8", include=list(spared))
    quantize(quantized, weights=weights, exclude=list(spared), **options)
    freeze(quantized)
    folder = bench.work / "quanto"
    folder.mkdir(exist_ok=True)
    path, other = folder / "model.safetensors", folder / "map.json"
    save_file(quantized.state_dict(), path)
    other.write_text(json.dumps(quantization_map(quantized)))
    separator = bench.separator()
    values = {
        f"{name}.weight": quantized.get_submodule(name).weight.dequantize()
        for name in convolutions(separator.mask_net)
    }
    fill_(separator.mask_net, values)
    return System(
        separator,
        safetensors_bytes(path),
        path.stat().st_size + other.stat().st_size,
        "its safetensors and quantization_map.json",
    )
