"""The default road to a posterior: a start, a flow in its coordinates, and two stages of training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pyro_nf.flows.flow import Flow
from pyro_nf.infer.objectives import ELBO, DifferentiableLogJoint, Objective
from pyro_nf.infer.start import MAX_FULL_DIM, Start
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
    dim = len(start.loc)
    layers: list[FlowTransform] = [
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
    return Flow(Chain([*layers, affine_base(start)]).to(start.loc))


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
        x = self.flow.base().sample((self.count_particles,))
        self.last = self.objective(self.flow, self.joint, x)
        return self.last.loss


def posterior_stages(
    flow: Flow,
    joint: DifferentiableLogJoint,
    *,
    objective: Objective | None = None,
    count_particles: int = COUNT_PARTICLES,
) -> list[Stage]:
    """The affine base alone, then everything.

    Args:
        flow: As :func:`posterior_flow` makes it.
        joint: The log joint density.
        objective: :class:`~pyro_nf.infer.objectives.ELBO` by default.
        count_particles: Draws a step.
    """
    objective = objective or ELBO()
    *layers, base = flow.transform.parts
    step = Step(flow, joint, objective, count_particles)
    affine = Step(Flow(base), joint, objective, count_particles)
    first, last = AFFINE_RATES
    return [
        Stage(
            affine,
            adam(base.parameters(), first, BETAS),
            warm_cosine(20, last / first),
            AFFINE_SHARE,
        ),
        Stage(step, adam(flow.parameters(), FLOW_RATE, BETAS), warm_cosine(20), 1 - AFFINE_SHARE),
    ]
