"""The separation Brain, what its stages depend on, and what train.py shows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch

from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.experiments import talker_separation as stages
from speechbrain_mpq.lobes.models.separator import build_separator

ROOT = Path(__file__).parents[3]
SAMPLES = 4000


@pytest.fixture
def brain():
    """A Brain with a tiny new separator."""
    torch.manual_seed(0)
    separator = build_separator(ROOT / "tests/data/separator_tiny.yaml").eval()
    hparams = {"distillation": 0.25, "bits": 32}
    return stages.Separation({"separator": separator}, None, hparams, {})


def make_mixtures(count):
    """Mixtures as a training set has them, two talkers each."""
    torch.manual_seed(1)
    return [
        {
            "mixture": torch.randn(SAMPLES, 2),
            "targets": torch.randn(SAMPLES, 2),
            "doa": torch.tensor([40.0, 120.0]),
        }
        for _ in range(count)
    ]


def make_batch(items):
    """The same as a SpeechBrain batch."""
    return SimpleNamespace(
        **{
            key: SimpleNamespace(data=torch.stack([i[key] for i in items]))
            for key in ("mixture", "targets", "doa")
        }
    )


def test_train_py_is_short_and_names_the_stages():
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    for stage in ("starting_separator", "load_data", "estimate", "pack"):
        assert f"stages.{stage}(" in text


def test_loss_is_si_snr_and_distillation_takes_its_share(brain):
    batch = make_batch(make_mixtures(2))
    with torch.no_grad():
        estimates = brain.compute_forward(batch, sb.Stage.TRAIN)
    assert estimates.shape == (2, 2, SAMPLES)  # [B, targets, samples]
    plain = -si_snr(estimates, batch.targets.data.transpose(1, 2)).mean()
    loss = brain.compute_objectives(estimates, batch, sb.Stage.TRAIN)
    assert loss == plain  # nobody to be distilled from
    brain.teacher = lambda *inputs: estimates.roll(1, 0)
    taught = si_snr(estimates, estimates.roll(1, 0)).mean()
    loss = brain.compute_objectives(estimates, batch, sb.Stage.TRAIN)
    torch.testing.assert_close(loss, 0.75 * plain - 0.25 * taught)
    loss = brain.compute_objectives(estimates, batch, sb.Stage.VALID)
    assert loss == plain


def test_calibration_loss_is_that_of_the_whole_separator(brain):
    items = make_mixtures(3)
    calibration = brain.calibration(items, 2)
    separator = brain.modules.separator
    inputs, weights = calibration["inputs"], calibration["weights"]
    assert len(inputs) == len(weights) == 2 and (weights >= 0).all()
    with torch.no_grad():
        output = separator.mask_net(inputs)
        loss = calibration["loss"](output[1:], slice(1, 2))
        batch = make_batch(items[1:2])
        estimates = separator(batch.mixture.data, batch.doa.data)
    target = items[1]["targets"][:, 0]
    # The separator matches its level to the mixture's; SI-SNR has no level
    assert loss.item() == pytest.approx(
        -si_snr(estimates[0, 0], target).item(), abs=1e-3
    )


def test_results_depend_on_architecture_and_weights():
    hparams = {"separator_file": "a.yaml", "pretrained_separator": "start"}
    files = stages.input_files(hparams, {4: "uniform/packed"})
    assert list(map(str, files)) == [
        *("a.yaml", "start/model.safetensors"),
        "uniform/packed/model.safetensors",
    ]
