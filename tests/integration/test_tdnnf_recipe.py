"""The TDNN-F recipe at tiny size: quantized by the runner, and by CTC."""

import json
import re
import shlex

import pytest
from helpers import ROOT, read_rows, run_row, start_row
from speechbrain.utils.edit_distance import accumulatable_wer_stats

from speechbrain_mpq import HybridASR, check_folder
from speechbrain_mpq.evaluation.runs import load_run
from speechbrain_mpq.run import main as run_recipe

SCRIPT = "recipes/Embedded/ASR/TDNNF/train.py"
ROW = next(row for row in read_rows() if row["Script_file"] == SCRIPT)


@pytest.fixture(scope="module")
def shared(speech, tmp_path_factory):
    """The folder in the place of tests/tmp, with the corpus in it."""
    folder = tmp_path_factory.mktemp("tdnnf")
    speech(folder / "embedded")
    return folder


@pytest.fixture(scope="module")
def trained(shared):
    """Output folder of the row."""
    return run_row(ROW, shared)


def metrics_of(folder):
    """Content of metrics.json."""
    return json.loads((folder / "metrics.json").read_text())


def test_published_folder_transcribes(trained, shared):
    assert check_folder(trained / "published") == []
    model = HybridASR.from_pretrained(trained / "published")
    test = json.loads((shared / "embedded/test_speech.json").read_text())
    path = next(iter(test.values()))["wav"]
    path = path.replace("{data_root}", str(shared / "embedded"))
    assert isinstance(model.transcribe_file(path), str)
    assert metrics_of(trained)["system"] == "fp32"


def test_what_is_published_is_a_start(trained, shared):
    flags = ROW["test_debug_flags"].replace("epochs 3", "epochs 0")
    flags += f" --start_from {trained / 'published'}"
    row = {**ROW, "test_debug_flags": flags}
    again = metrics_of(start_row(row, shared, shared / "started"))
    assert again["average"] == metrics_of(trained)["average"]


def test_a_start_of_other_phones_is_refused(trained, shared, tmp_path):
    """As many of them, so that all shapes fit."""
    text = (ROOT / SCRIPT).with_name("lexicon.txt").read_text()
    other = tmp_path / "lexicon.txt"
    other.write_text(re.sub(r" T\b", " ZZ", text))
    flags = ROW["test_debug_flags"].replace("epochs 3", "epochs 0")
    flags += f" --start_from {trained / 'published'} --lexicon_file {other}"
    row = {**ROW, "test_debug_flags": flags}
    with pytest.raises(ValueError, match="lexicon that it was trained with"):
        start_row(row, shared, shared / "other_phones")


def test_quantized_by_the_runner(trained, shared):
    flags = ROW["test_debug_flags"].replace("tests/tmp", str(shared))
    folder = shared / "hessian"
    run_recipe(
        [
            *(str(ROOT / ROW[k]) for k in ("Script_file", "Hparam_file")),
            *shlex.split(flags),
            *("--device=cpu", "--noprogressbar", f"--against=[{trained}]"),
            f"--output_folder={folder}",
            f"--weights={trained / 'save'}",
            *("--exclude", "model.xent.*", "--bits", "2", "--batches", "1"),
            *("--scores", "hessian", "--method", "post_training"),
            *("--rounding", "nearest"),
        ]
    )
    metrics = metrics_of(folder)
    assert (metrics["system"], metrics["bits"]) == ("hessian", 2)
    assert metrics["average_bits"] <= 2
    assert metrics["mapsswe"]["against"] == "fp32"
    packed = folder / "published/model.safetensors"
    assert metrics["model_bytes"] == packed.stat().st_size
    assert metrics["fp32_bytes"] > 4 * metrics["model_bytes"]
    assert HybridASR.from_pretrained(folder / "published").model.xent is None


def test_ctc(trained, shared):
    flags = ROW["test_debug_flags"].replace("epochs 3", "epochs 1")
    row = {**ROW, "test_debug_flags": f"{flags} --ctc True"}
    output = start_row(row, shared, shared / "ctc")
    metrics = metrics_of(output)
    items = load_run(output)["items"]
    stats = accumulatable_wer_stats(
        [item["reference"].split() for item in items],
        [item["hypothesis"].split() for item in items],
    )
    assert metrics["average"]["wer"] == pytest.approx(float(stats["WER"]))
    test = json.loads((shared / "embedded/test_speech.json").read_text())
    said = {key: entry["words"] for key, entry in test.items()}
    assert {item["id"]: item["reference"] for item in items} == said
    assert not (output / "published").exists()


def test_bottlenecks_are_searched_and_trained(trained, shared):
    flags = ROW["test_debug_flags"].replace("epochs 3", "epochs 1")
    asked = (
        " --search True --candidates [2,4,8,16] --penalties [0.5]"
        " --search_epochs 2 --search_batch_size 1 --tolerance 0.2"
    )
    row = {**ROW, "test_debug_flags": flags + asked}
    folder = start_row(row, shared, shared / "search")
    content = json.loads((folder / "searched_0.5.json").read_text())
    assert len(content["history"]) == 2
    assert not (folder / "published").exists()
    path = folder / "searched_0.5.json"
    flags = flags.replace("[8,8,8,8,8,8,8,8]", str(path))
    flags += f" --system searched --against [{trained}]"
    row = {**ROW, "test_debug_flags": flags}
    published = start_row(row, shared, shared / "derived") / "published"
    model = HybridASR.from_pretrained(published).model
    assert model.settings["bottlenecks"] == content["bottlenecks"]
    counted = sum(p.numel() for p in model.parameters())
    assert content["parameters"] == counted
    metrics = metrics_of(published.parent)
    assert metrics["system"] == "searched"
    assert metrics["mapsswe"]["against"] == "fp32"


def test_phones_of_another_lexicon(trained, shared):
    flags = ROW["test_debug_flags"] + " --phones 40"
    row = {**ROW, "test_debug_flags": flags}
    with pytest.raises(ValueError, match="has 37 phones.*give --phones 37"):
        start_row(row, shared, shared / "other")


@pytest.mark.parametrize("option", ["--output_folder", "--start_from"])
def test_search_over_another_training_is_refused(option, trained, shared):
    flags = ROW["test_debug_flags"].replace("epochs 3", "epochs 1")
    row = {**ROW, "test_debug_flags": f"{flags} --search True"}
    row["test_debug_flags"] += " --candidates [2,4,16]"
    folder = trained
    if option == "--start_from":
        row["test_debug_flags"] += f" --start_from {trained}"
        folder = shared / "begun"
    with pytest.raises(ValueError, match="another network.*--search") as error:
        start_row(row, shared, folder)
    assert "\n" not in str(error.value)
