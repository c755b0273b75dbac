r"""What is minimised to fit a flow to a log joint density, and how its gradient is estimated.

An objective is called as ``objective(flow, joint, x)`` with draws ``x (S, D)`` of the flow's base,
and returns an :class:`Estimate` whose ``loss`` is to be minimised by autograd. Whoever calls it
draws ``x``, and so decides on seeds, antithetic or quasi-random draws. With :math:`z = T(x)`,

.. math:: \log w = \log p(z) - \log q(z), \qquad \log q(z) = \log p_0(x) - \log|\det J|,
          \qquad J = \partial z / \partial x.

A particle whose density or gradient is not finite gets weight zero, and ``num_failed`` counts it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pyro_nf._checks import (
    check_count,
    check_kind,
    check_log_weights,
    check_number,
    check_positive,
    check_tensor,
)
from pyro_nf.flows.flow import Flow


class DifferentiableLogJoint(Protocol):
    """What an objective needs of a joint density; :class:`~pyro_nf.model.joint.LogJoint` has it."""

    has_parameters: bool

    def log_prob(self, z: Tensor) -> Tensor:
        """log p (S,) of z (S, D), differentiable."""
        ...

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p (S,) and its gradient (S, D), outside of autograd."""
        ...


@dataclass(frozen=True)
class Estimate:
    """The value of an objective on one batch of particles.

    Attributes:
        loss: To be minimised, a scalar with a graph. Its gradient is what counts: with sticking the
            landing its value is that of the objective too.
        log_weights: log p(z) - log q(z) of each particle (S,), without a graph; -inf if it failed.
        num_failed: How many particles had no finite density or gradient.
    """

    loss: Tensor
    log_weights: Tensor
    num_failed: int

    @property
    def elbo(self) -> Tensor:
        """Mean of the finite log weights, a scalar without a graph."""
        ok = torch.isfinite(self.log_weights)
        return torch.where(ok, self.log_weights, 0.0).sum() / ok.sum()


