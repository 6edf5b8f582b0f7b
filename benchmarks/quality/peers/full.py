"""The full-precision separator, which all others are compared with."""

from stored import System, safetensors_bytes

from speechbrain_mpq.quantization.packing import save_packed

POST_TRAINING = True
PACKAGES = ("torch",)
LEAVES = "everything"
SETTINGS = {"32 bit": {}}


def build(bench):
    """As it is."""
    separator = bench.separator()
    path = save_packed(separator, bench.work / "full")
    size = path.stat().st_size
    return System(separator, safetensors_bytes(path), size, "safetensors")
