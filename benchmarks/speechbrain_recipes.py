"""SpeechBrain's own recipes: trained, killed, resumed, packed, compared.

> python benchmarks/speechbrain_recipes.py SPEECHBRAIN --out results/recipes

SPEECHBRAIN is a clone of https://github.com/speechbrain/speechbrain, whose
recipes and samples are in no wheel. Recipes are made small, and run in copies
(speechbrain_recipes.yaml beside this file), in three ways:

* "float": as it is, packed in full precision;
* "block": with the block of docs/plug-in.md in its hparams;
* "runner": the script as it is under `python -m speechbrain_mpq.run`, 2 bits.

Where a recipe has checkpoints it is killed in its second epoch and the same
command given again. What was trained is then packed and loaded into modules
that the hparams make anew, with other weights: state_dict() and the outputs of
every module that the Brain called for a validation batch have to be the same
bits. `pack_results` packs once more, from the output folder alone. Some are
given the command a third time with --test_only, and compared likewise.

Some recipes need what is not in constraints.txt: transformers below 5,
unidecode, pandas, mir_eval, datasets below 4, matplotlib, pesq, sentencepiece.
"""

import argparse
import copy
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import site
import sys
import time
import traceback
from functools import wraps
from pathlib import Path

import hyperpyyaml
import speechbrain as sb
import torch
import yaml

from speechbrain_mpq import pack_results
from speechbrain_mpq import run as runner
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.parametrized import copies_apart
from speechbrain_mpq.quantization.quant_api import dequantize_
from speechbrain_mpq.quantization.state import module_states
from speechbrain_mpq.utils import write_json

TABLE = Path(__file__).with_suffix(".yaml")
BLOCK = """
quantizer: !new:speechbrain_mpq.Quantizer
    targets: !ref <modules>
    bits: 4
    vectors: False
"""
WAYS = ("float", "block", "runner")
KILLED = 42  # what tells that the training was killed as planned


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speechbrain", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--limit", type=int, default=900, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("results/recipes"))
    return parser.parse_args(arguments)


def read_table(repository, out):
    """Recipes by name, with all paths set."""
    text = TABLE.read_text(encoding="utf-8")
    text = text.replace("$REPOSITORY", str(repository))
    rows = yaml.safe_load(text.replace("$OUT", str(out)))
    return {n: row for n, row in rows.items() if not n.startswith("_")}


def copy_repository(repository, out):
    """Recipes and samples, to be changed and written to."""
    target = out / "speechbrain"
    if not target.is_dir():
        shutil.copytree(repository / "recipes", target / "recipes", True)
        shutil.copytree(repository / "tests/samples", target / "tests/samples")
        integration = "tests/integration"
        shutil.copytree(repository / integration, target / integration)
    return target


