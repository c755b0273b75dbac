"""Shift and scale."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_nf._checks import check_positive
from pyro_nf.univariate.base import UnivariateMap


class Additive(UnivariateMap):
    r"""Shift, :math:`y = x + t`: volume preserving, with an exact inverse.

    The map of *NICE: Non-linear Independent Components Estimation* (Dinh, Krueger, Bengio, 2014).

    Example:
        >>> import torch
        >>> y, ladj = Additive().forward_and_ladj(torch.zeros(2), torch.ones(2, 1))
        >>> y.tolist(), ladj.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """

    num_params = 1

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = x + params[..., 0]
        return y, torch.zeros_like(y)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = y - params[..., 0]
        return x, torch.zeros_like(x)


class Affine(UnivariateMap):
    r"""Shift and scale, :math:`y = t + x e^{s}`, with an exact inverse.

    The log-scale is clamped, :math:`s = \max(-b, \min(b, a))`: far from the data a network
    extrapolates, and an unbounded :math:`e^{a}` overflows.

    The map of *Density estimation using Real NVP* (Dinh, Sohl-Dickstein, Bengio, 2017) and of
    *Masked Autoregressive Flow for Density Estimation* (Papamakarios, Pavlakou, Murray, 2017).

    Args:
        max_log_scale: The bound :math:`b` on the absolute log-scale.

    Raises:
        ValueError: If ``max_log_scale`` is not positive.

    Example:
        >>> import torch
        >>> params = torch.tensor([[0.5, 0.2]])
        >>> y, ladj = Affine().forward_and_ladj(torch.tensor([2.0]), params)
        >>> x, _ = Affine().inverse_and_ladj(y, params)
        >>> round(x.item(), 4), round(ladj.item(), 2)
        (2.0, 0.2)
    """

    num_params = 2

    def __init__(self, max_log_scale: float = 5.0) -> None:
        check_positive("Affine", "max_log_scale", max_log_scale)
        self.max_log_scale = max_log_scale

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        t, a = params.unbind(-1)
        return t, a.clamp(-self.max_log_scale, self.max_log_scale)

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t, s = self._shift_and_log_scale(params)
        return torch.addcmul(t, x, s.exp()), s

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t, s = self._shift_and_log_scale(params)
        ladj = -s
        return (y - t) * ladj.exp(), ladj
