"""The default road to a posterior: a start, a flow in its coordinates, two stages of training."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import torch
from torch import Tensor

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.ops.recording import process_seconds
from pyro_nf.search.mixtures import mixture_draws
from pyro_nf.train.loop import Stage, adam, warm_cosine
from pyro_nf.train.randomness import own_randomness
from pyro_nf.transforms.base import Chain, FlowTransform
from pyro_nf.transforms.elementwise import Elementwise
from pyro_nf.univariate.sinh_arcsinh import SinhArcsinh
from pyro_nf.vi.objectives import ELBO, DifferentiableLogJoint, Objective

# One set of settings for all posteriors: in the coordinates of the start they look alike.
COUNT_PARTICLES = 64
AFFINE_SHARE = 0.12
AFFINE_RATES = (2e-2, 1e-3)
# The highest learning rate of the flow: of few steps each must go further.
FLOW_RATES = (5e-3, 1e-2)
RATE_TIMES_STEPS = 12.0
BETAS = (0.9, 0.99)
# More particles make the tails of the fit better, if they leave this many steps.
MANY_PARTICLES = 256
ENOUGH_STEPS = 500
# Fewer particles than usual, but not fewer than this, if they leave less than so many steps.
FEW_PARTICLES, FEW_STEPS = 4, 100
# Share of what is left that timing batches of particles may take.
TIMING_SHARE = 0.05
# Skewness and tails of a coordinate are felt by all draws at once: they learn at such a share
# of the flow's rate.
SHAPE_SHARE = 0.3
# A batch of many particles that costs at most this many times one of few is nearly free.
NEARLY_FREE = 1.5
# Decay of the moving average of the parameters that is kept.
AVERAGE = 0.99
# Once the log weights spread less than EVEN nats, such a share of the draws is moved so far out.
EVEN = 0.05
FAR_SHARE, FAR = 0.25, 1.0
# Draws that a state is judged by; always the same, so that states are compared without their noise.
CHECK_PARTICLES = 512
# They are fewer, but not fewer than this, if a check takes a larger share of what is left.
LEAST_CHECK_PARTICLES, CHECK_SHARE = 8, 0.03


class Step:
    """The loss of one step: fresh draws of the base, and an objective on them.

    Once q is p but for the tails, where few draws fall, it is the tails that decide what importance
    weights are worth. A path gradient (:class:`~pyro_nf.vi.objectives.StickTheLanding`) is zero
    wherever q is p, whatever the draws, so some of them may then come from further out. The loss is
    the mean over all of them.

    Args:
        flow: q.
        joint: p.
        objective: What is minimised.
        count_particles: S.
        tails: Whether to draw from further out when the weights are even; for a path gradient.

    Attributes:
        last: The last :class:`~pyro_nf.vi.objectives.Estimate`.
        memory: What the objective remembers, and the standard deviation of the last log weights, as
            "spread".
    """

    def __init__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        objective: Objective,
        count_particles: int = COUNT_PARTICLES,
        tails: bool = False,
    ) -> None:
        self.flow, self.joint, self.objective = flow, joint, objective
        self.count_particles, self.tails = count_particles, tails
        self.memory = objective.memory

    def __call__(self, batch: object = None) -> Tensor:
        x, weights = base_draws(self.flow, self.count_particles)
        count_far = 0
        if self.tails and weights is None and self.memory.get("spread", math.inf) < EVEN:
            count_far = int(FAR_SHARE * len(x))
            wider = 1 + FAR / math.sqrt(x.shape[-1])  # as |x| is about sqrt(D)
            x = torch.cat([wider * x[:count_far], x[count_far:]])
        self.last = self.objective(self.flow, self.joint, x, weights)
        if self.tails:
            self.memory["spread"] = float(self.last.log_weights[count_far:].std())
        return self.last.loss


def base_draws(flow: Flow, count: int) -> tuple[Tensor, Tensor | None]:
    """Draws of a flow's base (S, D), and their weights (S,) if they are stratified."""
    if isinstance(flow.base, GaussianMixture):
        return mixture_draws(flow.base, count)
    return flow.base().sample((count,)), None


def elbo_floor(
    flow: Flow, joint: DifferentiableLogJoint, count: int = CHECK_PARTICLES, seed: int = 0
) -> float:
    """What the ELBO of a flow is at least, by draws that depend on the seed only.

    The mean of the log weights less two standard errors: of states that are compared by the same
    draws, one with uneven weights may seem the best by their luck. NaN if no draw is finite.

    Args:
        flow: q.
        joint: p.
        count: Draws.
        seed: Of the draws; the global generators are left as they were.
    """
    with torch.no_grad(), own_randomness(seed):
        x, weights = base_draws(flow, count)
        z, ladj = flow.transform.forward_and_ladj(x)
        log_w = joint.log_prob(z) - flow.base().log_prob(x) + ladj
        ok = torch.isfinite(log_w)
        weights = ok.to(log_w) * (torch.ones_like(log_w) if weights is None else weights)
        weights = weights / weights.sum()
        log_w = torch.where(ok, log_w, 0.0)
        elbo = (weights * log_w).sum()
        error = (weights * (log_w - elbo)).square().sum().sqrt()
        return float(elbo - 2 * error)


