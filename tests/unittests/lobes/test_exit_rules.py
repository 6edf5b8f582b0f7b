"""Rules that choose an exit."""

import torch

from speechbrain_mpq.lobes.models.exit_rules import (
    MovingMask,
    RandomExit,
    UncertainMask,
)

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


def test_movement_is_weighed_by_level():
    masks = torch.rand(2, 1, 257)
    frames = torch.randn(2, 1, 257, dtype=torch.cfloat)
    sizes = frames.abs() ** 0.6
    level = sizes[0].mean() + (sizes[1].mean() - sizes[0].mean()) / 60
    moved = (sizes[1] * (masks[1] - masks[0]).abs()).mean() / level
    for factor, stops in ((0.99, False), (1.01, True)):
        rule = MovingMask(factor * moved.item())
        assert rule(1, masks[0], frames[0])  # nothing has moved yet
        assert rule(1, masks[1], frames[1]) == stops


def test_each_exit_moves_on_its_own():
    rule = MovingMask(0.1)
    for mask, stops in ((0.2, [True, True]), (0.2, [True, True])):
        frame = FRAME.clone()
        masks = [torch.full((1, 257), value) for value in (mask, 4 * mask)]
        assert [rule(e, m, frame) for e, m in zip((1, 3), masks)] == stops


def test_first_and_last():
    for kind in (MovingMask, UncertainMask):
        rule = kind(1e9, first=1, last=3)
        assert [rule(e, DOUBTFUL, FRAME) for e in (0, 1)] == [False, True]
        rule = kind(0.0, first=1, last=3)
        found = [rule(e, DOUBTFUL, FRAME) for e in (0, 1, 3)]
        assert found == [False, False, True]


def test_chance_keeps_to_its_share():
    rule = RandomExit(1, 5, share=0.25)
    early = [rule(1, None, None) for _ in range(1000)]
    assert 0.2 < sum(early) / 1000 < 0.3
    rule.reset()
    assert early == [rule(1, None, None) for _ in range(1000)]
    assert not rule(3, None, None) and rule(5, None, None)


def test_order_of_arguments_is_as_it_was():
    assert UncertainMask(0.5, 1, 7).memory == 7
    assert MovingMask(0.5, 1, 7, 3).last == 3
