"""The start finds the posterior, whatever the density does."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.flows.flow import Flow
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.guides.layers import affine_base
from pyro_nf.model.joint import LogJoint
from pyro_nf.search.ascent import BatchedLBFGS
from pyro_nf.search.gaussians import laplace_scale
from pyro_nf.search.mixtures import (
    fit_mixture,
    mixture_draws,
    mixture_elbo,
    mixture_of,
    separated_mixture,
)
from pyro_nf.search.start import GaussianStart, laplace_start
from pyro_nf.search.tempering import tempered_smc
from tests import reference_models as targets

F64 = torch.float64


def test_gaussian_is_found_exactly():
    target = targets.gaussian(20, 1e4, F64)
    start = laplace_start(LogJoint(target.model), max_seconds=60.0)
    assert abs(start.elbo) < 1e-4  # the evidence is 1, so KL is -elbo


@pytest.mark.parametrize("seed", [0, 1])
def test_funnel_does_not_end_in_its_neck(seed):
    start = laplace_start(LogJoint(targets.funnel(dtype=F64).model), seed=seed, max_seconds=60.0)
    assert start.elbo > -4.0


def test_finds_the_mode_far_away():
    def model():
        pyro.sample("x", dist.Normal(torch.tensor([500.0, -300.0]), 0.01).to_event(1))

    start = laplace_start(LogJoint(model), max_seconds=60.0)
    torch.testing.assert_close(start.loc, torch.tensor([500.0, -300.0]), rtol=0, atol=0.05)


def test_both_modes_are_reported():
    start = laplace_start(LogJoint(targets.two_modes(4, dtype=F64).model), max_seconds=60.0)
    assert start.elbo == pytest.approx(math.log(0.7), abs=0.05)
    assert start.modes[0].elbo == pytest.approx(math.log(0.3), abs=0.1) or (
        start.modes[0].elbo == pytest.approx(math.log(0.7), abs=0.1)
    )


def test_start_is_deterministic_and_leaves_the_generator_alone():
    joint = LogJoint(targets.banana(dtype=F64).model)
    before = torch.get_rng_state()
    a, b = laplace_start(joint, max_seconds=60.0), laplace_start(joint, max_seconds=60.0)
    assert torch.equal(a.loc, b.loc)
    assert torch.equal(before, torch.get_rng_state())


def test_lbfgs_climbs_each_point_to_its_own_top():
    scale = torch.tensor([1.0, 100.0, 0.01], dtype=F64)

    def value_and_grad(z):
        return -0.5 * ((z / scale) ** 2).sum(-1), -z / scale**2

    climb = BatchedLBFGS(value_and_grad, torch.randn(5, 3, dtype=F64) * 3)
    for _ in range(200):
        climb.step(tolerance=1e-12)
    assert climb.value.min() > -1e-6


def test_laplace_scale_is_the_root_of_the_inverse():
    A = torch.randn(5, 5, dtype=F64)
    P = A @ A.mT + torch.eye(5, dtype=F64)
    L = laplace_scale(-P)
    torch.testing.assert_close(L @ L.mT, torch.linalg.inv(P))
    assert torch.equal(L, L.tril())
    with pytest.raises(ValueError, match="not finite"):
        laplace_scale(P * torch.nan)


def test_high_dimension_takes_no_matrix():
    scale = torch.logspace(-2, 2, 400)

    def model():
        pyro.sample("x", dist.Normal(torch.ones(400), scale).to_event(1))

    start = laplace_start(LogJoint(model), max_seconds=20.0)
    assert start.scale.shape == (400,)
    assert start.elbo > -15.0
    z, log_q = Flow(affine_base(start))().rsample_and_log_prob((3,))
    assert z.shape == (3, 400)
    assert torch.isfinite(log_q).all()


def test_failing_regions_are_survived():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("wall", torch.where(x[..., 0] > -0.5, 0.0, torch.nan))

    start = laplace_start(LogJoint(model), max_seconds=60.0)
    assert math.isfinite(start.elbo)


@pytest.mark.parametrize("dim", [2, 6])
def test_cloud_finds_the_masses_of_the_modes(dim):
    target = targets.two_modes(dim, dtype=F64)
    joint = LogJoint(target.model)
    cloud = tempered_smc(
        joint,
        torch.zeros(dim, dtype=F64),
        5 * torch.eye(dim, dtype=F64),
        num_particles=2000,
        max_seconds=60,
    )
    assert cloud.is_complete
    assert cloud.log_evidence == pytest.approx(0.0, abs=0.2)
    assert (cloud.z.sum(-1) > 0).double().mean() == pytest.approx(0.7, abs=0.06)


def test_expectation_maximisation_finds_clusters():
    target = targets.two_modes(3, dtype=F64)
    z = target.draw(4000, torch.Generator().manual_seed(0))["x"]
    log_weights, means, roots = fit_mixture(z, 2)
    order = means[:, 0].argsort()
    torch.testing.assert_close(
        log_weights.exp()[order], torch.tensor([0.3, 0.7], dtype=F64), atol=0.03, rtol=0
    )
    torch.testing.assert_close(
        roots @ roots.mT, torch.eye(3, dtype=F64).expand(2, 3, 3), atol=0.15, rtol=0
    )
    mixture = mixture_of(log_weights, means, roots)
    wanted = dist.MixtureSameFamily(
        dist.Categorical(logits=log_weights), dist.MultivariateNormal(means, scale_tril=roots)
    )
    torch.testing.assert_close(mixture().log_prob(z), wanted.log_prob(z))
    x, weights = mixture_draws(mixture, 4000)
    torch.testing.assert_close((weights[:, None] * x).sum(0).detach(), z.mean(0), atol=0.1, rtol=0)
    assert weights.sum().item() == pytest.approx(1.0)


def test_a_mixture_is_found_where_there_are_pieces():
    pieces = LogJoint(targets.two_modes(2, dtype=F64).model)
    mixture = separated_mixture(pieces, laplace_start(pieces, max_seconds=60.0), max_seconds=60.0)
    assert mixture is not None
    assert mixture.count_components == 2
    whole = LogJoint(targets.funnel(dtype=F64).model)
    assert (
        separated_mixture(whole, laplace_start(whole, max_seconds=60.0), max_seconds=60.0) is None
    )


def test_a_mixture_reaches_what_the_start_does_not():
    """From a Gaussian on an arc the pieces go all round the ring."""
    target = targets.ring(dtype=F64)
    joint = LogJoint(target.model)
    arc = torch.tensor([[0.3, 0.0], [0.0, 1.0]], dtype=F64)
    start = GaussianStart(torch.tensor([2.9, 0.0], dtype=F64), arc, elbo=0.8)
    mixture = separated_mixture(joint, start, max_seconds=60.0)
    assert mixture is not None
    assert mixture_elbo(joint, mixture) > target.log_evidence - 0.4


def test_guide_starts_as_the_mixture():
    target = targets.two_modes(3, dtype=F64)
    z = target.draw(500, torch.Generator().manual_seed(0))["x"]
    mixture = mixture_of(*fit_mixture(z, 2))
    guide = AutoFlow(target.model, count_components=2).setup()
    guide.start_at(mixture)
    torch.testing.assert_close(guide.get_posterior().log_prob(z), mixture().log_prob(z))
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="2 components"):
        AutoFlow(target.model, count_components=3).setup().start_at(mixture)
