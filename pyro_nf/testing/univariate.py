"""The laws of univariate maps."""

from __future__ import annotations

import torch
from pyro.distributions import constraints

from pyro_nf._checks import check_kind
from pyro_nf.ops.spaces import ends
from pyro_nf.testing.cases import EXACT, LADJ, NUMERIC, close, points
from pyro_nf.univariate.base import HINT, UnivariateMap


def check_univariate(univariate: UnivariateMap) -> None:
    """Runs the laws of a univariate map: identity at 0, round trip, slope, order, ends.

    Args:
        univariate: The map.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> from pyro_nf.univariate.affine import Affine
        >>> check_univariate(Affine())
    """
    check_kind("check_univariate", "univariate", univariate, UnivariateMap, HINT)
    name, p = type(univariate).__name__, univariate.num_params
    x = points(univariate.domain, (50, 4)).sort(0).values
    params = points(constraints.real, (50, 4, p), seed=2)
    y, ladj = univariate.forward_and_ladj(x, params)
    back, inverse_ladj = univariate.inverse_and_ladj(y, params)
    close(f"{name}: round trip", back, x, EXACT if univariate.exact_inverse else NUMERIC)
    close(f"{name}: ladj of the inverse", inverse_ladj, -ladj, LADJ)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(univariate.forward_and_ladj(leaf, params)[0].sum(), leaf)
    close(f"{name}: ladj against autograd", ladj, slope.abs().log(), LADJ)
    by_autograd = UnivariateMap.slopes(univariate, x, params)
    for key, got in univariate.slopes(x, params)._asdict().items():
        close(f"{name}: {key} against autograd", got, getattr(by_autograd, key), LADJ)
    kept, keep = by_autograd.x_params, params.clone().requires_grad_()
    moved = univariate.inverse_and_ladj(y, keep)[0].sum()
    if univariate.exact_inverse and p:
        close(f"{name}: x_params", kept, torch.autograd.grad(moved, keep)[0], NUMERIC)
    y_again, _ = univariate.forward_and_ladj(x, params[:1].expand(50, 4, p))
    assert bool((y_again.diff(dim=0) > 0).all()), f"{name}: is not increasing"
    for dtype in (torch.float32, torch.float64):
        ends_are_safe(univariate, dtype)
    if p:
        start, start_ladj = univariate.forward_and_ladj(x, torch.zeros_like(params))
        close(f"{name}: zero parameters against the identity", start, x, EXACT)
        close(f"{name}: ladj at zero parameters", start_ladj, torch.zeros_like(x), EXACT)


def ends_are_safe(univariate: UnivariateMap, dtype: torch.dtype = torch.float32) -> None:
    """Far points and the ends of the image give no NaN; beyond the ends there is no density.

    Args:
        univariate: The map.
        dtype: What it computes in.

    Raises:
        AssertionError: If the law is broken.

    Example:
        >>> from pyro_nf.univariate.fixed import Tanh
        >>> ends_are_safe(Tanh())
    """
    name, p = type(univariate).__name__, univariate.num_params
    largest = torch.finfo(dtype).max / 4
    far = torch.tensor([-largest, -1e4, -30.0, 0.0, 30.0, 1e4, largest], dtype=dtype)
    far = far[univariate.domain.check(far)]
    y, ladj = univariate.forward_and_ladj(far, far.new_zeros(len(far), p))
    assert bool(y.isfinite().all() and ladj.isfinite().all()), f"{name}: not finite at {far}"
    assert bool(univariate.codomain.check(y).all()), f"{name}: {y} is outside of its image"
    x, ladj = univariate.inverse_and_ladj(y, y.new_zeros(len(y), p))
    assert bool(x.isfinite().all() and ladj.isfinite().all()), f"{name}: no way back from {y}"
    known = ends(univariate.codomain)
    assert known is not None, f"{name}: the ends of the codomain {univariate.codomain} are unknown"
    for end, beyond in zip(known, (-1.0, 1.0), strict=True):
        value = (end + torch.tensor([0.0, beyond])).to(dtype)
        x, ladj = univariate.inverse_and_ladj(value, value.new_zeros(2, p))
        if end.isfinite():
            assert bool(x.isfinite().all()), f"{name}: the inverse of {value} is {x}"
            assert ladj[1] == -torch.inf, f"{name}: a density at {value[1]}, outside of its image"
