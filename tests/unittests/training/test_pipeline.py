"""Inheriting clusters from uniform prototypes."""

import pytest
import torch
from helpers import brain_of, hparams_of, script
from speechbrain.utils.train_logger import (
    FileTrainLogger,
    TrainLogger,
    WandBLogger,
)

from speechbrain_mpq import choose_bits
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.training.pipeline import (
    inherit_,
    load_prototype,
    log_stats,
    plan_stats,
)


def network(channels=4):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv1d(3, channels, 1, bias=False),
        torch.nn.PReLU(),
        torch.nn.Conv1d(channels, 2, 1),
    )


@pytest.fixture
def prototypes(tmp_path):
    """Packed 2- and 8-bit systems whose biases differ."""
    folders = {}
    for bits in (2, 8):
        model = network()
        quantize_(model, bits, exclude=["*.bias"])
        model[2].bias.data.fill_(bits)
        folders[bits] = tmp_path / str(bits)
        save_packed(model, folders[bits])
    return {bits: load_prototype(path) for bits, path in folders.items()}


def plan(**bits):
    sizes = {"0": 12, "1": 1, "2": 8}
    return BitPlan(
        {
            name: ClusterBits(bits[f"c{name}"], size, (f"{name}.weight",))
            for name, size in sizes.items()
        },
        rest_parameters=2,
    )


def test_each_cluster_comes_from_the_prototype_of_its_bits(prototypes):
    model = network()
    inherit_(model, plan(c0=2, c1=8, c2=8), prototypes)
    assert torch.equal(model[0].weight, prototypes[2]["0.weight"])
    assert torch.equal(model[1].weight, prototypes[8]["1.weight"])
    assert torch.equal(model[2].weight, prototypes[8]["2.weight"])
    assert len(model[0].weight.unique()) <= 3


def test_the_rest_comes_from_where_most_parameters_do(prototypes):
    model = network()
    inherit_(model, plan(c0=2, c1=8, c2=8), prototypes)
    assert torch.equal(model[2].bias, torch.full((2,), 2.0))
    inherit_(model, plan(c0=8, c1=8, c2=2), prototypes)
    assert torch.equal(model[2].bias, torch.full((2,), 8.0))


def test_inherited_weights_quantize_to_the_prototype_itself(prototypes):
    model = network()
    inherit_(model, plan(c0=2, c1=2, c2=2), prototypes)
    quantize_(model, 2, exclude=["*.bias"])
    for index in (0, 2):
        expected = prototypes[2][f"{index}.weight"]
        torch.testing.assert_close(model[index].weight, expected)


def test_missing_prototypes_are_named(prototypes, tmp_path):
    with pytest.raises(ValueError, match=r"uses \[4\] bits"):
        inherit_(network(), plan(c0=2, c1=4, c2=8), prototypes)
    with pytest.raises(FileNotFoundError, match="uniform_4bit.yaml --bits"):
        load_prototype(tmp_path / "nowhere")


def test_another_architecture_is_refused_before_anything_changes(prototypes):
    model = network(channels=5)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="another architecture: 0.weight"):
        inherit_(model, plan(c0=2, c1=2, c2=2), prototypes)
    assert torch.equal(model[0].weight, before)


class Notes(TrainLogger):
    """Keeps what it is given."""

    def __init__(self):
        self.notes = []

    def log_stats(self, stats_meta, test_stats=None, **other):
        """Keep it."""
        self.notes.append((stats_meta, test_stats))


class FakeRun:
    """Stands for a run of Weights & Biases, which has `log` as well."""

    def __init__(self):
        self.logged = []

    def log(self, values, step=None):
        """Keep it."""
        self.logged.append((values, step))


def chosen(folder, scores):
    """The plan of the tiny recipe, and its loggers."""
    hparams = hparams_of("plain", folder, epochs=1)
    notes, run = Notes(), FakeRun()
    hparams["other_logger"] = notes
    hparams["wandb_logger"] = WandBLogger(lambda: run)
    brain = brain_of(hparams)
    plan = choose_bits(
        brain,
        script().dataset(4, seed=1),
        scores,
        3.5,
        loader_kwargs={"batch_size": 4},
        progress=False,
    )
    text = (folder / "train_log.txt").read_text()
    return plan, notes.notes, run.logged, text


def test_all_loggers_of_a_recipe_are_told(tmp_path):
    plan, notes, logged, text = chosen(tmp_path, "kl")
    ((stats, none),) = notes
    assert none is None and logged == [(stats, None)]
    assert stats["bits"] == plan.average_bits and stats["bytes"] == plan.bytes
    scores = ScoreTable.load(tmp_path / "scores.json").scores
    expected = sum(scores[n][c.bits] for n, c in plan.clusters.items())
    assert stats["score"] == pytest.approx(expected) and expected > 0
    assert text.startswith(f"bits: {plan.average_bits:.2f}, bytes: ")


def test_uniform_bits_have_no_score(tmp_path):
    hparams = hparams_of("plain", tmp_path, epochs=1)
    brain = brain_of(hparams)
    plan = choose_bits(brain, None, "uniform", 4, rounding="nearest")
    assert plan_stats(plan, tmp_path) == {"bits": 4.0, "bytes": plan.bytes}


def test_tensorboard_reads_it(tmp_path):
    pytest.importorskip("tensorboard")
    from speechbrain.utils.train_logger import TensorboardLogger
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    logger = TensorboardLogger(str(tmp_path))
    stats = {"bits": 3.5, "bytes": 1000}
    log_stats({"train_logger": logger}, stats, {"si_snr": 8.75})
    logger.writer.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("bits")[0].value == 3.5
    assert events.Scalars("bytes")[0].value == 1000
    assert events.Scalars("si_snr/test")[0].value == torch.tensor(8.75)


def test_a_log_whose_folder_is_not_there_yet_is_made(tmp_path):
    """Some recipes make their folder after the Brain, or in `fit`."""
    path = tmp_path / "results/1234/train_log.txt"
    log_stats({"train_logger": FileTrainLogger(path)}, {"bits": 4.0})
    assert path.read_text() == "bits: 4.00\n"
