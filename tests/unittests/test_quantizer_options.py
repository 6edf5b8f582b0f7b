"""Options of the plugin that are wrong, told before any work is done."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq import FakeQuantize, KLScores, LearnedBits, Quantizer
from speechbrain_mpq.plugin.limits import check_limits

KINDS = [Quantizer, LearnedBits]


def modules():
    """Two layers."""
    return {"one": torch.nn.Linear(4, 3), "two": torch.nn.Linear(3, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_misspelt_option(kind):
    message = f"{kind.__name__} has no option 'codebok'; near misses: codebook"
    with pytest.raises(TypeError, match=message) as raised:
        kind(modules(), codebok="midrise")
    choices = str(raised.value).partition("choose from ")[2].split(", ")
    assert {"targets", "bits", "codebook", "rows", "unreached"} <= set(choices)
    assert ("interval" in choices) == (kind is LearnedBits)
    assert not {"self", "options", "unknown"} & set(choices)
    assert len(choices) == len(set(choices))


def test_misspelt_option_of_a_yaml():
    text = """
    layer: !new:torch.nn.PReLU
    quantizer: !new:speechbrain_mpq.Quantizer
        targets: [!ref <layer>]
        granulrity: channel
    """
    with pytest.raises(TypeError, match="near misses: granularity"):
        load_hyperpyyaml(text)


@pytest.mark.parametrize("bits", ["4bit", "4", 0, 17, 2.5, True, [4]])
def test_impossible_uniform_bits(bits):
    layers = modules()
    with pytest.raises(ValueError, match="integer from 1 to 16 or 1.6, not"):
        Quantizer(layers, bits=bits)
    assert list(layers["one"].state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"bits": "4 apples"}, "budget '4 apples' is not understood"),
        ({"bits": 40}, "between 2 and 16"),
        ({"candidate_bits": [4, 17]}, "candidate bits .* from 1 to 16"),
        ({"min_bits": 17}, "from 1 to 16"),
        ({"min_bits": 8, "candidate_bits": [2, 4]}, "min_bits 8 is more than"),
        ({"interval": 0}, "at least one decision"),
    ],
)
def test_impossible_learned_bits(options, match):
    with pytest.raises(ValueError, match=match):
        LearnedBits(modules(), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, match",
    [
        ({"codebook": "midrse"}, "('midtread', 'midrise'), not 'midrse'"),
        ({"granularity": "row"}, "('tensor', 'channel'), not 'row'"),
        ({"rows": 0}, "rows must be a positive number"),
        ({"rows": "64"}, "rows must be a positive number"),
        ({"estimator": "LogStep"}, "!name:speechbrain_mpq.LogStep, not"),
        ({"estimator": FakeQuantize(4, 1.0)}, "estimator must be a class"),
        ({"equal_bits": ["gate"]}, "none of ['qkv', 'gates']; near misses"),
        ({"include": ["three.*"]}, "'three.*' matches no parameter"),
    ],
)
def test_options_that_are_used_later(kind, options, match):
    """Some are used by choose_bits only, when all data is prepared."""
    bits = {"bits": None} if kind is Quantizer else {}
    with pytest.raises((TypeError, ValueError)) as raised:
        kind(modules(), **bits, **options)
    assert match in str(raised.value)


@pytest.mark.parametrize(
    "limits, match",
    [
        ({"average_bits": 1.5}, "out of reach: with 2 to 4 bits"),
        ({"budget_bytes": 9}, "a budget of 9 bytes is out of reach"),
        ({"average_bits": 4, "min_bits": 6}, "reaches min_bits=6"),
        ({"average_bits": 4, "equal_bits": ["qvk"]}, "matches no cluster"),
    ],
)
def test_limits_that_no_plan_keeps(limits, match):
    quantizer = Quantizer(modules(), bits=None)
    check_limits(quantizer, KLScores((2, 4)), {"average_bits": 4})
    with pytest.raises(ValueError, match=match):
        check_limits(quantizer, KLScores((2, 4)), limits)
