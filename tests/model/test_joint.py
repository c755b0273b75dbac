"""The flat log joint equals the model, whatever the model is made of."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch.distributions import biject_to

from pyro_nf.model.joint import LogJoint
from pyro_nf.train.budget import Budget
from tests.reference_models import exact_targets, gaussian

F64 = torch.float64


def t(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


def by_hand(model, joint, z, args=()):
    """log p(x) + log|dx/dz| by Pyro's own trace, one particle at a time."""
    total = []
    for zi in z:
        values, ladj = {}, 0.0
        for name, site in joint.sites.items():
            u = site.cut(zi)
            values[name] = site.transform(u)
            ladj = ladj + site.transform.log_abs_det_jacobian(u, values[name]).sum()
        run = poutine.trace(poutine.condition(model, values)).get_trace(*args)
        total.append(run.log_prob_sum() + ladj)
    return torch.stack(total)


def scalars():
    mu = pyro.sample("mu", dist.Normal(t(1.0), 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(t(5.0)))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, tau), obs=t(1.0, 2.0, 3.0))


def plates():
    scale = pyro.sample("scale", dist.LogNormal(t(0.0), 1.0))
    with pyro.plate("rows", 4, dim=-2):
        a = pyro.sample("a", dist.Normal(t(0.0), scale))
        with pyro.plate("columns", 3, dim=-1):
            b = pyro.sample("b", dist.Gamma(t(2.0), a.exp()))
            pyro.sample("y", dist.Poisson(b), obs=torch.ones(4, 3, dtype=F64))


def supports():
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3, dtype=F64)))
    pyro.sample("corr", dist.LKJCholesky(3, t(2.0)))
    pyro.sample("interval", dist.Uniform(t(-1.0), t(3.0)))
    pyro.sample("beta", dist.Beta(t(2.0), t(3.0)).expand([2]).to_event(1))
    ordered = dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    pyro.sample(
        "ordered", dist.TransformedDistribution(ordered, dist.transforms.OrderedTransform())
    )
    pyro.sample("lower", dist.Pareto(t(1.0), t(2.0)))


def scaled():
    with poutine.scale(scale=3.0):
        mu = pyro.sample("mu", dist.Normal(t(0.0), 1.0))
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=t(1.0, 2.0, 3.0))
    pyro.factor("f", -(mu**4))


