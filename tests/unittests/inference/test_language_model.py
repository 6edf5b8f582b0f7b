"""A packed language model: loading, scores, SpeechBrain's rescorers."""

import copy
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders.scorer import RescorerBuilder

from speechbrain_mpq.decoders.nbest import NBest
from speechbrain_mpq.decoders.vocabulary import Vocabulary
from speechbrain_mpq.evaluation.task import find_task
from speechbrain_mpq.inference.language_model import (
    LanguageModel,
    RescoringRecognizer,
    RescoringWeights,
    rescore,
    save_language_model,
)
from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.inference.registry import build, describe
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.language_models import (
    TiedRNNLM,
    TiedTransformerLM,
)
from speechbrain_mpq.quantization.container import PackedModelError
from speechbrain_mpq.quantization.quant_api import quantize_

WORDS = "so be it is the state of a union".split()
MODELS = {
    "lstm": lambda: TiedRNNLM(13, 8),
    "gru": lambda: TiedRNNLM(13, 8, rnn="gru"),
    "transformer": lambda: TiedTransformerLM(13, 8, 2, 2, 8, max_length=600),
}


def network(kind="lstm"):
    """A small model with weights worth rounding."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def saved(folder, model):
    """A folder of a model."""
    return save_language_model(model, folder, Vocabulary(WORDS))


def logits(model, tokens):
    """What a model puts out for one sentence."""
    with torch.no_grad():
        output = model(torch.tensor([tokens]))
    return (output[0] if isinstance(output, tuple) else output)[0]


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("bits", [32, 2])
def test_loads_bit_for_bit(kind, bits, tmp_path):
    model = network(kind)
    if bits < 32:
        quantize_(model, bits, gates=True)
    lm = LanguageModel.from_pretrained(saved(tmp_path, model))
    tokens = [1, 4, 5, 6, 3]
    assert torch.equal(logits(lm.model, tokens), logits(model, tokens))
    assert check_folder(tmp_path) == []
    hparams = load_hyperpyyaml((tmp_path / "hyperparams.yaml").read_text())
    hparams["pretrainer"].collect_files(default_source=str(tmp_path))
    hparams["pretrainer"].load_collected()
    own = hparams["model"].eval()  # SpeechBrain's way
    assert torch.equal(logits(own, tokens), logits(model, tokens))


def test_loading_imports_what_a_file_names(tmp_path):
    """Whoever loads such a folder need not know what registers its class."""
    saved(tmp_path, network())
    code = (
        "import sys; from speechbrain_mpq.inference.loading import load; "
        "assert 'speechbrain' not in sys.modules; "
        f"print(type(load({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.stdout.decode().strip() == "TiedRNNLM", done.stderr


@pytest.mark.parametrize("kind", list(MODELS))
def test_scores_are_log_probabilities(kind, tmp_path):
    model = network(kind)
    lm = LanguageModel.from_pretrained(saved(tmp_path, model))
    sentences = ["the state of the union", "", "so be what it is"]
    found = lm.score(sentences, batch=2)
    for sentence, row in zip(sentences, found):
        tokens = lm.vocabulary.encode_as_ids(sentence)
        table = logits(model, [1, *tokens]).log_softmax(-1)
        own = table[range(len(tokens) + 1), [*tokens, 2]]
        torch.testing.assert_close(row.log_probs, own)
    assert found[2].unknown.tolist() == [False] * 2 + [True] + [False] * 3


def test_perplexity_with_and_without_unknown_words(tmp_path):
    lm = LanguageModel(network(), Vocabulary(WORDS))
    (row,) = lm.score(["so be what"])
    result = lm.perplexity(["so be what"])
    assert result["words"] == 4 and result["unknown"] == 1
    assert result["ppl"] == pytest.approx(math.exp(-row.total / 4))
    known = row.log_probs[[0, 1, 3]].sum()
    assert result["ppl_known"] == pytest.approx(math.exp(-known / 3))
    task = find_task("language modelling")
    assert task.summarise(lm.items(["so be what"])) == result
    assert task.summarise([])["ppl"] is None


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_speechbrain_rescores_with_it(kind, tmp_path):
    model = network(kind)
    quantize_(model, 4, gates=True)
    saved(tmp_path, model)
    rescorer = LanguageModel.from_pretrained(tmp_path).rescorer()
    builder = RescorerBuilder({rescorer.name: 0.5}, [rescorer])
    lists = [["so be it", "SO BE", "it is the state of a union"]]
    found, scores = builder.rescore(copy.deepcopy(lists), [[-3.0, -3.0, -3.0]])
    lm = LanguageModel.from_pretrained(tmp_path)
    totals = {
        text: -3 + row.total / 2
        for text, row in zip(lists[0], lm.score(lists[0]))
    }
    assert sorted(totals, key=totals.get, reverse=True) == found[0]
    if kind == "lstm":  # the other one leaves out <pad>'s probability
        expected = sorted(totals.values(), reverse=True)
        assert scores[0] == pytest.approx(expected, rel=1e-5)


def test_another_vocabulary_is_refused(tmp_path):
    saved(tmp_path, network())
    Vocabulary([*WORDS[1:], WORDS[0]]).write(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="not the one that the model was"):
        LanguageModel.from_pretrained(tmp_path)
    Vocabulary(WORDS[1:]).write(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="12 words is not that of this model"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.txt: a language model"):
        LanguageModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="12 words is not that of this model"):
        save_language_model(network(), tmp_path / "b", Vocabulary(WORDS[1:]))
    assert not (tmp_path / "b").exists()


def test_a_separator_is_no_language_model():
    from speechbrain_mpq.utils import BUNDLED_MODEL

    with pytest.raises(ValueError, match="a Separator, no language model"):
        LanguageModel.from_pretrained(BUNDLED_MODEL)


def test_sentences_longer_than_positions():
    lm = LanguageModel(network("transformer"), Vocabulary(WORDS))
    with pytest.raises(ValueError, match="600 words, and the model takes 599"):
        lm.score(["so " * 600])
    lists = [NBest("u1", ["so"], [-1.0]), NBest("u2", ["so " * 600], [-1.0])]
    with pytest.raises(ValueError, match="u2: a sentence of 600 words"):
        rescore(lists, lm)


@pytest.mark.parametrize("kind", list(MODELS))
def test_scores_do_not_depend_on_what_else_is_scored(kind):
    """And are those of a loop that reads on word by word."""
    lm = LanguageModel(network(kind), Vocabulary(WORDS))
    vocabulary = lm.vocabulary
    texts = ["so be it", "", "the state of a union is so", "so nobody"]
    turned = lm.score(texts[::-1], batch=2)[::-1]
    for text, own, other in zip(texts, lm.score(texts), turned):
        assert torch.allclose(own.log_probs, other.log_probs, atol=1e-5)
        tokens = [vocabulary.bos_index, *vocabulary.encode_as_ids(text)]
        for i, target in enumerate([*tokens[1:], vocabulary.eos_index]):
            last = logits(lm.model, tokens[: i + 1])[-1]
            expected = float(last.log_softmax(-1)[target])
            assert float(own.log_probs[i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"vocab": 2**40}, "vocab must be an integer"),
        ({"size": 0}, "size must be an integer"),
        ({"rnn": "os.system"}, "rnn must be one of"),
        ({"vocabulary_sha256": "x"}, "must be a SHA-256"),
    ],
)
def test_forged_architectures(change, match):
    architecture = describe(network())
    architecture = json.loads(json.dumps(architecture))
    architecture["arguments"].update(change)
    with pytest.raises(ValueError, match=match):
        build(architecture, None)


def test_a_file_of_another_model(tmp_path):
    """The header says more than the file holds: refused before it is built."""
    from speechbrain_mpq.quantization.packing import save_packed

    model = network()
    architecture = describe(model)
    architecture["arguments"]["size"] = 4096
    save_packed(model, tmp_path, None, architecture)
    with pytest.raises(PackedModelError, match="is \\(13, 8\\)"):
        load(tmp_path)


@pytest.mark.parametrize("kind", list(MODELS))
def test_engine_runs_the_stored_integers(kind, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is missing")
    pytest.importorskip("onnx", reason="the extra onnx is missing")
    model = network(kind)
    quantize_(model, 4)
    saved(tmp_path, model)
    sentences = ["so be it", "", "it is the state of a union so be it is"]
    exact = LanguageModel.from_pretrained(tmp_path).score(sentences)
    engine = LanguageModel.from_pretrained(tmp_path, engine="onnx")
    for row, given in zip(exact, engine.score(sentences)):
        assert torch.equal(row.unknown, given.unknown)
        assert not torch.equal(row.log_probs, given.log_probs)
        assert (row.log_probs - given.log_probs).abs().max() < 0.1
    with pytest.raises(ValueError, match="engine must be one of"):
        LanguageModel.from_pretrained(tmp_path, engine="openvino")


def test_a_folder_is_whole_with_its_own_vocabulary_only(tmp_path):
    folder = saved(tmp_path, network())
    assert check_folder(folder) == []
    path = folder / "vocab.txt"
    words = path.read_text().split()
    path.write_text("\n".join([*words[:4], *words[:3:-1]]))  # other numbers
    (problem,) = check_folder(folder)
    assert "the vocabulary is not the one that" in problem
    path.unlink()
    (problem,) = check_folder(folder)
    assert "needs the vocabulary beside it" in problem


FEW_WORDS = "so be it bee".split()
TOKENS = "_ abceiost"  # the blank first


@pytest.fixture
def folder(tmp_path):
    """A model that likes every word better than "bee"."""
    torch.manual_seed(0)
    model = TiedRNNLM(len(Vocabulary(FEW_WORDS)), 8)
    with torch.no_grad():
        model.out.w.bias[Vocabulary(FEW_WORDS).numbers["bee"]] = -20.0
    return save_language_model(model, tmp_path / "lm", Vocabulary(FEW_WORDS))


def recognizer(folder, spelled, lm_weight=0.5):
    """One that has heard what is spelled, in a posterior's columns."""
    made = RescoringRecognizer.__new__(RescoringRecognizer)
    made.device, made.rescorer = "cpu", folder
    made.lm = LanguageModel.from_pretrained(folder)
    made.weights = RescoringWeights(lm_weight)
    made._searcher, made._unknown, made._words = None, 0, 0
    tokenizer = CTCTextEncoder()
    tokenizer.update_from_iterable(TOKENS)
    probabilities = torch.full((1, len(spelled), len(TOKENS)), 1e-4)
    for frame, column in enumerate(spelled):
        for token, probability in column.items():
            probabilities[0, frame, TOKENS.index(token)] = probability
    made.model = SimpleNamespace(
        tokenizer=tokenizer,
        hparams=SimpleNamespace(blank_index=0),
        encode_batch=lambda wavs, lengths: probabilities.log(),
    )
    return made


