"""Trainings of an untouched recipe with a few more lines of YAML."""

import re

import pytest
import torch
from helpers import (
    LEARNED,
    LEARNING,
    OPTIMIZER,
    PLAIN,
    brain_of,
    fit,
    hparams_of,
    needs_bf16_lstm,
    script,
    train_tiny,
)
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq import Quantizer, learn_bits, pack_results
from speechbrain_mpq.quantization.packing import read_packed
from speechbrain_mpq.training import quantizer as quantizers

KINDS = ["uniform", "learned"]


def state(brain):
    """All tensors of the modules, copied."""
    return {k: v.clone() for k, v in brain.modules.state_dict().items()}


def assert_equal_states(one, other):
    """Bit-identical, and of the same names."""
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_ends_within_the_budget(kind, tmp_path):
    brain, hparams = train_tiny(kind, tmp_path, epochs=6)
    log = (tmp_path / "train_log.txt").read_text()
    losses = [float(loss) for loss in re.findall(r"train loss: (\S+)", log)]
    assert losses[-1] < 0.6 * losses[0]
    assert hparams["quantizer"].plan.average_bits <= 4
    for cluster in hparams["quantizer"].plan.clusters.values():
        for name in cluster.tensors:
            module, _, attribute = name.rpartition(".")
            weight = getattr(brain.modules.get_submodule(module), attribute)
            assert len(weight.unique()) < 2**cluster.bits


def test_six_lines_are_enough_to_learn_bits(tmp_path):
    """Those of docs/plug-in.md: three of its own, three for the optimizer."""
    block = LEARNED.split("    interval")[0]
    text = PLAIN.replace(OPTIMIZER, LEARNING) + block
    lines = [line for line in (LEARNING + block).splitlines() if line]
    assert len(lines) == 6
    overrides = {"output_folder": str(tmp_path), "epochs": 1, "items": 80}
    hparams = load_hyperpyyaml(text, overrides)
    quantizer = hparams["quantizer"]
    assert quantizer.plan.average_bits == 16
    fit(brain_of(hparams), hparams)  # in which the first decision is made
    assert quantizer.one_stage.step == quantizer.one_stage.interval == 20
    assert quantizer.plan.average_bits <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_bit_identical(kind, tmp_path):
    straight, _ = train_tiny(kind, tmp_path / "straight", epochs=3)
    train_tiny(kind, tmp_path / "halves", epochs=1)
    resumed, _ = train_tiny(kind, tmp_path / "halves", epochs=3)
    assert_equal_states(state(straight), state(resumed))
    logs = [
        tmp_path / name / "train_log.txt" for name in ("straight", "halves")
    ]
    assert logs[0].read_text() == logs[1].read_text()


def test_learned_bits_resume_between_decisions(tmp_path):
    """One epoch is two steps: the second decision comes after the resume."""
    options = {"items": 12}  # three steps an epoch
    straight, one = train_tiny("learned", tmp_path / "a", epochs=2, **options)
    train_tiny("learned", tmp_path / "b", epochs=1, **options)
    resumed, other = train_tiny("learned", tmp_path / "b", epochs=2, **options)
    assert one["quantizer"].one_stage.settled
    assert one["quantizer"].plan == other["quantizer"].plan
    assert_equal_states(state(straight), state(resumed))


@pytest.mark.parametrize("kind", KINDS)
def test_test_only_evaluates_the_trained_weights(kind, tmp_path):
    brain, hparams = train_tiny(kind, tmp_path)
    data = script().dataset(4, seed=3)
    options = {"min_key": "loss", "test_loader_kwargs": {"batch_size": 4}}
    trained = brain.evaluate(data, **options)
    again = hparams_of(kind, tmp_path)
    tester = brain_of(again, test_only=True)
    fit(tester, again)
    assert tester.optimizer_step == 0
    assert tester.evaluate(data, **options) == trained
    assert again["quantizer"].plan == hparams["quantizer"].plan


@needs_bf16_lstm
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, tmp_path):
    options = {"precision": "bf16", "eval_precision": "bf16"}
    brain, hparams = train_tiny(kind, tmp_path, epochs=3, run_opts=options)
    weights = [p for p in brain.modules.parameters() if p.requires_grad]
    assert all(w.dtype == torch.float32 for w in weights)
    assert all(w.isfinite().all() for w in weights)
    assert hparams["quantizer"].plan.average_bits <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_with_those_of_the_scales(kind, tmp_path):
    hparams = hparams_of(kind, tmp_path, epochs=1)
    brain = brain_of(hparams, max_grad_norm=1e-3)
    seen = []

    def look(optimizer, *_):
        gradients = [p.grad for p in brain.modules.parameters()]
        seen.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    original = brain.init_optimizers

    def init_and_look():
        original()
        brain.optimizer.register_step_pre_hook(look)

    brain.init_optimizers = init_and_look
    fit(brain, hparams)
    assert len(brain.optimizer.param_groups) == 1
    assert seen
    assert max(seen) <= 1.01e-3


def test_vector_weight_decay_makes_groups_that_learn_bits(tmp_path):
    brain, hparams = train_tiny(
        "learned", tmp_path, run_opts={"remove_vector_weight_decay": True}
    )
    assert len(brain.optimizer.param_groups) == 2
    assert hparams["quantizer"].plan.average_bits <= 4


