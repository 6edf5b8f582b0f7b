"""The runner of untouched recipes: what it is asked for, what it sees."""

import signal
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY_RECIPE, brain_of, hparams_of, script
from speechbrain.utils import checkpoints
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_mpq import choose_bits, run
from speechbrain_mpq.locks import IN_USE, folder_in_use
from speechbrain_mpq.quantization.packing import read_packed
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.run import (
    Runner,
    UnsuitableScript,
    _parser,
    main,
    quantized_fit,
)


class Onlooker:
    """Notes what a script gives to fit."""

    def before_fit(self, *given):
        """Keep it."""
        self.given = given

    def trains(self, brain):
        """Go on."""
        return True

    def after_fit(self, brain):
        """Nothing to pack."""


@pytest.mark.parametrize(
    "options, match",
    [
        (["--bits", "4 apples"], "budget '4 apples' is not understood"),
        (["--scores", "lk"], r"scores must be one of \('kl', 'output_error'"),
        (["--method", "adm"], r"method 'adm' is none of \('post_training'"),
        (["--method", "one_stage", "--scores", "kl"], "leave scores out"),
        (["--method", "admm", "--rounding", "calibrated"], "nearest"),
        (["--granularity", "row"], "granularity must be one of"),
        (["--rows", "0"], "rows must be a positive number"),
        (["--weights", "gone"], "no folder gone: change --weights"),
        (["--folder", __file__], "nothing can be written.*change --folder"),
        (["--folder", f"{__file__}/results"], "Not a directory"),
        (["--folder", "x" * 300], "File name too long"),
        (["--weights", "."], "no checkpoint in .: --weights wants"),
        (["--candidate_bits", "2", "17"], "candidate bits .* not 17"),
        (["--candidate_bits", "1.5", "2"], "candidate bits .* not 1.5"),
        (["--min_bits", "0"], "min_bits is 0: take 1 to 16"),
        (["--batches", "0"], "batches is 0: take at least 1"),
    ],
)
def test_runner_does_not_start_what_it_cannot_finish(tmp_path, options, match):
    script = tmp_path / "train.py"
    script.write_text("raise AssertionError('must not run')")
    with pytest.raises(SystemExit, match=match):
        main([str(script), *options])


def test_three_levels_are_among_the_candidates():
    options = ["--candidate_bits", "1.6", "2", "--min_bits", "1.6"]
    parsed, _ = _parser().parse_known_args(["train.py", *options])
    assert parsed.candidate_bits == [1.6, 2] and parsed.min_bits == 1.6


def test_a_mistyped_option_is_told_before_the_script_gets_it(tmp_path, capsys):
    """What the hparams file or SpeechBrain has is the script's."""
    script, hparams = tmp_path / "train.py", tmp_path / "train.yaml"
    script.write_text("raise SystemExit('the script ran')")
    hparams.write_text("weight: 1\nbatch: 2\n")
    asked = ["--weight", "2", "--batch=3", "--nonfinite_patience", "1"]
    with pytest.raises(SystemExit, match="the script ran"):
        main([str(script), str(hparams), *asked])
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="the script ran"):
        main([str(script), str(hparams), *asked, "--bit=4"])
    said = capsys.readouterr().err
    assert said == f"{hparams} has no key for --bit: did you mean --bits?\n"


@pytest.mark.parametrize("by_name", [True, False])
def test_the_loader_of_the_recipe_is_used(tmp_path, by_name):
    hparams, onlooker = hparams_of("plain", tmp_path, epochs=1), Onlooker()
    brain, loader = brain_of(hparams), {"batch_size": 4}
    train, valid = (script().dataset(4, seed=seed) for seed in (1, 2))
    arguments = [hparams["epoch_counter"], train, valid]
    with quantized_fit(onlooker):
        if by_name:
            brain.fit(*arguments, valid_loader_kwargs=loader)
        else:
            brain.fit(*arguments, False, loader, loader)
    assert onlooker.given == (brain, train, valid, loader)


class Tester(Onlooker):
    """Lets a script train and evaluate."""

    def before_evaluate(self, brain):
        """Go on."""


def test_what_fit_sets_is_there_in_a_test_only(tmp_path, caplog):
    """As for SpeechBrain's Tacotron2 and HiFiGAN, which end there."""
    data = script().dataset(4, seed=1)
    trained = brain_of(hparams_of("plain", tmp_path, epochs=1))
    trained.fit(trained.hparams.epoch_counter, data, data)
    brain = brain_of(hparams_of("plain", tmp_path), test_only=True)
    with torch.no_grad():
        for parameter in brain.modules.parameters():
            parameter.zero_()
    kind = type(brain)

    class Late(kind):
        def on_fit_start(self):
            super().on_fit_start()
            self.last = 0

        def compute_objectives(self, *given, **named):
            self.last += 1
            return super().compute_objectives(*given, **named)

    brain.__class__ = Late
    with pytest.raises(AttributeError, match="last"):
        brain.evaluate(data)
    with quantized_fit(Tester()):
        loss = brain.evaluate(data)
    assert "on_fit_start is run" in caplog.text
    assert brain.last == 4 and brain.step == 0
    assert loss == trained.evaluate(data)
    brain.test_only = False
    del brain.last
    with quantized_fit(Tester()), pytest.raises(AttributeError, match="last"):
        brain.evaluate(data)


