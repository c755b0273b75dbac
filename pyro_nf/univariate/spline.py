"""Monotone rational-quadratic splines."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_nf._checks import check_count, check_ends, check_positive
from pyro_nf.ops.layout import turned
from pyro_nf.ops.spaces import zero_outside
from pyro_nf.ops.spline import MIN_BIN, Bin, find_bin, forward_in_bin, inverse_in_bin
from pyro_nf.univariate.base import UnivariateMap


class RationalQuadratic(UnivariateMap):
    r"""A monotone rational-quadratic spline with ``count_bins`` bins and an exact inverse.

    On the interval the map is a ratio of two quadratics between neighbouring knots, with the
    parameters as bin widths, bin heights and slopes. By default the interval is
    :math:`(-b, b)` and the tails outside are the identity, joined with slope 1. With ``interval``
    the map takes that interval onto itself, with free slopes at its ends and no tails; points
    outside go to its ends and have the ladj -inf.

    *Neural Spline Flows* (Durkan, Bekasov, Murray, Papamakarios, 2019).

    Args:
        count_bins: The number of bins :math:`K`.
        bound: The half-width :math:`b` of the interval with linear tails.
        interval: The ends of the interval that is mapped onto itself, instead of linear tails.

    Raises:
        ValueError: If there is no bin, if there are too many, or if the interval is empty.

    Example:
        >>> import torch
        >>> spline, params = RationalQuadratic(count_bins=4), torch.randn(3, 11)
        >>> y, ladj = spline.forward_and_ladj(torch.tensor([-9.0, 0.2, 1.0]), params)
        >>> x, _ = spline.inverse_and_ladj(y, params)
        >>> torch.allclose(x, torch.tensor([-9.0, 0.2, 1.0]), atol=1e-4)
        True
    """

    def __init__(
        self,
        count_bins: int = 8,
        bound: float = 5.0,
        *,
        interval: tuple[float, float] | None = None,
    ) -> None:
        check_count("RationalQuadratic", "count_bins", count_bins, at_least=2)
        check_positive("RationalQuadratic", "bound", bound)
        if count_bins * MIN_BIN >= 1:
            raise ValueError(
                f"RationalQuadratic: count_bins must be below {round(1 / MIN_BIN)}, got "
                f"{count_bins}; each bin takes at least {MIN_BIN} of the interval."
            )
        self.count_bins, self.bound, self.interval = count_bins, bound, interval
        if interval is not None:
            check_ends("RationalQuadratic", "interval", interval)
        self._low, self._high = (-bound, bound) if interval is None else interval
        if interval is None:
            self.num_params = 3 * count_bins - 1
        else:
            self.num_params = 3 * count_bins + 1
            self.domain = self.codomain = constraints.interval(self._low, self._high)

    def _bin(self, value: Tensor, params: Tensor, axis: int) -> Bin:
        k = self.count_bins
        raw_sizes, raw_slopes = params[: 2 * k].unflatten(0, (2, k)), params[2 * k :]
        if self.interval is None:  # a raw slope of 0 is the slope 1 of the tails
            raw_slopes = F.pad(raw_slopes, (0, 0) * value.dim() + (1, 1))
        return find_bin(value, raw_sizes, raw_slopes, self._low, self._high, axis)

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, params = turned(x), turned(params)
        inside = x.clamp(self._low, self._high)
        y, ladj = forward_in_bin(inside, self._bin(inside, params, axis=0))
        return self._with_tails(x, y, ladj)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, params = turned(y), turned(params)
        inside = y.clamp(self._low, self._high)
        x, ladj = inverse_in_bin(inside, self._bin(inside, params, axis=1))
        return self._with_tails(y, x, ladj)

    def _with_tails(self, value: Tensor, image: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        if self.interval is None:
            tail = (value <= self._low) | (value >= self._high)
            image = torch.where(tail, value, image)
            ladj = torch.where(tail, torch.zeros_like(ladj), ladj)
        else:
            image = image.clamp(self._low, self._high)  # rounding must not lead out of it
            ladj = zero_outside(ladj, value, self.domain)
        return turned(image), turned(ladj)
