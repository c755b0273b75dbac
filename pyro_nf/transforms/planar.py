"""Planar flows: a ridge along one direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nf._checks import check_count
from pyro_nf.nn.mlp import Constant
from pyro_nf.ops.roots import solve_increasing
from pyro_nf.transforms.base import FlowTransform

# softplus(UNIT) = 1
UNIT = math.log(math.expm1(1.0))
# Where the slope 1 + w.u reaches 0 the map stops being invertible; this is how near it may come.
MIN_SLOPE = 1e-3


class Planar(FlowTransform):
    r"""A ridge across the direction ``w``, :math:`y = x + u \tanh(w \cdot x + b)`.

    It is invertible if :math:`w \cdot u > -1`, which
    :math:`u = v + (m(w \cdot v) - w \cdot v)\, w / \|w\|^2` ensures for any free ``v``, with
    :math:`m(t) = (1 - \epsilon)(\operatorname{softplus}(t + \log(e - 1)) - 1)`, so that
    :math:`v = 0` is the identity.
    The forward direction is fast. The inverse is numeric: with :math:`a = w \cdot x` it solves
    :math:`a + (w \cdot u) \tanh(a + b) = w \cdot y` to about 64 units of rounding, by Newton's
    method safeguarded by bisection, or raises; gradients come from the implicit function theorem.

    *Variational Inference with Normalizing Flows* (Rezende, Mohamed, 2015).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context that sets the parameters, 0 for none.
        hidden_dims: Widths of the hidden layers that see the context.
        activation: Makes their activation.

    Raises:
        ValueError: If a dimension makes no sense.
        RuntimeError: From the inverse, if it does not converge.

    Example:
        >>> import torch
        >>> planar = Planar(2)
        >>> _ = torch.nn.init.normal_(planar.net.value)
        >>> x = torch.tensor([0.3, -1.0])
        >>> torch.allclose(planar.inv(planar(x)), x, atol=1e-5)
        True
    """

    fast = "forward"
    inverse_kind = "numeric"

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        check_count("Planar", "input_dim", input_dim)
        super().__init__(input_dim, context_dim)
        self.net = Constant(
            1, 2 * input_dim + 1, context_dim, hidden_dims=hidden_dims, activation=activation
        )
        # w must not start at 0: there the gradient of v and that of w vanish together
        nn.init.normal_(self.net.value[0, input_dim : 2 * input_dim], std=1 / math.sqrt(input_dim))

    def _u_w_b(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = self.input_dim
        v, w, b = self.net(None, context).squeeze(-2).split((d, d, 1), -1)
        wv = (w * v).sum(-1, keepdim=True)
        m = (1 - MIN_SLOPE) * (F.softplus(wv + UNIT) - 1)
        norm = (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return v + (m - wv) * w / norm, w, b.squeeze(-1), m.squeeze(-1)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u, w, b, wu = self._u_w_b(context)
        h = torch.tanh((w * x).sum(-1) + b)
        return x + u * h.unsqueeze(-1), torch.log1p(wu * (1 - h * h))

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u, w, b, wu = self._u_w_b(context)

        def ridge(a: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(a + b)
            return a + wu * h, 1 + wu * (1 - h * h)

        target = (w * y).sum(-1)
        bound = wu.abs()  # |wu tanh| <= |wu|
        a = solve_increasing(ridge, target, target - bound, target + bound, "Planar")
        h = torch.tanh(a + b)
        return y - u * h.unsqueeze(-1), -torch.log1p(wu * (1 - h * h))


class Radial(FlowTransform):
    r"""A bulge or a dent around a point, :math:`y = x + \beta (x - x_0) / (\alpha + r)`.

    Here :math:`r = \|x - x_0\|`, :math:`\alpha > 0` and :math:`\beta > -\alpha`. Both directions
    are fast and the inverse is exact: :math:`r` is the positive root of
    :math:`r^2 + (\alpha + \beta - \rho) r - \alpha \rho = 0` with :math:`\rho = \|y - x_0\|`.

    *Variational Inference with Normalizing Flows* (Rezende, Mohamed, 2015).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context that sets the parameters, 0 for none.
        hidden_dims: Widths of the hidden layers that see the context.
        activation: Makes their activation.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> import torch
        >>> radial = Radial(2)
        >>> _ = torch.nn.init.normal_(radial.net.value)
        >>> x = torch.tensor([0.3, -1.0])
        >>> torch.allclose(radial.inv(radial(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        check_count("Radial", "input_dim", input_dim)
        super().__init__(input_dim, context_dim)
        self.net = Constant(
            1, input_dim + 2, context_dim, hidden_dims=hidden_dims, activation=activation
        )

    def _centre_alpha_beta(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        params = self.net(None, context).squeeze(-2)
        x0, raw_alpha, raw_beta = params.split((self.input_dim, 1, 1), -1)
        alpha = MIN_SLOPE + F.softplus(raw_alpha + UNIT).squeeze(-1)
        beta = (1 - MIN_SLOPE) * alpha * (F.softplus(raw_beta + UNIT).squeeze(-1) - 1)
        return x0, alpha, beta

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x0, alpha, beta = self._centre_alpha_beta(context)
        r = _norm(x - x0)
        y = x + (beta / (alpha + r)).unsqueeze(-1) * (x - x0)
        return y, _ladj(x.shape[-1], r, alpha, beta)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x0, alpha, beta = self._centre_alpha_beta(context)
        rho = _norm(y - x0)
        p = alpha + beta - rho
        root = (p * p + 4 * alpha * rho).sqrt()
        # of the two forms of the same root, the one that does not cancel
        r = torch.where(p > 0, 2 * alpha * rho / (p.abs() + root), (p.abs() + root) / 2)
        x = x0 + (y - x0) / (1 + beta / (alpha + r)).unsqueeze(-1)
        return x, -_ladj(x.shape[-1], r, alpha, beta)


def _norm(v: Tensor) -> Tensor:
    """The Euclidean norm, with the gradient 0 at 0."""
    return (v * v).sum(-1).clamp_min(torch.finfo(v.dtype).tiny).sqrt()


def _ladj(dim: int, r: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """(D - 1) tangents are scaled by 1 + beta / (alpha + r), the radius by its derivative."""
    h = 1 / (alpha + r)
    radius = torch.log1p(alpha * beta * h * h)
    return (dim - 1) * torch.log1p(beta * h) + radius
