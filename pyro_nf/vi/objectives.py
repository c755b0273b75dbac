r"""What is minimised to fit a distribution ``q`` to a log joint density.

An objective is called as ``objective(q, joint, x)``, draws particles :math:`z \sim q`, and returns
an :class:`Estimate` whose ``loss`` is to be minimised by autograd. ``x`` says how many particles;
where q is a flow it may be the draws of the base that they come from, and whoever draws those
decides on seeds, antithetic or quasi-random draws. ``num_failed`` counts the particles whose
density or gradient is not finite; their weight is zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

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
from pyro_nf.transforms.kinds import check_exact, kind_of
from pyro_nf.vi.gradients import (
    STICK_THE_LANDING,
    DifferentiableLogJoint,
    GradientEstimator,
    Paths,
    StickTheLanding,
    Variational,
    distribution_of,
)


@dataclass(frozen=True)
class Estimate:
    """The value of an objective on one batch of particles.

    Attributes:
        loss: To be minimised, a scalar with a graph. Its gradient is what counts: with sticking the
            landing its value is that of the objective too.
        log_weights: log p(z) - log q(z) of each particle ``(S, *batch)``, without a graph; -inf if
            it failed.
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


class Objective(ABC):
    """Something to minimise: ``objective(q, joint, x) -> Estimate``."""

    @property
    def memory(self) -> dict[str, float]:
        """What it remembers from call to call, to be kept and changed in place; mostly nothing."""
        return {}

    @abstractmethod
    def __call__(
        self,
        q: Variational | Flow,
        joint: DifferentiableLogJoint,
        x: Tensor | int,
        weights: Tensor | None = None,
    ) -> Estimate:
        """Evaluates the objective.

        Args:
            q: A distribution that draws with its density (:class:`Variational`), such as
                ``flow()`` or ``flow(context)``; a Flow without context stands for its own.
            joint: The log joint density p. It gets the draws as they are, ``(S, *batch, D)``.
            x: How many draws S to take; or, for a q with ``push`` and ``push_score``, draws of its
                base ``(S, *batch, D)``, with a graph if the base learns.
            weights: Of stratified draws, shape ``(S,)``, with sum 1; equal by default.
        """


def _each(weights: Tensor | None, log_q: Tensor) -> Tensor:
    """Weights of draws (S,) as weights of particles (S, *batch); equal ones if there are none."""
    if weights is None:
        return torch.ones_like(log_q)
    return weights.reshape(-1, *(1,) * (log_q.dim() - 1)).expand_as(log_q)


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

    gradient: GradientEstimator = STICK_THE_LANDING
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_kind("ELBO", "gradient", self.gradient, GradientEstimator)
        check_positive("ELBO", "temperature", self.temperature)

    def __call__(
        self,
        q: Variational | Flow,
        joint: DifferentiableLogJoint,
        x: Tensor | int,
        weights: Tensor | None = None,
    ) -> Estimate:
        paths = self.gradient.paths(q, joint, x)
        if weights is None and paths.all_ok:
            weights = paths.z.new_tensor(1 / paths.log_q.numel())
        else:
            weights = paths.keep(_each(weights, paths.log_q))
            weights = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
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
        gradient: GradientEstimator = STICK_THE_LANDING,
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
        q: Variational | Flow,
        joint: DifferentiableLogJoint,
        x: Tensor | int,
        weights: Tensor | None = None,
    ) -> Estimate:
        objective = ELBO(self.gradient, self.temperature)
        self._memory["step"] += 1
        return objective(q, joint, x, weights)


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
    gradient: GradientEstimator = STICK_THE_LANDING

    def __post_init__(self) -> None:
        check_count("ImportanceWeightedELBO", "count_inner", self.count_inner)
        check_kind("ImportanceWeightedELBO", "gradient", self.gradient, GradientEstimator)

    def __call__(
        self,
        q: Variational | Flow,
        joint: DifferentiableLogJoint,
        x: Tensor | int,
        weights: Tensor | None = None,
    ) -> Estimate:
        """See :class:`Objective`.

        Raises:
            ValueError: If K does not divide the number of particles, or they have weights.
            TypeError: If the log density of q is an estimate: exponentials of it are not right on
                average. A bound is, by the weights of its paths.
        """
        if kind_of(q) == "estimate":
            check_exact("ImportanceWeightedELBO", "q", q, "take ELBO, which takes estimates too")
        if weights is not None:
            raise ValueError("ImportanceWeightedELBO: particles with weights are not supported.")
        count = len(x) if isinstance(x, Tensor) else x
        if count % self.count_inner:
            raise ValueError(
                f"ImportanceWeightedELBO: {count} particles are not a multiple of count_inner = "
                f"{self.count_inner}."
            )
        paths = self.gradient.paths(q, joint, x)
        log_w = torch.where(paths.ok, paths.log_p - paths.log_q, -torch.inf).detach()
        groups = log_w.unflatten(0, (-1, self.count_inner))  # (S / K, K, *batch)
        alive = torch.isfinite(groups).any(1)
        bound = groups.logsumexp(1) - math.log(self.count_inner)
        share = torch.where(alive.unsqueeze(1), groups, 0.0).softmax(1)
        power = 2 if isinstance(self.gradient, StickTheLanding) else 1
        shares = (share**power * alive.unsqueeze(1)).flatten(0, 1) / alive.sum().clamp_min(1)
        value = torch.where(alive, bound, 0.0).sum() / alive.sum().clamp_min(1)
        surrogate = self.gradient.surrogate(paths, shares, 1.0)
        return _estimate(value, surrogate, paths, log_w)


