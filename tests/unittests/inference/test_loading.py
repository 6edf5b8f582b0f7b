"""One way to load packed folders: who builds what, and at what cost."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq import (
    QuantizedSeparator,
    load_packed_,
    load_separator,
    quantize_,
)
from speechbrain_mpq.evaluation.task import CardText
from speechbrain_mpq.inference.card import CARDS
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.inference.registry import REGISTRY, register, whole
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)

GOLDEN = Path(__file__).parents[2] / "data/packed/3"


class NoiseNet(nn.Module):
    """A network of another kind: recurrent, with a buffer that files lack."""

    def __init__(self, size, layers=1):
        super().__init__()
        self.settings = {"size": size, "layers": layers}
        self.rnn = nn.GRU(size, size, layers, batch_first=True)
        self.mask = nn.Linear(size, size)

    def forward(self, features):
        """[batch, frames, size] to a mask of the same shape."""
        return torch.sigmoid(self.mask(self.rnn(features)[0]))


@pytest.fixture
def registered(monkeypatch):
    """As the file of a new network does it."""
    for known in (REGISTRY, CARDS):
        for name in ("NoiseNet",):
            monkeypatch.setitem(known, name, None)
            del known[name]
    register(
        NoiseNet,
        {"size": whole(1, 4096), "layers": whole(1, 8)},
        card=CardText("Speech enhancer", "Takes noise away.\n"),
        probe=lambda net: net(torch.ones(1, 4, net.settings["size"])),
    )


@pytest.fixture
def noise_net(registered, tmp_path):
    """A packed folder of it, and what it computes."""
    torch.manual_seed(0)
    model = NoiseNet(6).eval()
    quantize_(model, 4)
    inputs = torch.randn(2, 9, 6)
    with torch.no_grad():
        return save_separator(model, tmp_path / "net"), inputs, model(inputs)


def test_a_new_network_is_loaded_safely_and_gets_a_card(noise_net):
    folder, inputs, expected = noise_net
    model = load(folder)
    assert isinstance(model, NoiseNet) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(model(inputs), expected, atol=1e-6)
        # torch rounds products with weights that take gradients otherwise
        assert torch.equal(model.requires_grad_()(inputs), expected)
    card = (folder / "README.md").read_text()
    assert "# Speech enhancer, 4 bits\n\nTakes noise away." in card
    assert "separation" not in card
    assert check_folder(folder) == []
    with open(folder / "hyperparams.yaml", encoding="utf-8") as text:
        hparams = load_hyperpyyaml(text)  # as SpeechBrain's from_hparams does
    load_packed_(hparams["modules"]["model"], folder)
    with torch.no_grad():
        found = hparams["model"].eval()(inputs)
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="a NoiseNet, no separator"):
        QuantizedSeparator.from_pretrained(folder)


def test_numbers_of_a_new_network_are_checked(noise_net):
    folder, _, _ = noise_net
    path = folder / "model.safetensors"
    container = read_container(path)
    container.config["architecture"]["arguments"]["size"] = 10**9
    write_container(path, container.tensors, container.config, "3")
    with pytest.raises(PackedModelError, match="size must be an integer"):
        load(folder)


def test_names_are_given_once(registered):
    other = type("NoiseNet", (nn.Module,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="another NoiseNet"):
        register(other, {})


class Lost(nn.Module):
    """It has a buffer that no file holds."""

    def __init__(self):
        super().__init__()
        self.settings = {}
        self.register_buffer("window", torch.ones(3), persistent=False)


def test_what_no_file_holds_needs_a_build(monkeypatch):
    monkeypatch.setitem(REGISTRY, "Lost", None)
    del REGISTRY["Lost"]
    register(Lost, {})
    with pytest.raises(ValueError, match="window, which no file holds"):
        REGISTRY["Lost"].build()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_programs_default_type_changes_nothing(kind):
    expected = QuantizedSeparator.from_pretrained(GOLDEN)
    mixture = torch.randn(1, 400, 2)
    wanted = expected.separate_batch(mixture, [60.0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        model = QuantizedSeparator.from_pretrained(GOLDEN)
        found = model.separate_batch(mixture, [60.0])
        stream = model.stream(60.0)
        pieces = torch.cat([stream.push(mixture[0]), stream.finish()], dim=1)
        assert torch.get_default_dtype() is kind
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted) and pieces.dtype == torch.float32
    again = expected.stream(60.0)
    whole = torch.cat([again.push(mixture[0]), again.finish()], dim=1)
    assert torch.equal(pieces, whole)


def test_trusted_folders_can_be_trained_further(tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "folder"))
    safe, trusted = load(folder), load_separator(folder)
    state, other = safe.state_dict(), trusted.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert all(p.requires_grad for p in trusted.parameters())
    (folder / "hyperparams.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="name a packed folder"):
        load(folder, trusted=True)


GREEDY = """
import resource, sys
from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.quantization.container import PackedModelError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load(sys.argv[1])
except PackedModelError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_memory_for_weights_that_fit_nothing(tmp_path):
    """One bit each, so that 1 MB would unfold to 32 MB and more."""
    pytest.importorskip("resource")
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "folder"))
    path = folder / "model.safetensors"
    config = read_container(path).config
    count = 2**23
    config["shapes"], config["bits"] = {"x": [count]}, [1]
    tensors = {
        "packed": torch.zeros(count // 8, dtype=torch.uint8),
        "scales": torch.ones(1),
    }
    write_container(path, tensors, config, "3")
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(folder)],
        capture_output=True,
        text=True,
    )
    assert "another model: lacks" in done.stderr
    assert int(done.stdout) < 12 * 1024, "KiB"


def test_nothing_is_decoded_of_a_file_that_fits_nothing(tmp_path, monkeypatch):
    """Its header is enough: 64 integers may hide in a coded byte."""
    separator = load_separator("pretrained/separator_mini")
    quantize_(separator, 2)
    folder = save_separator(separator, tmp_path, entropy_coded=True)
    path = folder / "model.safetensors"
    container = read_container(path)
    config = container.config
    assert container.version == "5"
    config["architecture"]["arguments"]["channels"] += 8
    write_container(path, container.tensors, config, "5")
    for name in ("decode_packed", "decode_states"):
        monkeypatch.delattr(f"speechbrain_mpq.quantization.unpacking.{name}")
    with pytest.raises(PackedModelError, match="the model's is"):
        load(folder)
    (problem, *_) = check_folder(folder)
    assert "the model's is" in problem
