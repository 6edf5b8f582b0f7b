"""Bits by what a Brain's own passes say, and packing from an output folder."""

import copy
import re
from functools import partial
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from helpers import brain_of, fit, hparams_of, script
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.decoders.seq2seq import S2SRNNGreedySearcher
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.metric_stats import MetricStats

from speechbrain_mpq import (
    HessianScores,
    KLScores,
    MaskErrorScores,
    Quantizer,
    choose_bits,
    pack_results,
)
from speechbrain_mpq.allocation.analysis import expected_gain
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits, Scheme
from speechbrain_mpq.quantization.quant_api import cluster_quantized
from speechbrain_mpq.training.calibration import (
    BrainCalibration,
    calibration_batches,
)
from speechbrain_mpq.training.choose import ANCHOR, method_of, scorer_of
from speechbrain_mpq.training.quantizer import quantizer_of

LOADER = {"batch_size": 4}


@pytest.fixture
def brain(tmp_path):
    """A Brain before fit, in full precision."""
    return brain_of(hparams_of("plain", tmp_path))


@pytest.fixture
def data():
    """Calibration items."""
    return script().dataset(4, seed=2)


def passes(brain, data):
    """Predictions and losses of all batches, the slow and obvious way."""
    brain.modules.eval()
    loader = brain.make_dataloader(
        data, sb.Stage.VALID, ckpt_prefix=None, **LOADER
    )
    with torch.no_grad():
        for batch in loader:
            predictions = brain.compute_forward(batch, sb.Stage.VALID)
            yield (
                predictions[0],
                brain.compute_objectives(predictions, batch, sb.Stage.VALID),
            )


def scored(brain, data, scores, folder, **options):
    """The table that choose_bits leaves."""
    choose_bits(
        brain, data, scores, 4, loader_kwargs=LOADER, progress=False, **options
    )
    return ScoreTable.load(folder / "scores.json")


def test_kl_is_that_of_the_brains_own_distributions(brain, data, tmp_path):
    copied = copy.deepcopy(brain.modules)
    table = scored(brain, data, "kl", tmp_path)
    fresh = brain_of(hparams_of("plain", tmp_path / "other"))
    fresh.modules.load_state_dict(copied.state_dict())
    reference = torch.cat([p.flatten(0, 1) for p, _ in passes(fresh, data)])
    for cluster, bits in (("encoder.rnn", 2), ("output.w", 3)):
        with cluster_quantized(fresh.modules, cluster, bits):
            found = [p.flatten(0, 1) for p, _ in passes(fresh, data)]
        divergences = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=reference.double()),
            torch.distributions.Categorical(logits=torch.cat(found).double()),
        )
        expected = divergences.mean().item()
        assert table.scores[cluster][bits] == pytest.approx(expected, rel=1e-4)
    assert table.method == "categorical_kl"


def test_what_there_is_to_win_is_logged(brain, data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "speechbrain_mpq.allocation.analysis.logger.info", said.append
    )
    scored(brain, data, "kl", tmp_path)
    assert "that mixed precision can gain at about" in said[0]
    assert "this plan gains" in said[0]


def test_a_plan_gains_no_more_than_the_most(tmp_path):
    rows = {"a": {2: 1.0, 4: 0.06, 8: 1e-4}, "b": {2: 0.0, 4: 0.0, 8: 0.0}}
    table = ScoreTable(rows, {n: {f"{n}.weight": 9} for n in rows})
    plan = BitPlan(
        {
            "a": ClusterBits(8, 9, ("a.weight",)),
            "b": ClusterBits(2, 9, ("b.weight",)),
        }
    )
    _, sentence = expected_gain(table, plan)
    most, planned = map(float, re.findall(r"([\d.]+) dB", sentence))
    assert planned > 0 and most == planned


def test_scores_that_are_all_zero_give_no_plan(brain, data):
    """As of a network that puts out the same whatever it hears."""
    with pytest.raises(ValueError, match="all scores are zero and say noth"):
        choose_bits(
            brain,
            data,
            "kl",
            4,
            output=lambda predictions: (0 * predictions[0]).log_softmax(-1),
            loader_kwargs=LOADER,
            progress=False,
        )


class LossesByName(sb.Brain):
    """A Brain with several losses, as of a GAN, and a layer without use."""

    def compute_forward(self, batch, stage):
        """Log-probabilities."""
        return self.modules.used(batch).log_softmax(-1)

    def compute_objectives(self, predictions, batch, stage):
        """Losses by their names."""
        return {"generator": -predictions.mean()}


