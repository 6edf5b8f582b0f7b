"""Checkpoints: damaged ones are passed over, parts come with their scales."""

import os

import pytest
import torch
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from speechbrain.utils import checkpoints
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_mpq.quantization.fake_quant import (
    FakeQuantize,
    LearnedStep,
    LogStep,
)
from speechbrain_mpq.quantization.packing import load_packed_, read_model
from speechbrain_mpq.training.checkpoints import (
    AtomicCheckpointer,
    check_same_network,
    recover_whole,
)
from speechbrain_mpq.training.quantizer import Quantizer


class Interrupted(Exception):
    """Stands in for a kill."""


def test_interrupted_save_leaves_the_last_whole_checkpoint(tmp_path):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    checkpointer.save_and_keep_only({"loss": 1.0}, min_keys=["loss"])
    weight = layer.weight.detach().clone()

    def interrupt(obj, path):
        path.write_bytes(b"half")
        raise Interrupted

    layer.weight.data.add_(1)
    checkpointer.custom_save_hooks["layer"] = interrupt
    with pytest.raises(Interrupted):
        checkpointer.save_and_keep_only({"loss": 0.5}, min_keys=["loss"])

    fresh = torch.nn.Linear(2, 1)
    again = AtomicCheckpointer(tmp_path, {"layer": fresh})
    # Somebody may be writing who only looks on here
    assert list(tmp_path.glob("partial+*"))
    checkpoint = again.recover_if_possible(min_key="loss")
    assert checkpoint.meta["loss"] == 1.0
    assert torch.equal(fresh.weight, weight)
    again.save_checkpoint()
    assert not list(tmp_path.glob("partial+*"))
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_best_and_the_latest_are_kept(tmp_path):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    for loss in (3.0, 1.0, 2.0):
        layer.weight.data.fill_(loss)
        checkpointer.save_and_keep_only({"loss": loss}, min_keys=["loss"])
    checkpointer.recover_if_possible(min_key="loss")
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert len(checkpointer.list_checkpoints()) == 2


def two_checkpoints(folder, **recoverables):
    """A checkpointer with an older and a newer checkpoint, and the newer."""
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(folder, {"layer": layer, **recoverables})
    layer.weight.data.fill_(1.0)
    older = checkpointer.save_checkpoint({"loss": 2.0}, name="older")
    layer.weight.data.fill_(2.0)
    newer = checkpointer.save_checkpoint({"loss": 1.0}, name="newer")
    os.utime(older.path, (1, 1))
    return checkpointer, layer, newer


def empty(path):
    """As after a crash of the system: names are there, contents are not."""
    path.write_bytes(b"")


def zeros(path):
    """The same, where the length is right."""
    path.write_bytes(bytes(path.stat().st_size))


def half(path):
    """A disk that was full."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    """Another content of the same length."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


def other(path):
    """What a server answers with, or a file that was written over."""
    path.write_bytes(b"<html>404</html>")


def byte(path):
    """Cut after the first byte."""
    path.write_bytes(path.read_bytes()[:1])


def folder(path):
    """No file at all."""
    path.unlink()
    path.mkdir()


def link(path):
    """A link to what is gone."""
    path.unlink()
    path.symlink_to("gone")


def pipe(path):
    """What nobody writes to."""
    path.unlink()
    os.mkfifo(path)