@dataclass(frozen=True)
class ForwardKL(Objective):
    r"""The cross entropy of given draws, :math:`-\sum_i \omega_i \log q(z_i)`: KL(p, q) + constant.

    It covers every mode that the draws cover. A step takes as many of the draws as there are
    particles, chosen in proportion to their weights; where there are draws of the base, these are
    the source of randomness. q must have no batch.

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
        q: Variational | Flow,
        joint: DifferentiableLogJoint,
        x: Tensor | int,
        weights: Tensor | None = None,
    ) -> Estimate:
        log_weights = self.draws.new_zeros(len(self.draws))
        if self.log_weights is not None:
            log_weights = self.log_weights
        cumulative = log_weights.softmax(0).cumsum(0)
        # The first coordinate of a base draw, as a rank, is its place within its stratum.
        if isinstance(x, Tensor):
            shift = torch.special.ndtr(x.detach()[:, 0])
        else:
            shift = torch.rand(x).to(cumulative)
        count = len(shift)
        strata = (torch.arange(count, device=shift.device) + shift) / count
        index = torch.searchsorted(cumulative, strata * cumulative[-1]).clamp_max(
            len(self.draws) - 1
        )
        z = self.draws[index]
        log_q = distribution_of(q).log_prob(z)
        log_p, _ = joint.value_and_grad(z)
        ok = torch.isfinite(log_q)
        loss = -torch.where(ok, log_q, 0.0).sum() / ok.sum().clamp_min(1)
        log_w = torch.where(ok, log_p - log_q, -torch.inf).detach()
        return Estimate(loss, log_w, int((~ok).sum()))


@dataclass(frozen=True)
class Watched(Objective):
    """An objective whose loss is NaN where every particle failed: of nothing there is no mean.

    Args:
        objective: It.
    """

    objective: Objective

    @property
    def memory(self) -> dict[str, float]:
        """That of the objective."""
        return self.objective.memory

    def __call__(
        self,
        q: Variational | Flow,
        joint: DifferentiableLogJoint,
        x: Tensor | int,
        weights: Tensor | None = None,
    ) -> Estimate:
        estimate = self.objective(q, joint, x, weights)
        failed = estimate.num_failed == estimate.log_weights.numel()
        return replace(estimate, loss=estimate.loss * math.nan) if failed else estimate