class Recipe:
    """One recipe in one way.

    Arguments
    ---------
    name : str
        Of the table.
    row : dict
        Its entry.
    way : str
        One of ``WAYS``.
    tree : Path
        Copy of the repository.
    out : Path
        Where results go.
    """

    def __init__(self, name, row, way, tree, out):
        self.name, self.row, self.way, self.tree = name, row, way, tree
        self.out = out / "runs" / name.replace("/", "_")
        self.folder = self.out / way
        self.integration = name.startswith("integration/")
        if self.integration:
            self._prepare_integration()
        else:
            self._prepare_recipe()

    def _prepare_integration(self):
        """Examples of the tests read the hparams beside them."""
        kind = self.row.get("folder", self.name.split("/")[1])
        own = self.tree / "tests/integration"
        self.place = own / f"{self.name.split('/')[1]}_{self.way}"
        if not self.place.is_dir():
            shutil.copytree(own / kind, self.place)
        self.script = self.place / self.row["script"]
        text = self.script.read_text(encoding="utf-8")
        # What the loss is after fifteen epochs.
        text = re.sub(r"(?m)^( +)assert .*", r"\1pass", text)
        self.script.write_text(text, encoding="utf-8")
        self.hparams = self.place / self.row.get("hparams", "hyperparams.yaml")
        original = own / kind / self.hparams.name
        self._write_hparams(original, self.hparams)
        self.arguments = [str(self.script)]

    def _prepare_recipe(self):
        """Recipes are run where their script is."""
        self.script = self.tree / self.row["script"]
        self.place = self.tree
        if self.name.startswith("LibriSpeech/LM"):  # reads dataset.py
            self.place = self.script.parent
        original = self.tree / self.row["hparams"]
        label = f"{self.way}_{original.name}"
        self.hparams = original.with_name(label)
        self._write_hparams(original, self.hparams)
        options = f"{self.row['options']} {self.row.get('more', '')}"
        self.arguments = [str(self.script), str(self.hparams)]
        self.arguments += [*shlex.split(options), "--device=cpu"]
        self.arguments += [f"--output_folder={self.folder}"]

    def _write_hparams(self, original, path):
        """The hparams with their changes, and without the block."""
        text = original.read_text(encoding="utf-8")
        for old, new in self.row.get("replace", {}).items():
            text, count = re.subn(old, new, text)
        for key in self.row.get("drop", ()):
            text = re.sub(rf"(?m)^{key}: ?(.|\n)*?(?=^\S|\Z)", "", text)
        self.plain = path.with_name(f"plain_{path.name}")
        self.plain.write_text(text, encoding="utf-8")
        block = BLOCK if self.way == "block" else ""
        path.write_text(text + block, encoding="utf-8")

    def command(self, epochs, test_only=False):
        """Options of the script, and of the runner before it."""
        arguments = list(self.arguments)
        if test_only:
            arguments += ["--test_only"]
        if "epochs" in self.row:
            arguments += [f"--{self.row['epochs']}={epochs}"]
        if self.way != "runner":
            return arguments
        scores = self.row.get("scores", "kl")
        arguments += ["--bits", "2", "--scores", scores, "--batches", "1"]
        arguments += shlex.split(self.row.get("runner", ""), comments=True)
        if self.row.get("fresh"):
            if self.integration:  # no weights to begin with
                arguments[arguments.index(scores)] = "uniform"
            else:
                arguments += ["--weights", str(self.out / "float/save")]
        if self.integration:
            arguments += ["--folder", str(self.folder)]
        return arguments


def first_calls(model, run):
    """What a model's modules are called with from outside, and put out."""
    names = {id(m): n for n, m in model.named_modules()}
    calls, running, handles = [], [], []

    def before(module, inputs, keywords):
        if not running:
            torch.manual_seed(0)  # some have dropout in evaluation, too
            kept = copy.deepcopy((inputs, keywords))
            calls.append([names[id(module)], kept, None])
        running.append(module)

    def after(module, inputs, keywords, output):
        running.pop()
        if not running:
            calls[-1][2] = copy.deepcopy(output)

    for module in model.modules():
        options = {"with_kwargs": True, "prepend": True}
        handles.append(module.register_forward_pre_hook(before, **options))
        options = {"with_kwargs": True, "always_call": True}
        handles.append(module.register_forward_hook(after, **options))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def leaves(value):
    """Tensors in an output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)


def same(one, other):
    """Whether two tensors are the same bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (x.detach().contiguous() for x in (one, other))
    if one.is_sparse or not one.numel():
        return True
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    # Bit patterns: NaN equals itself, and -0 is not 0.
    return torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def compare(trained, fresh, calls):
    """What differs between what was trained and what was loaded."""
    dequantize_(trained, keep_quantized=True)
    one, other = trained.state_dict(), fresh.state_dict()
    problems = [f"state: {name}" for name in sorted(set(one) ^ set(other))]
    problems += [
        f"value: {n}" for n in one if n in other and not same(one[n], other[n])
    ]
    modules = dict(fresh.named_modules())
    for name, (inputs, keywords), output in calls:
        torch.manual_seed(0)
        with torch.no_grad():
            again = modules[name](*inputs, **keywords)
        pairs = list(zip(leaves(output), leaves(again), strict=True))
        if not all(same(*pair) for pair in pairs):
            problems.append(f"output: {name}")
    return problems


