"""What the laws do not say about splines."""

from __future__ import annotations

import torch

from pyro_nf.univariate.spline import RationalQuadratic


def test_takes_numbers_one_by_one() -> None:
    spline = RationalQuadratic(8)
    values, params = 3 * torch.randn(7, dtype=torch.double), torch.randn(7, 23, dtype=torch.double)
    for direction in (spline.forward_and_ladj, spline.inverse_and_ladj):
        together, mapped = direction(values, params), torch.func.vmap(direction)(values, params)
        for one, other in zip(together, mapped, strict=True):
            torch.testing.assert_close(one, other)
        assert direction(values[0], params[0])[0].shape == ()
