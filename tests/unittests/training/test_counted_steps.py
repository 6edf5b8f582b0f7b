"""Padding is left out of rounding; embeddings follow their output layer."""

import copy

import pytest
import speechbrain as sb
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

from speechbrain_mpq import choose_bits
from speechbrain_mpq.quantization.codebook import fit_scale
from speechbrain_mpq.quantization.gptq import (
    calibrated_levels,
    calibrated_scale,
    damped_moment,
)
from speechbrain_mpq.quantization.plan import Scheme
from speechbrain_mpq.training.calibration import BrainCalibration
from speechbrain_mpq.training.counted_steps import counted_steps

WORDS, SIZE, PAD = 12, 6, 0


class Model(nn.Module):
    """A language model with one matrix for words in and out."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, SIZE)
        self.rnn = kind(SIZE, SIZE, batch_first=True, **options)
        size = 2 * SIZE if self.rnn.bidirectional else SIZE
        self.between = nn.Linear(size, SIZE)
        self.out = nn.Linear(SIZE, WORDS)
        self.out.weight = self.embedding.weight


class Reader(sb.Brain):
    """Predicts the next word; knows of padding in its loss only."""

    of_state = False  # whether the loss is that of the last state

    def compute_forward(self, batch, stage):
        """Log-probabilities, [items, steps, words]."""
        net = self.modules.model
        outputs, state = net.rnn(net.embedding(batch[:, :-1]))
        self.last = state[0] if isinstance(state, tuple) else state
        hidden = net.between(outputs)
        return net.out(hidden).log_softmax(-1)

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy of all words but padding."""
        if self.of_state:
            return self.last.square().sum()
        targets, rows = batch[:, 1:], predictions.flatten(0, 1)
        loss = nn.functional.nll_loss
        return loss(rows, targets.flatten(), ignore_index=PAD)


