"""Placeholder by the lead until the real one lands: same face, the solve by D plain passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_nf.nn.masked import MaskedNet
from pyro_nf.transforms.base import Fast, FlowTransform, over_vectors
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.base import UnivariateMap
from pyro_nf.univariate.spline import RationalQuadratic


class Autoregressive(FlowTransform):
    """Placeholder."""

    def __init__(
        self,
        univariate: UnivariateMap,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        reverse: bool = False,
        fast: Fast = "inverse",
    ) -> None:
        super().__init__(input_dim, context_dim)
        self.univariate = univariate
        self.domain = over_vectors(univariate.domain)
        self.codomain = over_vectors(univariate.codomain)
        self.fast = fast
        self.reverse = reverse
        self.net = MaskedNet(
            input_dim,
            univariate.num_params,
            context_dim,
            hidden_dims=hidden_dims,
            activation=activation,
        )

    def _order(self, v: Tensor) -> Tensor:
        return v.flip(-1) if self.reverse else v

    def _run(self, direction, v: Tensor, context: Tensor | None, one: bool):
        v = self._order(v)
        z = v
        if not one:
            z = torch.zeros_like(v)
            for _ in range(v.shape[-1]):
                z, _l = direction(v, self.net(z, context).expand(*v.shape, -1))
        out, ladj = direction(v, self.net(z, context).expand(*v.shape, -1))
        return self._order(out), ladj.sum(-1)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(self.univariate.forward_and_ladj, x, context, self.fast == "forward")

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(self.univariate.inverse_and_ladj, y, context, self.fast == "inverse")


def affine_autoregressive(
    input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = (64, 64)
) -> Autoregressive:
    """Placeholder."""
    return Autoregressive(Affine(), input_dim, context_dim, hidden_dims=hidden_dims)


def spline_autoregressive(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    hidden_dims: Sequence[int] = (64, 64),
) -> Autoregressive:
    """Placeholder."""
    return Autoregressive(
        RationalQuadratic(count_bins, bound), input_dim, context_dim, hidden_dims=hidden_dims
    )
