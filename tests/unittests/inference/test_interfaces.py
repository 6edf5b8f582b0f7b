"""Batches and files through the interface: the same talkers, bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn

from speechbrain_mpq.inference.interfaces import (
    SeparationInterface,
    doa_from_face,
)
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import ConvBlock

USED = [0, 3, 5, 7, 9, 11, 14]


class Loaded(SeparationInterface):
    """What loading a folder gives."""

    device = "cpu"

    def __init__(self, **options):
        torch.manual_seed(0)
        self.separator = Separator(
            SpatialFeatures(), 8, 16, 3, 2, 3, **options
        ).eval()
        for module in self.separator.modules():
            if isinstance(module, ConvBlock):
                nn.init.normal_(module.d_conv.weight)
                nn.init.normal_(module.conv_1x1_out.weight)


@pytest.fixture(scope="module")
def model():
    return Loaded()


@pytest.fixture(scope="module")
def mixture():
    return 0.1 * torch.randn(24001, 15, generator=torch.Generator())


@pytest.fixture
def path(tmp_path, mixture):
    path = tmp_path / "mix.wav"
    soundfile.write(path, mixture, 16000, "FLOAT")
    return path


def test_batch(model, mixture):
    waveforms = torch.stack([mixture[:9000], mixture[9000:18000]])
    centred = waveforms - waveforms.double().mean(1, keepdim=True).float()
    with torch.no_grad():
        expected = model.separator(
            centred[..., USED],
            torch.tensor([[60.0, 90.0], [10.0, 0.0]]),
        )
    found = model.separate_batch(waveforms, [[60, 90], [10, 0]])
    assert torch.equal(found, expected)
    used = model.separate_batch(waveforms[..., USED], torch.tensor([60, 10]))
    assert used.shape == (2, 1, 9000)
    assert torch.allclose(used, expected[:, :1], atol=1e-6)
    with pytest.raises(ValueError, match="14 channels; .* all 15"):
        model.separate_batch(waveforms[..., 1:], [60, 10])
    with pytest.raises(ValueError, match="lip"):
        model.separate_batch(waveforms, [60, 10], torch.zeros(2, 14, 8, 8))


@pytest.mark.parametrize("seconds", [0.1, 0.5, 60.0])
def test_file_is_batch_whatever_the_chunks(model, path, mixture, seconds):
    expected = model.separate_batch(mixture[None], [[60.0, 120.0]])[0]
    found = model.separate_file(path, [60, 120], chunk_seconds=seconds)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    single = model.separate_file(str(path), 120.0, chunk_seconds=seconds)
    assert torch.allclose(single, expected[1], rtol=1e-4, atol=1e-6)


def test_files_out(model, path, tmp_path):
    expected = model.separate_file(path, [60.0, 112.5]).numpy()
    out = tmp_path / "out.flac"
    written = model.separate_file(path, [60.0, 112.5], out)
    assert [p.name for p in written] == ["out_60.flac", "out_112.5.flac"]
    for file, signal in zip(written, expected):
        found, rate = soundfile.read(file)
        assert rate == 16000 and np.allclose(found, signal, atol=2**-15)
    names = [tmp_path / "a.wav", tmp_path / "b.wav"]
    assert model.separate_file(path, [60.0, 112.5], names) == names
    loud, _ = soundfile.read(
        *model.separate_file(path, 60, out, level=-30, subtype="PCM_24")
    )
    assert np.sqrt(np.mean(loud**2)) == pytest.approx(10**-1.5, rel=1e-3)


def test_higher_rate(model, tmp_path):
    resample = pytest.importorskip("torchaudio.functional").resample
    fast = 0.1 * torch.randn(30000, 15)
    path = tmp_path / "fast.wav"
    soundfile.write(path, fast, 48000, "FLOAT")
    slow = resample(fast.T, 48000, 16000).T
    found = model.separate_file(path, 60.0, chunk_seconds=0.1)
    expected = model.separate_batch(slow[None], [60.0])[0, 0]
    # Offsets are taken off at either rate
    assert (found - expected).norm() < 3e-3 * expected.norm()


def test_silence_is_silent(model, tmp_path, caplog):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros((9000, 7)), 16000)
    found = model.separate_file(path, 60.0)
    assert found.shape == (9000,) and not found.any()
    assert "is silent" in caplog.text


def test_no_half_written_output(model, path, tmp_path, mixture):
    """An error in the middle leaves what was there, and nothing else."""
    out = tmp_path / "out.wav"
    out.write_text("before")
    broken = mixture.clone()
    broken[23000, 2] = float("inf")
    bad = tmp_path / "bad.wav"
    soundfile.write(bad, broken, 16000, "FLOAT")
    with pytest.raises(ValueError, match="bad.wav: channel 3"):
        model.separate_file(bad, 60.0, out)
    calls = []

    def fails(inputs):
        calls.append(inputs)
        raise RuntimeError("out of luck")

    failing = Loaded()
    failing.separator.mask_net.conv_out.register_forward_pre_hook(
        lambda module, inputs: fails(inputs)
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        failing.separate_file(path, [60.0, 90.0], out)
    assert calls and out.read_text() == "before"
    assert {p.name for p in tmp_path.iterdir()} == {
        *("mix.wav", "bad.wav", "out.wav")
    }


def test_offsets_of_the_microphones_change_nothing(model, mixture, tmp_path):
    expected = model.separate_batch(mixture[None], [60.0])[0, 0]
    offset = mixture + torch.linspace(-0.1, 0.3, 15)
    found = model.separate_batch(offset[None].numpy(), [60.0])[0, 0]
    assert (found - expected).norm() < 1e-3 * expected.norm()
    soundfile.write(tmp_path / "a.wav", offset, 16000, "FLOAT")
    found = model.separate_file(tmp_path / "a.wav", 60.0)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_what_is_not_finite_is_an_error(path, tmp_path, mixture, value):
    broken = Loaded()
    broken.separator.mask_net.conv_out.weight.data[:] = value
    for out in (None, tmp_path / "out.wav"):
        with pytest.raises(ValueError, match="puts out NaN or infinity at"):
            broken.separate_file(path, 60.0, out)
    with pytest.raises(ValueError, match="puts out NaN or infinity at"):
        broken.separate_batch(mixture[None], [60.0])
    assert [p.name for p in tmp_path.iterdir()] == ["mix.wav"]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_chunks_of_no_length(model, path, seconds):
    with pytest.raises(ValueError, match="chunk_seconds must be above 0"):
        model.separate_file(path, 60.0, chunk_seconds=seconds)


def test_a_name_as_long_as_names_may_be(model, path, tmp_path):
    out = tmp_path / ("a" * 251 + ".wav")
    assert model.separate_file(path, 60.0, out) == [out] and out.exists()


def test_input_is_not_overwritten(model, path):
    content = path.read_bytes()
    with pytest.raises(ValueError, match="is the input"):
        model.separate_file(path, 60.0, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("doa", [-1, 181, float("nan"), [60, 200]])
def test_bad_directions(model, path, doa):
    with pytest.raises(ValueError, match="DOA must lie in 0 to 180"):
        model.separate_file(path, doa)


@pytest.fixture(scope="module")
def watching():
    """A model that looks at lips."""
    visual = {"front_end": "light", "height": 8, "width": 8, "channels": 8}
    return Loaded(visual=visual)


def pictures(count, targets=None, seed=0):
    """So many pictures of 8 x 8, bytes."""
    shape = (count, 8, 8) if targets is None else (targets, count, 8, 8)
    return np.random.default_rng(seed).integers(1, 255, shape, dtype=np.uint8)


@pytest.mark.parametrize("seconds", [0.3, 60.0])
def test_lips_of_a_file(watching, path, mixture, seconds):
    lips = pictures(38, targets=2)
    batch = mixture[None], [[60.0, 120.0]]
    expected = watching.separate_batch(*batch, torch.from_numpy(lips)[None])[0]
    found = watching.separate_file(
        path, [60, 120], lips=lips, chunk_seconds=seconds
    )
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    for of_type in (np.float32, np.float64):
        same = watching.separate_file(
            path, [60, 120], lips=(lips / 255).astype(of_type)
        )
        assert torch.allclose(same, expected, rtol=1e-4, atol=1e-6)
        same = watching.separate_batch(*batch, (lips / 255)[None])[0]
        assert torch.allclose(same, expected, rtol=1e-4, atol=1e-6)
    short = watching.separate_file(path, 120.0, lips=lips[1, :36])
    held = np.concatenate([lips[1, :36], lips[1, [35, 35]]])
    assert torch.equal(short, watching.separate_file(path, 120.0, lips=held))


def test_lips_may_be_missing(watching, path, mixture, caplog):
    expected = watching.separate_batch(mixture[None], [60.0])[0, 0]
    found = watching.separate_file(path, 60.0)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert "goes by sound alone" in caplog.text


def test_wrong_lips(model, watching, path):
    for lips, said in [
        (pictures(70), "70 pictures for audio that needs 38"),
        (pictures(38)[:, :4], "pictures of 8 x 8"),
        (pictures(38, targets=2), r"expected lips \[1, 1, 'pictures', 8, 8\]"),
        (pictures(38) * 1j, "uint8"),
        (pictures(38) / 254 * np.nan, "NaN"),
    ]:
        with pytest.raises(ValueError, match=said):
            watching.separate_file(path, 60.0, lips=lips)
    with pytest.raises(ValueError, match="no lip stream"):
        model.separate_file(path, 60.0, lips=pictures(38))
    with pytest.raises(ValueError, match="a stream of sound lacks"):
        watching.stream(60)


def test_a_talker_who_moves(model, path, mixture, tmp_path):
    doa = torch.stack([torch.linspace(50, 70, 94), torch.linspace(9, 8, 94)])
    expected = model.separate_batch(mixture[None], doa[None])[0]
    found = model.separate_file(path, doa, chunk_seconds=0.4)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    one = model.separate_file(path, doa[:1].numpy(), chunk_seconds=0.4)
    assert torch.allclose(one[0], expected[0], rtol=1e-4, atol=1e-6)
    written = model.separate_file(path, doa, tmp_path / "out.wav")
    assert [p.name for p in written] == ["out_59.9.wav", "out_8.5.wav"]
    many = [doa[0], doa[1].numpy()]
    assert torch.equal(
        model.separate_file(path, many, chunk_seconds=0.4), found
    )
    back = doa.numpy()[:, ::-1]
    model.separate_file(path, back)


@pytest.mark.parametrize(
    "doa, said",
    [
        (np.full((1, 90), 60.0), "94 frames needs as many .* got 90"),
        (np.full(94, 60.0), r"give \[1, 94\] for one who moves"),
        (np.full((1, 1, 94), 60.0), r"got \[1, 1, 94\]"),
        (np.zeros((1, 0)), r"got \[1, 0\]"),
        ([], "doa must be degrees"),
        ([[60.0, 61.0], [60.0]], "doa must be degrees"),
        ([60.0, [61.0]], "doa must be degrees"),
        (None, "doa must be degrees|DOA must lie"),
        ("left", "doa must be degrees"),
    ],
)
def test_directions_of_other_shapes(model, path, tmp_path, doa, said):
    with pytest.raises(ValueError, match=said):
        model.separate_file(path, doa, tmp_path / "out.wav")
    assert [p.name for p in tmp_path.iterdir()] == ["mix.wav"]


@pytest.mark.parametrize("x, doa", [(0, 0), (320, 90), (640, 180), (160, 45)])
def test_face(x, doa):
    assert doa_from_face(x, 640) == doa


@pytest.mark.parametrize("x, width", [(-1, 640), (641, 640), (1, 0)])
def test_face_outside(x, width):
    with pytest.raises(ValueError, match="is not in a picture"):
        doa_from_face(x, width)


MEMORY = """
import resource, sys
from tests.unittests.inference.test_interfaces import Loaded
model = Loaded()
peaks = []
for path in sys.argv[1:]:
    model.separate_file(path, 60.0, sys.argv[1] + ".out.wav")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Seven times as long a file; its 15 channels alone are 32 MiB."""
    pytest.importorskip("resource")
    paths = []
    for seconds in (5, 35):
        paths.append(str(tmp_path / f"{seconds}.wav"))
        noise = np.random.default_rng(0).standard_normal((seconds * 16000, 15))
        soundfile.write(paths[-1], 0.1 * noise, 16000)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths],
        capture_output=True,
        text=True,
    )
    short, long = map(int, done.stdout.split())
    assert long - short < 30, f"{short} MiB, then {long} MiB {done.stderr}"
