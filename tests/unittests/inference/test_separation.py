"""Packed folders: loaded in three ways, and saved again."""

import pickle
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import published
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.parameter_transfer import Pretrainer

import speechbrain_mpq
from speechbrain_mpq.inference import interfaces
from speechbrain_mpq.inference.folder import (
    copy_folder,
    repack,
    save_separator,
)
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.utils import BUNDLED_MODEL

DATA = Path(__file__).parents[2] / "data"


GOLDEN = DATA / "packed"
MAKER = runpy.run_path(str(DATA / "make_golden.py"))


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden folder."""
    return Path(shutil.copytree(GOLDEN / "3", tmp_path / "folder"))


@pytest.fixture(scope="module")
def expected():
    """A mixture, and what the quantized model makes of it."""
    torch.manual_seed(0)
    mixture, doa = torch.randn(1, 400, 2), torch.tensor([[60.0]])
    with torch.no_grad():
        return mixture, MAKER["golden"](3)(mixture, doa)


def reseal(folder, change):
    """Change the file of a folder, checksum included."""
    path = folder / "model.safetensors"
    container = read_container(path)
    change(container.config, container.tensors)
    write_container(path, container.tensors, container.config, "3")


def test_three_ways_give_the_quantized_model(folder, expected):
    mixture, estimate = expected
    safe = QuantizedSeparator.from_pretrained(folder)
    theirs = QuantizedSeparator.from_hparams(source=str(folder))
    module = load_packed_(MAKER["toy"](), folder)
    for model in (safe, theirs):
        assert torch.equal(model.separate_batch(mixture, [60.0]), estimate)
        assert torch.equal(model(mixture, [60.0]), estimate)
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.separator.training
    with torch.no_grad():
        again = module(mixture, torch.tensor([[60.0]]))
    assert torch.equal(again, estimate)


def test_the_model_inside_is_what_is_loaded_by_default():
    model = QuantizedSeparator.from_pretrained()
    assert model.microphones == [1, 4, 6, 8, 10, 12, 15]
    assert check_folder(BUNDLED_MODEL) == []


def test_speechbrains_own_class_loads_the_folder(folder, tmp_path, expected):
    """With and without a folder for links, as SpeechBrain's users do."""
    mixture, estimate = expected
    for savedir in (None, tmp_path / "saved"):
        model = Pretrained.from_hparams(source=str(folder), savedir=savedir)
        with torch.no_grad():
            made = model.mods.separator(mixture, torch.tensor([[60.0]]))
        assert torch.equal(made, estimate)


