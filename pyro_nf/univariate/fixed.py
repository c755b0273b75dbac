"""Maps without parameters, from the real line onto an interval and the like."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_nf._checks import check_positive
from pyro_nf.ops.spaces import inner_point, zero_outside
from pyro_nf.univariate.base import UnivariateMap


class Onto(UnivariateMap):
    """A map of the real line onto an interval, safe where numbers round to its ends.

    A subclass writes two formulas. Images that round to an end are moved to the nearest number
    inside, and so is a ``y`` at an end before it is inverted: both directions are finite wherever
    their argument is. A ``y`` beyond the ends has the ladj -inf, and so no density.

    Attributes:
        low: The left end.
        high: The right end; inf for none.
    """

    num_params = 0
    low: float
    high: float

    @abstractmethod
    def _formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``y`` and ``log|dy/dx|``."""

    @abstractmethod
    def _inverse_formula(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and ``log|dx/dy|`` for ``y`` inside the interval."""

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._formula(inner_point(x, -math.inf, math.inf))
        return inner_point(y, self.low, self.high), ladj

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._inverse_formula(inner_point(y, self.low, self.high))
        return x, zero_outside(ladj, y, self.codomain)


class Softsign(Onto):
    r"""The real line onto :math:`(-1, 1)`, :math:`y = x / (1 + |x|)`; exact inverse.

    A wide normal through it has two humps near -1 and 1.

    Example:
        >>> import torch
        >>> Softsign().forward_and_ladj(torch.tensor([1.0, -3.0]), torch.empty(2, 0))[0].tolist()
        [0.5, -0.75]
    """

    low, high = -1.0, 1.0
    codomain = constraints.interval(-1.0, 1.0)

    def _formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / (1 + x.abs()), -2 * torch.log1p(x.abs())

    def _inverse_formula(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y / (1 - y.abs()), -2 * torch.log1p(-y.abs())


class Tanh(Onto):
    r"""The real line onto :math:`(-1, 1)`, :math:`y = \tanh x`; exact inverse.

    Example:
        >>> import torch
        >>> Tanh().forward_and_ladj(torch.zeros(1), torch.empty(1, 0))[0].item()
        0.0
    """

    low, high = -1.0, 1.0
    codomain = constraints.interval(-1.0, 1.0)

    def _formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # log(1 - tanh^2 x) = 2 (log 2 - |x| - softplus(-2|x|)) does not cancel for large x
        return torch.tanh(x), 2 * (math.log(2.0) - x.abs() - F.softplus(-2 * x.abs()))

    def _inverse_formula(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.atanh(y), -torch.log1p(-y) - torch.log1p(y)


class Sigmoid(Onto):
    r"""The real line onto :math:`(0, 1)`, :math:`y = 1 / (1 + e^{-x})`; exact inverse (logit).

    Example:
        >>> import torch
        >>> Sigmoid().forward_and_ladj(torch.zeros(1), torch.empty(1, 0))[0].item()
        0.5
    """

    low, high = 0.0, 1.0
    codomain = constraints.unit_interval

    def _formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(x), -F.softplus(x) - F.softplus(-x)

    def _inverse_formula(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.log() - torch.log1p(-y), -y.log() - torch.log1p(-y)


class Exp(Onto):
    r"""The real line onto the positive numbers, :math:`y = e^{x}`; exact inverse (log).

    Example:
        >>> import torch
        >>> Exp().forward_and_ladj(torch.zeros(1), torch.empty(1, 0))[0].item()
        1.0
    """

    low, high = 0.0, math.inf
    codomain = constraints.positive

    def _formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp(), x

    def _inverse_formula(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y.log()
        return x, -x


class Softplus(Onto):
    r"""The real line onto the positive numbers, :math:`y = \log(1 + e^{x})`; exact inverse.

    Example:
        >>> import torch
        >>> y = Softplus().forward_and_ladj(torch.zeros(1), torch.empty(1, 0))[0]
        >>> round(y.item(), 4)
        0.6931
    """

    low, high = 0.0, math.inf
    codomain = constraints.positive

    def _formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(x), -F.softplus(-x)

    def _inverse_formula(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_dy_dx = torch.log(-torch.expm1(-y))  # log sigmoid(x) = log(1 - e^-y)
        return y + log_dy_dx, -log_dy_dx


class LeakyReLU(UnivariateMap):
    r"""Two slopes, :math:`y = x` for :math:`x \ge 0` and :math:`y = a x` below; exact inverse.

    Args:
        slope: The slope :math:`a > 0` of the negative half.

    Raises:
        ValueError: If ``slope`` is not positive.

    Example:
        >>> import torch
        >>> LeakyReLU(0.5).forward_and_ladj(torch.tensor([-2.0]), torch.empty(1, 0))[0].item()
        -1.0
    """

    num_params = 0

    def __init__(self, slope: float = 0.01) -> None:
        check_positive("LeakyReLU", "slope", slope)
        self.slope = slope

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = x.new_tensor(math.log(self.slope))
        return torch.where(x < 0, self.slope * x, x), torch.where(x < 0, log_slope, 0.0)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = y.new_tensor(math.log(self.slope))
        return torch.where(y < 0, y / self.slope, y), torch.where(y < 0, -log_slope, 0.0)
