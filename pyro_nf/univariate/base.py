"""The contract of a monotone scalar map."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.distributions import constraints


class UnivariateMap(ABC):
    r"""A stateless increasing map of one number, :math:`y = u(x; \theta)`.

    Every map serves every scheme: elementwise, coupling and autoregressive transforms apply it
    coordinate by coordinate, with the parameters that their conditioner computes.

    Shapes: ``x`` and ``y`` are ``(..., D)``, ``params`` is ``(..., D, num_params)`` and
    unconstrained, ``ladj`` is ``(..., D)``. ``params = 0`` is the identity. The ``ladj`` that a
    method returns belongs to the direction it computes: ``forward_and_ladj`` returns
    :math:`\log|dy/dx|`, ``inverse_and_ladj`` returns :math:`\log|dx/dy|`.

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

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in sorted(vars(self).items()) if k[0] != "_")
        return f"{type(self).__name__}({settings})"
