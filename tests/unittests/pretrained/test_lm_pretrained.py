"""The published language models: whole, safe, and they know English."""

from pathlib import Path

import pytest

from speechbrain_mpq.inference.folder import cluster_bits, coverage_rows
from speechbrain_mpq.inference.language_model import LanguageModel
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.quantization.packing import read_model

FOLDER = Path(__file__).parents[3] / "pretrained/lm_sotu_2bit"
TRANSFORMER = FOLDER.with_name("lm_sotu_transformer_1.6bit")


@pytest.fixture(
    scope="module", params=[FOLDER, TRANSFORMER], ids=lambda f: f.name
)
def lm(request):
    """The model."""
    return LanguageModel.from_pretrained(request.param)


@pytest.mark.parametrize("folder", [FOLDER, TRANSFORMER])
def test_folder_is_whole_and_small(folder):
    assert check_folder(folder) == []
    assert (folder / "model.safetensors").stat().st_size < 2**20 / 2


def test_gates_have_bits_of_their_own():
    bits = cluster_bits(coverage_rows(read_model(FOLDER)))
    assert {name for name in bits if name.endswith(("_l0", "_l1"))} == {
        f"rnn.rnn.{gate}_l{layer}"
        for gate in ("input", "forget", "cell", "output")
        for layer in (0, 1)
    }
    assert {entry["bits"] for entry in bits.values()} == {2}


@pytest.mark.parametrize(
    "good, bad",
    [
        (
            "the state of the union is strong",
            "the state of union the is strong",
        ),
        ("i ask the congress for its help", "i asked a congress four it help"),
        ("peace with all nations", "peace with oil nations"),
    ],
)
def test_sentences_of_words_that_follow_each_other(lm, good, bad):
    first, second = lm.score([good, bad])
    assert first.total > second.total
