"""Coordinates in which a hierarchy has no funnel: the partially non-centred parametrisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_nf._checks import check_kind, check_tensor
from pyro_nf.model.density import LogDensity
from pyro_nf.model.joint import LogJoint, RecentredJoint
from pyro_nf.search.gaussians import MAX_FULL_DIM, diagonal_precision
from pyro_nf.transforms.base import FlowTransform

# Rounding of a curvature of 1, in units of eps.
_ROUNDING = 100


class Recentre(FlowTransform):
    r"""The map from partially non-centred coordinates to unconstrained ones, by the model itself.

    .. math:: z_s = m_s(z_{<s}) + \sqrt{V_s(z_{<s})} \; v_s

    for each site whose prior has a location or a scale that depends on other latents; see
    :mod:`pyro_nf.sites.centring` for m and V. The other sites stay as they are. Both directions are
    exact and cost one run of the model for the whole batch.

    The model is not part of the state: a deep copy shares it, and after unpickling there is none.

    *A General Framework for the Parametrization of Hierarchical Models* (Papaspiliopoulos, Roberts,
    Sköld, 2007); *Automatic Reparameterisation of Probabilistic Programs* (Gorinova, Moore,
    Hoffman, 2020).

    Args:
        joint: The log joint density of the model, in plain coordinates.
        precision: h of all coordinates, shape ``(D,)``; it counts where the prior depends on other
            latents. Default: 0, for which the coordinates are non-centred.
        shift: b, shape ``(D,)``; 0 by default.

    Raises:
        RuntimeError: When it is called after unpickling.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     log_tau = pyro.sample("log_tau", dist.Normal(0.0, 3.0))
        ...     pyro.sample("theta", dist.Normal(0.0, log_tau.exp()))
        >>> recentre = Recentre(LogJoint(model))
        >>> recentre.forward_and_ladj(torch.tensor([-2.0, 1.0]))
        (tensor([-2.0000,  0.1353]), tensor(-2.))
    """

    precision: Tensor
    shift: Tensor

    def __init__(
        self, joint: LogJoint, precision: Tensor | None = None, shift: Tensor | None = None
    ) -> None:
        check_kind("Recentre", "joint", joint, LogJoint)
        super().__init__(joint.latent_dim)
        check_tensor("Recentre", "precision", precision, (joint.latent_dim,), optional=True)
        check_tensor("Recentre", "shift", shift, (joint.latent_dim,), optional=True)
        self.joint: LogJoint | None = joint
        zero = torch.zeros_like(joint.init_loc)
        self.register_buffer("precision", zero if precision is None else precision)
        self.register_buffer("shift", zero.clone() if shift is None else shift)

    @classmethod
    def at(cls, joint: LogJoint, z: Tensor) -> Recentre:
        r"""With h and b by the slope and the curvature of the likelihood at a point.

        In non-centred coordinates the log joint has the slope :math:`g` and the curvature
        :math:`-1 - \sigma^2 h`, and :math:`g = -v + \sigma h (d - z)`.

        Args:
            joint: The log joint density, in plain coordinates.
            z: The point, shape ``(D,)``, where the posterior has its mass.
        """
        plain = cls(joint)
        check_tensor("Recentre.at", "z", z, (joint.latent_dim,))
        there = plain.recentred()
        v = plain.inverse_and_ladj(z)[0].detach()
        sigma = joint.prior_scales(z)
        g = there.value_and_grad(v.unsqueeze(0))[1][0]
        excess = _curvature(there, v) - 1
        is_seen = excess > _ROUNDING * torch.finfo(z.dtype).eps
        h = torch.where(is_seen, excess / sigma**2, 0.0).nan_to_num(0.0, 0.0, 0.0)
        b = torch.where(h > 0, h * z + (g + v) / sigma, 0.0).nan_to_num(0.0, 0.0, 0.0)
        return cls(joint, h, b)

    def recentred(self) -> RecentredJoint:
        """The log joint density in the coordinates on the base side."""
        return self._model().recentred(self.precision, self.shift)

    def _model(self) -> LogJoint:
        if self.joint is None:
            raise RuntimeError(
                "Recentre: an unpickled guide has no model, by which its hierarchical sites are "
                "placed. Set up a new guide with the model, and load the state_dict of this one."
            )
        return self.joint

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._model().move(x, self.precision, self.shift)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._model().move(y, self.precision, self.shift, inverse=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"joint": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Recentre:
        return Recentre(self._model(), self.precision.clone(), self.shift.clone())


def _curvature(joint: LogDensity, z: Tensor) -> Tensor:
    """The diagonal of ``-d^2 log p / dz^2`` at a point ``(D,)``; 0 where there is none."""
    try:
        if len(z) > MAX_FULL_DIM:
            return diagonal_precision(joint, z, torch.Generator().manual_seed(0))
        return -joint.hessian(z).diagonal()
    except (ValueError, RuntimeError):  # an operation of the model without a second derivative
        return torch.zeros_like(z)