def test_a_plain_pretrainer_with_our_hook(folder):
    module = MAKER["toy"]()
    pretrainer = Pretrainer(
        loadables={"separator": module},
        paths={"separator": f"{folder}/model.safetensors"},
        custom_hooks={"separator": speechbrain_mpq.load_packed_},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    expected = load_packed_(MAKER["toy"](), folder).state_dict()
    state = module.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_build_separator_goes_on_working(folder):
    separator = build_separator(folder / "hyperparams.yaml").eval()
    assert fold_norms_(separator) == 0
    assert load_packed_(separator, folder) is separator


def test_the_safe_way_reads_the_weights_only(folder, expected, monkeypatch):
    """Neither YAML nor pickle nor JSON beside the file is touched."""
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            path.write_text("!!python/object/apply:os.system ['false']")

    def forbidden(*arguments, **options):
        raise AssertionError("must not be called")

    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr("hyperpyyaml.load_hyperpyyaml", forbidden)
    monkeypatch.setattr(
        "speechbrain_mpq.lobes.models.separator.load_hyperpyyaml", forbidden
    )
    model = QuantizedSeparator.from_pretrained(folder)
    mixture, estimate = expected
    assert torch.equal(model.separate_batch(mixture, [60.0]), estimate)


def test_nothing_is_imported_by_name(folder):
    def change(config, tensors):
        config["architecture"]["class"] = "antigravity.Separator"

    reseal(folder, change)
    with pytest.raises(PackedModelError, match="must be of class 'Separator'"):
        QuantizedSeparator.from_pretrained(folder)
    assert "antigravity" not in sys.modules


def test_weights_that_do_not_fit_their_architecture(folder):
    def change(config, tensors):
        config["architecture"]["arguments"]["channels"] = 16384

    reseal(folder, change)
    with pytest.raises(PackedModelError, match=r"conv_in.weight is \(4, 36"):
        QuantizedSeparator.from_pretrained(folder)
    assert "architecture that it was packed from" in check_folder(folder)[0]


def test_float_weights_must_be_finite(folder):
    def change(config, tensors):
        tensors["mask_net.conv_in.bias"][1] = float("nan")

    reseal(folder, change)
    with pytest.raises(PackedModelError, match="conv_in.bias holds NaN"):
        QuantizedSeparator.from_pretrained(folder)


@pytest.fixture
def older(tmp_path):
    """Copies folders of an older format, with the YAML they need."""

    def copied(version):
        folder = tmp_path / f"format {version}"
        shutil.copytree(GOLDEN / str(version), folder)
        return Path(shutil.copy(GOLDEN / "3/hyperparams.yaml", folder)).parent

    return copied


def test_older_folders_are_repacked_not_guessed(older, tmp_path):
    folder = older(1)
    with pytest.raises(PackedModelError, match="format 1 .*repack"):
        QuantizedSeparator.from_pretrained(folder)
    assert "format 1 does not say what to build" in check_folder(folder)[0]
    new = repack(folder, tmp_path / "new", base_model="some/base")
    assert check_folder(new) == []
    assert "base_model: some/base" in (new / "README.md").read_text()
    state = QuantizedSeparator.from_pretrained(new).separator.state_dict()
    old = load_packed_(MAKER["toy"](), folder).state_dict()
    assert all(torch.equal(state[name], old[name]) for name in old)


def test_repacking_in_place_keeps_integers_and_card(older):
    folder = older(2)
    (folder / "README.md").write_text("By hand.")
    assert repack(folder, folder) == folder
    for name in ("model.safetensors", "quantization_config.json"):
        content = (folder / name).read_bytes()
        assert content == (GOLDEN / "3" / name).read_bytes()
    assert (folder / "README.md").read_text() == "By hand."


def test_entropy_codebooks_stay_coded(tmp_path):
    features = SpatialFeatures([(8, 1)], n_fft=16, hop=8)
    original = Separator(features, 4, 6, 3, 1, 2).eval()
    quantize_(original, 3, codebook="entropy")
    folder = save_separator(original, tmp_path / "old")
    new = repack(folder, tmp_path / "new")
    assert check_folder(new) == []
    before, after = (
        QuantizedSeparator.from_pretrained(one).separator.state_dict()
        for one in (folder, new)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    sizes = {
        (one / "model.safetensors").stat().st_size for one in (folder, new)
    }
    assert max(sizes) - min(sizes) < 100  # of the header's text


def test_unfolded_norms_stay(tmp_path):
    features = SpatialFeatures([(8, 1)], n_fft=16, hop=8)
    original = Separator(features, 4, 6, 3, 1, 2).eval()
    original.mask_net.tcn_0_0.norm_in.running_mean.fill_(3)
    save_separator(original, tmp_path)
    model = QuantizedSeparator.from_pretrained(tmp_path)
    norm = model.separator.mask_net.tcn_0_0.norm_in
    assert isinstance(norm, torch.nn.BatchNorm1d)
    assert norm.running_mean.tolist() == [3.0] * 6
    old = save_packed(original, tmp_path / "old").parent
    shutil.copy(tmp_path / "hyperparams.yaml", old)
    assert check_folder(repack(old, tmp_path / "new")) == []


def test_saved_again_bit_by_bit(folder, tmp_path):
    (folder / "sample.flac").write_bytes(b"fLaC")
    for model in (
        QuantizedSeparator.from_pretrained(folder),
        QuantizedSeparator.from_hparams(source=str(folder)),
    ):
        saved = model.save_pretrained(tmp_path / "saved")
        names = sorted(path.name for path in folder.iterdir())
        assert sorted(path.name for path in saved.iterdir()) == names
        for name in names:
            content = (saved / name).read_bytes()
            assert content == published(folder / name), name
        shutil.rmtree(saved)


def test_what_is_missing_is_written_anew(folder, tmp_path):
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    model = QuantizedSeparator.from_pretrained(folder)
    assert check_folder(model.save_pretrained(tmp_path / "saved")) == []


@pytest.mark.parametrize(
    "hop", ['!apply:os.system ["true"]', "1\n__x: !apply:os.abort []"]
)
def test_a_strangers_strings_become_no_yaml(folder, tmp_path, hop):
    def forge(config, tensors):
        features = config["architecture"]["arguments"]["features"]
        features["arguments"]["hop"] = hop

    reseal(folder, forge)
    with pytest.raises(ValueError, match="hop must be an integer"):
        copy_folder(read_model(folder), tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


@pytest.mark.parametrize(
    "architecture",
    [
        {"class": "Separator", "arguments": {"features": {"arguments": [1]}}},
        {"arguments": {"features": {"arguments": [1]}, "folded": True}},
        [],
    ],
)
def test_a_strange_architecture_is_told_not_raised(folder, architecture):
    reseal(folder, lambda config, _: config.update(architecture=architecture))
    problems = check_folder(folder)
    assert any("pack the model again" in problem for problem in problems)


def test_changed_weights_are_not_passed_off(folder, tmp_path):
    model = QuantizedSeparator.from_pretrained(folder)
    model.separator.mask_net.conv_in.weight[0, 0] += 1
    with pytest.raises(ValueError, match="no longer those of.*save_separator"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_engine_takes_the_networks_place(folder, monkeypatch, expected):
    asked = []

    def load_network(path, engine, threads, separator):
        asked.append((path, engine, threads))
        network = load_packed_(MAKER["toy"](), path).mask_net
        return lambda inputs: network(inputs).detach()

    monkeypatch.setattr(interfaces, "load_network", load_network)
    model = QuantizedSeparator.from_pretrained(folder, "onnx", threads=2)
    assert asked == [(folder, "onnx", 2)]
    assert not list(model.separator.mask_net.parameters())
    mixture, estimate = expected
    given = model.separate_batch(mixture, [60.0])
    # Its features are fused where Numba is there: the same up to rounding
    assert torch.allclose(given, estimate, atol=1e-6)
    assert check_folder(model.save_pretrained(folder.parent / "saved")) == []
    with pytest.raises(ValueError, match="runs on the CPU"):
        QuantizedSeparator.from_pretrained(folder, "onnx", device="cuda")


def test_an_unknown_engine_is_refused(folder):
    with pytest.raises(ValueError, match="engine must be one of"):
        QuantizedSeparator.from_pretrained(folder, engine="tensorrt")


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_the_file_is_the_plan_and_one_percent(tmp_path, name):
    """At 2 bits, where the header weighs most."""
    separator = build_separator(f"hparams/models/separator_{name}.yaml").eval()
    fold_norms_(separator)
    plan = quantize_(separator, 2, exclude=["mask_net.conv_*.bias"])
    folder = save_separator(separator, tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    assert plan.bytes < size < 1.01 * plan.bytes
    # Depthwise filters and single slopes are stored without gaps.
    tensors = read_container(folder / "model.safetensors").tensors
    bits = 2 * sum(c.parameters for c in plan.clusters.values())
    assert len(tensors["packed"]) < bits / 8 + len(plan.tensors)
