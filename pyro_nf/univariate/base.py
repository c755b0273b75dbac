"""The contract of a monotone scalar map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.ops.gradients import gradients, leaf

# What to pass where a map is wanted.
HINT = "pass one of pyro_nf.univariate, such as Affine()"


class Slopes(NamedTuple):
    """Derivatives of a univariate map, of ``x`` and the ladj of the forward direction.

    Attributes:
        x_y: Of ``x`` by ``y``, ``(..., D)``.
        x_params: Of ``x`` by the parameters where ``y`` is kept, ``(..., D, num_params)``.
        ladj_x: Of the ladj by ``x``, ``(..., D)``.
        ladj_params: Of the ladj by the parameters, ``(..., D, num_params)``.
    """

    x_y: Tensor
    x_params: Tensor
    ladj_x: Tensor
    ladj_params: Tensor


class UnivariateMap(ABC):
    r"""An increasing map of one number, :math:`y = u(x; \theta)`.

    Every map serves every scheme: elementwise, coupling and autoregressive transforms apply it
    coordinate by coordinate, with the parameters that their conditioner computes.

    Shapes: ``x`` and ``y`` are ``(..., D)``, ``params`` is ``(..., D, num_params)`` and
    unconstrained, ``ladj`` is ``(..., D)``. ``params = 0`` is the identity. The ``ladj`` that a
    method returns belongs to the direction it computes: ``forward_and_ladj`` returns
    :math:`\log|dy/dx|`, ``inverse_and_ladj`` returns :math:`\log|dx/dy|`.

    A map has no state, as a rule. One that has weights of its own, which all coordinates share, is
    a :class:`torch.nn.Module` too: ``class MyMap(UnivariateMap, nn.Module)``. It may take its slope
    by autograd, inside ``torch.enable_grad()``.

    Attributes:
        num_params: How many unconstrained numbers :math:`\theta` has.
        exact_inverse: Whether the inverse is a closed form (otherwise it is numeric).
        domain: The constraint that ``x`` satisfies.
        codomain: The constraint that ``y`` satisfies.
    """

    num_params: int
    exact_inverse: bool = True
    domain: constraints.Constraint = constraints.real
    codomain: constraints.Constraint = constraints.real

    @abstractmethod
    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``y = u(x)`` and ``log|dy/dx|``, both ``(..., D)``."""

    @abstractmethod
    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` with ``u(x) = y`` and ``log|dx/dy|``, both ``(..., D)``."""

    def slopes(self, x: Tensor, params: Tensor) -> Slopes:
        """Derivatives of ``forward_and_ladj``, without a graph: by autograd, unless overridden."""
        with torch.inference_mode(False), torch.enable_grad():
            x, params = leaf(x), leaf(params)
            y, ladj = self.forward_and_ladj(x, params)
            (y_params,), (ladj_x, ladj_params) = gradients(y, params), gradients(ladj, x, params)
        x_y = (-ladj.detach()).exp()
        return Slopes(x_y, -y_params * x_y.unsqueeze(-1), ladj_x, ladj_params)

    def refuse_hidden_weights(self, owner: str) -> None:
        """Raises if the map has weights that a transform made with it would neither train nor save.

        Args:
            owner: The transform that asks.

        Raises:
            TypeError: If a Module or a tensor that learns belongs to a map that is no Module.
        """
        if isinstance(self, nn.Module):
            return
        for name, value in vars(self).items():
            if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad):
                raise TypeError(
                    f"{owner}: the map {type(self).__name__} has weights in {name!r}, but it is no "
                    "torch.nn.Module, so nothing would train, move or save them; write class "
                    f"{type(self).__name__}(UnivariateMap, torch.nn.Module)."
                )

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in sorted(vars(self).items()) if k[0] != "_")
        return f"{type(self).__name__}({settings})"
