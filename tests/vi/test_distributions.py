"""Objectives and posteriors of any distribution that draws with its density, with contexts too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_nf import AutoFlow, Flow, Posterior, flows
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.model.joint import LogJoint
from pyro_nf.testing import randomize
from pyro_nf.train.stages import adam
from pyro_nf.vi.gradients import GradientEstimator, Reparameterised, StickTheLanding
from pyro_nf.vi.objectives import (
    ELBO,
    ForwardKL,
    ImportanceWeightedELBO,
    Objective,
    TemperedELBO,
)
from pyro_nf.vi.stages import Step, elbo_floor
from tests import reference_models as targets

F64 = torch.float64
ESTIMATORS = [StickTheLanding(), Reparameterised()]


class Gaussian(nn.Module):
    """A Pyro MultivariateNormal in the form that objectives ask for."""

    def __init__(self, *batch: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.full((*batch, 2), 0.3, dtype=F64))
        self.root = nn.Parameter(torch.tensor([[1.2, 0.0], [0.5, 0.8]], dtype=F64))

    def law(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.root.tril())

    def rsample_and_log_prob(self, sample_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        z = self.law().rsample(sample_shape)
        return z, self.law().log_prob(z)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law().log_prob(value)


class Rows:
    """p(z, x_b) of each row: z ~ N(0, 1), x_b ~ N(z, 1), so that z | x_b ~ N(x_b / 2, 1 / 2)."""

    has_parameters = False

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def log_prob(self, z: Tensor) -> Tensor:
        prior = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z)
        return (prior + dist.Normal(z, 1.0).log_prob(self.x)).sum(-1)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            log_p = self.log_prob(leaf)
            return log_p.detach(), torch.autograd.grad(log_p.sum(), leaf)[0]

    @property
    def log_evidence(self) -> Tensor:
        return dist.Normal(torch.zeros_like(self.x), math.sqrt(2.0)).log_prob(self.x).sum(-1)


def banana() -> LogJoint:
    return LogJoint(targets.banana(dtype=F64).model)


def seeded(run: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(5)
    return run()


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    pairs = zip(found, module.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


# ---- a distribution that is no flow


def test_the_elbo_of_a_distribution_that_is_no_flow() -> None:
    q, joint = Gaussian(), banana()

    def by_hand() -> Tensor:
        z = q.law().rsample((40,))
        return (q.law().log_prob(z) - joint.log_prob(z)).mean()

    wanted = seeded(by_hand)
    estimate = seeded(lambda: ELBO(Reparameterised())(q, joint, 40).loss)
    torch.testing.assert_close(estimate, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(q, estimate), gradient(q, wanted))


def test_the_landing_of_a_distribution_that_is_no_flow() -> None:
    q, joint = Gaussian(), banana()

    def by_hand() -> Tensor:
        z = q.law().rsample((40,))
        still = copy.deepcopy(q).requires_grad_(requires_grad=False)
        return (still.log_prob(z) - joint.log_prob(z)).mean()

    wanted = gradient(q, seeded(by_hand))
    got = gradient(q, seeded(lambda: ELBO(StickTheLanding())(q, joint, 40).loss))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert wanted.abs().max() > 0.01


class OnlyDraws:
    """A flow that neither takes draws of its base nor knows its slope."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def rsample_and_log_prob(self, sample_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.flow().rsample_and_log_prob(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flow().log_prob(value)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_what_a_flow_pushes_changes_nothing(estimator: GradientEstimator) -> None:
    """By the same draws the gradients are those of a distribution that only draws."""
    flow, joint = randomize(flows.maf(2), 0.3).double(), banana()
    x = seeded(lambda: flow.base().sample((40,)))
    pushed = ELBO(estimator)(flow(), joint, x)
    drawn = seeded(lambda: ELBO(estimator)(OnlyDraws(flow), joint, 40).loss)
    torch.testing.assert_close(drawn, pushed.loss)
    torch.testing.assert_close(gradient(flow, drawn), gradient(flow, pushed.loss))
    of_flow = ELBO(estimator)(flow, joint, x)  # a flow stands for its distribution
    assert torch.equal(of_flow.loss, pushed.loss)


def test_all_objectives_take_it() -> None:
    q, joint = Gaussian(), banana()

    def loss(objective: Objective) -> float:
        return float(seeded(lambda: objective(q, joint, 4000).loss).detach())

    elbo, bound = -loss(ELBO()), -loss(ImportanceWeightedELBO(8))
    assert elbo < bound < 0.1  # log 1, and noise
    assert -loss(TemperedELBO(4, start=0.5)) > elbo
    z = joint.pack(targets.banana(dtype=F64).draw(4000, torch.Generator().manual_seed(0)))
    cross = loss(ForwardKL(z))
    assert cross == pytest.approx(-float(q.log_prob(z).mean().detach()), rel=0.02)
    floor = elbo_floor(q, joint, 4000)
    assert elbo - 2 < floor < bound


def test_a_step_trains_it_to_the_exact_posterior() -> None:
    joint, q = Rows(torch.tensor([1.0, -2.0], dtype=F64)), Gaussian()
    step = Step(lambda: q, joint, ELBO(), num_particles=32)
    optimizer = adam(q.parameters(), 0.05)
    torch.manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    torch.testing.assert_close(q.loc.detach(), joint.x / 2, atol=1e-3, rtol=0)
    root = math.sqrt(0.5) * torch.eye(2, dtype=F64)
    torch.testing.assert_close(q.root.detach().tril().abs(), root, atol=1e-3, rtol=0)


# ---- contexts


def conditional(make=flows.maf) -> Flow:
    return randomize(make(2, context_dim=3, count_layers=2), 0.3).double()


