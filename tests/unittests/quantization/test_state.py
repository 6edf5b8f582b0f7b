"""Buffers, state of other kinds, names: kept, stored once, or refused."""

import json
import struct

import numpy as np
import pytest
import torch
from helpers import assert_packs, refused_file
from speechbrain.lobes.models.transformer.Transformer import PositionalEncoding
from speechbrain.nnet.complex_networks.c_linear import CLinear
from speechbrain.nnet.hypermixing import ParallelMLPs
from speechbrain.nnet.quaternion_networks.q_linear import QLinear
from speechbrain.nnet.RNN import LiGRU
from speechbrain.processing.features import InputNormalization
from speechbrain.utils import checkpoints
from torch import nn

from speechbrain_mpq.quantization import container as container_file
from speechbrain_mpq.quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)
from speechbrain_mpq.quantization.groups import split_groups
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    read_packed,
    save_packed,
    unpackable,
)
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    clusters,
    coverage,
    dequantize_,
    quantize_,
)
from speechbrain_mpq.quantization.tensors import named_tensors


@checkpoints.register_checkpoint_hooks
class Hooked(nn.Module):
    """A module whose state its own hooks save, in any form."""

    def __init__(self, state=None, write=torch.save):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.state, self.write, self.loaded = state, write, 0

    @checkpoints.mark_as_saver
    def save(self, path):
        """Save the state."""
        self.write(self.state, path)

    @checkpoints.mark_as_loader
    def load(self, path, end_of_epoch):
        """Load the state."""
        self.loaded += 1
        if path.read_bytes()[:1] == b"{":
            self.state = json.loads(path.read_text())
        else:
            self.state = torch.load(path)
        if self.state == {"wrong": 1}:
            self.state = None


def as_json(state, path):
    """A hook that writes JSON."""
    path.write_text(json.dumps(state))


def as_words(state, path):
    """A hook that writes a form of its own."""
    path.write_text(f"mean is {state}")


@pytest.mark.parametrize(
    "state", [{"count": 3}, [1, 2], (torch.ones(2), True), "text", -1.5]
)
def test_what_hooks_save_comes_back(tmp_path, state):
    model, other = Hooked(state), Hooked()
    save_packed(model, tmp_path)
    load_packed_(other, tmp_path)
    assert str(other.state) == str(state) and type(other.state) is type(state)


@checkpoints.register_checkpoint_hooks
class Averaged(nn.Linear):
    """A layer whose hook saves another value under its weight's name."""

    def __init__(self):
        super().__init__(4, 4)
        self.average = torch.randn(4, 4)

    @checkpoints.mark_as_saver
    def save(self, path):
        """Save the average."""
        torch.save({"weight": self.average}, path)

    @checkpoints.mark_as_loader
    def load(self, path, end_of_epoch):
        """Load the average."""
        self.average = torch.load(path)["weight"]


@pytest.mark.parametrize("bits", [None, 4])
def test_hooks_may_save_other_values_by_names_of_state_dict(tmp_path, bits):
    model, other = Averaged(), Averaged()
    if bits:
        quantize_(model, bits)
    save_packed(model, tmp_path)
    load_packed_(other, tmp_path)
    assert other.average.equal(model.average)
    assert other.weight.equal(model.weight)


def test_json_of_hooks_comes_back(tmp_path):
    save_packed(Hooked({"mean": [1, 2.5]}, as_json), tmp_path)
    other = load_packed_(Hooked({"mean": []}, as_json), tmp_path)
    assert other.state == {"mean": [1, 2.5]}


