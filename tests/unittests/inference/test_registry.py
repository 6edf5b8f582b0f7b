"""What files may ask for: our classes, with plain arguments in range."""

import copy

import pytest
import torch

from speechbrain_mpq.inference.folder import hyperparams
from speechbrain_mpq.inference.registry import build, describe
from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import equalize_inputs_, fold_norms_
from speechbrain_mpq.quantization.quant_api import quantize_

SPACINGS = [4.0, 3.5]
VISUAL = {"front_end": "light", "height": 8, "width": 8, "channels": 4}


def separator(folded=True, equalized=False, **arguments):
    """A small separator."""
    features = SpatialFeatures([(3, 1)], "ipd", 16, 8, SPACINGS)
    made = Separator(features, 4, 6, 3, 2, 1, **arguments).eval()
    if folded:
        fold_norms_(made)
    if equalized:
        equalize_inputs_(made)
    return made


def shapes(module):
    """Names and shapes of all that is stored."""
    return {n: tuple(t.shape) for n, t in module.state_dict().items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"folded": False},
        {"equalized": True},
        {"scale_inputs": True},
        {"visual": {**VISUAL, "hidden": 6, "blocks": 1, "after": 2}},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_what_is_described_is_built(tmp_path, arguments):
    original = separator(**arguments)
    architecture = describe(original)
    built = build(architecture)
    assert shapes(built) == shapes(original)
    assert not built.training
    for name, constant in original.features.named_buffers():
        assert torch.equal(built.features.get_buffer(name), constant), name
    assert built.features.microphones == [1, 3]
    # The same from YAML, as SpeechBrain builds it.
    path = tmp_path / "hyperparams.yaml"
    path.write_text(hyperparams(architecture))
    again = build_separator(path)
    assert describe(again) == architecture


def test_quantizing_changes_no_description():
    model = separator()
    architecture = describe(model)
    quantize_(model, 4, rows=2)
    assert describe(model) == architecture


@pytest.mark.parametrize("name", ["mini", "paper", "av_mini"])
def test_the_shipped_models_can_be_described(name):
    model = build_separator(f"hparams/models/separator_{name}.yaml")
    assert shapes(build(describe(model))) == shapes(model)


def test_no_memory_is_reserved_for_weights():
    architecture = describe(separator())
    architecture["arguments"] |= {"channels": 16384, "hidden": 16384}
    architecture["arguments"]["layers"] = 16
    built = build(architecture)  # 34 GB of weights, if they were there
    assert all(p.device.type == "meta" for p in built.parameters())


def changed(place, value):
    """A description with one entry changed; "" stands for the whole."""
    architecture = copy.deepcopy(describe(separator()))
    if not place:
        return value
    *parents, leaf = place.split(".")
    node = architecture
    for parent in parents:
        node = node[parent]
    if value is KeyError:
        del node[leaf]
    else:
        node[leaf] = value
    return architecture


FEATURES = "arguments.features"


@pytest.mark.parametrize(
    "place, value, match",
    [
        ("", [], "architecture must be an object"),
        ("", None, "architecture must be an object"),
        ("class", "os.system", "must be of class 'Separator'"),
        ("class", ["Separator"], "must be of class 'Separator'"),
        ("class", KeyError, "lacks 'class'"),
        ("more", 1, "has no 'more'"),
        ("arguments", [], "must be an object"),
        ("arguments.__class__", "x", "has no '__class__'"),
        ("arguments.channels", KeyError, "lacks 'channels'"),
        ("arguments.channels", 0, "integer from 1 to 16384, not 0"),
        ("arguments.channels", 2**40, "integer from 1 to 16384"),
        ("arguments.channels", "4", "integer from 1 to 16384, not '4'"),
        ("arguments.channels", 4.0, "integer from 1 to 16384, not 4.0"),
        ("arguments.channels", True, "integer from 1 to 16384, not True"),
        ("arguments.kernel_size", 4, "must be one of"),
        ("arguments.layers", 17, "integer from 1 to 16"),
        ("arguments.blocks", 65, "integer from 1 to 64"),
        ("arguments.folded", 1, r"must be one of \(True, False\), not 1"),
        ("arguments.folded", "!new:os.system", "must be one of"),
        ("arguments.visual", {"front_end": "x"}, "must be one of"),
        ("arguments.visual", {"module": "os"}, "has no 'module'"),
        ("arguments.visual", {"after": 3}, "cannot|fusion after"),
        (FEATURES, 3, "must be an object"),
        (f"{FEATURES}.class", "Separator", "of class 'SpatialFeatures'"),
        (f"{FEATURES}.arguments.pairs", [], "list of 1 to 256"),
        (f"{FEATURES}.arguments.pairs", [[1]], "list of 2 to 2"),
        (f"{FEATURES}.arguments.pairs", [[1, 9]], "the array has 3"),
        (f"{FEATURES}.arguments.pairs", [[0, 1]], "from 1 to 1024"),
        (f"{FEATURES}.arguments.phase", "x", "must be one of"),
        (f"{FEATURES}.arguments.n_fft", 2**30, "from 16 to 16384"),
        (f"{FEATURES}.arguments.hop", 17, "gaps between their windows"),
        (f"{FEATURES}.arguments.spacings_cm", [1e999], "must be a number"),
        (f"{FEATURES}.arguments.spacings_cm", ["a"], "must be a number"),
        (f"{FEATURES}.arguments.spacings_cm", "x" * 999, r"x\.\.\."),
    ],
)
def test_anything_else_is_refused(place, value, match):
    with pytest.raises(ValueError, match=match):
        build(changed(place, value))


def test_depth_is_limited_as_a_whole():
    architecture = changed("arguments.blocks", 64)
    architecture["arguments"]["layers"] = 16
    with pytest.raises(ValueError, match="more than 256 ConvBlocks"):
        build(architecture)


def test_a_subclass_is_not_taken_for_its_parent():
    class Mine(Separator):
        pass

    features = SpatialFeatures([(3, 1)])
    with pytest.raises(ValueError, match="files cannot name a Mine, only"):
        describe(Mine(features, 4, 6, blocks=1, layers=1))


def test_a_changed_module_is_not_described_wrongly():
    model = separator()
    model.mask_net.conv_out = torch.nn.Conv1d(4, 7, 1)
    with pytest.raises(ValueError, match="was changed after it was built"):
        describe(model)