def choose_particles(joint: LogJoint | Metered, max_seconds: float | None) -> int:
    """Many particles where they leave enough steps, or cost hardly more than few.

    Args:
        joint: The log joint density; it is evaluated a few times.
        max_seconds: What the steps may take; None to look at no clock, so that a fit that is
            bounded by steps can be repeated: then many, unless each particle is a run of its own.
    """
    if max_seconds is None:
        kind = joint.joint.kind if isinstance(joint, Metered) else joint.kind
        return COUNT_PARTICLES if kind == "loop" else MANY_PARTICLES
    meter = Metered.of(joint, max_seconds, time.process_time)

    def seconds(count: int) -> float:
        z = meter.init_loc.expand(count, -1)
        times = []
        for _ in range(2):
            if meter.price("gradient", count) <= TIMING_SHARE * meter.budget.seconds_left:
                meter.value_and_grad(z)
            times.append(meter.price("gradient", count))
        return min(times)

    few, many = seconds(COUNT_PARTICLES), seconds(MANY_PARTICLES)
    if ENOUGH_STEPS * many < max_seconds or many < NEARLY_FREE * few:
        return MANY_PARTICLES
    count = COUNT_PARTICLES
    while count > FEW_PARTICLES and FEW_STEPS * meter.price("gradient", count) > max_seconds:
        count //= 2
    return count


def choose_check_particles(joint: Metered) -> int:
    """Draws of a check: 512, or fewer if that takes too large a share of what is left."""
    return joint.afford("value", CHECK_PARTICLES, CHECK_SHARE, LEAST_CHECK_PARTICLES)


def choose_rate(count_steps: float, count_particles: int) -> float:
    """The learning rate of the flow: 12 / count_steps, but 0.005 to 0.01.

    Few particles have noisy gradients, with which steps had better be small.

    Example:
        >>> [choose_rate(steps, 256) for steps in (600, 2000, 6000)], choose_rate(600, 64)
        ([0.01, 0.006, 0.005], 0.005)
    """
    least, most = FLOW_RATES
    if count_particles < MANY_PARTICLES:
        return least
    return min(max(RATE_TIMES_STEPS / max(count_steps, 1), least), most)


def seconds_per_step(
    flow: Flow, joint: DifferentiableLogJoint, count_particles: int, seed: int = 0
) -> float:
    """Process seconds of one step, by a few whose gradients are thrown away."""
    step = Step(flow, joint, ELBO(), count_particles)
    with own_randomness(seed):
        seconds = process_seconds(lambda: step().backward(), count=2)
    flow.zero_grad()
    return seconds


def posterior_stages(
    flow: Flow,
    joint: DifferentiableLogJoint,
    *,
    objective: Objective | None = None,
    count_particles: int = COUNT_PARTICLES,
    rate: float = FLOW_RATES[0],
    tails: bool = False,
) -> list[Stage]:
    """The affine base alone, then everything.

    Args:
        flow: Of an :class:`~pyro_nf.guides.guide.AutoFlow`: layers, then the affine base.
        joint: The log joint density.
        objective: :class:`~pyro_nf.vi.objectives.ELBO` by default.
        count_particles: S.
        rate: The highest learning rate of the flow.
        tails: See :class:`Step`.
    """
    objective = objective or ELBO()
    parts = cast("list[FlowTransform]", list(cast(Chain, flow.transform).parts))
    base = Flow(Chain(parts[1:]), flow.base)
    affine = Step(base, joint, objective, count_particles)
    step = Step(flow, joint, objective, count_particles, tails)
    first, last = AFFINE_RATES
    return [
        Stage(
            affine,
            adam(base.parameters(), first, BETAS),
            warm_cosine(20, last / first),
            AFFINE_SHARE,
            affine.memory,
        ),
        Stage(
            step,
            adam(_groups(flow, rate), betas=BETAS),
            warm_cosine(20),
            1 - AFFINE_SHARE,
            step.memory,
        ),
    ]


def _groups(flow: Flow, rate: float) -> list[dict[str, Any]]:
    """Parameters of a flow by the rate at which they learn."""
    elementwise = [m for m in flow.modules() if isinstance(m, Elementwise)]
    shapes = [
        p for m in elementwise if isinstance(m.univariate, SinhArcsinh) for p in m.parameters()
    ]
    slow = {id(p) for p in shapes}
    rest = [p for p in flow.parameters() if id(p) not in slow]
    groups = [{"params": rest, "lr": rate}, {"params": shapes, "lr": SHAPE_SHARE * rate}]
    return [group for group in groups if group["params"]]