@pytest.mark.parametrize(
    "model, name, why",
    [
        (Hooked(3, as_words), "@saver", "neither a state of torch nor JSON"),
        (Hooked({1, 2}), "@saver", "more than tensors|a set has no place"),
        (Hooked(write=lambda *_: None), "@saver", "no single file"),
        (Hooked(torch.zeros(2, dtype=torch.cfloat)), "@saver", "complex64"),
    ],
    ids=["words", "set", "nothing", "complex"],
)
def test_what_cannot_be_kept_is_named_before_training(
    tmp_path, caplog, model, name, why
):
    quantize_(model, 4)
    assert name in caplog.text and "cannot be packed" in caplog.text
    (reason,) = unpackable(model).values()
    rows = {row["tensor"]: row["reason"] for row in coverage(model)}
    assert "cannot be packed" in rows[name]
    with pytest.raises(ValueError, match=f"{name} cannot be packed.*({why})"):
        save_packed(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_without_a_place_are_named(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    model.register_buffer("packed", torch.zeros(2))
    model.add_module("a@b", nn.BatchNorm1d(2))
    named = unpackable(model)
    assert {"phase", "packed", "1.weight", "1.bias"} < set(named)
    assert "a@b.running_mean" in named and "a@b.weight" in named
    with pytest.raises(ValueError, match="phase cannot be packed.*complex64"):
        save_packed(model, tmp_path)


def test_models_without_values_are_refused(tmp_path):
    """Loading into them does nothing, and torch says nothing."""
    save_packed(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), tmp_path)
    meta = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, device="meta"))
    lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="1.weight is on the meta device"):
        load_packed_(meta, tmp_path)
    with pytest.raises(ValueError, match="1.weight cannot be packed.*meta"):
        save_packed(meta, tmp_path)
    load, quantize = (
        lambda model: load_packed_(model, tmp_path),
        lambda model: quantize_(model, 4),
    )
    for use in (load, quantize, coverage):
        with pytest.raises(ValueError, match="1.weight has no shape"):
            use(lazy)


def test_keys_that_nobody_can_find_are_named():
    class Odd(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "running"] = torch.ones(2)

    assert "neither parameter nor buffer" in unpackable(Odd(2, 2))["running"]


def test_states_that_do_not_load_leave_the_model_as_it_was(tmp_path):
    save_packed(Hooked({"wrong": 1}), tmp_path)
    other = Hooked({"right": 2})
    weight = other.weight.detach().clone()
    with pytest.raises(PackedModelError, match="state does not load"):
        load_packed_(other, tmp_path)
    assert other.state == {"right": 2} and torch.equal(other.weight, weight)


def test_states_of_another_model_are_refused(tmp_path):
    save_packed(Hooked({"count": 3}), tmp_path)
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(PackedModelError, match="adds @saver"):
        load_packed_(plain, tmp_path)


def test_a_file_without_the_state_says_so(tmp_path, caplog):
    """As written before states were packed."""
    fresh = InputNormalization(norm_type="global")
    model = nn.ModuleDict({"normalize": fresh, "linear": nn.Linear(2, 2)})
    path = save_packed(model, tmp_path)  # nothing seen, nothing stored
    assert not any("@" in name for name in read_container(path).tensors)
    fresh(torch.randn(2, 5, 2), torch.ones(2))
    load_packed_(model, tmp_path)
    assert "holds no normalize.@saver" in caplog.text