@dataclass(frozen=True)
class Paths:
    """Particles and what moves them.

    Attributes:
        z: Draws T(x) (S, D), with the graph to the flow's parameters.
        log_q: (S,), with the graph if it is a path of the gradient.
        log_p: (S,); with a graph if it is a path of the gradient.
        slope_p: d log p / dz (S, D), without a graph.
        slope_q: d log q / dz (S, D) at fixed parameters, without a graph, or None.
        ok: (S,), which of them are finite.
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
    """How the gradient of sum_s a_s (temperature log p(z_s) - log q(z_s)) goes to the flow."""

    @abstractmethod
    def paths(self, flow: Flow, joint: DifferentiableLogJoint, x: Tensor) -> Paths:
        """Pushes base draws x (S, D) through the flow and evaluates the joint density."""

    @abstractmethod
    def surrogate(self, paths: Paths, weights: Tensor, temperature: float) -> Tensor:
        """A scalar with the gradient of sum_s weights_s (temperature log p - log q) to the flow."""


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

    def paths(self, flow: Flow, joint: DifferentiableLogJoint, x: Tensor) -> Paths:
        z, ladj = flow.transform.forward_and_ladj(x)
        return _density_paths(joint, z, flow.base().log_prob(x) - ladj)

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

    def paths(self, flow: Flow, joint: DifferentiableLogJoint, x: Tensor) -> Paths:
        log_p0, score = flow.base.log_prob_and_score(x)
        z, ladj, slope_q = flow.transform.push_score(x, score)
        return _density_paths(joint, z, log_p0 - ladj.detach(), slope_q)

    def surrogate(self, paths: Paths, weights: Tensor, temperature: float) -> Tensor:
        assert paths.slope_q is not None
        slope = paths.keep(temperature * paths.slope_p - paths.slope_q)
        z = paths.keep(paths.z)
        log_p = paths.keep(paths.log_p)
        return (weights * ((slope * z).sum(-1) + temperature * log_p)).sum()


class Objective(ABC):
    """Something to minimise: ``objective(flow, joint, x) -> Estimate``."""

    @property
    def memory(self) -> dict[str, float]:
        """What it remembers from call to call, to be kept and changed in place; mostly nothing."""
        return {}

    @abstractmethod
    def __call__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Estimate:
        """Evaluates the objective.

        Args:
            flow: q.
            joint: The log joint density p.
            x: Draws of ``flow.base()``, shape ``(S, D)``; with a graph if the base learns.
            weights: Of stratified draws, shape ``(S,)``, with sum 1; equal by default.
        """


def _estimate(value: Tensor, surrogate: Tensor, paths: Paths, log_w: Tensor) -> Estimate:
    """A loss with the value of the objective and the gradient of its surrogate, both maximised."""
    loss = -(value.detach() + surrogate - surrogate.detach())
    if paths.all_ok:
        return Estimate(loss, log_w.detach(), 0)
    failed = int((~paths.ok).sum())
    return Estimate(loss, torch.where(paths.ok, log_w, -torch.inf).detach(), failed)


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound, :math:`E_q[\beta \log p(z) - \log q(z)] \le \log p`.

    With :math:`\beta = 1` it bounds the log evidence. Smaller values, higher temperatures, widen q
    and let it find modes that lie apart; :class:`TemperedELBO` raises it to 1 in steps.

    Args:
        gradient: The estimator.
        temperature: :math:`\beta`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_nf.model.joint import LogJoint
        >>> from pyro_nf.flows.flow import Flow
        >>> from pyro_nf.transforms.affine import LowerAffine
        >>> joint = LogJoint(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
        >>> estimate = ELBO()(Flow(LowerAffine(2)), joint, torch.randn(64, 2))
        >>> round(abs(estimate.loss.item()), 5)  # q is p: no noise at all
        0.0
    """

    gradient: GradientEstimator = StickTheLanding()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_kind("ELBO", "gradient", self.gradient, GradientEstimator)
        check_positive("ELBO", "temperature", self.temperature)

    def __call__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Estimate:
        paths = self.gradient.paths(flow, joint, x)
        if weights is None and paths.all_ok:
            weights = x.new_tensor(1 / len(x))
        else:
            weights = paths.keep(torch.ones_like(paths.log_q) if weights is None else weights)
            weights = weights / weights.sum().clamp_min(torch.finfo(x.dtype).tiny)
        log_w = paths.log_p - paths.log_q
        each = paths.keep(self.temperature * paths.log_p - paths.log_q).detach()
        value = (weights * each).sum()
        surrogate = self.gradient.surrogate(paths, weights.detach(), self.temperature)
        return _estimate(value, surrogate + value, paths, log_w)


class TemperedELBO(Objective):
    r"""An :class:`ELBO` whose :math:`\beta` rises from a start to 1 in equal ratios.

    Args:
        count_steps: After how many calls :math:`\beta` is 1.
        start: The first :math:`\beta`.
        gradient: The estimator.

    Raises:
        ValueError: If the start is not in (0, 1].

    Attributes:
        temperature: The :math:`\beta` of the next call.
    """

    def __init__(
        self,
        count_steps: int,
        start: float = 0.1,
        gradient: GradientEstimator = StickTheLanding(),
    ) -> None:
        check_count("TemperedELBO", "count_steps", count_steps)
        check_number("TemperedELBO", "start", start, "in (0, 1]", above=0, at_most=1)
        check_kind("TemperedELBO", "gradient", gradient, GradientEstimator)
        self.count_steps, self.start, self.gradient = count_steps, start, gradient
        self._memory = {"step": 0.0}

    @property
    def memory(self) -> dict[str, float]:
        """The number of calls, as "step"."""
        return self._memory

    @property
    def temperature(self) -> float:
        done = min(1.0, self._memory["step"] / max(1, self.count_steps))
        return float(self.start ** (1 - done))

    def __call__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Estimate:
        objective = ELBO(self.gradient, self.temperature)
        self._memory["step"] += 1
        return objective(flow, joint, x, weights)


