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

from pyro_nf._checks import (
    check_event_shape,
    event_shape_of,
    input_dim_of,
    numbers_of,
    size_of,
)
from pyro_nf.ops.gradients import leaf
from pyro_nf.ops.layout import sum_event
from pyro_nf.ops.spaces import over_events

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def log_prob_and_score(law: dist.TorchDistribution, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`\log p(x)` (...) and its slope of the shape of ``x``, both without a graph.

    Args:
        law: A distribution whose density has a gradient.
        x: Its points, batch dimensions first.
    """
    if isinstance(law, IndependentNormals):
        with torch.no_grad():
            return law.log_prob(x), law.score(x)
    with torch.inference_mode(False), torch.enable_grad():
        x = leaf(x)
        log_prob = law.log_prob(x)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
    return log_prob.detach(), score


class Base(nn.Module, ABC):
    """Makes the base distribution of a flow.

    Args:
        event_shape: Shape of the event; an integer is the size of a vector.
        input_dim: Size of a vector, instead of ``event_shape``.

    Attributes:
        event_shape: Shape of the event.
        input_dim: Its size if it is a vector, else None.

    Raises:
        ValueError: If a dimension makes no sense.
    """

    def __init__(
        self, event_shape: int | Sequence[int] | None = None, *, input_dim: int | None = None
    ) -> None:
        super().__init__()
        self.event_shape = event_shape_of(type(self).__name__, input_dim, event_shape)
        self.input_dim = input_dim_of(self.event_shape)

    def sizes(self) -> dict[str, Any]:
        """The arguments of the constructor that decide the shapes of parameters and buffers."""
        if self.input_dim is None:
            return {"event_shape": list(self.event_shape)}
        return {"input_dim": self.input_dim}

    def extra_repr(self) -> str:
        """What is shown in the parentheses."""
        return ", ".join(f"{name}={size}" for name, size in self.sizes().items())

    @abstractmethod
    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        """Returns a fresh distribution with this batch shape."""

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log p_0(x)` (...) and its slope, of the shape of ``x``, without a graph.

        Args:
            x: Shape ``(..., *event_shape)``.
        """
        self._check_points(x)
        with torch.inference_mode(False):  # what a law made in that mode holds has no slope
            return log_prob_and_score(self(), x)

    def _check_points(self, x: Tensor) -> None:
        """Raises unless ``x`` is a floating tensor of events."""
        check_event_shape(type(self).__name__, "x", x, self.event_shape, len(self.event_shape))


class DiagonalNormal(Base):
    r"""Independent normals, :math:`x_i \sim N(\mu_i, \sigma_i)`; standard normals by default.

    Args:
        event_shape: Shape of the event; an integer is the size of a vector.
        loc: Means, a number or of the shape of the event.
        scale: Standard deviations, a number or of the shape of the event, positive.
        input_dim: Size of a vector, instead of ``event_shape``.

    Raises:
        ValueError: If a scale is not positive.

    Example:
        >>> DiagonalNormal(2, scale=3.0)().stddev.tolist()
        [3.0, 3.0]
        >>> DiagonalNormal((3, 8, 8))().sample((5,)).shape
        torch.Size([5, 3, 8, 8])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int] | None = None,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        *,
        input_dim: int | None = None,
    ) -> None:
        super().__init__(event_shape, input_dim=input_dim)
        means = numbers_of("DiagonalNormal", "loc", loc, self.event_shape)
        scales = numbers_of("DiagonalNormal", "scale", scale, self.event_shape)
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


class IndependentNormals(dist.TorchDistribution):
    r"""What :class:`DiagonalNormal` makes.

    .. math:: \log p(x) = -\tfrac12 \|\epsilon\|^2 - \sum_i \log \sigma_i - \tfrac{D}{2} \log 2\pi,
        \qquad \epsilon = (x - \mu) / \sigma

    Torch's Normal computes the same entry by entry, at several times the cost, and draws in a way
    that vmap cannot repeat for each example.

    Args:
        loc: Means, of the shape of the event.
        scale: Standard deviations, of that shape.
        batch_shape: Any; all elements have the same law.
    """

    arg_constraints: ClassVar[dict[str, dist.constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, batch_shape: torch.Size) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(batch_shape, loc.shape, validate_args=False)

    @property
    def support(self) -> dist.constraints.Constraint:
        """All real events."""
        return over_events(dist.constraints.real, self.loc.dim())

    @property
    def mean(self) -> Tensor:
        """The means, ``batch_shape + event_shape``."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variances, ``batch_shape + event_shape``."""
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
        """Log density, ``(..., *event_shape) -> (...)``."""
        eps = (value - self.loc) / self.scale
        constant = self.scale.log().sum() + self.loc.numel() * _HALF_LOG_2PI
        log_prob = torch.sub(-constant, sum_event(eps.square(), self.loc.dim()), alpha=0.5)
        if not self.batch_shape:  # the common case; broadcast_shapes is slow
            return log_prob
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def score(self, value: Tensor) -> Tensor:
        """Slope of the log density, of the shape of ``value``."""
        return (self.loc - value) / self.scale.square()