class Watch:
    """The Brain of a script, and what its modules are built from."""

    def __init__(self, kill):
        self.kill = kill
        self.brain = self.data = self.hparams = None
        self.keys, self.evaluated = {}, 0

    def install(self):
        """Listen to SpeechBrain, in this process."""
        fit, evaluate = sb.Brain.fit, sb.Brain.evaluate
        fit_train, load = sb.Brain._fit_train, hyperpyyaml.load_hyperpyyaml

        @wraps(fit)  # the runner looks at its signature
        def watched_fit(
            brain,
            epoch_counter,
            train_set,
            valid_set=None,
            *more,
            **options,
        ):
            if self.data is None:  # a GAN's Brain calls `fit` in its own
                self.brain = brain
                # Where torch's own breaks the model that a copy is made of
                copies_apart(brain.modules)
                kind = "train" if valid_set is None else "valid"
                loading = options.get(f"{kind}_loader_kwargs", {})
                data = train_set if valid_set is None else valid_set
                self.data = data, loading
            return fit(
                brain,
                epoch_counter,
                train_set,
                valid_set,
                *more,
                **options,
            )

        def watched_evaluate(brain, test_set, *more, **options):
            keys = {k: v for k, v in options.items() if k.endswith("_key")}
            self.keys = keys
            self.evaluated += 1
            return evaluate(brain, test_set, *more, **options)

        def watched_train(brain, train_set, epoch, enable):
            if self.kill and epoch >= 2:
                step = brain.fit_batch

                def last_step(batch):
                    step(batch)
                    os._exit(KILLED)

                brain.fit_batch = last_step
            return fit_train(brain, train_set, epoch, enable)

        def watched_load(stream, overrides=None, *more, **options):
            found = load(stream, overrides, *more, **options)
            if "modules" in found:
                self.hparams = overrides
            return found

        sb.Brain.fit, sb.Brain.evaluate = watched_fit, watched_evaluate
        sb.Brain._fit_train = watched_train
        hyperpyyaml.load_hyperpyyaml = watched_load

    def evaluate_one(self):
        """Run one validation batch, as the Brain does."""
        data, loading = self.data
        if not isinstance(data, torch.utils.data.DataLoader):
            loading = {**loading, "ckpt_prefix": None}
            stage = sb.Stage.VALID
            data = self.brain.make_dataloader(data, stage, **loading)
        self.brain.modules.eval()
        with torch.no_grad():
            self.brain.evaluate_batch(next(iter(data)), sb.Stage.VALID)


def check(recipe, watch):
    """Pack, load, compare; the result, JSON-ready."""
    brain = watch.brain
    trained, result = brain.modules, {}
    brain.on_stage_start(sb.Stage.VALID, 1)
    calls = first_calls(trained, watch.evaluate_one)
    packed = recipe.folder / "packed"
    if recipe.way != "runner":
        save_packed(trained, packed)
    path = packed / "model.safetensors"
    torch.manual_seed(4321)
    with open(recipe.plain, encoding="utf-8") as source:
        hparams = hyperpyyaml.load_hyperpyyaml(source, watch.hparams)
    fresh = torch.nn.ModuleDict(hparams["modules"]).eval()
    load_packed_(fresh, packed)
    result["problems"] = compare(trained, fresh, calls)
    result["compared"] = {
        "tensors": len(trained.state_dict()),
        "states": len(module_states(trained)[0]),
        "calls": len(calls),
    }
    result["bytes"] = path.stat().st_size
    if recipe.way != "float" and "epochs" in recipe.row:
        again = pack_results(
            recipe.folder, recipe.out / f"again_{recipe.way}", **watch.keys
        )
        result["pack_results"] = (
            "same bytes"
            if again.read_bytes() == path.read_bytes()
            else "other bytes"
        )
    return result


def run_script(recipe, epochs, kill=False, test_only=False):
    """In a process of its own: the script, and what comes after it."""
    os.chdir(recipe.place)
    watch = Watch(kill)
    watch.install()
    arguments = recipe.command(epochs, test_only)
    site.addsitedir(str(recipe.script.parent))
    if recipe.way == "runner":
        runner.main(arguments)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    if test_only and not watch.evaluated:
        raise RuntimeError("--test_only evaluated nothing")
    return check(recipe, watch)


