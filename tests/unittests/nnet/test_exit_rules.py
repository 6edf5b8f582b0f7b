"""Rules that choose an exit."""

import torch

from speechbrain_mpq.nnet.exit_rules import RandomExit, UncertainMask

FRAME = torch.ones(1, 257, dtype=torch.cfloat)
DOUBTFUL = torch.full((1, 257), 0.5)


def test_rule_listens():
    rule = UncertainMask(0.5)
    assert not rule(0, DOUBTFUL, FRAME)
    assert rule(1, 0.02 * DOUBTFUL, FRAME)  # has decided
    assert rule(0, DOUBTFUL, 0.01 * FRAME)  # a pause: nobody hears it
    rule.reset()
    assert not rule(0, DOUBTFUL, 0.01 * FRAME)  # all that there is


def test_level_does_not_count():
    for gain in (0.1, 10):
        rule = UncertainMask(0.5)
        assert not rule(0, DOUBTFUL, gain * FRAME)
        assert rule(1, 0.02 * DOUBTFUL, gain * FRAME)


def test_silence_leaves_early():
    assert UncertainMask(0.5)(0, DOUBTFUL, 0 * FRAME)


def test_chance_keeps_to_its_share():
    rule = RandomExit(1, 5, share=0.25)
    early = [rule(1, None, None) for _ in range(1000)]
    assert 0.2 < sum(early) / 1000 < 0.3
    rule.reset()
    assert early == [rule(1, None, None) for _ in range(1000)]
    assert not rule(3, None, None) and rule(5, None, None)
