"""Training: a step, the two stages, how a state is judged, and sizes that can be afforded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixtureDistribution
from pyro_nf.guides.joint_flow import JointFlow
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.ops.recording import process_seconds
from pyro_nf.search.mixtures import mixture_draws
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.stages import Stage, adam, warm_cosine
from pyro_nf.transforms.elementwise import Elementwise
from pyro_nf.univariate.sinh_arcsinh import SinhArcsinh
from pyro_nf.vi.gradients import (
    DifferentiableLogJoint,
    Variational,
    distribution_of,
    drawn,
    gradient_for,
)
from pyro_nf.vi.objectives import ELBO, Objective
from pyro_nf.vi.recipe import PosteriorRecipe

DEFAULT = PosteriorRecipe()


class Step:
    """The loss of one step: fresh draws of the base, and an objective on them.

    Once q is p but for the tails, where few draws fall, it is the tails that decide what importance
    weights are worth. A path gradient (:class:`~pyro_nf.vi.gradients.StickTheLanding`) is zero
    wherever q is p, whatever the draws, so some of them may then come from further out. The loss is
    the mean over all of them.

    Args:
        make_q: Makes q, with its parameters as they are: a flow, or a function of nothing such as
            ``lambda: flow(context)``.
        joint: p.
        objective: What is minimised.
        num_particles: S.
        tails: Whether to draw from further out when the weights are even; for a path gradient.
        recipe: Says when, how many and how far.

    Attributes:
        last: The last :class:`~pyro_nf.vi.objectives.Estimate`.
        memory: What the objective remembers, and the standard deviation of the last log weights, as
            "spread".
    """

    def __init__(
        self,
        make_q: Callable[[], Variational],
        joint: DifferentiableLogJoint,
        objective: Objective,
        num_particles: int = DEFAULT.few_particles,
        tails: bool = False,
        recipe: PosteriorRecipe = DEFAULT,
    ) -> None:
        self.make_q, self.joint, self.objective = make_q, joint, objective
        self.num_particles, self.tails, self.recipe = num_particles, tails, recipe
        self.memory = objective.memory

    def __call__(self, batch: object = None) -> Tensor:
        q, recipe, num_far = self.make_q(), self.recipe, 0
        x, weights = base_draws(q, self.num_particles)
        is_even = self.memory.get("spread", math.inf) < recipe.even
        if self.tails and is_even and weights is None and isinstance(x, Tensor):
            num_far = int(recipe.far_share * len(x))
            wider = 1 + recipe.far / math.sqrt(x.shape[-1])  # as |x| is about sqrt(D)
            x = torch.cat([wider * x[:num_far], x[num_far:]])
        self.last = self.objective(q, self.joint, x, weights)
        if self.tails:
            self.memory["spread"] = float(self.last.log_weights[num_far:].std())
        return self.last.loss


def base_draws(q: Variational, count: int) -> tuple[Tensor | int, Tensor | None]:
    """Draws of q's base (S, ..., D), and their weights (S,) if they are stratified.

    Args:
        q: A distribution; of one that is no flow the count comes back.
        count: S.
    """
    if not isinstance(q, FlowDistribution):
        return count, None
    if isinstance(q.base_dist, GaussianMixtureDistribution):
        return mixture_draws(q.base_dist, count)
    return q.base_dist.sample((count,)), None


def elbo_floor(
    q: Variational | Flow,
    joint: DifferentiableLogJoint,
    count: int = DEFAULT.num_check_particles,
    seed: int = 0,
) -> float:
    """What the ELBO of a distribution is at least, by draws that depend on the seed only.

    The mean of the log weights less two standard errors: of states that are compared by the same
    draws, one with uneven weights may seem the best by their luck. NaN if no draw is finite.

    Args:
        q: The distribution; a flow without context stands for its own.
        joint: p.
        count: Draws.
        seed: Of the draws; the global generators are left as they were.
    """
    with torch.no_grad(), own_randomness(seed):
        q = distribution_of(q)
        x, weights = base_draws(q, count)
        z, log_q = drawn(q, x)
        log_w = joint.log_prob(z) - log_q
        ok = torch.isfinite(log_w)
        weights = ok.to(log_w) * (torch.ones_like(log_w) if weights is None else weights)
        weights = weights / weights.sum()
        log_w = torch.where(ok, log_w, 0.0)
        elbo = (weights * log_w).sum()
        error = (weights * (log_w - elbo)).square().sum().sqrt()
        return float(elbo - 2 * error)


def posterior_stages(
    flow: JointFlow,
    joint: DifferentiableLogJoint,
    *,
    objective: Objective | None = None,
    num_particles: int = DEFAULT.few_particles,
    rate: float = DEFAULT.flow_rates[0],
    tails: bool = False,
    recipe: PosteriorRecipe = DEFAULT,
) -> list[Stage]:
    """The affine part alone, then everything.

    Args:
        flow: Of an :class:`~pyro_nf.guides.guide.AutoFlow`.
        joint: The log joint density.
        objective: :class:`~pyro_nf.vi.objectives.ELBO` by default, with the gradient that suits
            the flow (:func:`~pyro_nf.vi.gradients.gradient_for`).
        num_particles: S.
        rate: The highest learning rate of the second stage.
        tails: See :class:`Step`.
        recipe: All other rates and shares.
    """
    objective = objective or ELBO(gradient_for(flow))
    gaussian = flow.affine_flow()
    affine = Step(gaussian, joint, objective, num_particles, recipe=recipe)
    step = Step(flow, joint, objective, num_particles, tails, recipe)
    (first, last), warmup = recipe.affine_rates, recipe.warmup_steps
    return [
        Stage(
            affine,
            adam(gaussian.parameters(), first, recipe.betas),
            warm_cosine(warmup, last / first),
            recipe.affine_share,
            affine.memory,
        ),
        Stage(
            step,
            adam(_groups(flow, rate, recipe.shape_share), betas=recipe.betas),
            warm_cosine(warmup),
            1 - recipe.affine_share,
            step.memory,
        ),
    ]


def _groups(flow: Flow, rate: float, shape_share: float) -> list[dict[str, Any]]:
    """Parameters of a flow by the rate at which they learn."""
    elementwise = [m for m in flow.modules() if isinstance(m, Elementwise)]
    shapes = [
        p for m in elementwise if isinstance(m.univariate, SinhArcsinh) for p in m.parameters()
    ]
    slow = {id(p) for p in shapes}
    rest = [p for p in flow.parameters() if id(p) not in slow]
    groups = [{"params": rest, "lr": rate}, {"params": shapes, "lr": shape_share * rate}]
    return [group for group in groups if group["params"]]


def choose_particles(
    joint: LogJoint | Metered, max_seconds: float | None, recipe: PosteriorRecipe = DEFAULT
) -> int:
    """Many particles where they leave enough steps, or cost hardly more than few.

    Args:
        joint: The log joint density; it is evaluated a few times.
        max_seconds: What the steps may take; None to look at no clock, so that a fit that is
            bounded by steps can be repeated: then many, unless each particle is a run of its own.
        recipe: Says what is few, many and enough.
    """
    few, many = recipe.few_particles, recipe.many_particles
    if max_seconds is None:
        kind = joint.joint.kind if isinstance(joint, Metered) else joint.kind
        return few if kind == "loop" else many
    meter = Metered.of(joint, max_seconds, time.process_time)

    def seconds(count: int) -> float:
        z = meter.init_loc.expand(count, -1)
        times = []
        for _ in range(2):
            if meter.price("gradient", count) <= recipe.timing_share * meter.budget.seconds_left:
                meter.value_and_grad(z)
            times.append(meter.price("gradient", count))
        return min(times)

    of_few, of_many = seconds(few), seconds(many)
    if recipe.enough_steps * of_many < max_seconds or of_many < recipe.nearly_free * of_few:
        return many
    count = few
    while (
        count > recipe.least_particles
        and recipe.few_steps * meter.price("gradient", count) > max_seconds
    ):
        count //= 2
    return count


def choose_check_particles(joint: Metered, recipe: PosteriorRecipe = DEFAULT) -> int:
    """Draws of a check, fewer than usual if that takes too large a share of what is left.

    Args:
        joint: The log joint density, with the budget of the fit.
        recipe: Says how many are usual, the least, and the share.
    """
    least = recipe.least_check_particles
    return joint.afford("value", recipe.num_check_particles, recipe.check_share, least)


def seconds_per_step(
    flow: Flow, joint: DifferentiableLogJoint, num_particles: int, seed: int = 0
) -> float:
    """Process seconds of one step, by a few whose gradients are thrown away.

    Args:
        flow: q.
        joint: p.
        num_particles: S.
        seed: Of the draws; the global generators are left as they were.
    """
    step = Step(flow, joint, ELBO(gradient_for(flow)), num_particles)
    with own_randomness(seed):
        seconds = process_seconds(lambda: step().backward(), count=2)
    flow.zero_grad()
    return seconds