DAMAGES = [empty, zeros, half, flipped, os.remove]
DAMAGES += [other, byte, folder, link, pipe]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("how", [{}, {"min_key": "loss"}], ids=["new", "best"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage, how):
    checkpointer, layer, newer = two_checkpoints(tmp_path)
    damage(newer.paramfiles["layer"])
    found = checkpointer.recover_if_possible(**how)
    assert found.path.name == "CKPT+older"
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert "CKPT+newer is damaged (" in caplog.text
    assert "in its place" in caplog.text


@pytest.mark.parametrize("text", ["1.5", "x", "[1]"])
def test_a_damaged_counter_is_passed_over(tmp_path, text):
    counter = EpochCounter(9)
    checkpointer, layer, newer = two_checkpoints(tmp_path, counter=counter)
    newer.paramfiles["counter"].write_text(text)
    checkpointer.recover_if_possible()
    assert layer.weight.tolist() == [[1.0, 1.0]] and counter.current == 0


@pytest.mark.parametrize("order", [1, -1])
def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, order):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    for loss in (float("nan"), 2.0, float("inf"))[::order]:
        layer.weight.data.fill_(loss)
        checkpointer.save_checkpoint({"loss": loss, "lost": float("nan")})
    for how in ({"min_key": "loss"}, {"max_key": "loss"}):
        found = checkpointer.recover_if_possible(**how)
        assert found.meta["loss"] == 2.0
    with pytest.raises(ValueError, match="has a finite lost: the training"):
        checkpointer.recover_if_possible(min_key="lost")


TEXTS = ["", "\0" * 80, "unixtime: 1", "a: [", "- 1"]
TEXTS += [f"end-of-epoch: true\nunixtime: {x}" for x in ("today", ".nan", "[]")]


@pytest.mark.parametrize("text", TEXTS)
def test_a_damaged_description_is_passed_over(tmp_path, caplog, text):
    checkpointer, layer, newer = two_checkpoints(tmp_path)
    (newer.path / "CKPT.yaml").write_text(text)
    checkpointer.recover_if_possible()
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert "CKPT+newer is damaged (CKPT.yaml" in caplog.text
    checkpointer.save_and_keep_only({"loss": 0.5}, min_keys=["loss"])


def test_speechbrains_own_checkpointer_recovers_likewise(tmp_path):
    _, layer, newer = two_checkpoints(tmp_path)
    half(newer.paramfiles["layer"])
    (tmp_path / "CKPT+another").mkdir()
    (tmp_path / "CKPT+another/CKPT.yaml").write_text("")
    recover_whole(Checkpointer(tmp_path, {"layer": layer}))
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert recover_whole(Checkpointer(tmp_path / "new", {"l": layer})) is None


def test_no_whole_checkpoint_is_no_fresh_start(tmp_path):
    checkpointer, _, newer = two_checkpoints(tmp_path)
    for path in tmp_path.rglob("layer.ckpt"):
        half(path)
    with pytest.raises(ValueError, match="no whole checkpoint.*Delete them"):
        checkpointer.recover_if_possible()


def test_another_models_checkpoint_is_an_error_as_ever(tmp_path):
    two_checkpoints(tmp_path)
    other = AtomicCheckpointer(tmp_path, {"layer": torch.nn.Linear(3, 1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.recover_if_possible()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path, monkeypatch
):
    layer, order = torch.nn.Linear(2, 1), []
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda f: order.append("disk") or fsync(f))
    monkeypatch.setattr(
        "os.replace", lambda *p: order.append("name") or replace(*p)
    )
    checkpointer.save_checkpoint()
    # Two files and their folder, then the folder with the new name.
    assert order == ["disk"] * 3 + ["name", "disk"]


def test_a_name_can_be_used_again(tmp_path):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    for value in (1.0, 2.0):
        layer.weight.data.fill_(value)
        checkpointer.save_checkpoint(name="best")
    assert [p.name for p in tmp_path.iterdir()] == ["CKPT+best"]
    layer.weight.data.fill_(0.0)
    checkpointer.recover_if_possible()
    assert layer.weight.tolist() == [[2.0, 2.0]]


def adapted(seed=0, **options):
    """A model with adapters: only these are trained, and saved."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    return AdaptedModel(
        torch.nn.Sequential(*layers),
        adapter_class=LoRA,
        all_linear=True,
        adapter_kwargs={"rank": 2},
        **options,
    )


def train(model, steps=5):
    """Some steps of what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "estimator", [LogStep, LearnedStep, FakeQuantize], ids=lambda e: e.__name__
)
@pytest.mark.parametrize(
    "exclude", [["*.bias"], ["*adapter*"], ["*pretrained*"]], ids=str
)
def test_parts_of_a_model_are_resumed_with_their_scales(
    tmp_path, estimator, exclude
):
    options = {"bits": 4, "exclude": exclude, "estimator": estimator}
    model, x = adapted(), torch.randn(2, 8)
    Quantizer({"asr": model}, **options)
    train(model)
    Checkpointer(tmp_path, {"model": model}).save_checkpoint()
    again = adapted()
    Quantizer({"asr": again}, **options)
    Checkpointer(tmp_path, {"model": again}).recover_if_possible()
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_parts_in_full_precision_load_into_a_quantized_model(tmp_path):
    full = adapted()
    train(full)
    Checkpointer(tmp_path, {"model": full}).save_checkpoint()
    model = adapted()
    Quantizer({"asr": model}, bits=8)
    Checkpointer(tmp_path, {"model": model}).recover_if_possible()
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), full(x), atol=0.05, rtol=0.05)