def forged_state(path, text, *tensors):
    """A file with a state that nobody would write."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    parts = {f"@saver.{i}": tensor for i, tensor in enumerate(tensors)}
    tensors = {"@saver": content, "weight": torch.zeros(4, 4), **parts}
    header = {"granularity": "tensor", "tensors": {}}
    write_container(path, tensors, header)


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"tensor":0}', "without its tensor"),
        ('{"tensor":true}', "without its tensor"),
        ('{"object":"os.system"}', "state with 'object'"),
        ('{"dict":[[{"dict":[]},1]]}', "unhashable"),
        ('{"dict":[[1]]}', "inconsistent"),
        ('{"a":1,"b":2}', "inconsistent"),
        ('{"float":"1e999"}', "state with 'float'"),
        ("NaN", "no JSON"),
        ("[" * 3000 + "]" * 3000, "nested too deeply|inconsistent"),
    ],
)
def test_forged_states_are_refused(tmp_path, text, match):
    path = tmp_path / "model.safetensors"
    forged_state(path, text)
    refused_file(path, match)


def test_tensors_of_no_state_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    forged_state(path, "1", torch.zeros(2))
    refused_file(path, "each of its tensors once")
    same = torch.tensor(list(b'{"a":"weight","weight":"b"}'), dtype=torch.uint8)
    header = {"granularity": "tensor", "tensors": {}}
    weight = {"weight": torch.zeros(2)}
    write_container(path, {"@same": same, **weight}, header)
    refused_file(path, "stored twice")
    write_container(path, {"@other": same, **weight}, header)
    refused_file(path, "of no state")


def test_buffers_of_new_modules_are_not_stored(tmp_path):
    model = nn.Sequential(PositionalEncoding(64), nn.Linear(64, 4))
    quantize_(model, 4)
    path = save_packed(model, tmp_path)
    assert path.stat().st_size < 1000
    rows = {row["tensor"]: row for row in coverage(model)}
    assert rows["0.pe"]["bytes"] == 0 and "every new" in rows["0.pe"]["reason"]
    other = nn.Sequential(PositionalEncoding(64), nn.Linear(64, 4))
    load_packed_(other, tmp_path)
    other[0].pe += 1  # no longer what the file left out
    with pytest.raises(PackedModelError, match="lacks 0.pe"):
        load_packed_(other, tmp_path)
    save_packed(other, tmp_path)
    again = nn.Sequential(PositionalEncoding(64), nn.Linear(64, 4))
    assert torch.equal(load_packed_(again, tmp_path)[0].pe, other[0].pe)


def test_masks_take_few_bits_and_are_exact(tmp_path):
    def build():
        return LiGRU(hidden_size=8, input_shape=(2, 5, 3), dropout=0.15)

    assert_packs(tmp_path, build, lambda: torch.randn(2, 5, 3))
    masks = read_packed(tmp_path)[0]["rnn.0.drop_masks"]
    assert masks.bits == 1.6


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    "values",
    [(0.0,), (2.5,), (-1.0, 1.0), (0.0, 3.0, -3.0), (-0.0, 1.0), (1.0, 2.0)],
)
def test_constant_buffers_come_back_bit_for_bit(tmp_path, values, granularity):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Linear(4, 2)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            draw = torch.randint(len(values), (64, 64))
            buffer = torch.tensor(values, dtype=dtype)[draw]
            model.register_buffer(f"of_{str(dtype)[6:]}", buffer)
        return model

    model, other = build(0), build(1)
    quantize_(model, 3, granularity=granularity)
    save_packed(model, tmp_path)
    load_packed_(other, tmp_path)
    for name, buffer in model.named_buffers():
        if "parametrizations" not in name:
            found = getattr(other, name)
            assert torch.equal(found, buffer)
            assert torch.equal(found.signbit(), buffer.signbit())


def test_equal_masks_are_stored_as_integers(tmp_path):
    def make():
        return LiGRU(hidden_size=32, input_shape=(4, 10, 8), num_layers=3)

    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 10, 8)
    quantize_(model, 4)
    path = save_packed(model.eval(), tmp_path)
    masks = [b for n, b in model.named_buffers() if n.endswith("drop_masks")]
    assert len(masks) == 3
    assert path.stat().st_size < sum(m.numel() for m in masks) / 8 + 20_000
    again = make().eval()
    load_packed_(again, tmp_path)
    assert torch.equal(again(x)[0], model(x)[0])


def test_equal_buffers_are_stored_once(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        table = torch.randn(64, 64)
        model = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        for layer in model:
            layer.register_buffer("table", table.clone())
        return model

    model, other = build(0), build(1)
    path = save_packed(model, tmp_path)
    assert path.stat().st_size < 64 * 64 * 4 + 1500
    load_packed_(other, tmp_path)
    assert all(torch.equal(a.table, b.table) for a, b in zip(model, other))
    rows = {row["tensor"]: row for row in coverage(model)}
    assert rows["2.table"]["reason"] == "equal to 0.table"


def test_tied_names_are_all_there():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.output = nn.Linear(6, 10)
            self.output.weight = self.embedding.weight

    for patterns in (["output.*"], ["output.weight"], ["embedding.*"]):
        with pytest.raises(ValueError, match="one tied parameter"):
            quantize_(Tied(), 2, exclude=patterns)
    model = Tied()
    quantize_(model, 2, include=["output.*"])
    assert len(model.embedding.weight.unique()) <= 3
    rows = {row["tensor"]: row for row in coverage(model)}
    assert rows["output.weight"]["reason"] == "tied to embedding.weight"
    assert rows["output.weight"]["bytes"] == 0
    quantize_(kept := Tied(), 2, exclude=["*.weight"])
    assert not isinstance(kept.embedding, type(model.embedding))


class Pair(nn.Module):
    """Two matrices, and a third one that is a buffer."""

    def __init__(self, one, other, buffer):
        super().__init__()
        self.one, self.other = nn.Parameter(one), nn.Parameter(other)
        self.register_buffer("third", buffer)


def views():
    """A matrix, another one, and pairs that share memory or do not."""
    matrix, other = torch.randn(4, 4), torch.randn(4, 4)
    return {
        "same": (matrix, matrix.data, other),
        "transposed": (matrix, matrix.T, other),
        "buffer": (matrix, other, matrix.view(-1)),
        "other type": (matrix, other, matrix.view(torch.int32)),
        "inside": (matrix[:, :3], matrix[1:, 2:], other),
        "columns": (matrix[:, :2], matrix[:, 2:], other),
        "rows": (matrix[:2], matrix[2:], other),
    }


@pytest.mark.parametrize("kind", views())
def test_weights_that_share_memory_are_refused(kind):
    pair = views()[kind]
    model = Pair(*pair)
    before = [value.clone() for value in pair]
    if kind in ("columns", "rows"):  # beside each other
        quantize_(model, 2, granularity="channel")
        dequantize_(model)
    else:
        with pytest.raises(ValueError, match="share memory, but are no one"):
            quantize_(model, 2)
    assert not list(model.children())
    assert all(map(torch.equal, pair, before))


def test_a_layer_under_two_names_is_quantized_once(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        layer = nn.Linear(3, 3)
        return nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})

    model, other = build(0), build(1)
    quantize_(model, 4)
    with pytest.raises(ValueError, match="a.weight, b.0.weight are one tied"):
        dequantize_(model)
        quantize_(model, 4, exclude="b.*")
    quantize_(model, 4)
    save_packed(model, tmp_path)
    load_packed_(other, tmp_path)
    assert torch.equal(other["b"][0].weight, model["a"].weight)


def test_a_hook_that_wants_another_name_is_told():
    def rename(module, state, prefix, metadata):
        state[prefix + "kernel"] = state.pop(prefix + "weight")

    layer = nn.Linear(2, 2)
    layer._register_state_dict_hook(rename)
    with pytest.raises(ValueError, match="state_dict hook fails.*'weight'"):
        quantize_(layer, 4)
    quantize_(layer, 4, exclude="weight")  # and it was left as it was


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rows", [None, 3])
def test_the_bytes_of_a_file_are_known_before(tmp_path, granularity, rows):
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose1d(4, 6, 3),
            "norm": nn.BatchNorm1d(6),
            "rnn": LiGRU(hidden_size=8, input_shape=(2, 5, 3)),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)),
        }
    )
    entries = {}
    for i, (name, own) in enumerate(clusters(model, rows=rows).items()):
        if name == "norm":
            continue  # stays in float
        entries[name] = (own, (1.6, 2, 5, 16)[i % 4])
    tensors = split_groups(named_tensors(model), rows)
    sizes = {name: tensor.weight.numel() for name, tensor in tensors.items()}
    plan = BitPlan(
        {
            name: ClusterBits(bits, sum(sizes[n] for n in own), tuple(own))
            for name, (own, bits) in entries.items()
        },
        codebook="midrise",
    )
    before = packed_file_bytes(model, plan, granularity)
    quantize_(model, plan, granularity=granularity)
    assert save_packed(model, tmp_path).stat().st_size == before
    assert packed_file_bytes(model) == before


def test_a_transposed_convolution_scales_its_output_channels(tmp_path):
    gains = torch.logspace(-2, 0, 32)
    for groups in (1, 2, 16):
        module = nn.ConvTranspose1d(16, 32, 8, groups=groups, bias=False)
        module.weight.data *= gains[: 32 // groups, None]
        full = module(torch.eye(16)[None]).detach()
        quantize_(module, 4, granularity="channel")
        error = module(torch.eye(16)[None]) - full
        of_channel = error.norm(dim=(0, 2)) / full.norm(dim=(0, 2))
        assert of_channel.max() < 0.12
        path = save_packed(module, tmp_path)
        assert read_model(path).version == 4
        other = nn.ConvTranspose1d(16, 32, 8, groups=groups, bias=False)
        load_packed_(other, tmp_path)
        assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize(
    "make, names, width",
    [
        (lambda: CLinear(8, (2, 16)), ["real_weight", "imag_weight"], 8),
        (lambda: QLinear(8, (2, 16)), ["r_weight", "k_weight"], 8),
        (lambda: ParallelMLPs(6, 24, num_mlps=3), ["fc1_weights"], 24),
    ],
    ids=["complex", "quaternion", "mlps"],
)
def test_speechbrains_layers_scale_their_output_channels(
    tmp_path, make, names, width
):
    module = make()
    for name in names:
        weight = getattr(module, name)
        axes = 1 if weight.dim() == 2 else (0, 1)  # of the outputs
        shape = [
            n if i in np.atleast_1d(axes) else 1
            for i, n in enumerate(weight.shape)
        ]
        gains = torch.logspace(-2, 0, width).view(shape)
        weight.data.copy_(torch.randn_like(weight) * gains)
    floats = {n: getattr(module, n).detach().clone() for n in names}
    quantize_(module, 4, granularity="channel")
    for name in names:
        alpha = module.parametrizations[name][0].alpha
        assert alpha.numel() == width
        error = (getattr(module, name) - floats[name]).square()
        other = [i for i, n in enumerate(alpha.shape) if n == 1]
        share = error.sum(other) / floats[name].square().sum(other)
        assert share.max() < 0.05
    again = make()
    load_packed_(again, save_packed(module, tmp_path).parent)
    assert all(
        torch.equal(getattr(again, n), getattr(module, n)) for n in names
    )


def test_transposed_convolutions_are_not_divided():
    module = nn.ConvTranspose1d(16, 8, 3)
    assert clusters(module, rows=4) == {".": ["weight", "bias"]}


@pytest.mark.parametrize(
    "axes",
    [{"weight": [0]}, {"weight": [2]}, {"other": [1]}, [], {"bias": [1]}],
)
def test_forged_axes_are_refused(tmp_path, axes):
    module = nn.ConvTranspose1d(4, 4, 3)
    quantize_(module, 4, granularity="channel")
    path = save_packed(module, tmp_path)
    held = read_container(path)
    write_container(path, held.tensors, {**held.config, "axes": axes}, "4")
    refused_file(path, "inconsistent")


def test_a_file_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)
    path = save_packed(model, tmp_path)
    content = path.read_bytes()
    model.weight.data.fill_(1)
    quantize_(model, 4)
    monkeypatch.setattr(container_file, "MAX_HEADER", 200)
    with pytest.raises(ValueError, match="not written.*a header of"):
        save_packed(model, tmp_path)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2


def test_names_and_shapes_are_checked_before_the_weights_are_read(tmp_path):
    import tracemalloc

    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    quantize_(model, 1)
    path = save_packed(model, tmp_path)
    size, wrong = path.stat().st_size, nn.Linear(2, 2)

    def peak(call):
        tracemalloc.start()
        call()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    def refused():
        with pytest.raises(PackedModelError, match="another model"):
            load_packed_(wrong, tmp_path)

    assert peak(refused) < size  # its names and shapes, no weights
    # numpy's share: what is unpacked at a time, not all of it.
    assert peak(lambda: read_model(path)) < 40 * 2**20


def test_a_damaged_file_is_told_as_damaged_even_if_it_does_not_fit(tmp_path):
    path = save_packed(nn.Linear(4, 4), tmp_path)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[8 + length] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackedModelError, match="SHA-256"):
        load_packed_(nn.Linear(2, 2), tmp_path)
