"""The default road to a posterior: a start, a flow in its coordinates, two stages of training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.objectives import ELBO, DifferentiableLogJoint, Objective
from pyro_nf.infer.start import MAX_FULL_DIM, Start
from pyro_nf.infer.tempering import mixture_draws
from pyro_nf.train.loop import Stage, adam, warm_cosine
from pyro_nf.transforms.affine import FixedAffine, LowerAffine, LowRankAffine
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.base import Chain, FlowTransform
from pyro_nf.univariate.affine import Affine

# One set of settings for all posteriors: in the coordinates of the start they look alike.
COUNT_PARTICLES = 64
COUNT_LAYERS = 3
HIDDEN_DIM, MAX_HIDDEN_DIM = 64, 256
AFFINE_SHARE = 0.25
AFFINE_RATES = (2e-2, 1e-3)
FLOW_RATE = 5e-3
BETAS = (0.9, 0.99)
# A batch of the log joint that costs more seconds than this leaves time for few steps only. Most of
# it is overhead of many small operations, so that more particles come nearly free; their smaller
# noise allows larger steps.
SLOW_SECONDS = 5e-3
SLOW_PARTICLES = 256
SLOW_RATE = 1e-2


def affine_base(start: Start, rank: int = 16) -> Chain:
    r"""The learnable Gaussian in the coordinates of a start.

    .. math:: z = m_0 + L_0 (m + L x)

    At zero parameters it is the start itself. In these coordinates one learning rate suits all
    posteriors. ``L`` is full and lower triangular, or, where the start is diagonal, diagonal plus
    full in a subspace.

    Args:
        start: Gives m_0 and L_0.
        rank: Size of the subspace in high dimensions.
    """
    dim = len(start.loc)
    learned = LowerAffine(dim) if dim <= MAX_FULL_DIM else LowRankAffine(dim, rank)
    return Chain([learned.to(start.loc), FixedAffine(start.loc, start.scale)])


def autoregressive_layers(input_dim: int) -> Chain:
    """Three affine autoregressive layers, fast to sample, that turn the order round each time.

    Args:
        input_dim: Size of the event.

    Example:
        >>> len(autoregressive_layers(4).parts)
        3
    """
    width = max(HIDDEN_DIM, min(2 * input_dim, MAX_HIDDEN_DIM))
    return Chain(
        Autoregressive(
            Affine(),
            input_dim,
            hidden_dims=(width,),
            activation=nn.SiLU,  # a posterior is smooth, and so should its flow be
            reverse=i % 2 == 1,
            fast="forward",
        )
        for i in range(COUNT_LAYERS)
    )


class Step:
    """The loss of one step: fresh draws of the base, and an objective on them.

    Args:
        flow: q.
        joint: p.
        objective: What is minimised.
        count_particles: S.

    Attributes:
        last: The last :class:`~pyro_nf.infer.objectives.Estimate`.
    """

    def __init__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        objective: Objective,
        count_particles: int = COUNT_PARTICLES,
    ) -> None:
        self.flow, self.joint, self.objective = flow, joint, objective
        self.count_particles = count_particles

    def __call__(self, batch: object = None) -> Tensor:
        base = self.flow.base
        if isinstance(base, GaussianMixture):
            x, weights = mixture_draws(base, self.count_particles)
            self.last = self.objective(self.flow, self.joint, x, weights)
        else:
            x = base().sample((self.count_particles,))
            self.last = self.objective(self.flow, self.joint, x)
        return self.last.loss


@dataclass(frozen=True)
class Pace:
    """How large a step is.

    Attributes:
        count_particles: S.
        rate: The highest learning rate of the flow.
    """

    count_particles: int = COUNT_PARTICLES
    rate: float = FLOW_RATE


def choose_pace(joint: LogJoint) -> Pace:
    """Few large steps where the log joint is slow, many small ones else.

    Args:
        joint: The log joint density; it is evaluated four times.
    """

    def seconds(count: int) -> float:
        z = joint.init_loc.expand(count, -1)
        begin = time.process_time()
        joint.value_and_grad(z)
        return time.process_time() - begin

    slow = min(seconds(COUNT_PARTICLES) for _ in range(2))
    if slow < SLOW_SECONDS or seconds(SLOW_PARTICLES) > 2 * slow:
        return Pace()
    return Pace(SLOW_PARTICLES, SLOW_RATE)


def posterior_stages(
    flow: Flow,
    joint: DifferentiableLogJoint,
    *,
    objective: Objective | None = None,
    pace: Pace | None = None,
) -> list[Stage]:
    """The affine base alone, then everything.

    Args:
        flow: Of an :class:`~pyro_nf.infer.guide.AutoFlow`: layers, then the affine base.
        joint: The log joint density.
        objective: :class:`~pyro_nf.infer.objectives.ELBO` by default.
        pace: Particles and learning rate.
    """
    objective, pace = objective or ELBO(), pace or Pace()
    parts = cast("list[FlowTransform]", list(cast(Chain, flow.transform).parts))
    base = Flow(Chain(parts[1:]), flow.base)
    affine = Step(base, joint, objective, pace.count_particles)
    step = Step(flow, joint, objective, pace.count_particles)
    first, last = AFFINE_RATES
    return [
        Stage(
            affine,
            adam(base.parameters(), first, BETAS),
            warm_cosine(20, last / first),
            AFFINE_SHARE,
        ),
        Stage(step, adam(flow.parameters(), pace.rate, BETAS), warm_cosine(20), 1 - AFFINE_SHARE),
    ]
