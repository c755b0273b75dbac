"""Objectives and gradient estimators against exact gradients."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.recipes import iaf, maf, planar, realnvp
from pyro_nf.model.joint import LogJoint
from pyro_nf.search.mixtures import mixture_draws, mixture_of
from pyro_nf.transforms.affine import FixedAffine, LowerAffine, LowRankAffine
from pyro_nf.transforms.chain import Chain
from pyro_nf.vi.gradients import Reparameterised, StickTheLanding
from pyro_nf.vi.objectives import ELBO, ForwardKL, ImportanceWeightedELBO, TemperedELBO
from tests import reference_models as targets

F64 = torch.float64


@pytest.fixture
def joint():
    return LogJoint(targets.banana(dtype=F64).model)


def shaken(flow, size=0.2):
    generator = torch.Generator().manual_seed(1)
    flow = flow.double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=F64))
    return flow


def gradient(flow, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(flow.parameters()))])


def elbo_by_hand(flow, joint, x):
    z, ladj = flow.transform.forward_and_ladj(x)
    return (joint.log_prob(z) - flow.base().log_prob(x) + ladj).mean()


def test_reparameterised_gradient_is_exact(joint):
    flow, x = shaken(iaf(2)), torch.randn(50, 2, dtype=F64)
    estimate = ELBO(Reparameterised())(flow, joint, x)
    wanted = -elbo_by_hand(flow, joint, x)
    torch.testing.assert_close(estimate.loss, wanted)
    torch.testing.assert_close(gradient(flow, estimate.loss), gradient(flow, wanted))
    assert estimate.elbo == pytest.approx(-wanted.item())


@pytest.mark.parametrize("recipe", [iaf, maf, realnvp, planar])
def test_the_landing_equals_the_gradient_with_the_score_held(joint, recipe):
    flow, x = shaken(recipe(2)), torch.randn(50, 2, dtype=F64)
    z, _ = flow.transform.forward_and_ladj(x)
    still = copy.deepcopy(flow).requires_grad_(requires_grad=False)
    wanted = gradient(flow, (still().log_prob(z) - joint.log_prob(z)).mean())
    got = gradient(flow, ELBO(StickTheLanding())(flow, joint, x).loss)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_landing_has_the_same_mean_and_no_noise_at_the_optimum(joint):
    flow, x = shaken(Flow(LowerAffine(2))), torch.randn(400_000, 2, dtype=F64)
    a = gradient(flow, ELBO(StickTheLanding())(flow, joint, x).loss)
    b = gradient(flow, ELBO(Reparameterised())(flow, joint, x).loss)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)

    gaussian = LogJoint(
        lambda: pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    )
    flow, x = Flow(LowerAffine(3)).double(), torch.randn(8, 3, dtype=F64)
    exact = gradient(flow, ELBO(StickTheLanding())(flow, gaussian, x).loss)
    noisy = gradient(flow, ELBO(Reparameterised())(flow, gaussian, x).loss)
    assert exact.abs().max() < 1e-12
    assert noisy.abs().max() > 1e-3


def test_importance_weighted_bound_lies_between(joint):
    flow, x = shaken(Flow(LowerAffine(2))), torch.randn(64_000, 2, dtype=F64)
    bounds = [-ImportanceWeightedELBO(k)(flow, joint, x).loss.item() for k in (1, 8, 64)]
    assert -ELBO()(flow, joint, x).loss.item() == pytest.approx(bounds[0])
    assert bounds[0] < bounds[1] < bounds[2] < 0.05
    a = gradient(flow, ImportanceWeightedELBO(8, StickTheLanding())(flow, joint, x).loss)
    b = gradient(flow, ImportanceWeightedELBO(8, Reparameterised())(flow, joint, x).loss)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="multiple of count_inner"):
        ImportanceWeightedELBO(7)(flow, joint, x[:64])


def test_forward_kl_is_the_cross_entropy(joint):
    z = joint.pack(targets.banana(dtype=F64).draw(5000, torch.Generator().manual_seed(0)))
    flow, x = shaken(realnvp(2)), torch.randn(4000, 2, dtype=F64)
    wanted = -flow().log_prob(z).mean()
    assert ForwardKL(z)(flow, joint, x).loss.item() == pytest.approx(wanted.item(), rel=0.05)
    one = torch.full((5000,), -torch.inf, dtype=F64)
    one[7] = 0.0
    loss = ForwardKL(z, one)(flow, joint, x).loss
    torch.testing.assert_close(loss, -flow().log_prob(z[7]))


def test_tempered_elbo_ends_as_the_elbo(joint):
    flow, x = Flow(LowerAffine(2)).double(), torch.randn(16, 2, dtype=F64)
    objective = TemperedELBO(10, start=0.1)
    temperatures = []
    for _ in range(12):
        temperatures.append(objective.temperature)
        loss = objective(flow, joint, x).loss
    assert temperatures[0] == pytest.approx(0.1)
    assert temperatures[5] == pytest.approx(math.sqrt(0.1))
    assert temperatures[-1] == 1.0
    torch.testing.assert_close(loss, ELBO()(flow, joint, x).loss)
    with pytest.raises(ValueError, match="start"):
        TemperedELBO(10, start=0.0)


@pytest.mark.parametrize("estimator", [StickTheLanding(), Reparameterised()])
def test_failed_particles_are_masked(estimator):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.factor("wall", x[..., 0].sqrt())

    joint = LogJoint(model)
    flow = Flow(LowerAffine(2)).double()
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 1.0]], dtype=F64)
    estimate = ELBO(estimator)(flow, joint, x)
    assert estimate.num_failed == 1
    assert estimate.log_weights[1] == -torch.inf
    torch.testing.assert_close(estimate.loss, ELBO(estimator)(flow, joint, x[[0, 2]]).loss)
    a = gradient(flow, estimate.loss)
    b = gradient(flow, ELBO(estimator)(flow, joint, x[[0, 2]]).loss)
    torch.testing.assert_close(a, b)
    dead = ELBO(estimator)(flow, joint, -x[:1])
    assert gradient(flow, dead.loss).eq(0).all()


@pytest.mark.parametrize("estimator", [StickTheLanding(), Reparameterised()])
def test_the_models_own_parameters_learn(estimator):
    scale = torch.full((), 2.0, dtype=F64, requires_grad=True)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=F64), scale).to_event(1))

    flow, x = Flow(LowerAffine(2)).double(), torch.randn(7, 2, dtype=F64)
    (grad,) = torch.autograd.grad(ELBO(estimator)(flow, LogJoint(model), x).loss, scale)
    wanted = -((x**2).sum(-1) / 2.0**3 - 2 / 2.0).mean()
    torch.testing.assert_close(grad, wanted)


def test_mixture_gradient_reaches_weights_and_components():
    joint = LogJoint(targets.two_modes(2, dtype=F64).model)
    log_weights = torch.tensor([0.5, 0.5], dtype=F64).log()
    means = torch.tensor([[-3.0, -3.0], [3.0, 3.0]], dtype=F64) / math.sqrt(2)
    base = mixture_of(log_weights, means, torch.eye(2, dtype=F64).repeat(2, 1, 1))
    flow = Flow(LowerAffine(2).double(), base)
    torch.manual_seed(0)
    x, weights = mixture_draws(flow.base, 20_000)
    loss = ELBO()(flow, joint, x, weights).loss
    loss.backward()
    # d/dpi of sum_k pi_k log(0.5 / p_k), through the softmax
    half = math.log(0.7 / 0.3) * 0.25
    assert flow.base.logits.grad.tolist() == pytest.approx([half, -half], abs=0.01)
    assert flow.base.means.grad.abs().max() < 0.05


@pytest.mark.parametrize(
    "transform",
    [
        LowerAffine(4),
        LowRankAffine(4, 2),
        FixedAffine(torch.arange(4.0), torch.arange(1.0, 5.0)),
        FixedAffine(torch.arange(4.0), torch.eye(4) + torch.ones(4, 4).tril(-1)),
        Chain([LowerAffine(4), FixedAffine(torch.zeros(4), torch.ones(4))]),
    ],
)
def test_affine_maps(transform):
    transform = transform.double()
    x = torch.randn(5, 4, dtype=F64)
    if list(transform.parameters()):
        identity = FixedAffine not in map(type, transform.modules())
        if identity:
            torch.testing.assert_close(transform(x), x)
        shaken(transform)
    y, ladj = transform.forward_and_ladj(x)
    back, inverse_ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)
    J = torch.func.jacrev(transform)(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(J)[1], ladj[0])


def test_affine_errors():
    with pytest.raises(ValueError, match="shape"):
        FixedAffine(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="positive"):
        FixedAffine(torch.zeros(2), torch.tensor([1.0, -1.0]))