def test_full_precision_checkpoint_starts_a_quantized_training(tmp_path):
    plain, _ = train_tiny("plain", tmp_path / "plain")
    found = plain.checkpointer.find_checkpoint()
    hparams = hparams_of("uniform", tmp_path / "quantized")
    for name in ("encoder", "output"):
        weights = torch.load(found.paramfiles[name], weights_only=True)
        # As SpeechBrain's Pretrainer does it.
        answer = hparams["modules"][name].load_state_dict(weights, strict=False)
        assert not answer.missing_keys
        assert not answer.unexpected_keys
    loaded = hparams["modules"]["output"].w.weight.detach()
    wanted = torch.load(found.paramfiles["output"], weights_only=True)[
        "w.weight"
    ]
    error = (loaded - wanted).norm() / wanted.norm()
    assert 0 < error < 0.2  # 4 bits of scales that fit the loaded weights


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_packed_as_they_were_evaluated(kind, tmp_path):
    brain, hparams = train_tiny(kind, tmp_path)
    (tmp_path / "hyperparams.yaml").write_text(
        yaml_text(kind, tmp_path), encoding="utf-8"
    )
    path = pack_results(tmp_path, min_key="loss")
    brain.checkpointer.recover_if_possible(min_key="loss")
    packed, _ = read_packed(path.parent)
    tensor = packed["output.w.weight"]
    values = tensor.integers * tensor.alpha
    assert torch.equal(values, brain.modules["output"].w.weight)


def yaml_text(kind, folder):
    """What SpeechBrain leaves in an output folder."""
    from helpers import quantized_yaml
    from hyperpyyaml import resolve_references

    overrides = {"output_folder": str(folder)}
    return resolve_references(quantized_yaml(kind), overrides).getvalue()


def test_folder_without_a_training_cannot_be_packed(tmp_path):
    with pytest.raises(FileNotFoundError, match="hyperparams.yaml"):
        pack_results(tmp_path)
    (tmp_path / "hyperparams.yaml").write_text(yaml_text("plain", tmp_path))
    with pytest.raises(ValueError, match="no quantized training"):
        pack_results(tmp_path)
    (tmp_path / "hyperparams.yaml").write_text(yaml_text("uniform", tmp_path))
    with pytest.raises(ValueError, match="no checkpoint in"):
        pack_results(tmp_path)


def test_learned_bits_without_their_optimizer_are_refused(tmp_path):
    hparams = hparams_of("learned", tmp_path)
    hparams["opt_class"] = torch.optim.SGD
    with pytest.raises(ValueError, match="speechbrain_mpq.learn_bits"):
        fit(brain_of(hparams), hparams)


def test_a_step_that_a_gradient_scaler_skips_does_not_count(tmp_path):
    """As with --precision=fp16: gradients overflow, nothing is stepped."""
    hparams = hparams_of("learned", tmp_path)
    layer, quantizer = hparams["modules"]["output"], hparams["quantizer"]
    optimizer = hparams["opt_class"](quantizer.model.parameters())
    layer(torch.ones(12) * 1e38).square().sum().backward()
    pending = quantizer.one_stage.gradients._pending
    assert not pending["output.w.weight"].isfinite().all()
    optimizer.zero_grad()
    quantizer.model["encoder"](torch.ones(1, 3, 8))[0].sum().backward()
    layer(torch.ones(12)).square().sum().backward()
    norm = hparams["modules"]["norm"](torch.randn(2, 12))
    norm.square().sum().backward()
    optimizer.step()
    sums = quantizer.one_stage.gradients.sums
    assert quantizer.one_stage.step == 1
    assert all(total.isfinite().all() for total in sums.values())


def test_validation_before_the_first_decision_is_refused(tmp_path):
    hparams = hparams_of("learned", tmp_path)
    hparams["quantizer"].one_stage.interval = 5
    with pytest.raises(ValueError, match="lower interval"):
        fit(brain_of(hparams), hparams)


def test_optimizer_without_a_quantized_weight_is_refused(tmp_path):
    hparams = hparams_of("learned", tmp_path)
    others = hparams["modules"]["encoder"].parameters()
    with pytest.raises(ValueError, match="norm.* optimizer does not train"):
        learn_bits(others, hparams["quantizer"], torch.optim.SGD, lr=0.1)


def test_checkpoint_of_plain_training_has_no_learned_bits(tmp_path):
    train_tiny("uniform", tmp_path, epochs=1)
    with pytest.raises(ValueError, match="learned no bits"):
        train_tiny("learned", tmp_path, epochs=2)


def test_a_module_that_no_loss_reaches_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quantizers, "PATIENCE", 2)
    hparams = hparams_of("plain", tmp_path)
    hparams["modules"]["idle"] = torch.nn.Linear(2, 2)
    quantizer = Quantizer(hparams["modules"])
    with pytest.raises(ValueError, match=r"no loss reaches idle.*exclude"):
        fit(brain_of(hparams), hparams)
    quantizer.dequantize()
    hparams = hparams_of("plain", tmp_path)
    hparams["modules"]["idle"] = torch.nn.Linear(2, 2)
    ignoring = Quantizer(hparams["modules"], unreached="ignore")
    fit(brain_of(hparams), hparams)
    assert "idle.weight" in ignoring.plan.tensors


def test_frozen_modules_need_no_gradient(tmp_path):
    hparams = hparams_of("plain", tmp_path)
    hparams["modules"]["encoder"].requires_grad_(False)
    Quantizer(hparams["modules"])
    frozen = list(hparams["modules"]["encoder"].parameters())
    assert not any(weight.requires_grad for weight in frozen)
    fit(brain_of(hparams), hparams)


def test_checkpoint_of_another_plan_is_refused(tmp_path):
    train_tiny("uniform", tmp_path, epochs=1)
    hparams = hparams_of("uniform", tmp_path)
    hparams["quantizer"].quantize(8)
    with pytest.raises(ValueError, match=r"another plan.*bits 4 there and 8"):
        fit(brain_of(hparams), hparams)
