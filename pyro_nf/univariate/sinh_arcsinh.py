"""Skewness and tail weight in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_nf._checks import check_positive
from pyro_nf.univariate.base import UnivariateMap


class SinhArcsinh(UnivariateMap):
    r"""Skewness and tail weight, :math:`y = \sinh(\epsilon + e^{s} \operatorname{asinh} x)`.

    The inverse is exact, :math:`x = \sinh(e^{-s}(\operatorname{asinh} y - \epsilon))`. A positive
    :math:`\epsilon` skews to the right; :math:`s > 0` makes the tails of ``y`` heavier than those
    of ``x``, :math:`|y| \sim |x|^{e^{s}}`. Both parameters are bounded smoothly by tanh.

    *Sinh-arcsinh distributions* (Jones, Pewsey, 2009).

    Args:
        max_skew: The bound on :math:`|\epsilon|`.
        max_log_tail: The bound on :math:`|s|`.

    Raises:
        ValueError: If a bound is not positive.

    Example:
        >>> import torch
        >>> x, params = torch.linspace(-2, 2, 5), torch.full((5, 2), 0.3)
        >>> y, _ = SinhArcsinh().forward_and_ladj(x, params)
        >>> torch.allclose(SinhArcsinh().inverse_and_ladj(y, params)[0], x, atol=1e-5)
        True
    """

    num_params = 2

    def __init__(self, max_skew: float = 2.0, max_log_tail: float = 1.0) -> None:
        check_positive("SinhArcsinh", "max_skew", max_skew)
        check_positive("SinhArcsinh", "max_log_tail", max_log_tail)
        self.max_skew, self.max_log_tail = max_skew, max_log_tail

    def _skew_and_log_tail(self, params: Tensor) -> tuple[Tensor, Tensor]:
        a, c = params.unbind(-1)
        return (
            self.max_skew * torch.tanh(a / self.max_skew),
            self.max_log_tail * torch.tanh(c / self.max_log_tail),
        )

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        eps, s = self._skew_and_log_tail(params)
        y = torch.sinh(eps + s.exp() * torch.asinh(x))
        return y, s + _log_cosh_asinh(y) - _log_cosh_asinh(x)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        eps, s = self._skew_and_log_tail(params)
        x = torch.sinh((-s).exp() * (torch.asinh(y) - eps))
        return x, _log_cosh_asinh(x) - s - _log_cosh_asinh(y)


def _log_cosh_asinh(x: Tensor) -> Tensor:
    """log cosh asinh x = log(1 + x^2) / 2, without the square, which overflows."""
    return torch.hypot(x, x.new_ones(())).log()