def test_parts_of_other_bits_are_refused(tmp_path):
    model = adapted()
    Quantizer({"asr": model}, bits=4)
    Checkpointer(tmp_path, {"model": model}).save_checkpoint()
    other = adapted()
    Quantizer({"asr": other}, bits=2)
    with pytest.raises(ValueError, match="quantized to another plan"):
        Checkpointer(tmp_path, {"model": other}).recover_if_possible()


class Half(torch.nn.Module):
    """A head that is trained, behind a body that is not."""

    def __init__(self):
        super().__init__()
        self.body, self.head = (torch.nn.Linear(8, 8) for _ in range(2))
        self.body.requires_grad_(False)

    def forward(self, x):
        """Both."""
        return self.head(self.body(x).relu())


@checkpoints.register_checkpoint_hooks
class HeadSaved(Half):
    """Its hooks save the head's own state."""

    @checkpoints.mark_as_saver
    def save(self, path):
        """Save the head."""
        torch.save({"head": self.head.state_dict(), "of": 2}, path)

    @checkpoints.mark_as_loader
    def load(self, path, end_of_epoch):
        """Load the head."""
        self.head.load_state_dict(torch.load(path)["head"])


@checkpoints.register_checkpoint_hooks
class TrainedSaved(Half):
    """Its hooks save what is trained; it has none for Pretrainers."""

    @checkpoints.mark_as_saver
    def save(self, path):
        """Save what is trained."""
        named = self.named_parameters()
        torch.save({n: p.data for n, p in named if p.requires_grad}, path)

    @checkpoints.mark_as_loader
    def load(self, path, end_of_epoch):
        """Load what there is."""
        self.load_state_dict(torch.load(path), strict=False)


class HeadInState(Half):
    """Its state dict leaves out the body."""

    def state_dict(self, *args, **kwargs):
        """The head's."""
        state = super().state_dict(*args, **kwargs)
        return {n: v for n, v in state.items() if not n.startswith("body")}

    def load_state_dict(self, state, strict=True):
        """What there is."""
        return super().load_state_dict(state, strict=False)


def save_trained(model, path):
    """A checkpointer's hook: parameters that are trained, no buffers."""
    named = model.named_parameters()
    torch.save({n: p.data for n, p in named if p.requires_grad}, path)


def save_head(model, path):
    """A checkpointer's hook: state of the head."""
    state = model.state_dict()
    torch.save({n: v for n, v in state.items() if n.startswith("head")}, path)


def load_some(model, path, end_of_epoch):
    """A checkpointer's hook: what there is."""
    model.load_state_dict(torch.load(path), strict=False)


