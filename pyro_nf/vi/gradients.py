r"""How the gradient of a log weight goes to the distribution that is fitted.

What is fitted is any distribution ``q`` that draws with its density (:class:`Variational`). With
:math:`z \sim q` and a log joint density :math:`\log p`,

.. math:: \log w = \log p(z) - \log q(z).

A particle whose density or gradient is not finite gets weight zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.transforms.kinds import kind_of


class Variational(Protocol):
    """What can be fitted: a distribution that draws with its density.

    :class:`~pyro_nf.flows.distribution.FlowDistribution` is one, with or without a context. One
    that has ``push(x)`` and ``push_score(x)`` too, as that has, takes draws of its base from
    outside, and knows its own slope without a look at ``log_prob``.
    """

    def rsample_and_log_prob(self, sample_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Draws ``sample_shape + batch_shape + (D,)`` with gradients, and their log density."""
        ...

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density, differentiable in ``value``."""
        ...


class DifferentiableLogJoint(Protocol):
    """What an objective needs of a joint density; :class:`~pyro_nf.model.joint.LogJoint` has it."""

    has_parameters: bool

    def log_prob(self, z: Tensor) -> Tensor:
        """log p (...) of z (..., D), differentiable."""
        ...

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p (...) and its gradient (..., D), outside of autograd."""
        ...


@dataclass(frozen=True)
class Paths:
    """Particles and what moves them.

    Attributes:
        z: Draws ``(S, *batch, D)``, with the graph to the parameters of q.
        log_q: ``(S, *batch)``, with the graph if it is a path of the gradient.
        log_p: ``(S, *batch)``; with a graph if it is a path of the gradient.
        slope_p: d log p / dz, of the shape of z, without a graph.
        slope_q: d log q / dz at fixed parameters, likewise, or None.
        ok: ``(S, *batch)``, which of them are finite.
    """

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_p: Tensor
    slope_q: Tensor | None
    ok: Tensor

    @cached_property
    def all_ok(self) -> bool:
        """Whether no particle failed, as is the rule: then nothing has to be masked."""
        return bool(self.ok.all())

    def keep(self, value: Tensor) -> Tensor:
        """Zero for failed particles, in value and gradient."""
        if self.all_ok:
            return value
        mask = self.ok if value.dim() == self.ok.dim() else self.ok.unsqueeze(-1)
        return torch.where(mask, value, 0.0)


class GradientEstimator(ABC):
    """How the gradient of sum_s a_s (temperature log p(z_s) - log q(z_s)) goes to q."""

    @abstractmethod
    def paths(self, q: Variational | Flow, joint: DifferentiableLogJoint, x: Tensor | int) -> Paths:
        """Draws particles and evaluates the joint density.

        Args:
            q: The distribution; a flow without context stands for its own.
            joint: The log joint density.
            x: How many draws S; or, for a q with ``push``, draws of its base ``(S, *batch, D)``.
        """

    @abstractmethod
    def surrogate(self, paths: Paths, weights: Tensor, temperature: float) -> Tensor:
        """A scalar with the gradient of sum_s weights_s (temperature log p - log q) to q."""


def distribution_of(q: Variational | Flow) -> Variational:
    """The distribution itself; that of a flow without context."""
    return cast(Variational, q()) if isinstance(q, Flow) else q


def drawn(q: Variational, x: Tensor | int) -> tuple[Tensor, Tensor]:
    """Draws with their log density: so many, or those that draws of the base become."""
    if isinstance(x, Tensor):
        return cast(FlowDistribution, q).push(x)
    return q.rsample_and_log_prob((x,))


def drawn_with_slope(q: Variational, x: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws with their log density and its slope at fixed parameters, both without a graph."""
    if isinstance(x, Tensor):
        return cast(FlowDistribution, q).push_score(x)
    if kind_of(q) == "bound":
        raise TypeError(
            "StickTheLanding: q must have a log density, got a bound (log_prob_kind = 'bound'), "
            "whose slope is another one. Take the plain gradient, as ELBO(Reparameterised())."
        )
    z, log_q = q.rsample_and_log_prob((x,))
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(q.log_prob(leaf).sum(), leaf)
    return z, log_q.detach(), slope


def _density_paths(
    joint: DifferentiableLogJoint, z: Tensor, log_q: Tensor, slope_q: Tensor | None = None
) -> Paths:
    """Slopes of the joint density; with a graph only to the model's own parameters."""
    if joint.has_parameters:
        leaf = z.detach().requires_grad_()
        log_p = joint.log_prob(leaf)
        total = torch.where(torch.isfinite(log_p), log_p, 0.0).sum()
        (slope_p,) = torch.autograd.grad(total, leaf, retain_graph=True)
    else:
        log_p, slope_p = joint.value_and_grad(z)
    total = log_p + log_q + (z if slope_q is None else z + slope_q).sum(-1)
    ok = torch.isfinite(total.detach())  # a sum is finite only if all of it is
    return Paths(z, log_q, log_p, slope_p, slope_q, ok)


@dataclass(frozen=True)
class Reparameterised(GradientEstimator):
    r"""The plain reparameterised gradient, through :math:`z` and through the parameters of q.

    *Auto-Encoding Variational Bayes* (Kingma, Welling, 2014).
    """

    def paths(self, q: Variational | Flow, joint: DifferentiableLogJoint, x: Tensor | int) -> Paths:
        return _density_paths(joint, *drawn(distribution_of(q), x))

    def surrogate(self, paths: Paths, weights: Tensor, temperature: float) -> Tensor:
        # z . slope has the gradient of log p(z); log_p itself that of the model's parameters.
        moved = paths.keep((paths.slope_p * paths.z).sum(-1))
        log_p = paths.keep(paths.log_p)
        log_q = paths.keep(paths.log_q)
        return (weights * (temperature * (moved + log_p) - log_q)).sum()


@dataclass(frozen=True)
class StickTheLanding(GradientEstimator):
    r"""The path gradient: the score of q is left out, whose mean is zero and whose noise is not.

    .. math:: \nabla \log w = (\nabla_z \log p - \nabla_z \log q)^\top \, \partial z / \partial
              \phi, \qquad \nabla_z \log q = J^{-\top} \nabla_x (\log p_0(x) - \log|\det J|)

    Its variance vanishes when q is p. The score of q comes from that of the base
    (:meth:`~pyro_nf.transforms.base.FlowTransform.push_score`), so that no inverse is needed.

    *Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference*
    (Roeder, Wu, Duvenaud, 2017).
    """

    def paths(self, q: Variational | Flow, joint: DifferentiableLogJoint, x: Tensor | int) -> Paths:
        return _density_paths(joint, *drawn_with_slope(distribution_of(q), x))

    def surrogate(self, paths: Paths, weights: Tensor, temperature: float) -> Tensor:
        assert paths.slope_q is not None
        slope = paths.keep(temperature * paths.slope_p - paths.slope_q)
        z = paths.keep(paths.z)
        log_p = paths.keep(paths.log_p)
        return (weights * ((slope * z).sum(-1) + temperature * log_p)).sum()


STICK_THE_LANDING = StickTheLanding()
"""The estimator that objectives take if none is given."""


def gradient_for(q: Variational | Flow) -> GradientEstimator:
    """The path gradient, or the plain one where there is only a bound of the log density.

    Args:
        q: What is fitted.

    Example:
        >>> from pyro_nf.transforms.affine import LowerAffine
        >>> gradient_for(Flow(LowerAffine(2)))
        StickTheLanding()
    """
    is_bound = kind_of(q) == "bound"
    return Reparameterised() if is_bound else STICK_THE_LANDING