@dataclass(frozen=True)
class ImportanceWeightedELBO(Objective):
    r"""The importance-weighted bound, :math:`E \log \frac1K \sum_{k \le K} w_k \le \log p`.

    Tighter than the ELBO for K > 1, and kinder to tails. The path gradient of a group has the
    weights :math:`\tilde w_k^2` (doubly reparameterised); the plain one :math:`\tilde w_k`.

    *Importance Weighted Autoencoders* (Burda, Grosse, Salakhutdinov, 2016); *Doubly Reparameterized
    Gradient Estimators for Monte Carlo Objectives* (Tucker, Lawson, Gu, Maddison, 2019).

    Args:
        count_inner: K; must divide the number of particles.
        gradient: The estimator.
    """

    count_inner: int = 8
    gradient: GradientEstimator = StickTheLanding()

    def __post_init__(self) -> None:
        check_count("ImportanceWeightedELBO", "count_inner", self.count_inner)
        check_kind("ImportanceWeightedELBO", "gradient", self.gradient, GradientEstimator)

    def __call__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Estimate:
        """See :class:`Objective`.

        Raises:
            ValueError: If K does not divide the number of particles, or they have weights.
        """
        if weights is not None:
            raise ValueError("ImportanceWeightedELBO: particles with weights are not supported.")
        if len(x) % self.count_inner:
            raise ValueError(
                f"ImportanceWeightedELBO: {len(x)} particles are not a multiple of count_inner = "
                f"{self.count_inner}."
            )
        paths = self.gradient.paths(flow, joint, x)
        log_w = torch.where(paths.ok, paths.log_p - paths.log_q, -torch.inf).detach()
        groups = log_w.reshape(-1, self.count_inner)
        alive = torch.isfinite(groups).any(-1)
        bound = groups.logsumexp(-1) - math.log(self.count_inner)
        share = torch.where(alive.unsqueeze(-1), groups, 0.0).softmax(-1)
        power = 2 if isinstance(self.gradient, StickTheLanding) else 1
        shares = (share**power * alive.unsqueeze(-1)).reshape(-1) / alive.sum().clamp_min(1)
        value = torch.where(alive, bound, 0.0).sum() / alive.sum().clamp_min(1)
        surrogate = self.gradient.surrogate(paths, shares, 1.0)
        return _estimate(value, surrogate, paths, log_w)


@dataclass(frozen=True)
class ForwardKL(Objective):
    r"""The cross entropy of given draws, :math:`-\sum_i \omega_i \log q(z_i)`: KL(p, q) + constant.

    It covers every mode that the draws cover. A step takes as many of the draws as there are
    particles, chosen in proportion to their weights with the flow's own base draws as the source of
    randomness, so that it is called as every other objective.

    Args:
        draws: z, shape ``(N, D)``.
        log_weights: Of the draws, shape ``(N,)``; equal by default.
    """

    draws: Tensor
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("ForwardKL", "draws", self.draws, (None, None))
        check_count("ForwardKL", "the number of draws", len(self.draws))
        if self.log_weights is not None:
            check_log_weights("ForwardKL", "log_weights", self.log_weights, len(self.draws))

    def __call__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Estimate:
        # The first coordinates of the base draws, ranked, are a random permutation of the strata.
        count = len(x)
        log_weights = self.draws.new_zeros(len(self.draws))
        if self.log_weights is not None:
            log_weights = self.log_weights
        cumulative = log_weights.softmax(0).cumsum(0)
        shift = torch.special.ndtr(x.detach()[:, 0])
        strata = (torch.arange(count, device=x.device) + shift) / count
        index = torch.searchsorted(cumulative, strata * cumulative[-1]).clamp_max(
            len(self.draws) - 1
        )
        z = self.draws[index]
        log_q = flow().log_prob(z)
        log_p, _ = joint.value_and_grad(z)
        ok = torch.isfinite(log_q)
        loss = -torch.where(ok, log_q, 0.0).sum() / ok.sum().clamp_min(1)
        log_w = torch.where(ok, log_p - log_q, -torch.inf).detach()
        return Estimate(loss, log_w, int((~ok).sum()))
