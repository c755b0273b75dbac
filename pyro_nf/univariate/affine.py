"""Shift and scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_nf._checks import check_positive
from pyro_nf.ops.gradients import by_hand, final
from pyro_nf.univariate.base import Slopes, UnivariateMap


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
        if _by_hand(x, params):
            return _Forward.apply(x, params, self.max_log_scale)
        t, s = self._shift_and_log_scale(params)
        return torch.addcmul(t, x, s.exp()), s

    def slopes(self, x: Tensor, params: Tensor) -> Slopes:
        with torch.no_grad():
            _, s = self._shift_and_log_scale(params)
            x_y, free = (-s).exp(), (s.abs() < self.max_log_scale).to(s)  # 0 where it is clamped
            # x = (y - t) e^(-s), as parameters lie in memory
            x_params, ladj_params = torch.empty_like(params), torch.zeros_like(params)
            x_t, x_s = x_params.unbind(-1)
            torch.neg(x_y, out=x_t)
            torch.mul(x, free, out=x_s).neg_()
            ladj_params.select(-1, 1).copy_(free)
            return Slopes(x_y, x_params, torch.zeros_like(x), ladj_params)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        if _by_hand(y, params):
            return _Inverse.apply(y, params, self.max_log_scale)
        t, s = self._shift_and_log_scale(params)
        ladj = -s
        return (y - t) * ladj.exp(), ladj


class SmoothAffine(UnivariateMap):
    r"""Shift and scale within smooth bounds, :math:`y = t + x e^{s}`, with an exact inverse.

    .. math::
        t = b_t \tanh(c_t \, \theta_1 / b_t), \qquad s = b_s \tanh(c_s \, \theta_2 / b_s)

    Whatever the parameters, a point is moved by at most :math:`b_t` and stretched by at most
    :math:`e^{b_s}`. Optimisers like Adam move each parameter by the learning rate in a step: the
    factors :math:`c` say how far that moves and stretches a point, so that one learning rate suits
    a network, whose outputs change with all its weights, and free numbers beside it.

    Args:
        max_shift: The bound :math:`b_t` on the absolute shift.
        max_log_scale: The bound :math:`b_s` on the absolute log-scale.
        shift_gain: The factor :math:`c_t`.
        scale_gain: The factor :math:`c_s`.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> import torch
        >>> y, ladj = SmoothAffine().forward_and_ladj(torch.zeros(1), torch.full((1, 2), 1e6))
        >>> y.tolist(), ladj.tolist()
        ([10.0], [3.0])
    """

    num_params = 2

    def __init__(
        self,
        max_shift: float = 10.0,
        max_log_scale: float = 3.0,
        *,
        shift_gain: float = 1.0,
        scale_gain: float = 1.0,
    ) -> None:
        check_positive("SmoothAffine", "max_shift", max_shift)
        check_positive("SmoothAffine", "max_log_scale", max_log_scale)
        check_positive("SmoothAffine", "shift_gain", shift_gain)
        check_positive("SmoothAffine", "scale_gain", scale_gain)
        self.max_shift, self.max_log_scale = max_shift, max_log_scale
        self.shift_gain, self.scale_gain = shift_gain, scale_gain

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        a, c = params.unbind(-1)
        return (
            self.max_shift * torch.tanh((self.shift_gain / self.max_shift) * a),
            self.max_log_scale * torch.tanh((self.scale_gain / self.max_log_scale) * c),
        )

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t, s = self._shift_and_log_scale(params)
        return torch.addcmul(t, x, s.exp()), s

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t, s = self._shift_and_log_scale(params)
        return (y - t) * (-s).exp(), -s


def _by_hand(value: Tensor, params: Tensor) -> bool:
    return torch.is_grad_enabled() and value.shape == params.shape[:-1] and by_hand()


# The gradients by hand keep only a value and the ladj, and no parameters.


class _Forward(torch.autograd.Function):
    r"""The gradients of :math:`y` and of the ladj :math:`l = s` go back.

    .. math:: \bar x = \bar y e^s, \qquad \bar t = \bar y, \qquad \bar s = \bar l + \bar x x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        t, a = params.unbind(-1)
        s = a.clamp(-bound, bound)
        ctx.bound, ctx.layout = bound, _layout(params)
        ctx.save_for_backward(x, s)
        return torch.addcmul(t, x, s.exp()), s

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> tuple[Tensor, Tensor, None]:
        x, s = ctx.saved_tensors
        grad_x = grad_y * s.exp()
        grad_s = torch.addcmul(grad_ladj, grad_x, x)
        return grad_x, _gradient_of_params(grad_y, grad_s, s, ctx.bound, ctx.layout), None


class _Inverse(torch.autograd.Function):
    r"""The gradients of :math:`x` and of the ladj :math:`l = -s` go back.

    .. math:: \bar y = \bar x e^l, \qquad \bar t = -\bar y, \qquad \bar s = -\bar l - \bar x x.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, params: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        t, a = params.unbind(-1)
        ladj = a.clamp(-bound, bound).neg_()
        x = (y - t).mul_(ladj.exp())
        ctx.bound, ctx.layout = bound, _layout(params)
        ctx.save_for_backward(x, ladj)
        return x, ladj

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> tuple[Tensor, Tensor, None]:
        x, ladj = ctx.saved_tensors
        grad_y = grad_x * ladj.exp()
        grad_s = -torch.addcmul(grad_ladj, grad_x, x)
        return grad_y, _gradient_of_params(-grad_y, grad_s, ladj, ctx.bound, ctx.layout), None


def _layout(params: Tensor) -> tuple[torch.Size, tuple[int, ...]] | None:
    """How the parameters lie in memory; None if some of them are the same number."""
    return None if 0 in params.stride() else (params.shape, params.stride())


def _gradient_of_params(
    grad_t: Tensor,
    grad_s: Tensor,
    s: Tensor,
    bound: float,
    layout: tuple[torch.Size, tuple[int, ...]] | None,
) -> Tensor:
    """Puts the two gradients together as the parameters lie; where ``s`` is clamped its is 0."""
    backward = torch.ops.aten.hardtanh_backward
    if layout is None or not final(grad_t, grad_s):
        return torch.stack((grad_t, backward(grad_s, s, -bound, bound)), -1)
    grad = s.new_empty_strided(*layout)
    grad[..., 0] = grad_t
    backward.grad_input(grad_s, s, -bound, bound, grad_input=grad[..., 1])
    return grad
