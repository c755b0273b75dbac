"""Transforms and flows inside stock Pyro and stock torch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import ComposeTransformModule, iterated
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalizingFlow
from pyro.infer.reparam import TransformReparam
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_nf import flows, transforms
from pyro_nf.testing import randomize
from tests.cases import CONTEXT_DIM, RECIPES

F64 = torch.float64
# Every factory that makes a transform from one integer.
FACTORIES = {
    f.__name__: f
    for f in (
        transforms.ActNorm,
        transforms.LULinear,
        transforms.Planar,
        transforms.Radial,
        transforms.additive_coupling,
        transforms.affine_autoregressive,
        transforms.affine_coupling,
        transforms.spline,
        transforms.spline_autoregressive,
        transforms.spline_coupling,
    )
}


def standard_normal(*batch: int) -> dist.Distribution:
    return dist.Normal(torch.zeros(*batch, 3, dtype=F64), 1.0).to_event(1)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_iterated_in_a_compose(factory) -> None:
    parts = iterated(3, factory, 3)
    compose = randomize(ComposeTransformModule(parts)).double()
    assert {id(p) for p in compose.parameters()} == {id(q) for p in parts for q in p.parameters()}
    d = dist.TransformedDistribution(standard_normal(), [compose])
    y = d.rsample((5,))
    log_prob = d.log_prob(y)
    assert log_prob.shape == (5,)
    torch.testing.assert_close(d.log_prob(y.clone()), log_prob)
    jacobian = torch.autograd.functional.jacobian(lambda x: compose(x), compose.inv(y[0]).detach())
    wanted = standard_normal().log_prob(compose.inv(y[0])) - jacobian.slogdet().logabsdet
    torch.testing.assert_close(log_prob[0], wanted, atol=1e-7, rtol=0)
    log_prob.sum().backward()
    assert all(p.grad is not None for p in compose.parameters())


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_in_torchs_transformed_distribution(factory) -> None:
    transform = randomize(factory(3)).double()
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(3, dtype=F64), 1.0), 1
    )
    for t in (transform, transform.inv):
        d = torch.distributions.TransformedDistribution(base, [t])
        y = d.rsample((4,))
        log_prob = d.log_prob(y)
        x, ladj = t.inverse_and_ladj(y)
        torch.testing.assert_close(log_prob, base.log_prob(x) + ladj)
        assert d.expand((2,)).sample().shape == (2, 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_a_conditional_transformed_distribution(recipe: str) -> None:
    flow = randomize(RECIPES[recipe](3, CONTEXT_DIM)).double()
    d = dist.conditional.ConditionalTransformedDistribution(standard_normal(), [flow.transform])
    context = torch.randn(4, CONTEXT_DIM, dtype=F64)
    conditioned = d.condition(context)
    y = flow(context).sample()
    torch.testing.assert_close(conditioned.log_prob(y), flow(context).log_prob(y))
    assert conditioned.sample((4,)).shape == (4, 3)


def test_conditional_and_plain_in_one_conditional_compose() -> None:
    parts = [transforms.affine_coupling(3, 2), transforms.LULinear(3)]
    compose = dist.conditional.ConditionalComposeTransformModule(parts)
    conditioned = randomize(compose).condition(torch.ones(2))
    x = torch.randn(5, 3)
    y = conditioned(x)
    torch.testing.assert_close(conditioned.inv(y), x, atol=1e-4, rtol=0)


def target() -> None:
    with pyro.plate("d", 2):
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0]), 0.5))
    pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_in_pyros_normalizing_flow_guide(factory) -> None:
    guide = AutoNormalizingFlow(target, lambda dim: factory(dim))
    svi = SVI(target, guide, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO())
    before = None
    for _ in range(3):  # no clear_cache between the steps
        assert torch.isfinite(torch.tensor(svi.step()))
        state = torch.cat([p.detach().reshape(-1).clone() for p in guide.parameters()])
        assert before is None or not torch.equal(before, state)
        before = state
    inverse = AutoNormalizingFlow(target, lambda dim: factory(dim).inv)
    inverse()
    count = len(list(factory(3).parameters()))
    assert len(list(inverse.transform.parameters())) == count > 0


def test_pyro_module_trains_the_flow() -> None:
    flow = flows.nsf(2, count_layers=1, hidden_dims=(8,))
    data = torch.randn(50, 2) + 3

    def model() -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", 50):
            pyro.sample("x", flow(), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0] - 50
    names = set(pyro.get_param_store().keys())
    assert names == {f"flow$$${name}" for name, _ in flow.named_parameters()}


class VAE(PyroModule):
    """Flows as attributes of a PyroModule: an amortised posterior and a learnt prior."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = flows.maf(2, count_layers=1, hidden_dims=(8,))
        self.encoder = flows.iaf(2, 3, count_layers=1, hidden_dims=(8,))
        self.decoder = nn.Linear(2, 3)

    @pyro_method
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))


@pytest.mark.parametrize("vectorize", [False, True])
def test_attributes_of_a_pyro_module(vectorize: bool) -> None:
    vae, x = VAE(), torch.randn(20, 3) + 2
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, p in vae.named_parameters():
        assert not torch.equal(before[name], p), f"{name} did not learn"


# A flow as the prior of a latent.


@pytest.fixture
def prior() -> flows.Flow:
    return randomize(flows.maf(2, count_layers=2, hidden_dims=(8,)), 1.0).double()


@pytest.fixture
def model(prior: flows.Flow):
    y = torch.tensor([0.5, -0.5], dtype=F64)

    def model() -> None:
        z = pyro.sample("z", prior())
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    return model


def exact_mean(prior: flows.Flow) -> Tensor:
    with torch.no_grad():
        z = prior().sample((200_000,))
        y = torch.tensor([0.5, -0.5], dtype=F64)
        weights = dist.Normal(z, 0.5).to_event(1).log_prob(y).softmax(0)
        return weights @ z


def test_prior_under_auto_normal(model, prior) -> None:
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=4))
    for _ in range(150):
        svi.step()
    torch.testing.assert_close(guide.median()["z"], exact_mean(prior), atol=0.25, rtol=0)


def test_prior_under_nuts(model, prior) -> None:
    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=80, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"]
    assert draws.dtype == F64
    torch.testing.assert_close(draws.mean(0), exact_mean(prior), atol=0.25, rtol=0)


def test_prior_in_predictive_and_plates(prior) -> None:
    def model() -> None:
        with pyro.plate("n", 5):
            pyro.sample("z", prior())

    for parallel in (False, True):
        draws = Predictive(model, num_samples=7, parallel=parallel)()["z"]
        assert draws.shape == (7, 5, 2)


def test_prior_under_transform_reparam(model, prior) -> None:
    reparam = poutine.reparam(model, {"z": TransformReparam()})
    trace = poutine.trace(reparam).get_trace()
    assert {"z_base", "z"} <= set(trace.nodes)
    z, x = trace.nodes["z"]["value"], trace.nodes["z_base"]["value"]
    torch.testing.assert_close(prior.transform(x), z)
    svi = SVI(reparam, AutoNormal(reparam), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    assert torch.isfinite(torch.tensor([svi.step() for _ in range(3)])).all()
