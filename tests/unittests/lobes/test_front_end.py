"""The separator as a front end: levels, padding, what trains, what loads."""

import doctest
import importlib.util
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.inference.loading import load_separator
from speechbrain_mpq.lobes.models.separator import (
    SeparatorFrontEnd,
    build_separator,
)
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.quant_api import quantize_

TINY = Path(__file__).parents[2] / "data/separator_tiny.yaml"


DOA = torch.tensor([30.0, 120.0, 75.0])


@pytest.fixture
def separator():
    torch.manual_seed(0)
    separator = build_separator(TINY).eval()
    fold_norms_(separator)
    return separator


@pytest.fixture
def waveforms():
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(3, 4000, 2, generator=generator)


def test_it_is_the_separator(separator, waveforms):
    speech = SeparatorFrontEnd(separator)(waveforms, DOA)
    assert torch.equal(speech, separator(waveforms, DOA))
    # An output of the level of its input: twice as loud gives twice as much
    louder = SeparatorFrontEnd(separator)(2 * waveforms, DOA)
    torch.testing.assert_close(louder, 2 * speech, rtol=1e-4, atol=1e-6)


def test_padding_and_neighbours_change_nothing(separator, waveforms):
    """Each item of a padded batch comes out as if it were alone."""
    front_end = SeparatorFrontEnd(separator)
    lengths = torch.tensor([0.5, 1.0, 0.5])
    padded = waveforms.clone()
    padded[0, 2000:] = padded[2, 2000:] = 0
    speech = front_end(padded, DOA, lengths)
    for index, samples in enumerate((2000, 4000, 2000)):
        one = slice(index, index + 1)
        alone = front_end(waveforms[one, :samples], DOA[one])
        torch.testing.assert_close(speech[one, :samples], alone)
        assert not speech[index, samples:].any()
    # What the padding holds does not matter either
    assert torch.equal(front_end(waveforms, DOA, lengths), speech)


def test_one_level_for_all_where_asked(separator, waveforms):
    front_end = SeparatorFrontEnd(separator, rms=0.05)
    waveforms = waveforms * torch.tensor([0.01, 1.0, 5.0])[:, None, None]
    lengths = torch.tensor([1.0, 0.5, 1.0])
    speech = front_end(waveforms, DOA, lengths)
    levels = [
        s[:n].square().mean().sqrt() for s, n in zip(speech, (4000, 2000))
    ]
    assert levels == pytest.approx([0.05, 0.05], rel=1e-4)
    silent = front_end(torch.zeros(1, 4000, 2), DOA[:1])
    assert not silent.any()


def test_frozen_does_not_train_and_trainable_does(separator, waveforms):
    frozen = SeparatorFrontEnd(separator).train()
    assert not frozen.separator.training and frozen.training
    assert not frozen(waveforms, DOA).requires_grad
    trainable = SeparatorFrontEnd(build_separator(TINY), frozen=False).train()
    assert trainable.separator.training
    speech = trainable(waveforms, DOA, torch.tensor([1.0, 0.5, 1.0]))
    speech.square().sum().backward()
    gradients = [p.grad for p in trainable.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_yaml_builds_and_loads_it(separator, waveforms, tmp_path):
    quantize_(separator, 3)
    save_packed(separator, tmp_path)
    shape = TINY.read_text()
    (tmp_path / "hyperparams.yaml").write_text(shape)
    text = f"""
front_end: !new:speechbrain_mpq.SeparatorFrontEnd
    separator: !apply:speechbrain_mpq.load_separator [{tmp_path}]
new_one: !new:speechbrain_mpq.SeparatorFrontEnd
    separator: {TINY}
    frozen: False
"""
    hparams = load_hyperpyyaml(text)
    loaded, new_one = hparams["front_end"], hparams["new_one"]
    assert torch.equal(loaded(waveforms, DOA), separator(waveforms, DOA))
    assert loaded.microphones == new_one.microphones == [1, 8]
    assert all(p.requires_grad for p in new_one.parameters())


def test_wrong_input_is_named(separator, waveforms, tmp_path):
    front_end = SeparatorFrontEnd(separator)
    with pytest.raises(ValueError, match="one direction for each of 3"):
        front_end(waveforms, DOA[:2])
    with pytest.raises(ValueError, match=r"microphones \[1, 8\]"):
        front_end(waveforms[..., :1], DOA)
    with pytest.raises(TypeError, match="needs a Separator, not a Linear"):
        SeparatorFrontEnd(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="rms must be above 0"):
        SeparatorFrontEnd(separator, rms=0)
    with pytest.raises(FileNotFoundError, match="name a packed folder"):
        load_separator(tmp_path)


def test_benchmark_names_the_commands_and_prints_a_table():
    path = Path(__file__).parents[3] / "benchmarks/front_end.py"
    spec = importlib.util.spec_from_file_location("front_end_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    done = doctest.testmod(script, optionflags=flags)
    assert done.attempted and not done.failed
    for kind in script.FILES:  # every command names files that are there
        for system in script.SYSTEMS:
            _, train, hparams, *_ = script.command(system, kind, 1)
            assert (script.ROOT / train).exists()
            assert (script.ROOT / hparams).exists()
