r"""How far a latent site stands apart from the sites that its prior depends on.

In a hierarchy a latent z has a prior with a location :math:`\mu` and a scale :math:`\sigma` that
are latent too. Where the scale is small z is held near the location, and the posterior has the
shape of a funnel, which no affine map straightens. If the data say of z what one observation d with
the precision h would, then given the others it is normal, with

.. math::
    V = \frac{\sigma^2}{1 + h \sigma^2}, \qquad m = \frac{\mu + \sigma^2 b}{1 + h \sigma^2},
    \qquad b = h d.

So :math:`v = (z - m) / \sqrt V` is a standard normal whatever :math:`\mu` and :math:`\sigma`. With
h = 0 this is the non-centred parametrisation; with a large h the coordinate is z itself, centred.
What lies between is called partially non-centred.

*A General Framework for the Parametrization of Hierarchical Models* (Papaspiliopoulos, Roberts,
Sköld, 2007); *Automatic Reparameterisation of Probabilistic Programs* (Gorinova, Moore, Hoffman,
2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

# Families that a change of location and scale does not leave, the log-normal in its logarithm.
_LOCATION_SCALE = (dist.Normal, dist.StudentT, dist.Cauchy, dist.Laplace, dist.LogNormal)


def location_and_scale(fn: Any) -> tuple[Tensor, Tensor] | None:
    """The location and the scale of a prior in unconstrained coordinates, or None.

    Args:
        fn: A distribution.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> location_and_scale(dist.Normal(torch.ones(2), 3.0).to_event(1))
        (tensor([1., 1.]), tensor([3., 3.]))
    """
    while isinstance(fn, (dist.Independent, ExpandedDistribution, MaskedDistribution)):
        fn = fn.base_dist
    return (fn.loc, fn.scale) if isinstance(fn, _LOCATION_SCALE) else None


@dataclass(frozen=True)
class SiteCentring:
    """What the data say of one site: h and b, each of the shape of its coordinates.

    Attributes:
        precision: h, not negative.
        shift: b.
    """

    precision: Tensor
    shift: Tensor

    def forward(self, fn: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        """``z = m + sqrt(V) v`` and ``log|dz / dv|`` of each coordinate.

        Args:
            fn: The prior, given what it depends on.
            v: Coordinates.
        """
        m, V = self._moments(fn)
        return m + V.sqrt() * v, (0.5 * V.log()).expand(v.shape)

    def inverse(self, fn: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``v = (z - m) / sqrt(V)`` and ``log|dv / dz|`` of each coordinate.

        Args:
            fn: The prior, given what it depends on.
            z: Unconstrained coordinates of the site.
        """
        m, V = self._moments(fn)
        return (z - m) / V.sqrt(), (-0.5 * V.log()).expand(z.shape)

    def _moments(self, fn: Any) -> tuple[Tensor, Tensor]:
        found = location_and_scale(fn)
        assert found is not None
        (mu, sigma), h, b = found, self.precision, self.shift
        ratio = 1 + h * sigma**2
        return (mu + sigma**2 * b) / ratio, sigma**2 / ratio
