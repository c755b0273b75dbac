"""Linear maps with a cheap determinant, and the statistics that start them from data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf._checks import check_count
from pyro_nf.ops.devices import in_double
from pyro_nf.ops.gradients import by_hand
from pyro_nf.ops.layout import in_columns
from pyro_nf.transforms.base import FlowTransform, check_start

# A column whose standard deviation is below this counts as constant: it is not blown up to 1.
_MIN_SD = 1e-6


def shrunk_covariance(y: Tensor) -> Tensor:
    r"""The covariance of ``y (N, D)``, shrunk towards its diagonal.

    .. math:: \hat\Sigma = (1 - \lambda) S + \lambda \operatorname{diag} S,
              \qquad \lambda = \frac{D}{D + N}

    With few rows for many columns the sample covariance :math:`S` is singular or nearly so; the
    weight of the diagonal then keeps the whitening bounded.
    """
    n = len(y)
    centred = y - y.mean(0)
    s = centred.mT @ centred / max(n - 1, 1)
    return shrunk_towards(s, s.diagonal().clamp_min(_MIN_SD**2).diag_embed(), n)


def shrunk_towards(covariance: Tensor, target: Tensor, n: int | Tensor) -> Tensor:
    r"""A covariance ``(..., D, D)`` of n rows between itself and a target.

    .. math:: (1 - \lambda) S + \lambda T, \qquad \lambda = \frac{D}{D + n}

    Args:
        covariance: S.
        target: T, of which fewer rows know more.
        n: How many rows; a tensor ``(...)`` for each covariance its own.
    """
    d = covariance.shape[-1]
    weight = d / (d + n)
    if isinstance(weight, Tensor):
        weight = weight[..., None, None]
    return (1 - weight) * covariance + weight * target


class LULinear(FlowTransform):
    r"""An invertible matrix in LU form, :math:`y = b + L U x`.

    ``L`` is unit lower triangular, ``U`` upper triangular with the diagonal :math:`e^{s}`, so the
    ladj is :math:`\sum s`. Both directions cost :math:`D^2` a point, the inverse by two triangular
    solves, exact. At zero parameters it is the identity; ``start_from_data`` makes it whiten.

    *Glow: Generative Flow with Invertible 1x1 Convolutions* (Kingma, Dhariwal, 2018).

    Args:
        input_dim: Size of the event.

    Raises:
        ValueError: If the dimension makes no sense.

    Example:
        >>> import torch
        >>> LULinear(2)(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """

    def __init__(self, input_dim: int) -> None:
        check_count("LULinear", "input_dim", input_dim)
        super().__init__(input_dim)
        self.bias = nn.Parameter(torch.zeros(input_dim))
        self.log_diagonal = nn.Parameter(torch.zeros(input_dim))
        # the strict triangles of L and U share one square matrix
        self.triangles = nn.Parameter(torch.zeros(input_dim, input_dim))

    def _lower_and_upper(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        lower = self.triangles.tril(-1) + eye
        upper = self.triangles.triu(1) + self.log_diagonal.exp().diag_embed()
        return lower, upper

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper = self._lower_and_upper()
        y = self.bias + x @ (lower @ upper).mT
        return y, self.log_diagonal.sum().expand(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper = self._lower_and_upper()
        # x (L U)^T = y - b, solved from the right so that the batch needs no transpose
        rows = (y - self.bias).reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(
            lower.mT, rows, upper=True, left=False, unitriangular=True
        )
        rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)
        return rows.reshape(y.shape), -self.log_diagonal.sum().expand(y.shape[:-1])

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        """Sets ``b`` to the mean and ``L U`` to the Cholesky factor of the shrunk covariance.

        Without ``whiten``, ``L U`` is only the diagonal of standard deviations.
        """
        check_start(self, y, context, whiten)
        with torch.no_grad():
            # nearly equal columns need the digits, which Apple's devices do not have
            covariance = shrunk_covariance(in_double(y))
            if not whiten:
                covariance = covariance.diagonal().diag_embed()
            factor = torch.linalg.cholesky(covariance)
            diagonal = factor.diagonal()
            self.bias.copy_(y.mean(0))
            self.log_diagonal.copy_(diagonal.log())
            self.triangles.copy_((factor / diagonal).tril(-1))
        return super().start_from_data(y, context, whiten=whiten)


class ActNorm(FlowTransform):
    r"""Shift and scale of each coordinate, :math:`y = b + e^{s} x`; both directions fast, exact.

    ``start_from_data`` sets it so that the data have mean 0 and standard deviation 1 on the base
    side. It is the identity until then: nothing starts by itself at a first call.

    *Glow: Generative Flow with Invertible 1x1 Convolutions* (Kingma, Dhariwal, 2018).

    Args:
        input_dim: Size of the event.

    Raises:
        ValueError: If the dimension makes no sense.

    Example:
        >>> import torch
        >>> norm = ActNorm(1)
        >>> x = norm.start_from_data(torch.tensor([[3.0], [5.0]]))
        >>> norm.bias.item(), round(x.std().item(), 3)
        (4.0, 1.0)
    """

    def __init__(self, input_dim: int) -> None:
        check_count("ActNorm", "input_dim", input_dim)
        super().__init__(input_dim)
        self.bias = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.bias + self.log_scale.exp() * x
        return y, self.log_scale.sum().expand(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = in_columns(y)
        if torch.is_grad_enabled() and by_hand():
            x = _Normalized.apply(y, self.bias, self.log_scale)
        else:
            x = (y - self.bias) * (-self.log_scale).exp()
        return x, (-self.log_scale.sum()).expand(y.shape[:-1])

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        """Sets the shift to the mean and the scale to the standard deviation of each column."""
        check_start(self, y, context, whiten)
        with torch.no_grad():
            self.bias.copy_(y.mean(0))
            if len(y) > 1:
                self.log_scale.copy_(y.std(0).clamp_min(_MIN_SD).log())
        return super().start_from_data(y, context, whiten=whiten)


class _Normalized(torch.autograd.Function):
    r""":math:`x = (y - b) e^{-s}`, which keeps ``x``, as the next part does, and not ``y - b``.

    .. math::
        \bar y = \bar x e^{-s}, \qquad \bar b = -e^{-s} \sum \bar x, \qquad \bar s = -\sum \bar x x.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, b: Tensor, s: Tensor) -> Tensor:
        x = (y - b).mul_((-s).exp())
        ctx.save_for_backward(x, s)
        return x

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, s = ctx.saved_tensors
        scale = (-s).exp()
        grad_y = grad_x * scale if ctx.needs_input_grad[0] else None
        grad_b = -scale * grad_x.reshape(-1, len(s)).sum(0)
        return grad_y, grad_b, -(grad_x * x).reshape(-1, len(s)).sum(0)
