"""A hybrid recognizer's network in stock ONNX Runtime."""

import numpy as np
import pytest
import torch

from speechbrain_mpq import HybridASR
from speechbrain_mpq.__main__ import main
from speechbrain_mpq.decoders.ngram import estimate_arpa
from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.inference.speech_recognition import save_recognizer
from speechbrain_mpq.lobes.models.tdnnf import TDNNF
from speechbrain_mpq.quantization.quant_api import quantize_

onnxruntime = pytest.importorskip("onnxruntime", reason="extra onnx is missing")
pytest.importorskip("onnx", reason="the extra onnx is not installed")
LEXICON = Lexicon({"tea": [["t", "iy"]], "eat": [["iy", "t"]]})


def network(**options):
    """A TDNN-F whose norms and outputs have learned something."""
    torch.manual_seed(0)
    settings = {"strides": [1, 0, 3], "prefinal": 8, **options}
    bottlenecks = [4] * len(settings["strides"])
    model = TDNNF(40, 6, 16, bottlenecks, xent=False, **settings)
    torch.nn.init.normal_(model.chain.output.weight)
    if model.decorrelate is not None:  # no symmetric matrix any more
        model.decorrelate.weight.data.add_(
            0.05 * torch.randn_like(model.decorrelate.weight)
        )
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 60, 40))
    return model.eval()


def saved(model, folder):
    estimate_arpa(folder / "any.arpa", ["tea eat", "eat"])
    return save_recognizer(model, folder / "asr", LEXICON, folder / "any.arpa")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decorrelate": False, "context": 2, "bypass": 0.0},
        {"strides": [1, 1, 0], "subsampling": 2},
        {"strides": [3, 3]},
    ],
)
def test_floats_are_those_of_pytorch(options, tmp_path):
    from speechbrain_mpq.inference.onnx_recognizer import recognizer_model

    model = network(**options)
    made, report = recognizer_model(model)
    assert report["decibels"] > 100 and report["weights"] == {}
    session = onnxruntime.InferenceSession(made.SerializeToString())
    for frames in (1, 2, 3, 47):
        features = torch.randn(1, frames, 40)
        (given,) = session.run(None, {"features": features.numpy()})
        with torch.no_grad():
            expected = model(features).log_softmax(2)
        assert given == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_stored_integers_are_multiplied(granularity, tmp_path):
    from onnx import numpy_helper

    from speechbrain_mpq.inference.onnx_recognizer import recognizer_model

    model = network()
    quantize_(model, 4, granularity=granularity, exclude=["*.bias"])
    folder = saved(model, tmp_path)
    made, report = recognizer_model(
        HybridASR.from_pretrained(folder).model, folder
    )
    # decorrelate, first, three layers of two, prefinal and three of the head
    assert report["weights"] == {"integer": 12}
    assert report["decibels"] > 15
    levels = [
        numpy_helper.to_array(item)
        for item in made.graph.initializer
        if item.name.endswith(".levels")
    ]
    assert len(levels) == 12
    assert all(np.abs(table).max() <= 7 for table in levels)


def test_recognizers_take_the_engine(tmp_path, capsys):
    model = network()
    quantize_(model, 8)
    folder = saved(model, tmp_path)
    torch_one = HybridASR.from_pretrained(folder)
    onnx_one = HybridASR.from_pretrained(folder, engine="onnx")
    wavs, wav_lens = torch.randn(2, 8000), torch.tensor([1.0, 0.6])
    pairs = zip(
        torch_one.outputs(wavs, wav_lens), onnx_one.outputs(wavs, wav_lens)
    )
    for expected, given in pairs:
        assert given.shape == expected.shape
        assert given == pytest.approx(expected, abs=0.3)
    with pytest.raises(ValueError, match="engine 'openvino' is none of"):
        HybridASR.from_pretrained(folder, engine="openvino")
    path = tmp_path / "asr.onnx"
    arguments = ["export", str(folder), "--engine", "onnx", "-o", str(path)]
    assert main(arguments) == 0
    assert "12 weights are multiplied as integers" in capsys.readouterr().out
    assert (
        onnxruntime.InferenceSession(str(path)).get_inputs()[0].shape[2] == 40
    )
    assert main(["export", str(folder), "-o", str(path)]) == 1
    assert "choose --engine onnx" in capsys.readouterr().err