# "so be it" or "so bee it": a blank between two e, or one long e
SPELLED = [
    *({"s": 1}, {"o": 1}, {" ": 1}, {"b": 1}, {"e": 1}),
    *({"_": 0.55, "e": 0.45}, {"e": 1}, {" ": 1}, {"i": 1}, {"t": 1}),
]


def test_the_language_model_has_the_last_word(folder):
    alone = recognizer(folder, SPELLED, lm_weight=0.0)
    assert alone(torch.zeros(100)) == "so bee it"
    assert recognizer(folder, SPELLED)(torch.zeros(100)) == "so be it"


def test_another_language_is_refused(folder):
    spelled = [{"c": 1}, {" ": 1}] * 300
    with pytest.raises(ValueError, match="words are not in the vocabulary"):
        recognizer(folder, spelled)(torch.zeros(100))


def test_scores_are_sums(folder):
    lm = LanguageModel.from_pretrained(folder)
    lists = [NBest("u", ["so bee it", "so it", ""], [-1.0, -2.0, -9.0])]
    weights = RescoringWeights(lm_weight=0.7, word_bonus=0.3)
    (ranked,) = rescore(lists, lm, weights)
    for text, score, parts in zip(
        ranked.hypotheses, ranked.scores, ranked.details
    ):
        own = parts["recognizer_scores"] + 0.7 * parts["lm_scores"]
        assert score == pytest.approx(own + 0.3 * len(text.split()))
        (words,) = lm.score([text])
        assert parts["lm_scores"] == pytest.approx(words.total)
    assert ranked.scores == sorted(ranked.scores, reverse=True)


def test_infinite_scores_are_refused(folder):
    lm = LanguageModel.from_pretrained(folder)
    lists = [NBest("u", ["so"], [-1.0])]
    with pytest.raises(ValueError, match="u: 'so' has a score of"):
        rescore(lists, lm, RescoringWeights(word_bonus=math.inf))