def unplated_data():
    mu = pyro.sample("mu", dist.Normal(t(0.0), 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.arange(6, dtype=F64))


def subsampled_data():
    mu = pyro.sample("mu", dist.Normal(t(0.0), 1.0))
    y = torch.arange(20, dtype=F64)
    with pyro.plate("data", 20, subsample_size=7) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


@pytest.mark.parametrize("model", [scalars, plates, supports, scaled, unplated_data])
def test_equals_pyros_trace(model):
    joint = LogJoint(model)
    z = joint.init_loc + torch.randn(7, joint.latent_dim, dtype=F64)
    assert joint.kind == "batched"
    torch.testing.assert_close(joint.log_prob(z), by_hand(model, joint, z), rtol=1e-9, atol=1e-9)
    assert joint.log_prob(z.reshape(7, 1, -1)).shape == (7, 1)
    assert joint.log_prob(z[0]).shape == ()


@pytest.mark.parametrize("model", [scalars, plates, supports, scaled])
def test_gradient_hessian_and_recording(model):
    joint = LogJoint(model)
    z = joint.init_loc + 0.3 * torch.randn(6, joint.latent_dim, dtype=F64)
    value, grad = joint.value_and_grad(z)
    zi = z[0].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(joint.log_prob, zi)
    torch.testing.assert_close(joint.hessian(z[0]), hessian, rtol=1e-7, atol=1e-7)
    (wanted,) = torch.autograd.grad(joint.log_prob(zi), zi)
    torch.testing.assert_close(grad[0], wanted)
    joint.trace(6, max_seconds=60.0)
    recorded, recorded_grad = joint.value_and_grad(z)
    torch.testing.assert_close(recorded, value)
    torch.testing.assert_close(recorded_grad, grad)


@pytest.mark.parametrize("model", [plates, supports])
def test_pack_inverts_unpack(model):
    joint = LogJoint(model)
    z = torch.randn(5, 2, joint.latent_dim, dtype=F64)
    values = joint.unpack(z)
    for name, site in joint.sites.items():
        assert values[name].shape == (5, 2, *site.shape)
    torch.testing.assert_close(joint.pack(values), z)
    with pytest.raises(ValueError, match="is missing"):
        joint.pack({})


def test_coordinates_are_those_of_pyros_guides():
    guide = AutoMultivariateNormal(plates, init_loc_fn=init_to_value(values=values_of_plates()))
    guide()
    joint = LogJoint(plates, prototype=guide.prototype_trace)
    z = torch.randn(joint.latent_dim, dtype=F64)
    for (name, value), site in zip(guide._unpack_latent(z), joint.sites.values(), strict=True):
        assert name["name"] == site.name
        torch.testing.assert_close(value, site.cut(z))
    torch.testing.assert_close(joint.init_loc, guide.loc)


def values_of_plates():
    return {
        "scale": t(2.0),
        "a": torch.ones(4, 1, dtype=F64),
        "b": torch.full((4, 3), 3.0, dtype=F64),
    }


def vector_product():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    X = torch.arange(12, dtype=F64).reshape(4, 3)
    pyro.sample("y", dist.Normal(X @ beta, 1.0).to_event(1), obs=torch.ones(4, dtype=F64))


def whole_mean():
    """Broadcasts without an error, but mixes the particles."""
    x = pyro.sample("x", dist.Normal(t(0.0), 1.0).expand([4]).to_event(1))
    pyro.sample("y", dist.Normal(x.mean(), 1.0), obs=t(1.0))


def in_place():
    x = pyro.sample("x", dist.Normal(t(0.0), 1.0))
    err = torch.zeros(3, dtype=F64)
    err[0] = x
    err[1] = err[0] * 0.5
    pyro.sample("y", dist.Normal(err, 1.0).to_event(1), obs=torch.ones(3, dtype=F64))


def control_flow():
    x = pyro.sample("x", dist.Normal(t(0.0), 1.0))
    loc = 3 * x if x > 0 else -x
    pyro.sample("y", dist.Normal(loc, 1.0), obs=t(1.0))


@pytest.mark.parametrize(
    ("model", "kind", "why"),
    [
        (vector_product, "vmap", "site"),
        (whole_mean, "vmap", "single run"),
        (in_place, "recorded vmap", "site 'x'"),
        (control_flow, "loop", "site 'x'"),
    ],
)
def test_falls_back_and_says_why(model, kind, why):
    with pytest.warns(UserWarning, match=why):
        joint = LogJoint(model)
    assert joint.kind == kind
    z = torch.randn(9, joint.latent_dim, dtype=F64)
    torch.testing.assert_close(joint.log_prob(z), by_hand(model, joint, z))
    if kind == "loop":
        assert not joint.trace(9, max_seconds=60.0)
    value, grad = joint.value_and_grad(z)
    joint.trace(9, max_seconds=60.0)
    torch.testing.assert_close(joint.value_and_grad(z)[1], grad)
    torch.testing.assert_close(value, joint.log_prob(z))


def test_subsample_is_drawn_afresh_and_never_recorded():
    joint = LogJoint(subsampled_data)
    assert joint.is_random
    assert joint.kind == "batched"
    assert not joint.trace(5, max_seconds=60.0)
    z = torch.zeros(5, 1, dtype=F64)
    values = torch.stack([joint.log_prob(z) for _ in range(2000)])
    wanted = dist.Normal(0.0, 1.0).log_prob(torch.arange(20, dtype=F64)).sum()
    wanted = wanted + dist.Normal(t(0.0), 1.0).log_prob(t(0.0))
    error = values[:, 0].std() / 2000**0.5
    assert (values[:, 0].mean() - wanted).abs() < 5 * error


def test_own_randomness_is_noticed():
    def model():
        x = pyro.sample("x", dist.Normal(t(0.0), 1.0))
        pyro.sample("y", dist.Normal(x + torch.randn((), dtype=F64), 1.0), obs=t(1.0))

    joint = LogJoint(model)
    assert joint.is_random
    assert joint.log_prob(torch.zeros(1, 1, dtype=F64)) != joint.log_prob(
        torch.zeros(1, 1, dtype=F64)
    )


def test_latents_of_a_subsample_are_refused():
    def model():
        with pyro.plate("rows", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(t(0.0), 1.0))

    with pytest.raises(ValueError, match="plate 'rows'"):
        LogJoint(model)


def test_flat_priors():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        y = t(1.0, 2.0)
        pyro.sample("y", dist.Normal(x, s.unsqueeze(-1)).to_event(1), obs=y)

    joint = LogJoint(model)
    assert joint.kind == "batched"
    z = torch.randn(4, 3, dtype=F64)
    s = z[:, 2:].exp()
    wanted = dist.Normal(z[:, :2], s).log_prob(t(1.0, 2.0)).sum(-1) + z[:, 2]
    torch.testing.assert_close(joint.log_prob(z), wanted)
    started = joint.init(init_to_value(values={"x": t(3.0, 4.0), "s": t(2.0)}))
    torch.testing.assert_close(started[:2], t(3.0, 4.0))


def test_support_that_depends_on_a_latent():
    def model():
        a = pyro.sample("a", dist.Exponential(t(1.0)))
        b = pyro.sample("b", dist.Uniform(-a, 2 * a))
        pyro.sample("y", dist.Normal(b, 1.0), obs=t(0.5))

    joint = LogJoint(model)
    assert joint.dynamic_sites == ("b",)
    z = torch.randn(5, 2, dtype=F64)
    a = z[:, 0].exp()
    b = biject_to(constraints.interval(-a, 2 * a))(z[:, 1])
    values = joint.unpack(z)
    torch.testing.assert_close(values["b"], b)
    p = z[:, 1].sigmoid()
    wanted = -a + z[:, 0] + (p * (1 - p)).log() + dist.Normal(b, 1.0).log_prob(t(0.5))
    torch.testing.assert_close(joint.log_prob(z), wanted)


def test_discrete_sites_are_summed_out():
    y = t(-1.0, 0.5, 3.0, 2.5)

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(t(0.3, 0.7)))
            pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joint = LogJoint(model)
    assert joint.enumerated_sites == ("k",)
    assert joint.latent_dim == 2
    z = torch.randn(6, 2, dtype=F64)
    each = dist.Normal(z[:, None], 1.0).log_prob(y[:, None]) + t(0.3, 0.7).log()
    wanted = dist.Normal(t(0.0), 2.0).log_prob(z).sum(-1) + each.logsumexp(-1).sum(-1)
    torch.testing.assert_close(joint.log_prob(z), wanted)
    assert torch.isfinite(joint.value_and_grad(z)[1]).all()