def sentences():
    """Words and no padding, of many lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 4, 6, 12, 3, 8, 5, 7, 10, 2)
    return [torch.randint(1, WORDS, (n,), generator=generator) for n in lengths]


def brain(**options):
    """The same every time."""
    torch.manual_seed(0)
    return Reader({"model": Model(**options)}, run_opts={"device": "cpu"})


def loader(batches):
    """The batches as they are."""
    return torch.utils.data.DataLoader(batches, batch_size=None)


def padded(rows):
    """One batch of them."""
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def calibrated(batches, reader=None, scheme=None):
    """A Brain whose modules are rounded on batches, and its model."""
    reader = reader or brain()
    options = {"scheme": scheme, "vectors": False, "progress": False}
    options["batches"] = len(batches)
    choose_bits(reader, loader(batches), "uniform", 3, **options)
    return reader.modules.model


def weights_of(model):
    """Recurrent weights and the embedding."""
    rnn = model.rnn
    values = rnn.weight_ih_l0, rnn.weight_hh_l0, model.out.weight
    return dict(zip(("inputs", "recurrent", "words"), values))


def test_padding_changes_nothing():
    """As if every sentence came alone, without any."""
    alone = weights_of(calibrated([row[None] for row in sentences()]))
    rows = sentences()
    together = calibrated(
        [padded(rows[:3]), padded(rows[3:4]), padded(rows[4:])]
    )

    class Blind(Reader):
        compute_objectives = sb.Brain.compute_objectives

    reader = brain()
    reader.__class__ = Blind
    blind = calibrated([padded(rows)], reader)
    for name, weight in weights_of(together).items():
        torch.testing.assert_close(weight, alone[name])
        assert not torch.allclose(weights_of(blind)[name], alone[name])


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": nn.GRU, "num_layers": 2}, {"bidirectional": True}],
)
def test_steps_count_up_to_the_last_word(options):
    """Where padding is read backwards it does count, as it is remembered."""
    reader, batch = brain(**options), padded(sentences())
    calibration = BrainCalibration(reader.modules, reader, lambda: [batch])
    model = reader.modules.model
    with calibration.ready():
        layers = {"rnn": model.rnn, "out": model.out}
        found = counted_steps(calibration, layers, 0)
        reader.of_state = True
        of_state = counted_steps(calibration, {"rnn": model.rnn}, 0)
    words = [len(row) - 1 for row in sentences()]
    [steps], [rows] = found["rnn"], found["out"]
    assert [row.tolist() for row in rows] == [
        [t < n for t in range(batch.shape[1] - 1)] for n in words
    ]
    whole = [batch.shape[1] - 1] * len(words)
    both = options.get("bidirectional")
    assert [int(step.sum()) for step in steps] == (whole if both else words)
    assert [int(step.sum()) for step in of_state["rnn"][0]] == whole


def test_cells_count_until_the_loss_forgets_them():
    class Cells(Reader):
        def compute_forward(self, batch, stage):
            cell, state = self.modules.cell, None
            for step in batch.T[:3]:
                state = cell(nn.functional.one_hot(step, 4).float(), state)
            self.kept = state[0][:1]  # the second item's are not looked at
            return state[0]

        def compute_objectives(self, predictions, batch, stage):
            return self.kept.sum()

    reader = Cells({"cell": nn.LSTMCell(4, 3)}, run_opts={"device": "cpu"})
    batch = torch.tensor([[0, 1, 2], [3, 2, 1]])
    calibration = BrainCalibration(reader.modules, reader, lambda: [batch])
    with calibration.ready():
        layers = {"cell": reader.modules.cell}
        uses = counted_steps(calibration, layers, 0)["cell"]
    assert [[row.item() for row in use] for use in uses] == [[True, False]] * 3


@torch.no_grad()
def test_embedding_is_rounded_as_the_output_layer():
    """Against its own inputs in full precision, written out."""
    plain, rows = brain(), [row[None] for row in sentences()]
    model = plain.modules.model
    hidden = torch.cat(
        [
            model.between(model.rnn(model.embedding(row[:, :-1]))[0])[0]
            for row in rows
        ]
    ).double()
    weight = model.out.weight.detach()
    centred = hidden - hidden.mean(0)
    values = []
    for damping in (0.1, 1.0, 10.0):  # the choice of one is not repeated here
        moment = damped_moment(centred.T @ centred, damping)
        alpha = fit_scale(weight, 3)
        alpha = calibrated_scale(weight, moment, 3, alpha).float()
        levels = calibrated_levels(weight, moment, 3, alpha)
        values.append((levels * alpha).float())
    found = calibrated(rows)
    assert torch.equal(found.out.weight, found.embedding.weight)
    assert any(torch.allclose(found.out.weight, value) for value in values)
    nearest = fit_scale(weight, 3)
    nearest = (weight / nearest).round().clamp(-3, 3) * nearest
    assert not torch.allclose(found.out.weight, nearest)


@torch.no_grad()
def test_predictions_come_closer_with_gates():
    rows = [padded(sentences()[:5]), padded(sentences()[5:])]
    scheme = Scheme(gates=True, codebook="midrise")
    lost = {}
    for rounding in ("nearest", "calibrated"):
        reader, plain = brain(), brain()
        choose_bits(
            reader,
            loader(rows),
            "uniform",
            2,
            rounding=rounding,
            scheme=copy.deepcopy(scheme),
            vectors=False,
            progress=False,
        )
        lost[rounding] = sum(
            nn.functional.kl_div(
                reader.compute_forward(row, None),
                plain.compute_forward(row, None),
                log_target=True,
                reduction="sum",
            )
            for row in rows
        )
    assert lost["calibrated"] < 0.5 * lost["nearest"]


def test_layers_that_share_with_more_than_embeddings_stay_nearest(caplog):
    reader = brain()
    model = reader.modules.model
    model.between = nn.Linear(SIZE, WORDS)
    model.between.weight = model.out.weight
    forward = reader.compute_forward

    def compute_forward(batch, stage):
        model.between(model.rnn(model.embedding(batch))[0])
        model.between, between = nn.Identity(), model.between
        try:
            return forward(batch, stage)
        finally:
            model.between = between

    reader.compute_forward = compute_forward
    with caplog.at_level("INFO"):
        calibrated([padded(sentences())], reader)
    assert "(shared by several modules): model.embedding" in caplog.text
