"""Factorised attention against the equation, written out."""

import torch

from speechbrain_mpq.separation.fusion import FactorisedAttention


def test_published_form_against_a_slow_one():
    torch.manual_seed(0)
    fusion = FactorisedAttention(6, 4, factors=3)
    audio, visual = torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    views = fusion.views.weight.view(3, 6, 6)  # P_k
    choose = fusion.weights.weight[..., 0]  # P^V
    expected = torch.empty_like(audio)
    for b in range(2):
        for t in range(5):
            v = torch.softmax(choose @ visual[b, :, t], 0)
            total = sum(v[k] * (views[k] @ audio[b, :, t]) for k in range(3))
            expected[b, :, t] = torch.sigmoid(total)
    torch.testing.assert_close(fusion(audio, visual), expected)
    assert fusion.views.bias is None  # 256 x 256 matrices, nothing else


def test_residual_form_begins_near_the_audio():
    torch.manual_seed(0)
    fusion = FactorisedAttention(16, 8, factors=10, residual=True)
    audio, visual = torch.randn(2, 16, 50), torch.randn(2, 8, 50)
    change = fusion(audio, visual) - audio
    assert 0 < change.std() < 0.1 * audio.std()


def test_lips_alone_can_change_a_silent_frame():
    torch.manual_seed(0)
    fusion = FactorisedAttention(8, 4, factors=5, residual=True)
    silent = torch.zeros(1, 8, 1)
    one, other = torch.randn(2, 1, 4, 1)
    assert not torch.equal(fusion(silent, one), fusion(silent, other))
