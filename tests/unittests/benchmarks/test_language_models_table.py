"""The language models' tables: rows, commands, word errors of the chosen."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.decoders.nbest import NBest
from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa
from speechbrain_mpq.decoders.vocabulary import Vocabulary
from speechbrain_mpq.inference.language_model import LanguageModel
from speechbrain_mpq.lobes.models.language_models import TiedRNNLM
from speechbrain_mpq.quantization.codebook import check_bits
from speechbrain_mpq.quantization.plan import Scheme
from speechbrain_mpq.run import _parser
from speechbrain_mpq.training.choose import method_of, scorer_of

ROOT = Path(__file__).parents[3]
BENCHMARKS, RECIPE = ROOT / "benchmarks", ROOT / "recipes/SOTU/LM"


def script(name):
    """A benchmark, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS / Path(name).parent)
        return importlib.import_module(Path(name).name)


@pytest.fixture(scope="module")
def rows():
    return script("quality/language_models")


@pytest.fixture(scope="module")
def rescoring():
    return script("quality/rescoring")


@pytest.fixture(scope="module")
def setting(rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    data = root / "sotu"
    data.mkdir()
    (data / "train.txt").write_text("".join(f"{i}\n" for i in range(20)))
    (data / "vocab.txt").write_text("words\n")
    (data / "valid.txt").write_text("".join(f"{i}\n" for i in range(400)))
    start, results = root / "start", root / "results"
    return rows.Setting("hparams/lstm.yaml", data, start, results, 7)


def test_every_row_is_a_command_that_the_runner_takes(rows, setting):
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    for bits in rows.EQUAL:
        folder = setting.folder(rows.Row("admm", bits)) / "packed"
        folder.mkdir(parents=True)
    for row in rows.ROWS:
        options, rest = _parser().parse_known_args(row.arguments(setting))
        assert float(options.bits) == row.bits
        assert options.gates and not options.vectors
        method_of(options.method)
        scheme = Scheme(gates=True)
        scorer_of(options.scores, scheme, options.candidate_bits)
        if options.scores == "uniform":
            check_bits(row.bits)  # all weights get them
        untrained = row.method in ("rounded", "calibrated")
        assert ("--number_of_epochs" in rest) != untrained
        assert options.rounding == (row.method if row.calibrates else "nearest")


def test_full_precision_is_trained_on_or_from_nothing(rows, setting):
    longer, smaller = (setting.plain(name) for name in rows.PLAIN)
    assert str(setting.start) in longer and str(setting.start) not in smaller
    assert str(rows.few_sentences(setting.data)) in longer
    assert str(setting.data) in smaller
    assert rows.wanted_rows(["smaller"]) == ["smaller"]


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_smaller_networks_have_the_bytes_of_two_bits(rows, setting, name):
    path = RECIPE / f"hparams/{name}.yaml"
    words = replace(setting, hparams=str(path)).plain("smaller")
    start = words.index("--size")
    keys = "size", "width", "dropout"
    own = {
        key[2:]: float(value) if "dropout" in key else int(value)
        for key, value in zip(words[start::2], words[start + 1 :: 2])
        if key[2:] in keys
    }
    counts = []
    for overrides in ({}, own):
        with open(path, encoding="utf-8") as fin:
            model = load_hyperpyyaml(fin, overrides)["model"]
        counts.append(sum(p.numel() for p in model.parameters()))
    full, smaller = counts
    assert 2.1 * full < 32 * smaller < 2.4 * full


def test_results_stand_where_the_weights_are_gone(
    rows, tmp_path, monkeypatch, capsys
):
    kept = {"full": {"ppl": 9.0, "ppl_known": 9.0, "bytes": 32}}
    (tmp_path / "gone_1234.json").write_text(json.dumps(kept))
    monkeypatch.setattr(rows, "KEPT", tmp_path)
    words = ["gone.yaml", "--data_folder", "d", "--start_from", "nowhere"]
    monkeypatch.setattr("sys.argv", ["rows", *words, "--only", "no such"])
    assert not rows.main()
    assert "| full |  | 32.00 | 9.0 |" in capsys.readouterr().out


def test_fine_tuning_sees_every_eighth_sentence(rows, setting):
    folder = rows.few_sentences(setting.data)
    assert (folder / "train.txt").read_text().split() == ["0", "8", "16"]
    assert (folder / "vocab.txt").read_text() == "words\n"
    # Scores look at the same sentences.
    assert len((folder / "valid.txt").read_text().split()) == 50


def test_seeds_of_calibration_draw_other_sentences(rows, setting):
    def valid_of(seed, method):
        own = replace(setting, seed=seed)
        words = rows.Row(method, 2).arguments(own)
        folder = Path(words[words.index("--data_folder") + 1])
        return (folder / "valid.txt").read_text().split()

    first = (setting.data / "valid.txt").read_text().split()
    assert valid_of(1234, "calibrated") == first
    assert valid_of(7, "rounded") == first
    drawn = valid_of(7, "calibrated"), valid_of(8, "calibrated")
    assert drawn[0] != first and drawn[0] != drawn[1]
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted(first)


def test_bits_in_the_file_are_of_all_its_bytes(rows):
    full = {"ppl": 80.0, "ppl_known": 90.0, "bytes": 4000, "average_bits": 32}
    small = {"ppl": 84.0, "ppl_known": 95.0, "bytes": 250, "average_bits": 1.9}
    text = rows.table({"full": full, "kl": small})
    assert "| kl | 1.90 | 2.00 | 84.0 (+5.0 %) | 95.0 | 250 | 16.0 |" in text
    errors = {
        "full": {"sets": {"clean": {"wer": 15.0, "p": 1.0}}},
        "kl": {"sets": {"clean": {"wer": 15.25, "p": 2e-4}}},
    }
    rows_of = {"full": full, "kl": small, "nas": small}
    lines = rows.table(rows_of, errors).splitlines()
    assert "| PPL of known words | WER clean | p | bytes |" in lines[0]
    assert "| 90.0 | 15.00 | 1.000 | 4,000 |" in lines[2]
    assert "| 95.0 | 15.25 | < 0.001 | 250 |" in lines[3]
    assert "| 95.0 |  |  | 250 |" in lines[4]  # not rescored
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


LISTS = [
    NBest("a", ["the cat", "the cad"], [-2.0, -1.0]),
    NBest("b", ["a dog", "a dog of"], [-1.0, -3.0]),
]
REFERENCES = {"a": "the cat", "b": "a dog"}


def with_scores(lists, scores):
    """Lists as `rescore` leaves them."""
    return [
        NBest(
            row.id,
            row.hypotheses,
            row.scores,
            [
                {"recognizer_scores": own, "lm_scores": lm}
                for own, lm in zip(row.scores, part)
            ],
        )
        for row, part in zip(lists, scores)
    ]


def test_weights_are_those_with_the_fewest_errors(rescoring):
    assert rescoring.error_rate(
        rescoring.chosen(LISTS), REFERENCES
    ) == pytest.approx(25)
    lists = with_scores(LISTS, [(-1.0, -9.0), (-4.0, -4.0)])
    weights = rescoring.tuned(lists, REFERENCES)
    assert weights[0] >= 0.2  # 8 nats have to outweigh 1
    best = rescoring.chosen(lists, weights)
    assert best == REFERENCES
    # A bonus that outweighs all takes the longest.
    assert rescoring.chosen(lists, (0.0, 9.0))["b"] == "a dog of"


def test_oracle_has_the_fewest_errors(rescoring):
    assert rescoring.oracle(LISTS, REFERENCES) == REFERENCES


def test_references_must_be_there(rescoring, tmp_path):
    path = tmp_path / "text"
    path.write_text("a the cat\n")
    with pytest.raises(ValueError, match="no reference of 'b'"):
        rescoring.read_references(path, LISTS)
    path.write_text("a the cat\nb a dog\n")
    assert rescoring.read_references(path, LISTS) == REFERENCES


def test_scores_that_stay_are_another_key(rescoring, tmp_path):
    path = tmp_path / "nbest.json"
    rows = [
        {**row.to_dict(), "acoustic": [-x for x in row.scores]} for row in LISTS
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    own = rescoring.with_own_scores(path, LISTS, "acoustic")
    assert [row.scores for row in own] == [[2, 1], [1, 3]]
    assert [row.hypotheses for row in own] == [r.hypotheses for r in LISTS]
    assert rescoring.with_own_scores(path, LISTS, "scores") is LISTS
    with pytest.raises(ValueError, match="no 'am' of 'a': see --own"):
        rescoring.with_own_scores(path, LISTS, "am")


def test_bench_compares_with_the_first_model(rescoring):
    torch.manual_seed(0)
    vocabulary = Vocabulary(["the", "cat", "cad", "a", "dog", "of"])
    lm = LanguageModel(TiedRNNLM(vocab=10, size=4, layers=1), vocabulary)
    lm = rescoring.Timed(lm)
    sets = {"tune": (LISTS, REFERENCES), "test": (LISTS, REFERENCES)}
    bench = rescoring.Bench(sets)
    passes = bench.passes()
    assert passes["first pass"]["test"] == {"wer": pytest.approx(25)}
    assert passes["oracle"]["test"] == {"wer": 0}
    bench.choose_weights(lm)
    first, again = bench.row(lm), bench.row(lm)
    assert again["test"]["p"] == 1
    assert again["test"]["wer"] == first["test"]["wer"]
    # Words and ends of lists that are the same each time.
    assert lm.words == 3 + 3 + 3 + 4
    assert lm.milliseconds > 0
    rows = {
        **{name: {"sets": row} for name, row in passes.items()},
        "lstm": {"sets": again, "ms": 0.5, "bytes": 1234},
    }
    last = rescoring.table(rows).splitlines()[-1]
    assert last.startswith("| lstm | ") and last.endswith("0.500 | 1,234 |")


def test_ngrams_count_words_and_bytes_as_the_networks_do(tmp_path):
    ngrams = script("quality/ngrams")
    assert ngrams.trie_bytes([4, 8]) == 20  # 4 x 19 and 8 x 10 bits
    vocabulary = Vocabulary(["the", "cat"])
    path = tmp_path / "lm.arpa"
    words = set(vocabulary.words)
    estimate_arpa(path, ["the cat", "the dog"], 2, None, words)
    lines = ["the dog", "cat"]
    items = list(ngrams.test_items(Ngram(path), lines, vocabulary))
    lm = LanguageModel(TiedRNNLM(vocab=6, size=4, layers=1), vocabulary)
    for own, other in zip(items, lm.items(lines), strict=True):
        assert own["words"] == other["words"]
        assert own["unknown"] == other["unknown"]
        assert 0 <= own["nats_unknown"] < own["nats"]