PARTS = {
    "class": (HeadSaved, None),
    "trained": (TrainedSaved, None),
    "state_dict": (HeadInState, None),
    "hook, trained": (Half, save_trained),
    "hook, head": (Half, save_head),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "estimator", [LogStep, LearnedStep, FakeQuantize], ids=lambda e: e.__name__
)
def test_a_part_that_is_saved_on_purpose_is_resumed(tmp_path, part, estimator):
    kind, saver = PARTS[part]

    def start():
        torch.manual_seed(0)
        model = kind()
        Quantizer({"asr": model}, bits=3, estimator=estimator)
        checkpointer = Checkpointer(tmp_path)
        loader = load_some if saver else None
        checkpointer.add_recoverable("m", model, loader, saver)
        return model, checkpointer

    model, checkpointer = start()
    train(model)
    checkpointer.save_checkpoint()
    again, checkpointer = start()
    checkpointer.recover_if_possible()
    x = torch.randn(2, 8)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_scales_that_were_not_saved_are_fitted(tmp_path, caplog):
    model, again = Half(), Half()
    for own in (model, again):
        own.head.weight.data.mul_(1 if own is model else 100)
        Quantizer({"asr": own}, bits=8)
    path = tmp_path / "x"
    save_trained(model, path)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.add_recoverable("m", model, load_some, save_trained)
    checkpointer.save_checkpoint()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.add_recoverable("m", again, load_some, save_trained)
    checkpointer.recover_if_possible()
    assert "head.weight: its scales were not saved" in caplog.text
    error = (again.head.weight - model.head.weight).norm()
    assert error < 0.02 * model.head.weight.norm()


def test_a_pretrainer_may_lack_nothing_after_parts_were_saved(tmp_path):
    Quantizer({"asr": TrainedSaved()}, bits=4)  # nor may its class change that
    model = Half()
    Quantizer({"asr": model}, bits=4)
    state = {f"module.{n}": v for n, v in Half().state_dict().items()}
    torch.save(state, tmp_path / "m.ckpt")
    pretrainer = Pretrainer(
        tmp_path, {"m": model}, {"m": str(tmp_path / "m.ckpt")}
    )
    pretrainer.collect_files()
    with pytest.raises(ValueError, match="lacks 'body.weight'"):
        pretrainer.load_collected()


@pytest.mark.parametrize("kind", [HeadSaved, TrainedSaved, HeadInState])
def test_a_model_that_saves_a_part_is_packed_whole(tmp_path, kind):
    model = kind()
    quantizer = Quantizer({"asr": model}, bits=3)
    train(model)
    path = quantizer.pack(tmp_path)
    plain = torch.nn.ModuleDict({"asr": kind()})
    load_packed_(plain, path)
    x = torch.randn(2, 8)
    assert torch.equal(plain["asr"](x), model.eval()(x))
    stored = read_model(path)
    states = [{"head": {}, "of": 2}] if kind is HeadSaved else []
    assert list(stored.states.values()) == states


def test_a_whole_model_may_lack_nothing_as_ever():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    Quantizer({"layer": layer}, bits=4)
    with pytest.raises(ValueError, match="lacks '0.weight'"):
        layer.load_state_dict({}, strict=False)


def test_checkpoints_of_a_network_of_other_sizes_are_refused(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"net": torch.nn.Linear(2, 1)})
    check_same_network(torch.nn.Linear(3, 1), checkpointer, "go", name="net")
    checkpoint = checkpointer.save_checkpoint()
    check_same_network(torch.nn.Linear(2, 1), checkpointer, "go", name="net")
    with pytest.raises(ValueError, match=r"weight is \[1, 2\], here .*: go$"):
        check_same_network(
            torch.nn.Linear(3, 1), checkpointer, "go", name="net"
        )
    path = checkpoint.paramfiles["net"]
    path.write_bytes(path.read_bytes()[:40])
    check_same_network(torch.nn.Linear(3, 1), checkpointer, "go", name="net")