@pytest.fixture
def ends(tmp_path):
    """The tiny recipe in a script that fails after its training."""
    text = (TINY_RECIPE / "train.py").read_text(encoding="utf-8")
    last = "    main(sys.argv[1:])\n"
    assert text.endswith(last)
    path = tmp_path / "train.py"
    path.write_text(text + "    assert not sys.argv, 'too bad a loss'\n")
    return path


def test_what_comes_after_a_training_does_not_cost_it(ends, tmp_path):
    own = [f"--output_folder={tmp_path / 'own'}", "--device=cpu", "--epochs=1"]
    bits = ["--bits=4", "--scores=size", "--rounding=nearest"]
    folder = tmp_path / "results"
    options = [*own, *bits, f"--folder={folder}", "--float_vectors"]
    yaml = TINY_RECIPE / "train.yaml"
    with pytest.raises(AssertionError, match="too bad a loss"):
        main([str(ends), str(yaml), *options])
    plan = BitPlan.load(folder / "plan.json")
    assert "norm" not in plan.clusters
    quantized, _ = read_packed(folder / "packed")
    assert set(quantized) == set(plan.tensors)


def test_jit_is_refused_before_any_scoring(tmp_path):
    hparams = hparams_of("plain", tmp_path)
    brain = brain_of(hparams, jit=True)
    with pytest.raises(ValueError, match="module 'encoder'.*leave out --jit"):
        choose_bits(brain, [], "kl", progress=False)
    brain = brain_of(hparams, jit=True, jit_module_keys=["output"])
    choose_bits(brain, [], "uniform", exclude=["output.*"], rounding="nearest")


def test_a_brain_that_no_script_has_is_told_before_any_training(tmp_path):
    brain = brain_of(hparams_of("plain", tmp_path))
    runner = Runner("4", brain="TinyASP")
    with pytest.raises(UnsuitableScript, match="did you mean TinyASR"):
        runner.before_fit(brain, [], [], {})
    Runner("4", brain="Brain").before_fit(brain, [], [], {})  # a later one


def test_two_processes_do_not_share_a_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    brain = brain_of(hparams_of("plain", tmp_path))
    with open(tmp_path / IN_USE, "w") as held:  # as another process would
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UnsuitableScript, match="another process is at"):
            Runner("4").before_fit(brain, [], [], {})
        with pytest.raises(BlockingIOError, match="another process is at"):
            choose_bits(brain, [], "uniform", rounding="nearest")
    runner = Runner("4", scores="uniform", rounding="nearest")
    runner.before_fit(brain, [], [], {})
    assert folder_in_use(tmp_path)
    runner.release()
    assert not (tmp_path / IN_USE).exists()


def test_weights_of_one_checkpoint_or_the_latest(tmp_path, caplog):
    model = torch.nn.Linear(1, 1)
    checkpointer = Checkpointer(tmp_path, {"model": model})
    for number, name in enumerate(("best", "latest")):
        torch.nn.init.constant_(model.weight, number)
        checkpointer.save_checkpoint(name=name)
        time.sleep(0.02)  # the order is by time
    brain = SimpleNamespace(
        checkpointer=SimpleNamespace(recoverables={"model": model})
    )
    run._load_weights(brain, tmp_path / "CKPT+best")
    assert model.weight.item() == 0 and "latest of" not in caplog.text
    with caplog.at_level("WARNING"):
        run._load_weights(brain, tmp_path)
    assert model.weight.item() == 1
    assert "CKPT+latest is the latest of 2 checkpoints" in caplog.text
    Runner(4, weights=str(tmp_path / "CKPT+best"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_it_as_an_error_would(tmp_path, name):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, signal, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(60)\n"
        "finally:\n"
        f"    pathlib.Path({str(tmp_path / 'tidied')!r}).touch()\n"
    )
    # Under nohup it is ignored, and stays so: a training goes on
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(script)])
    finally:
        signal.signal(getattr(signal, name), before)
    assert ended.value.code == 128 + getattr(signal, name)
    assert (tmp_path / "tidied").exists()


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    tmp_path, monkeypatch
):
    line = [str(TINY_RECIPE / "train.py"), str(TINY_RECIPE / "train.yaml")]
    line += ["--device=cpu", "--noprogressbar", "--epochs=1"]
    line += [f"--output_folder={tmp_path}", "--bits=4", "--scores=uniform"]
    save = checkpoints.torch_save

    def killed(module, path):
        if "output" in str(path.name):
            raise KeyboardInterrupt
        save(module, path)

    hooks = checkpoints.DEFAULT_SAVE_HOOKS
    monkeypatch.setitem(hooks, torch.nn.Module, killed)
    with pytest.raises(KeyboardInterrupt):
        main(line)
    monkeypatch.undo()
    assert list((tmp_path / "save").iterdir())  # a part of one
    assert not list((tmp_path / "save").glob("CKPT*"))
    assert main(line).is_file()
    assert all(p.name[:4] == "CKPT" for p in (tmp_path / "save").iterdir())
