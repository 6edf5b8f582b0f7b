"""The shipped noise suppressor: whole, small, and less noise comes out."""

import numpy as np
import pytest
import torch

from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.inference.enhancement import SpeechEnhancer
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.simulation.noise import coloured, mix_at_snr
from speechbrain_mpq.utils import BUNDLED_ENHANCER


@pytest.fixture(scope="module")
def enhancer():
    """As it is loaded where no folder is named."""
    return SpeechEnhancer.from_pretrained()


@pytest.fixture(scope="module")
def noisy_and_clean():
    """Utterances of a voice that training has not heard, 5 dB over noise."""
    pytest.importorskip("espeakng_loader")
    from speechbrain_mpq.simulation.corpus import utterance

    pairs = []
    for index in range(3):
        samples, _ = utterance("test", index)
        rng = np.random.default_rng(index)
        noise = coloured(rng, len(samples), exponent=1)
        pair = mix_at_snr(samples / 2**15, noise, snr=5)
        pairs.append([torch.from_numpy(w).float() for w in pair])
    return pairs


def test_folder_is_whole_and_small():
    assert check_folder(BUNDLED_ENHANCER) == []
    size = (BUNDLED_ENHANCER / "model.safetensors").stat().st_size
    assert size < 0.72 * 2**20


def test_every_exit_takes_noise_away(enhancer, noisy_and_clean):
    gains = {exit: [] for exit in enhancer.exits}
    for noisy, clean in noisy_and_clean:
        for exit in enhancer.exits:
            found = enhancer.enhance_batch(noisy[None], exit=exit)[0]
            gain = si_snr(found, clean) - si_snr(noisy, clean)
            gains[exit].append(gain.item())
    means = [np.mean(gains[exit]) for exit in enhancer.exits]
    assert means[0] > 0.5 and means[1] > 1.5 and means[-1] > 2
    assert means[0] < means[1] < means[-1]


def test_exits_chosen_frame_by_frame(enhancer, noisy_and_clean):
    stream = enhancer.stream("auto", macs=1e6)
    for noisy, _ in noisy_and_clean:
        stream.feed(noisy)
        stream.flush()
        assert len(set(stream.exits)) > 1
        assert enhancer.model.macs(1) < stream.mean_macs() < 1.3e6
