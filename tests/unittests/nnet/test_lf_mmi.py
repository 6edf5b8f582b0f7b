"""LF-MMI against sums over paths that are written out, and against CTC."""

import itertools
import math

import numpy as np
import pytest
import torch

from speechbrain_mpq.decoders.chain_graphs import (
    ChainGraph,
    denominator_graph,
    estimate_ngram,
    leak_distribution,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.nnet import path_sums
from speechbrain_mpq.nnet.lf_mmi import LFMMILoss, lf_mmi
from speechbrain_mpq.nnet.path_sums import (
    Denominator,
    DenseTransitions,
    PairTransitions,
    SparseTransitions,
    log_forward,
    pad_graphs,
)

PHONES = 3
WORDS = [[[1]], [[2, 1], [2]], [[1, 2]]]  # the second has two pronunciations


def lattice(words=WORDS):
    return phone_lattice(words, silence=0)


def ngram(order=2, smoothing=1.0, extra_states=2000):
    corpus = [lattice(), lattice(WORDS[:2]), lattice(WORDS[1:])]
    return estimate_ngram(corpus, PHONES, order, extra_states, smoothing)


def random_outputs(batch, frames, size=2 * PHONES, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, frames, size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return scale * noise


def sequence_weight(phones, model):
    """Probability of a whole phone sequence, by the n-gram's histories."""
    state, weight = 0, 1.0
    for phone in phones:
        weight *= model.probabilities[state, phone]
        state = model.next_state[state, phone]
    return weight * model.probabilities[state, -1]


def segmentations(phones, frames):
    """Every way to spread phones over frames, as lists of pdfs."""
    cuts = itertools.combinations(range(1, frames), len(phones) - 1)
    for cut in cuts:
        begins = (0, *cut, frames)
        yield [
            2 * phone + (frame > begin)
            for phone, begin, end in zip(phones, begins, begins[1:])
            for frame in range(begin, end)
        ]


def brute_force(sequences, model, outputs):
    """Log-sum over phone sequences and segmentations of one utterance."""
    frames = len(outputs)
    total = 0.0
    for phones in sequences:
        weight = sequence_weight(phones, model)
        for pdfs in segmentations(phones, frames):
            score = sum(outputs[t, pdf].item() for t, pdf in enumerate(pdfs))
            total += weight * math.exp(score)
    return math.log(total)


def all_sequences(frames):
    for length in range(1, frames + 1):
        yield from itertools.product(range(PHONES), repeat=length)


def said_sequences(words):
    """Phone sequences of a transcript with optional silences, each once."""
    found = set()
    for alternatives in itertools.product(*words):
        for silent in itertools.product([(), (0,)], repeat=len(words) + 1):
            sequence = list(silent[0])
            for alternative, pause in zip(alternatives, silent[1:]):
                sequence += [*alternative, *pause]
            found.add(tuple(sequence))
    return found


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    "smoothing, extra", [(0.0, 2000), (1.0, 2000), (0.5, 3)]
)
def test_denominator_is_sum_over_all_sequences(order, smoothing, extra):
    model = ngram(order, smoothing, extra)
    outputs = random_outputs(2, 5)
    lengths = torch.tensor([5, 4])
    found = Denominator(denominator_graph(model), leak=0)(outputs, lengths)
    for row, frames in enumerate(lengths.tolist()):
        asked = brute_force(all_sequences(frames), model, outputs[row, :frames])
        assert found.log_sum[row].item() == pytest.approx(asked, abs=1e-10)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_numerator_is_sum_over_the_transcript(order):
    model = ngram(order)
    outputs = random_outputs(1, 8)
    graph = numerator_graph(lattice(), model)
    found = log_forward(pad_graphs([graph]), outputs, torch.tensor([8]))
    asked = brute_force(said_sequences(WORDS), model, outputs[0])
    assert found.log_sum.item() == pytest.approx(asked, abs=1e-10)


def test_same_pronunciations_count_once():
    model = ngram()
    once = numerator_graph(lattice([[[1]]]), model)
    twice = numerator_graph(lattice([[[1], [1]]]), model)
    outputs = random_outputs(1, 4)
    first, second = (
        log_forward(pad_graphs([graph]), outputs, torch.tensor([4])).log_sum
        for graph in (once, twice)
    )
    assert first == second
    # A silence that is also a word.
    graph = numerator_graph(lattice([[[0]], [[1]]]), model)
    asked = {(0, 1), (0, 0, 1), (0, 0, 0, 1)}
    asked |= {(*phones, 0) for phones in asked}
    found = log_forward(pad_graphs([graph]), outputs, torch.tensor([4]))
    assert found.log_sum.item() == pytest.approx(
        brute_force(asked, model, outputs[0]), abs=1e-10
    )


def leaky_sum(graph, leak, outputs):
    """Log-sum by products of full matrices, without scaling."""
    arcs = np.zeros((graph.states, graph.states))
    arcs[graph.sources, graph.targets] = np.exp(graph.log_weights)
    mix = np.eye(graph.states) + leak * leak_distribution(graph)
    emitted = outputs.exp().numpy()
    alpha = np.exp(graph.initial) * emitted[0, graph.entry]
    for frame in emitted[1:]:
        step = arcs * frame[graph.entry] + np.diag(frame[graph.loop])
        alpha = alpha @ mix @ step
    return math.log(alpha @ np.exp(graph.final))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_leaky_hmm_is_a_restart_between_frames(order):
    graph = denominator_graph(ngram(order))
    outputs = random_outputs(1, 6)
    found = Denominator(graph, leak=0.1)(outputs, torch.tensor([6]))
    asked = leaky_sum(graph, 0.1, outputs[0])
    assert found.log_sum.item() == pytest.approx(asked, abs=1e-10)


def test_leak_distribution_sums_to_one():
    for order in (2, 3, 4):
        occupancy = leak_distribution(denominator_graph(ngram(order)))
        assert occupancy.sum() == pytest.approx(1)
        assert (occupancy >= 0).all()


@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_all_products_of_a_trigram_agree(leak):
    graph = denominator_graph(ngram(3))
    outputs, lengths = random_outputs(2, 7), torch.tensor([7, 5])
    denominator = Denominator(graph, leak)
    results = []
    for kind in (DenseTransitions, PairTransitions, SparseTransitions):
        denominator.transitions = kind(graph, torch.float64)
        recursion = denominator(outputs, lengths)
        found = denominator.occupancies(outputs, lengths, recursion)
        torch.testing.assert_close(recursion.log_sum, found[1])
        results.append(found)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_sparse_product_of_a_gpu_is_that_of_a_cpu(monkeypatch):
    arcs = SparseTransitions(denominator_graph(ngram(4)), torch.float64)
    alpha = torch.rand(2, len(arcs.entering_offsets) - 1).double()
    asked = arcs(alpha), arcs.backward(alpha)
    monkeypatch.setattr(path_sums, "_sum_arcs", path_sums._sum_segments)
    torch.testing.assert_close((arcs(alpha), arcs.backward(alpha)), asked)


@pytest.mark.parametrize(
    "order, kind",
    [(2, DenseTransitions), (3, PairTransitions), (4, SparseTransitions)],
)
def test_product_follows_from_the_graph(order, kind, monkeypatch):
    monkeypatch.setattr(path_sums, "DENSE_STATES", 3)
    denominator = Denominator(denominator_graph(ngram(order)))
    assert isinstance(denominator.transitions, kind)


def batch_of(order=2, frames=(8, 6, 7), leak=0.1):
    """Outputs, lengths, numerators and denominator of three utterances."""
    model = ngram(order)
    texts = (WORDS, WORDS[:2], WORDS[1:])
    numerators = [
        numerator_graph(lattice(words), model, f"u{i}")
        for i, words in enumerate(texts)
    ]
    outputs = random_outputs(3, max(frames))
    denominator = Denominator(denominator_graph(model), leak)
    return outputs, torch.tensor(frames), numerators, denominator


@pytest.mark.parametrize("order, leak", [(2, 0), (2, 0.1), (3, 0.1), (4, 0.1)])
def test_gradient_is_that_of_finite_differences(order, leak):
    outputs, lengths, numerators, denominator = batch_of(order, (6, 4, 5), leak)
    outputs.requires_grad_()

    def objective(values):
        return lf_mmi(values, lengths, numerators, denominator)[0]

    assert torch.autograd.gradcheck(objective, outputs)


def test_second_derivatives():
    outputs, lengths, numerators, denominator = batch_of(frames=(4, 2, 3))
    outputs.requires_grad_()

    def objective(values):
        return lf_mmi(values, lengths, numerators, denominator, True)[0]

    once = lf_mmi(outputs, lengths, numerators, denominator)
    twice = lf_mmi(outputs, lengths, numerators, denominator, True)
    torch.testing.assert_close(once, twice)
    (first,) = torch.autograd.grad(once[0].sum(), outputs)
    (second,) = torch.autograd.grad(twice[0].sum(), outputs)
    torch.testing.assert_close(first, second)
    assert torch.autograd.gradgradcheck(objective, outputs)


def test_posteriors_of_each_frame_sum_to_one():
    outputs, lengths, numerators, denominator = batch_of()
    objective, numerator = lf_mmi(outputs, lengths, numerators, denominator)
    recursion = denominator(outputs, lengths)
    posteriors, _ = denominator.occupancies(outputs, lengths, recursion)
    heard = torch.arange(outputs.shape[1]) < lengths[:, None]
    for occupancy in (numerator, posteriors):
        torch.testing.assert_close(occupancy.sum(2), heard.double())
        assert (occupancy >= 0).all()
    assert (objective <= 0).all()


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.1, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_objective_is_never_positive_and_always_finite(order, scale, dtype):
    outputs, lengths, numerators, _ = batch_of(order)
    model = denominator_graph(ngram(order))
    denominator = Denominator(model, leak=0, dtype=dtype)
    outputs = (scale * outputs).to(dtype).requires_grad_()
    objective, _ = lf_mmi(outputs, lengths, numerators, denominator)
    resolution = 1e-12 if dtype == torch.float64 else 1e-5
    assert (objective <= resolution * (1 + scale)).all()
    objective.sum().backward()
    assert outputs.grad.isfinite().all()
    assert outputs.grad.sum(2).abs().max() < 1e-5
    # As exact as the log domain is throughout.
    exact, _ = lf_mmi(
        outputs.double(),
        lengths,
        numerators,
        Denominator(model, leak=0),
        double_backward=True,
    )
    torch.testing.assert_close(
        objective.double(), exact, rtol=resolution, atol=scale * resolution
    )


def test_batch_is_its_utterances_and_padding_is_not_heard():
    outputs, lengths, numerators, denominator = batch_of()
    outputs[1, 6:] = math.nan
    outputs[2, 7:] = math.inf
    outputs.requires_grad_()
    together, _ = lf_mmi(outputs, lengths, numerators, denominator)
    (grad,) = torch.autograd.grad(together.sum(), outputs)
    for row, frames in enumerate(lengths.tolist()):
        alone = outputs[row : row + 1, :frames].detach().requires_grad_()
        objective, _ = lf_mmi(
            alone,
            lengths[row : row + 1],
            numerators[row : row + 1],
            denominator,
        )
        objective.sum().backward()
        torch.testing.assert_close(objective[0], together[row])
        torch.testing.assert_close(alone.grad[0], grad[row, :frames])
        assert (grad[row, frames:] == 0).all()


def test_two_runs_are_the_same_to_the_bit():
    results = []
    for _ in range(2):
        outputs, lengths, numerators, denominator = batch_of(3)
        outputs.requires_grad_()
        objective, _ = lf_mmi(outputs, lengths, numerators, denominator)
        objective.sum().backward()
        results.append((objective.detach(), outputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_gpu_is_deterministic_and_agrees(order, scale, monkeypatch):
    monkeypatch.setattr(path_sums, "DENSE_STATES", 3)
    results = []
    for device in ("cpu", "cuda", "cuda"):
        outputs, lengths, numerators, denominator = batch_of(order)
        outputs = (scale * outputs).to(device).requires_grad_()
        objective, _ = lf_mmi(
            outputs, lengths.to(device), numerators, denominator.to(device)
        )
        objective.sum().backward()
        results.append((objective.detach().cpu(), outputs.grad.cpu()))
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[1][0], results[2][0])
    assert torch.equal(results[1][1], results[2][1])


# CTC: labels emit one output, on entering and staying; between labels, a blank
# (output 0) that only equal neighbours need.


def ctc_graph(labels):
    """The paths that collapse to the labels, of weight one."""
    outputs = [0]
    for label in labels:
        outputs += [label, 0]
    arcs = [(s, s + 1) for s in range(len(outputs) - 1)]
    arcs += [
        (s, s + 2)
        for s in range(1, len(outputs) - 2, 2)
        if outputs[s] != outputs[s + 2]
    ]
    sources, targets = np.array(arcs).T
    weights = np.full(len(outputs), -np.inf)
    initial, final = weights.copy(), weights.copy()
    initial[:2], final[-2:] = 0, 0
    outputs = np.array(outputs)
    zeros = np.zeros(len(arcs))
    return ChainGraph(outputs, outputs, sources, targets, zeros, initial, final)


def free_graph(size):
    """Every sequence of outputs, of weight one."""
    sources, targets = np.nonzero(~np.eye(size, dtype=bool))
    outputs, zeros = np.arange(size), np.zeros(size)
    weights = np.zeros(len(sources))
    return ChainGraph(outputs, outputs, sources, targets, weights, zeros, zeros)


def test_ctc_is_a_special_case():
    size, frames = 6, torch.tensor([12, 9, 10])
    labels = [[1, 2, 2, 5], [3], [4, 4, 4]]
    outputs = random_outputs(3, 12, size, scale=3).requires_grad_()
    objective, _ = lf_mmi(
        outputs,
        frames,
        [ctc_graph(sequence) for sequence in labels],
        Denominator(free_graph(size), leak=0),
    )
    (grad,) = torch.autograd.grad(objective.sum(), outputs)
    ctc = torch.nn.CTCLoss(reduction="none")(
        outputs.log_softmax(2).transpose(0, 1),
        torch.tensor(sum(labels, [])),
        frames,
        torch.tensor([len(sequence) for sequence in labels]),
    )
    (asked,) = torch.autograd.grad(-ctc.sum(), outputs)
    torch.testing.assert_close(objective, -ctc, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, asked, rtol=0, atol=1e-6)


def loss_of(order=2, **options):
    outputs, lengths, numerators, _ = batch_of(order)
    loss = LFMMILoss(denominator_graph(ngram(order)), **options)
    return loss, outputs.float(), numerators, lengths / outputs.shape[1]


def test_loss_has_its_terms():
    plain, outputs, numerators, relative = loss_of(l2=0, xent=0)
    value = plain(outputs, numerators, relative)
    lengths = (relative * outputs.shape[1]).round().long()
    objective, occupancy = lf_mmi(
        outputs, lengths, numerators, plain.denominator
    )
    frames = lengths.sum()
    torch.testing.assert_close(value, (-objective.sum() / frames).float())
    heard = torch.arange(outputs.shape[1]) < lengths[:, None]
    energy = (outputs.square() * heard[:, :, None]).sum() / frames
    loss, *_ = loss_of(l2=0.5, xent=0)
    torch.testing.assert_close(
        loss(outputs, numerators, relative), value + 0.25 * energy
    )
    loss, *_ = loss_of(l2=0, xent=0.1)
    second = torch.randn_like(outputs).requires_grad_()
    cross = -(occupancy * second.log_softmax(2)).sum() / frames
    found = loss(outputs, numerators, relative, second)
    torch.testing.assert_close(found, (value + 0.1 * cross).float())
    found.backward()  # the second head learns from the first, not back
    assert second.grad.abs().sum() > 0


def test_half_precision_and_autocast():
    loss, outputs, numerators, relative = loss_of()
    asked = loss(outputs, numerators, relative)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(outputs, numerators, relative), asked)
    half = outputs.bfloat16().requires_grad_()
    value = loss(half, numerators, relative)
    assert value.item() == pytest.approx(asked.item(), abs=0.02)
    value.backward()
    assert half.grad.dtype == torch.bfloat16


def test_overfits_one_utterance():
    loss, outputs, numerators, _ = loss_of(leak=0, l2=0)
    outputs = torch.zeros_like(outputs[:1]).requires_grad_()
    optimizer = torch.optim.Adam([outputs], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(outputs, numerators[:1], torch.ones(1))
        value.backward()
        optimizer.step()
    assert 0 <= value.item() < 0.01


def test_what_cannot_be_aligned_is_named_and_left_out(caplog):
    loss, outputs, numerators, relative = loss_of()
    asked = loss(outputs[:2], numerators[:2], relative[:2])
    short = torch.tensor([*relative[:2], 2 / outputs.shape[1]])
    outputs.requires_grad_()
    for _ in range(2):  # told once
        found = loss(outputs, numerators, short)
    torch.testing.assert_close(found, asked)
    assert loss.left_out == {"u2": "3 frames at least, 2 there"}
    assert caplog.text.count("leaves out utterance u2") == 1
    found.backward()
    assert (outputs.grad[2] == 0).all()


@pytest.mark.parametrize("phones", [[1, 2, 2], [0, 0], [2]])
def test_unseen_sequence_is_left_out(phones):
    model = estimate_ngram([phone_lattice([[[1, 2, 1]]])], 3, smoothing=0)
    graph = numerator_graph(phone_lattice([[phones]]), model, "v3")
    loss = LFMMILoss(denominator_graph(model))
    outputs = random_outputs(1, 8).requires_grad_()
    value = loss(outputs, [graph], torch.ones(1))
    assert value == 0
    value.backward()
    assert (outputs.grad == 0).all()
    assert "estimate it with smoothing" in loss.left_out["v3"]


def test_outputs_of_another_phone_set():
    loss, outputs, numerators, relative = loss_of()
    with pytest.raises(ValueError, match="utterance u0.*pdf 5.*4 outputs"):
        loss(outputs[:, :, :4], numerators, relative)
    with pytest.raises(ValueError, match="3 utterances and 2 numerators"):
        loss(outputs, numerators[:2], relative)
    with pytest.raises(ValueError, match="leak -1"):
        LFMMILoss(denominator_graph(ngram()), leak=-1)