def test_a_failing_particle_spares_the_others():
    def model():
        a = pyro.sample("a", dist.Normal(t(0.0), 1.0))
        cov = torch.eye(2, dtype=F64) + a[..., None, None] * (1 - torch.eye(2, dtype=F64))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, dtype=F64), cov), obs=t(1.0, 0.0))

    joint = LogJoint(model)
    assert joint.kind == "batched"
    z = t(0.5, 2.0, -0.3).unsqueeze(-1)
    for recorded in (False, joint.trace(3, max_seconds=60.0)):
        value, grad = joint.value_and_grad(z)
        assert value[1] == -torch.inf, recorded
        assert grad[1] == 0
        single, single_grad = joint.value_and_grad(z[::2])
        torch.testing.assert_close(value[::2], single)
        torch.testing.assert_close(grad[::2], single_grad)
    z = z.clone().requires_grad_()
    joint.log_prob(z)[0].backward()
    assert z.grad[1] == 0
    assert z.grad[0] != 0


def test_parameters_of_the_model_get_their_gradient():
    scale = torch.ones((), dtype=F64, requires_grad=True)

    def model():
        x = pyro.sample("x", dist.Normal(t(0.0), scale))
        pyro.sample("y", dist.Normal(x.sqrt(), 1.0), obs=t(1.0))

    joint = LogJoint(model, init_loc_fn=init_to_value(values={"x": t(1.0)}))
    assert joint.has_parameters
    assert not joint.trace(2, max_seconds=60.0)
    z = t(2.0, -1.0).unsqueeze(-1).requires_grad_()
    log_prob = joint.log_prob(z)
    assert log_prob[1] == -torch.inf
    log_prob[0].backward()
    assert torch.isfinite(scale.grad)
    assert torch.isfinite(z.grad).all()