def in_a_process(recipe, limit, log, *arguments, **options):
    """Exit status and what `run_script` found; forked, as imports take long."""
    path = recipe.out / f"{recipe.way}.json"
    path.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        with open(log, "ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        code = 0
        try:
            write_json(path, run_script(recipe, *arguments, **options))
        except SystemExit as end:
            print("ended:", end.code)
            code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ends = time.time() + limit
    while time.time() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.2)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "time is up", None
    result = json.loads(path.read_text()) if path.exists() else None
    return os.waitstatus_to_exitcode(status), result


def last_line(log):
    """What a failed process said last."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [x for x in text.replace("\r", "\n").splitlines() if x.strip()]
    return next((x for x in reversed(lines) if "%|" not in x), "")


def one_way(recipe, limit):
    """Everything in one way; a row of the report."""
    shutil.rmtree(recipe.folder, ignore_errors=True)
    recipe.folder.mkdir(parents=True)
    log = recipe.out / f"{recipe.way}.log"
    log.write_text("")
    started, row = time.time(), {}
    kills = "epochs" in recipe.row and recipe.way != "float"
    if kills:
        status, _ = in_a_process(recipe, limit, log, 2, kill=True)
        row["killed"] = status == KILLED
        if status != KILLED:
            return {"failed": last_line(log), "killed": False}
    epochs = 2 if kills else 1
    status, result = in_a_process(recipe, limit, log, epochs)
    if result is None:
        return {**row, "failed": f"{status}: {last_line(log)}"}
    if recipe.row.get("test_only"):
        _, tested = in_a_process(recipe, limit, log, epochs, test_only=True)
        again = tested and {n: tested[n] for n in ("problems", "bytes")}
        result["test_only"] = again or last_line(log)
    return {**row, **result, "seconds": round(time.time() - started)}


def make_tokenizer(out, hparams):
    """Pieces of the words in the samples."""
    import sentencepiece

    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
    fox = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG"
    text = out / "text.txt"
    text.write_text("\n".join([f"{fox} {letter}" for letter in letters] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(out / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        bos_id=1,
        eos_id=2,
        unk_id=0,
    )
    (out / "tokenizer.model").rename(out / "tokenizer.ckpt")


def make_language_model(out, recipe):
    """The recipe's own language model, with random weights."""
    options = [a for a in recipe.arguments[2:] if a != "--device=cpu"]
    _, _, overrides = sb.parse_arguments([str(recipe.plain), *options])
    with open(recipe.plain, encoding="utf-8") as source:
        found = hyperpyyaml.load_hyperpyyaml(source, overrides)
    torch.save(found["lm_model"].state_dict(), out / "lm.ckpt")


def make_wav2vec2(out, recipe):
    """A tiny wav2vec 2.0 with random weights."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    Wav2Vec2Model(config).save_pretrained(out / "wav2vec2")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(out / "wav2vec2")


MAKERS = {
    "tokenizer": make_tokenizer,
    "language_model": make_language_model,
    "wav2vec2": make_wav2vec2,
}
MADE = {"tokenizer": "tokenizer.ckpt", "language_model": "lm.ckpt"}


def main(arguments=None):
    """Run, print, write."""
    options = parse(arguments)
    torch.set_num_threads(1)
    out = options.out.resolve()
    tree = copy_repository(options.speechbrain.resolve(), out)
    needs = out / "needs"
    needs.mkdir(parents=True, exist_ok=True)
    report = out / "report.json"
    rows = json.loads(report.read_text()) if report.exists() else {}
    for name, row in read_table(tree, out).items():
        if options.only and not any(part in name for part in options.only):
            continue
        for way in options.ways:
            recipe = Recipe(name, row, way, tree, out)
            for need in row.get("needs", ()):
                if not (needs / MADE.get(need, need)).exists():
                    MAKERS[need](needs, recipe)
            done = one_way(recipe, options.limit)
            rows.setdefault(name, {})[way] = done
            print(name, way, json.dumps(done)[:600], flush=True)
            write_json(report, rows)


if __name__ == "__main__":
    main()