def test_losses_by_name_are_no_obstacle_to_kl(tmp_path, caplog):
    modules = {name: torch.nn.Linear(4, 4) for name in ("used", "unused")}
    brain = LossesByName(modules, hparams={"output_folder": tmp_path})
    table = scored(brain, torch.randn(8, 2, 4), "kl", tmp_path)
    assert table.scores["used"][2] > 0 and not any(
        table.scores["unused"].values()
    )
    assert "Not known whether the loss needs them" in caplog.text


def test_loss_scores_are_increases_of_the_brains_loss(brain, data, tmp_path):
    fresh = brain_of(hparams_of("plain", tmp_path / "other"))
    fresh.modules.load_state_dict(brain.modules.state_dict())
    before = sum(loss for _, loss in passes(fresh, data)).item()
    with cluster_quantized(fresh.modules, "encoder.rnn", 2):
        after = sum(loss for _, loss in passes(fresh, data)).item()
    table = scored(brain, data, "loss", tmp_path)
    increase = table.scores["encoder.rnn"][2]
    assert increase == pytest.approx(after - before, rel=1e-3)


def test_hessian_of_a_loss_that_autograd_cannot_curve(brain, data, tmp_path):
    """Against the Hessian's diagonal by differences of single weights."""
    weight = brain.modules["output"].w.weight
    batch = next(
        iter(brain.make_dataloader(data, sb.Stage.VALID, None, **LOADER))
    )
    brain.modules.eval()

    def slope(index, step):
        with torch.no_grad():
            weight.view(-1)[index] += step
        predictions = brain.compute_forward(batch, sb.Stage.VALID)
        loss = brain.compute_objectives(predictions, batch, sb.Stage.VALID)
        gradient = torch.autograd.grad(loss, weight)[0].view(-1)[index].item()
        with torch.no_grad():
            weight.view(-1)[index] -= step
        return gradient

    trace = sum(
        (slope(i, 0.01) - slope(i, -0.01)) / 0.02 for i in range(weight.numel())
    )
    scores = HessianScores(
        (2, 4), probes=200, distribution="rademacher", differences=True
    )
    table = scored(brain, data, scores, tmp_path, batches=1)
    found = table.details["tensor_traces"]["output.w.weight"]
    assert found["standard_error"] < 0.4 * trace
    assert abs(found["trace"] - trace) < 3 * found["standard_error"]


def test_double_derivatives_of_ctc_are_refused(brain, data):
    with pytest.raises(ValueError, match="differences=True"):
        choose_bits(brain, data, HessianScores(probes=2), loader_kwargs=LOADER)


@pytest.mark.parametrize("scores", ["weight_error", "size", "uniform"])
def test_scores_without_data_need_none(brain, scores):
    plan = choose_bits(brain, [], scores, 4, rounding="nearest")
    assert plan.average_bits <= 4


def test_budgets(brain, data, tmp_path):
    options = {"loader_kwargs": LOADER, "progress": False}
    plan = choose_bits(brain, data, budget="2.5 bit", folder=tmp_path / "a")
    assert 2 < plan.average_bits <= 2.5
    choose_bits(brain, data, budget=1500, folder=tmp_path / "b", **options)
    packed = quantizer_of(brain).pack(tmp_path / "packed")
    assert 1200 < packed.stat().st_size <= 1500
    with pytest.raises(ValueError, match="out of reach"):
        choose_bits(brain, data, budget=100, folder=tmp_path / "c", **options)


def test_budget_below_what_stays_in_full_precision(tmp_path, data):
    hparams = hparams_of("plain", tmp_path)
    hparams["quantizer"] = Quantizer(hparams["modules"], exclude=["encoder.*"])
    rest = 4 * hparams["quantizer"].plan.rest_parameters
    match = r"bytes is out of reach.* for what stays in float.*exclude less"
    with pytest.raises(ValueError, match=match):
        choose_bits(
            brain_of(hparams), data, budget=rest - 8, loader_kwargs=LOADER
        )


def test_chosen_bits_train_and_resume(tmp_path, data):
    def trained(epochs, scores="kl"):
        hparams = hparams_of("uniform", tmp_path, epochs=epochs)
        brain = brain_of(hparams)
        plan = choose_bits(
            brain, data, scores, 3.5, loader_kwargs=LOADER, progress=False
        )
        fit(brain, hparams)
        return plan

    plan = trained(epochs=1)
    assert len({c.bits for c in plan.clusters.values()}) > 1
    (tmp_path / "scores.json").unlink()  # made anew only if scored anew
    assert trained(epochs=2) == plan
    assert not (tmp_path / "scores.json").exists()
    with pytest.raises(ValueError, match="another output_folder"):
        trained(epochs=3, scores="loss")