def test_errors():
    with pytest.raises(ValueError, match="no continuous latent"):
        LogJoint(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=t(1.0)))
    with pytest.raises(ValueError, match="site 'n' has support"):
        LogJoint(lambda: pyro.sample("n", dist.Poisson(t(3.0))))
    joint = LogJoint(scalars)
    with pytest.raises(ValueError, match="latent_dim = 2"):
        joint.log_prob(torch.zeros(3, 3, dtype=F64))

    def impossible():
        pyro.sample("x", dist.Normal(t(0.0), 1.0))
        pyro.factor("f", t(-torch.inf))

    with pytest.raises(ValueError, match="not finite"):
        LogJoint(impossible)


def test_leaves_the_world_as_it_was():
    before = torch.get_rng_state()
    validation = torch.distributions.Distribution._validate_args
    joint = LogJoint(scalars)
    joint.log_prob(torch.zeros(2, 2, dtype=F64))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.distributions.Distribution._validate_args == validation
    assert joint.init_loc.dtype == F64


def test_dtype_follows_the_model():
    assert LogJoint(gaussian(3, dtype=torch.float32).model).init_loc.dtype == torch.float32
    assert LogJoint(gaussian(3, dtype=F64).model).init_loc.dtype == F64


@pytest.mark.parametrize("target", exact_targets(F64), ids=lambda target: target.name)
def test_exact_targets_broadcast(target):
    joint = LogJoint(target.model)
    assert joint.kind == "batched"
    draws = target.draw(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(joint.unpack(joint.pack(draws)), draws)


def test_a_density_that_is_nowhere_finite_is_named() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("fine", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        pyro.sample("broken", dist.Normal(mu, 1.0), obs=torch.tensor(math.nan))

    with pytest.raises(ValueError, match=r"\['broken'\]"):
        LogJoint(model)


@pytest.mark.parametrize(
    ("cost", "kind"), [(0.1, "batched"), (0.5, "batched"), (0.55, "batched"), (1.0, "loop")]
)
def test_8_a_slow_model_is_looked_at_as_far_as_there_is_time(cost: float, kind: str) -> None:
    now = 0.0

    def model() -> None:
        nonlocal now
        now += cost
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind == "loop" else "error")
        joint = LogJoint(model, budget=Budget(max_seconds=4.0, clock=lambda: now))
    assert now <= 4.0
    assert joint.kind == kind
    assert kind == "batched" or "no time" in joint.reason
    z = torch.tensor([[0.5], [-1.0]])
    prior, likelihood = dist.Normal(0.0, 2.0), dist.Normal(1.0, 1.0)
    expected = (prior.log_prob(z) + likelihood.log_prob(z)).squeeze(-1)
    torch.testing.assert_close(joint.log_prob(z), expected)
