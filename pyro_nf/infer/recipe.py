"""The default road to a posterior: a start, a flow in its coordinates, two stages of training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.objectives import ELBO, DifferentiableLogJoint, Objective
from pyro_nf.infer.start import MAX_FULL_DIM, Start
from pyro_nf.infer.tempering import mixture_draws, mixture_of, separated_mixture
from pyro_nf.train.loop import Stage, adam, warm_cosine
from pyro_nf.transforms.affine import FixedAffine, LowerAffine, LowRankAffine
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.base import Chain, FlowTransform
from pyro_nf.univariate.affine import Affine

# One set of settings for all posteriors: in the coordinates of the start they look alike.
COUNT_PARTICLES = 64
COUNT_LAYERS = 3
HIDDEN_DIMS = (64,)
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


def posterior_flow(
    start: Start,
    *,
    count_layers: int = COUNT_LAYERS,
    hidden_dims: Sequence[int] = HIDDEN_DIMS,
) -> Flow:
    """Affine autoregressive layers, fast to sample, and then the affine base.

    Args:
        start: The Gaussian to start from; the flow is that Gaussian at first.
        count_layers: How many autoregressive layers, in alternating order.
        hidden_dims: Widths of the hidden layers of each.
    """
    layers = _layers(len(start.loc), count_layers, hidden_dims)
    return Flow(Chain([*layers, *affine_base(start).parts]).to(start.loc))


def mixture_flow(
    mixture: GaussianMixture,
    *,
    count_layers: int = COUNT_LAYERS,
    hidden_dims: Sequence[int] = HIDDEN_DIMS,
) -> Flow:
    r"""A flow whose base is a learnable Gaussian mixture: for modes that lie apart, and for rings.

    A smooth map of one Gaussian has one connected piece; a map of several has several. The base of
    the flow is the mixture in the coordinates in which all of it has mean 0 and covariance 1.

    Args:
        mixture: In unconstrained coordinates of the model.
        count_layers: How many autoregressive layers, in alternating order.
        hidden_dims: Widths of the hidden layers of each.
    """
    with torch.no_grad():
        pi, means = mixture.logits.softmax(-1), mixture.means
        factors = mixture.triangles.triu(1) + mixture.log_diagonals.exp().diag_embed()
        roots = torch.linalg.inv(factors).mT
        loc = pi @ means
        centred = means - loc
        cov = (pi[:, None, None] * (roots @ roots.mT)).sum(0) + (pi * centred.mT) @ centred
        scale = torch.linalg.cholesky(cov.double()).to(loc)
        white = torch.linalg.solve_triangular(scale.mT, centred, upper=True, left=False)
        white_roots = torch.linalg.solve_triangular(scale, roots, upper=False)
        base = mixture_of(mixture.logits, white, white_roots)
    layers = _layers(len(loc), count_layers, hidden_dims)
    return Flow(Chain([*layers, FixedAffine(loc, scale)]).to(loc), base)


def choose_flow(
    joint: LogJoint,
    start: Start,
    *,
    max_seconds: float = 1.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Flow:
    """A :func:`mixture_flow` for a posterior in pieces, a :func:`posterior_flow` else.

    Args:
        joint: The log joint density.
        start: Where to start.
        max_seconds: For the search of pieces.
        seed: Of its random numbers.
        clock: What the seconds are counted with.
    """
    mixture = separated_mixture(joint, start, max_seconds=max_seconds, seed=seed, clock=clock)
    return posterior_flow(start) if mixture is None else mixture_flow(mixture)


def _layers(dim: int, count_layers: int, hidden_dims: Sequence[int]) -> list[FlowTransform]:
    return [
        Autoregressive(
            Affine(),
            dim,
            hidden_dims=hidden_dims,
            activation=nn.SiLU,
            reverse=i % 2 == 1,
            fast="forward",
        )
        for i in range(count_layers)
    ]


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
        flow: As :func:`posterior_flow` makes it.
        joint: The log joint density.
        objective: :class:`~pyro_nf.infer.objectives.ELBO` by default.
        pace: Particles and learning rate.
    """
    objective, pace = objective or ELBO(), pace or Pace()
    is_mixture = isinstance(flow.base, GaussianMixture)
    parts: list[FlowTransform] = list(flow.transform.parts)  # type: ignore[arg-type]
    # A mixture is affine in each of its components.
    base = Flow(Chain(parts[-1:] if is_mixture else parts[-2:]), flow.base)
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