def test_choosing_leaves_the_random_state_and_the_modes(brain, data):
    brain.modules.train()
    before = torch.get_rng_state()
    choose_bits(brain, data, loader_kwargs=LOADER, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert brain.modules["encoder"].training


def test_equal_bits(brain, data):
    plan = choose_bits(
        brain,
        data,
        budget=3.5,
        loader_kwargs=LOADER,
        equal_bits=["encoder.*", "*"],
        progress=False,
    )
    assert len({cluster.bits for cluster in plan.clusters.values()}) == 1


def test_full_precision_checkpoints_in_the_same_folder(tmp_path, data):
    hparams = hparams_of("plain", tmp_path, epochs=1)
    fit(brain_of(hparams), hparams)
    again = brain_of(hparams_of("plain", tmp_path))
    with pytest.raises(ValueError, match="another output_folder"):
        choose_bits(again, data)


def test_after_fit_is_too_late(tmp_path, data):
    hparams = hparams_of("plain", tmp_path, epochs=1)
    brain = brain_of(hparams)
    fit(brain, hparams)
    with pytest.raises(ValueError, match="before brain.fit"):
        choose_bits(brain, data)


def test_empty_calibration_set(brain, data):
    with pytest.raises(ValueError, match="calibration set is empty"):
        choose_bits(brain, data.filtered_sorted(select_n=0))


def test_no_distribution(brain, data):
    wrong = {"loader_kwargs": LOADER, "progress": False}
    with pytest.raises(ValueError, match="end it with log_softmax"):
        choose_bits(brain, data, output=lambda p: p[0] * 3, **wrong)
    brain.hparams.norm = lambda hidden: hidden * float("nan")
    with pytest.raises(ValueError, match="no distribution.*output="):
        choose_bits(brain, data, **wrong)


class TwoKinds(script().TinyASR):
    """Puts out a distribution, and one of another kind of a second head."""

    made = {
        "softmax": lambda hidden: hidden.softmax(-1),
        "sigmoid": torch.sigmoid,
        "decision": lambda hidden: hidden.softmax(-1).detach(),
    }
    second = "softmax"

    def compute_forward(self, batch, stage):
        """Log-probabilities, and what the second head says."""
        batch = batch.to(self.device)
        hidden, _ = self.modules.encoder(batch.feats[0])
        outputs = self.modules.output(hidden)
        found = SimpleNamespace(heads=[self.made[self.second](3 * outputs)])
        found.itself = found  # and objects may know each other
        is_hard = self.second == "decision"
        found.first = outputs if is_hard else hidden.log_softmax(-1)
        return found

    def compute_objectives(self, predictions, batch, stage):
        """Energy of both."""
        head, first = predictions.heads[0], predictions.first
        loss = head.square().mean() + first.square().mean()
        return loss + self.modules.output.w.weight.square().mean()


@pytest.mark.parametrize(
    "second, method",
    [
        ("softmax", "joint_kl"),
        ("sigmoid", "joint_kl"),
        ("decision", "output_error"),
    ],
)
def test_distributions_of_other_kinds_count_where_the_loss_needs_them(
    brain, data, second, method
):
    brain.__class__ = type("Brain", (TwoKinds,), {"second": second})
    load = partial(calibration_batches, brain, data, 1, LOADER)
    calibration = BrainCalibration(brain.modules, brain, load)
    scorer, network, _ = calibration.prepared(scorer_of("kl", Scheme()))
    assert scorer.method == method
    with torch.no_grad():
        output = network(torch.tensor(0))
        found = calibration.run(0)
    sizes = found.first.numel(), found.heads[0].numel()
    assert output.numel() == sum(sizes[: 1 + (method == "joint_kl")])


class Synthesizer(script().TinyASR):
    """Puts out attention weights, which the last layer does not change."""

    def compute_forward(self, batch, stage):
        """A spectrogram, one ten times as loud, attention weights."""
        batch = batch.to(self.device)
        hidden, _ = self.modules.encoder(batch.feats[0])
        return self.modules.output(hidden), 10 * hidden, hidden.softmax(-1)

    def compute_objectives(self, predictions, batch, stage):
        """Energy."""
        return predictions[0].square().mean()


def relative_errors(brain, data, cluster, bits):
    """Of both outputs and the attention weights, the slow and obvious way."""
    brain.modules.eval()
    loader = brain.make_dataloader(
        data, sb.Stage.VALID, ckpt_prefix=None, **LOADER
    )
    (batch,) = loader
    with torch.no_grad():
        plain = brain.compute_forward(batch, sb.Stage.VALID)
        with cluster_quantized(brain.modules, cluster, bits):
            other = brain.compute_forward(batch, sb.Stage.VALID)
    return [
        ((q - p).square().sum() / p.square().sum()).item()
        for p, q in zip(plain, other)
    ]


@pytest.mark.parametrize("scores", ["kl", "output_error"])
def test_all_outputs_count_where_distributions_do_not_tell_all(
    brain, data, tmp_path, scores
):
    brain.__class__ = Synthesizer
    errors = {
        cluster: relative_errors(brain, data, cluster, 3)
        for cluster in ("encoder.rnn", "output.w")
    }
    assert errors["output.w"][1:] == [0, 0] and all(errors["encoder.rnn"])
    table = scored(brain, data, scores, tmp_path)
    for cluster, expected in errors.items():
        # The mean, as the energies of all three are 1.
        mean = sum(expected) / 3
        assert table.scores[cluster][3] == pytest.approx(mean, rel=1e-4)


def test_masks_are_compared_as_bernoulli(brain, data, tmp_path):
    """Any function of the predictions is compared, in its own kind."""
    table = scored(
        brain, data, "kl", tmp_path, output=lambda p: p[0].exp()[..., :2]
    )
    assert table.method == "bernoulli_kl"


def test_what_no_plan_keeps_is_told_before_scoring(brain, data, monkeypatch):
    def pass_over(*arguments):
        raise AssertionError("must not score")

    monkeypatch.setattr(brain, "compute_forward", pass_over)
    with pytest.raises(ValueError, match="out of reach"):
        choose_bits(brain, data, budget=1, loader_kwargs=LOADER)
    with pytest.raises(ValueError, match="as 'qkv' expects"):
        choose_bits(brain, data, equal_bits="qkv", loader_kwargs=LOADER)


def test_settings_of_an_earlier_plan(brain, tmp_path):
    nearest = {"scores": "size", "rounding": "nearest"}
    choose_bits(brain, [], **nearest)
    with pytest.raises(ValueError, match=r"candidate_bits.*another output_f"):
        choose_bits(brain, [], **nearest, candidate_bits=(2, 8))
    path = tmp_path / "chosen.json"
    for damage in (lambda: path.write_text("["), path.unlink):
        damage()
        with pytest.raises(ValueError, match="does not tell what the plan"):
            choose_bits(brain, [], **nearest)


def test_wrong_scores_are_named(brain, data, tmp_path):
    with pytest.raises(ValueError, match="scores must be one of"):
        choose_bits(brain, data, "gradient")
    with pytest.raises(ValueError, match=r"needs \['weights'\]"):
        choose_bits(brain, data, MaskErrorScores(), loader_kwargs=LOADER)
    with pytest.raises(ValueError, match="granularity 'channel'"):
        choose_bits(brain, data, KLScores(granularity="channel"))
    with pytest.raises(ValueError, match="uniform bits need a budget in bits"):
        choose_bits(brain, data, "uniform", "1 KiB")


def test_patterns_belong_to_the_block(tmp_path, data):
    brain = brain_of(hparams_of("uniform", tmp_path))
    with pytest.raises(ValueError, match="give them in its block"):
        choose_bits(brain, data, exclude=["*.bias"])
    brain = brain_of(hparams_of("plain", tmp_path))
    nearest = {"scores": "size", "rounding": "nearest"}
    plan = choose_bits(brain, [], **nearest, exclude=["*.bias"])
    assert choose_bits(brain, [], **nearest, exclude="*.bias") == plan
    with pytest.raises(ValueError, match="the same at every call"):
        choose_bits(brain, [], **nearest, exclude=["output.*"])
    brain = brain_of(hparams_of("learned", tmp_path))
    with pytest.raises(ValueError, match="learns its bits"):
        choose_bits(brain, data)


@pytest.mark.parametrize(
    "scores, rounding", [("kl", None), ("size", "calibrated")]
)
def test_fresh_global_normalization(scores, rounding, brain, data, tmp_path):
    norm = InputNormalization(norm_type="global")
    brain.modules["normalize"] = norm
    options = {"loader_kwargs": LOADER, "progress": False, "folder": tmp_path}
    with pytest.raises(
        ValueError, match="normalize: no statistics yet.*--weights"
    ):
        choose_bits(brain, data, scores, rounding=rounding, **options)
    assert not (tmp_path / "plan.json").exists() or scores == "size"
    choose_bits(brain, [], "uniform", folder=tmp_path / "b", progress=False)
    norm.train()
    norm(torch.randn(2, 9, 8), torch.ones(2))
    choose_bits(brain, data, "kl", **{**options, "folder": tmp_path / "c"})


class Greedy(S2SRNNGreedySearcher):
    """A search that is a forward of its own."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.searched = []

    def forward(self, hidden):
        """Note it, and find a number."""
        self.searched.append(len(hidden))
        return len(self.searched)


class Beam(CTCBeamSearcher):
    """A search that is called without a forward."""

    def __init__(self):
        self.searched = []

    def decode_beams(self, hidden, *_):
        """Note it, and find a number."""
        self.searched.append(len(hidden))
        return len(self.searched)

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__


@pytest.mark.parametrize("place", ["hparams", "brain", "script"])
@pytest.mark.parametrize("kind", [Greedy, Beam])
def test_a_passes_metrics_and_searches_are_left_out(brain, data, kind, place):
    search, appended, found = kind(), [], []
    if place != "script":
        (brain if place == "brain" else brain.hparams).search = search
    brain.hparams.metric = MetricStats(lambda **values: appended.append(values))
    plain = brain.compute_forward

    def forward(batch, stage):
        predictions = plain(batch, stage)
        found.append([search(predictions[0]) for _ in range(2)])
        brain.hparams.metric.append(["a"], predict=predictions[0].numpy())
        return predictions

    brain.compute_forward = forward
    choose_bits(
        brain,
        data,
        "kl",
        loader_kwargs=LOADER,
        rounding="nearest",
        progress=False,
    )
    # Twice in the one batch, which are two searches.
    assert (len(search.searched), appended) == (2, [])
    assert len(found) > 10 and found == [[1, 2]] * len(found)
    assert search(torch.ones(1, 2, 3)) == 3  # as ever afterwards


@pytest.mark.parametrize("takes", ["numpy", "in C"])
def test_a_validation_that_takes_arrays(brain, data, takes):
    plain = brain.compute_objectives

    def objectives(predictions, batch, stage):
        if takes == "numpy":  # as searches and metrics do
            assert predictions[0].cpu().numpy().ndim == 3
        elif predictions[0].requires_grad:
            raise RuntimeError("no view of a Tensor that requires grad")
        return plain(predictions, batch, stage)

    brain.compute_objectives = objectives
    options = {
        "loader_kwargs": LOADER,
        "progress": False,
        "rounding": "nearest",
    }
    if takes == "numpy":
        choose_bits(brain, data, "hessian", **options)
        with pytest.raises(RuntimeError, match="requires grad"):
            torch.ones(1, requires_grad=True).numpy()
        return
    with pytest.raises(ValueError, match="use scores that need none"):
        choose_bits(brain, data, "hessian", **options)
    choose_bits(brain, data, "loss", **options)


def test_anchors_cannot_be_taken_for_those_of_another_loading():
    text = "a: &id001 (4, 4)\nb: *id001\nurl: http://x?a&id001\n"
    assert ANCHOR.sub(r"\1saved\2", text) == (
        "a: &saved001 (4, 4)\nb: *saved001\nurl: http://x?a&id001\n"
    )
    # As ruamel.yaml writes `- [!ref <a>, !ref <b>]`.
    text = "c:\n- [*id001, *id002]\n- {*id003,*id004: 2}\n"
    assert "id0" not in ANCHOR.sub(r"\1saved\2", text)


def test_folders_without_a_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="finished training"):
        pack_results(tmp_path)


def test_names_take_settings():
    scheme = Scheme()
    assert scorer_of("random:seed=3", scheme).seed == 3
    assert scorer_of("hessian:probes=50", scheme, (2, 4)).probes == 50
    method = method_of("admm:penalty=0.5,growth=2")
    assert (method.penalty, method.growth) == (0.5, 2)
    printed = method_of("admm_printed")
    assert (printed.penalty, printed.growth, printed.step) == (1e-3, 1, 1e-3)
    for text in ("random:sed=3", "random:3", "randm:seed=3", "uniform:a=1"):
        with pytest.raises(ValueError):
            scorer_of(text, scheme)
    for text in ("admm:penalt=1", "admm:1", "adm:penalty=1"):
        with pytest.raises(ValueError):
            method_of(text)