CONTEXT = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
X = torch.tensor([[1.0, 0.0], [-2.0, 1.0], [0.5, 0.5], [3.0, -1.0]], dtype=F64)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("make", [flows.maf, flows.iaf, flows.realnvp])
def test_a_batch_of_contexts_is_the_mean_over_contexts(make, estimator) -> None:
    flow, x = conditional(make), torch.randn(6, 4, 2, dtype=F64)
    for objective in (ELBO(estimator), ImportanceWeightedELBO(3, estimator)):
        whole = objective(flow(CONTEXT), Rows(X), x)
        each = [objective(flow(CONTEXT[b]), Rows(X[b]), x[:, b]) for b in range(4)]
        assert whole.log_weights.shape == (6, 4)
        torch.testing.assert_close(whole.loss, sum(e.loss for e in each) / 4)
        torch.testing.assert_close(
            gradient(flow, whole.loss), sum(gradient(flow, e.loss) for e in each) / 4
        )
        log_w = torch.stack([e.log_weights for e in each], -1)
        torch.testing.assert_close(whole.log_weights, log_w)


def test_the_exact_posterior_of_every_row_has_no_noise() -> None:
    q = Gaussian(4)
    with torch.no_grad():
        q.loc.copy_(X / 2)
        q.root.copy_(math.sqrt(0.5) * torch.eye(2, dtype=F64))
    joint = Rows(X)
    estimate = ELBO()(q, joint, 5)
    torch.testing.assert_close(estimate.log_weights, joint.log_evidence.expand(5, 4))
    torch.testing.assert_close(-estimate.loss, joint.log_evidence.mean())
    assert gradient(q, estimate.loss).abs().max() < 1e-12


def test_strata_of_a_mixture_for_every_context() -> None:
    flow = Flow(conditional().transform, randomize(GaussianMixture(2, 3)).double())
    step = Step(lambda: flow(CONTEXT), Rows(X), ELBO(), num_particles=6_000)
    torch.manual_seed(1)
    with torch.no_grad():
        loss, z = step(), flow(CONTEXT).sample((6_000,))
        plain = Rows(X).log_prob(z) - flow(CONTEXT).log_prob(z)
    assert step.last.log_weights.shape == (6_000, 4)
    error = 4 * float(plain.std()) / math.sqrt(plain.numel())
    assert float(-loss) == pytest.approx(float(plain.mean()), abs=error)


# ---- pushing


@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("base", ["normal", "mixture"])
@pytest.mark.parametrize("make", [flows.maf, flows.iaf, flows.realnvp, flows.nsf])
def test_push_score_is_the_slope_of_the_log_density(make, base, batch) -> None:
    law = GaussianMixture(2, 3) if base == "mixture" else None
    flow = Flow(conditional(make).transform, None if law is None else randomize(law)).double()
    q = flow(CONTEXT if batch else CONTEXT[0])
    x = torch.randn(5, *batch, 2, dtype=F64)
    y, log_q, score = q.push_score(x)
    assert not (log_q.requires_grad or score.requires_grad) and y.requires_grad
    leaf = y.detach().requires_grad_()
    wanted = q.log_prob(leaf)
    torch.testing.assert_close(log_q, wanted.detach(), rtol=1e-8, atol=1e-8)
    slope = torch.autograd.grad(wanted.sum(), leaf)[0]
    torch.testing.assert_close(score, slope, rtol=1e-6, atol=1e-8)
    pushed, log_prob = q.push(x)
    torch.testing.assert_close(pushed, y)
    torch.testing.assert_close(log_prob, log_q)


# ---- posteriors


def gaussians() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X[0])


def test_a_posterior_of_the_exact_distribution() -> None:
    q = dist.MultivariateNormal(X[0] / 2, 0.5 * torch.eye(2, dtype=F64))
    posterior = Posterior.from_distribution(q, LogJoint(gaussians), num_draws=500)
    evidence = float(Rows(X[0]).log_evidence)
    torch.testing.assert_close(
        posterior.log_weights, torch.full((500,), evidence, dtype=F64), rtol=1e-10, atol=1e-10
    )
    assert posterior.khat == -math.inf and posterior.ess == pytest.approx(500)
    with pytest.raises(TypeError, match="use 'psis'"):
        posterior.refine("neutra", progress=False)


def test_a_posterior_of_a_flow_with_a_context() -> None:
    flow, joint = conditional(), LogJoint(gaussians)
    q = flow(CONTEXT[1])
    assert isinstance(q, FlowDistribution)
    posterior = Posterior.from_distribution(q, joint, num_draws=400, seed=3)
    assert torch.equal(posterior.samples["z"], posterior.z)
    log_q = q.log_prob(posterior.z).detach()
    torch.testing.assert_close(posterior.log_q, log_q, rtol=1e-8, atol=1e-8)
    wanted = Rows(X[0]).log_prob(posterior.z)
    torch.testing.assert_close(posterior.log_p, wanted, rtol=1e-10, atol=1e-10)
    chains = posterior.refine("neutra", num_chains=1, num_draws=4, warmup=2, progress=False)
    assert len(chains) == 4 and chains.log_q is None
    with pytest.raises(ValueError, match="one context of shape"):
        Posterior.from_distribution(flow(CONTEXT), joint)


def test_from_guide_is_from_its_distribution() -> None:
    guide, joint = AutoFlow(gaussians).setup(), LogJoint(gaussians)
    randomize(guide.flow, 0.2)
    a = Posterior.from_guide(guide, num_draws=50, seed=4)
    b = Posterior.from_distribution(guide.get_posterior(), joint, num_draws=50, seed=4)
    assert torch.equal(a.z, b.z) and torch.equal(a.log_weights, b.log_weights)
