"""Other arrays, by the commands of docs/arrays.md at tiny size."""

import json
import re

import numpy as np
import pytest
import soundfile
from helpers import ROOT, run

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.verification import check_folder

SMALL = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


def small_file(name, folder):
    """A model's file with the sizes of a tiny one."""
    text = (ROOT / f"hparams/models/{name}.yaml").read_text()
    for key, value in SMALL.items():
        text = re.sub(rf"^{key}: \d+", f"{key}: {value}", text, flags=re.M)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name, microphones, most",
    [("separator_linear4", 4, 180), ("separator_circular6", 6, 360)],
)
def test_an_array_is_trained_quantized_and_used(
    name, microphones, most, speech, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("pesq")
    speech(tmp_path / "data")
    options = {"separator_file": small_file(name, tmp_path)}
    run(tmp_path, "pretrain.yaml", **options, number_of_epochs=1)
    full = tmp_path / "results/pretrain_32bit/1234/packed"
    options |= {"pretrained_separator": full, "against": "[]"}
    run(tmp_path, "uniform_4bit.yaml", **options, number_of_epochs=0)
    packed = tmp_path / "results/uniform_4bit/1234/packed"
    assert check_folder(packed) == []
    settings = json.loads((tmp_path / "data/rooms/settings.json").read_text())
    assert len(settings["positions_cm"]) == microphones
    sample, rate = soundfile.read(packed / "sample.flac")
    assert sample.shape[1] == microphones

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(packed)]) == 0
    assert f"{microphones} microphones" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((16000, microphones))
    soundfile.write("mix.wav", noise, rate)
    command = ["separate", "mix.wav", "--model", str(packed), "--doa"]
    assert main([*command, str(most)]) == 0
    assert main([*command, str(most + 1)]) == 1
    assert f"DOA must lie in 0 to {most} degrees" in capsys.readouterr().err
    found = ["locate", str(packed / "sample.flac"), "--model", str(packed)]
    assert main([*found, "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["curve"]
    assert len(curve) == {180: 181, 360: 360}[most]
