"""Base distributions as Modules, so that they move with ``.to`` and may learn."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nf._checks import check_count, check_event, numbers_of, size_of
from pyro_nf.ops.gradients import leaf

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Base(nn.Module, ABC):
    """Makes the base distribution of a flow, with event shape ``(input_dim,)``.

    Args:
        input_dim: Size of the event.

    Raises:
        ValueError: If the dimension makes no sense.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        check_count(type(self).__name__, "input_dim", input_dim)
        self.input_dim = input_dim

    def sizes(self) -> dict[str, int]:
        """The arguments of the constructor that decide the shapes of parameters and buffers."""
        return {"input_dim": self.input_dim}

    def extra_repr(self) -> str:
        """What is shown in the parentheses."""
        return ", ".join(f"{name}={size}" for name, size in self.sizes().items())

    @abstractmethod
    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        """Returns a fresh distribution with this batch shape."""

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log p_0(x)` (...) and its slope (..., D), without a graph.

        Args:
            x: Shape ``(..., D)``.
        """
        check_event(type(self).__name__, "x", x, self.input_dim, 1)
        with torch.inference_mode(False), torch.enable_grad():
            x = leaf(x)
            log_prob = self().log_prob(x)
            (score,) = torch.autograd.grad(log_prob.sum(), x)
        return log_prob.detach(), score


class DiagonalNormal(Base):
    r"""Independent normals, :math:`x_i \sim N(\mu_i, \sigma_i)`; standard normals by default.

    Args:
        input_dim: Size of the event.
        loc: Means, a number or shape ``(input_dim,)``.
        scale: Standard deviations, a number or shape ``(input_dim,)``, positive.

    Raises:
        ValueError: If a scale is not positive.

    Example:
        >>> DiagonalNormal(2, scale=3.0)().stddev.tolist()
        [3.0, 3.0]
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, input_dim: int, loc: float | Tensor = 0.0, scale: float | Tensor = 1.0
    ) -> None:
        super().__init__(input_dim)
        means = numbers_of("DiagonalNormal", "loc", loc, input_dim)
        scales = numbers_of("DiagonalNormal", "scale", scale, input_dim)
        if not bool((scales > 0).all()):
            raise ValueError(f"DiagonalNormal: scale must be positive, got {scales.tolist()}.")
        # a number has no dtype of its own, and takes that of the tensor beside it
        given = [t.dtype for t in (loc, scale) if isinstance(t, Tensor) and t.is_floating_point()]
        dtype = reduce(torch.promote_types, given) if given else means.dtype
        self.register_buffer("loc", means.to(dtype))
        self.register_buffer("scale", scales.to(dtype))

    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        return IndependentNormals(
            self.loc, self.scale, size_of("DiagonalNormal", "batch_shape", batch_shape)
        )

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("DiagonalNormal", "x", x, self.input_dim, 1)
        with torch.no_grad():
            return self().log_prob(x), (self.loc - x) / self.scale.square()


class IndependentNormals(dist.TorchDistribution):
    r"""What :class:`DiagonalNormal` makes.

    .. math:: \log p(x) = -\tfrac12 \|\epsilon\|^2 - \sum_i \log \sigma_i - \tfrac{D}{2} \log 2\pi,
        \qquad \epsilon = (x - \mu) / \sigma

    Torch's Normal computes the same entry by entry, at several times the cost, and draws in a way
    that vmap cannot repeat for each example.

    Args:
        loc: Means, shape ``(D,)``.
        scale: Standard deviations, shape ``(D,)``.
        batch_shape: Any; all elements have the same law.
    """

    arg_constraints: ClassVar[dict[str, dist.constraints.Constraint]] = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, batch_shape: torch.Size) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(batch_shape, loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The means, ``batch_shape + (D,)``."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variances, ``batch_shape + (D,)``."""
        return self.scale.square().expand(self.batch_shape + self.event_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> IndependentNormals:
        """The same law for each element of another batch shape."""
        return IndependentNormals(self.loc, self.scale, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, with gradients."""
        shape = self._extended_shape(torch.Size(sample_shape))
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.scale, eps)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, ``(..., D) -> (...)``."""
        eps = (value - self.loc) / self.scale
        constant = self.scale.log().sum() + len(self.loc) * _HALF_LOG_2PI
        log_prob = torch.sub(-constant, eps.square().sum(-1), alpha=0.5)
        if not self.batch_shape:  # the common case; broadcast_shapes is slow
            return log_prob
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
