"""The loss between compressed spectra."""

import torch

from speechbrain_mpq.nnet.spectral_loss import compressed_loss


def test_loss_is_the_formula():
    torch.manual_seed(0)
    target, estimate = torch.randn(2, 3, 6, 257, dtype=torch.cdouble)
    level = target.abs().square().mean((1, 2), keepdim=True).sqrt()
    s, e = target / level, estimate / level
    s_c, e_c = s.abs() ** 0.3, e.abs() ** 0.3
    phases = (s_c * s / s.abs() - e_c * e / e.abs()).abs().square()
    expected = 0.3 * phases + 0.7 * (s_c - e_c).square()
    found = compressed_loss(estimate, target)
    assert torch.allclose(found, expected.mean((1, 2)), rtol=1e-3)
    louder = compressed_loss(10 * estimate, 10 * target)
    assert torch.allclose(found, louder)
    silent = torch.zeros_like(target)
    for pair in ((silent, silent), (estimate, silent), (silent, target)):
        assert compressed_loss(*pair).isfinite().all()
