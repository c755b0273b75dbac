"""Hierarchical sites placed by their priors: the same density, in coordinates without a funnel."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_nf import testing
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.joint import LogJoint
from pyro_nf.search.start import GaussianStart
from pyro_nf.sites.centring import SiteCentring, location_and_scale
from pyro_nf.vi.fit import fit_svi

F64 = torch.float64
Y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=F64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0], dtype=F64)
GROUP = torch.tensor([0, 0, 1, 2, 2, 2])


def t(value):
    return torch.tensor(value, dtype=F64)


def schools():
    mu = pyro.sample("mu", dist.Normal(t(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(t(5.0)))
    with pyro.plate("J", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def indexed():
    """Indexing the last dimension with a batch in front of it works under vmap only."""
    mu = pyro.sample("mu", dist.Normal(t(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(t(2.0)))
    alpha = pyro.sample("alpha", dist.Normal(mu, tau).expand([3]).to_event(1))
    x = torch.stack([alpha[int(g)] for g in GROUP])
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.arange(6, dtype=F64))


def levels():
    """Three levels, two plates, and families other than the normal."""
    log_scale = pyro.sample("log_scale", dist.Normal(t(0.0), 1.0))
    with pyro.plate("rows", 4, dim=-2):
        a = pyro.sample("a", dist.StudentT(t(4.0), 0.0, log_scale.exp()))
        with pyro.plate("columns", 3, dim=-1):
            b = pyro.sample("b", dist.LogNormal(a, 0.5 * log_scale.exp()))
            pair = dist.Laplace(b.log().unsqueeze(-1), t([0.5, 2.0])).to_event(1)
            c = pyro.sample("c", pair)
            pyro.sample("y", dist.Normal(c.sum(-1), b), obs=torch.ones(4, 3, dtype=F64))


def funnel():
    v = pyro.sample("v", dist.Normal(t(0.0), 3.0))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(t(0.0), (v / 2).exp()))


def flat():
    """No prior depends on another latent."""
    mu = pyro.sample("mu", dist.Normal(t(0.0), 5.0))
    with pyro.plate("J", 4):
        pyro.sample("y", dist.Normal(mu, SIGMA), obs=Y)


MODELS = [schools, indexed, levels, funnel]


def random_recentring(joint, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.rand(joint.latent_dim, generator=generator, dtype=F64)
    b = torch.randn(joint.latent_dim, generator=generator, dtype=F64)
    return Recentre(joint, h, b)


def joint_of(model):
    if model is indexed:
        with pytest.warns(UserWarning, match="LogJoint uses vmap instead"):
            return LogJoint(model)
    return LogJoint(model)


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        (schools, ("theta",)),
        (indexed, ("alpha",)),
        (levels, ("a", "b", "c")),
        (funnel, ("x",)),
        (flat, ()),
    ],
)
def test_sites_with_latent_parents_are_found(model, sites):
    assert joint_of(model).hierarchical_sites == sites


@pytest.mark.parametrize("model", MODELS)
def test_the_laws_of_a_transform(model):
    joint = joint_of(model)
    recentring = random_recentring(joint)
    x = torch.randn(20, joint.latent_dim, dtype=F64)
    z, ladj = recentring.forward_and_ladj(x)
    back, inverse_ladj = recentring.inverse_and_ladj(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)
    # it has no state of its own: no law of parameters, pickling, dtypes or compiling applies
    for law in (
        testing.ladj_is_autograds,
        testing.inverse_is_a_module,
        testing.batch_shapes,
        testing.gradients_cancel,
        testing.scores_are_pushed,
        testing.bad_input_is_named,
    ):
        law(recentring)


@pytest.mark.parametrize("model", MODELS)
def test_the_density_is_that_of_the_change_of_variables(model):
    joint = joint_of(model)
    recentring = random_recentring(joint)
    v = 0.5 * torch.randn(7, joint.latent_dim, dtype=F64)
    z, ladj = recentring.forward_and_ladj(v)
    there = recentring.recentred()
    torch.testing.assert_close(there.log_prob(v), joint.log_prob(z) + ladj)
    values, got = joint.unpack(z), there.unpack(v)
    for name, value in values.items():
        torch.testing.assert_close(got[name], value)
    torch.testing.assert_close(there.pack(values), v)
    torch.testing.assert_close(there.init_loc, recentring.inverse_and_ladj(joint.init_loc)[0])


def test_coordinates_are_standard_normal_under_normal_priors():
    joint = LogJoint(funnel)
    there = Recentre(joint).recentred()
    v = torch.randn(6, 10, dtype=F64)
    wanted = dist.Normal(0.0, 1.0).log_prob(v[:, 1:]).sum(-1)
    wanted = wanted + dist.Normal(0.0, 3.0).log_prob(v[:, 0])
    torch.testing.assert_close(there.log_prob(v), wanted)


def test_what_normal_data_say_is_found_exactly():
    """One observation each, of known precision, wherever one looks."""
    joint = LogJoint(schools)
    for z in torch.randn(3, 6, dtype=F64):
        recentring = Recentre.at(joint, z)
        torch.testing.assert_close(recentring.precision[2:], SIGMA**-2)
        torch.testing.assert_close(recentring.shift[2:], Y / SIGMA**2)
        assert not recentring.precision[:2].any()


def test_given_their_parents_the_schools_are_standard_normal():
    joint = LogJoint(schools)
    there = Recentre.at(joint, torch.zeros(6, dtype=F64)).recentred()
    parents = torch.tensor([[3.0, -6.0], [0.0, 0.0], [-2.0, 3.0]], dtype=F64)
    v = torch.cat([parents, torch.randn(3, 4, dtype=F64)], -1)
    hessian = there.hessian(v)[:, 2:, 2:]
    torch.testing.assert_close(hessian, -torch.eye(4, dtype=F64).expand(3, 4, 4))
    v[:, 2:] = 0
    slope = there.value_and_grad(v)[1][:, 2:]
    torch.testing.assert_close(slope, torch.zeros(3, 4, dtype=F64), atol=1e-10, rtol=0)


def test_a_model_without_second_derivatives_stays_non_centred():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(t(1.0)))
        x = pyro.sample("x", dist.Normal(t(0.0), tau))
        pyro.factor("data", -Square.apply(x - 1.0))

    joint = LogJoint(model)
    recentring = Recentre.at(joint, torch.zeros(2, dtype=F64))
    assert not recentring.precision.any() and not recentring.shift.any()


def test_scales_of_zero_give_no_nan_to_the_others():
    joint = LogJoint(funnel)
    v = torch.zeros(2, 10, dtype=F64)
    v[0, 0] = -1e4
    log_p = Recentre(joint).recentred().log_prob(v)
    assert torch.isfinite(log_p[1]) and not log_p.isnan().any()


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(t(1.0), t(2.0)),
        dist.Normal(t(1.0), t(2.0)).expand([3]).to_event(1),
        dist.Normal(t(1.0), t(2.0)).mask(torch.tensor(True)),
        dist.LogNormal(t(1.0), t(2.0)),
    ],
)
def test_location_and_scale_are_found_inside(prior):
    loc, scale = location_and_scale(prior)
    assert (loc == 1).all() and (scale == 2).all()


def test_other_families_have_none():
    assert location_and_scale(dist.Gamma(t(1.0), t(2.0))) is None
    assert location_and_scale(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))) is None


def test_centring_reaches_from_the_prior_to_the_data():
    prior, v = dist.Normal(t(3.0), t(2.0)), t(1.0)
    free = SiteCentring(t(0.0), t(0.0)).forward(prior, v)[0]
    held = SiteCentring(t(1e12), t(5e12)).forward(prior, v)[0]
    assert float(free) == 5.0 and abs(float(held) - 5.0) < 1e-5


def fitted(model, **settings):
    return fit_svi(model, max_steps=60, num_particles=16, progress=False, **settings)


def test_a_fit_of_a_funnel_is_exact():
    posterior = fitted(funnel).posterior(2000)
    assert posterior.ess / 2000 > 0.99
    assert abs(float(posterior.samples["v"].std()) - 3) < 0.2


def test_a_guide_that_is_recentred_is_a_guide_of_the_model():
    fit = fitted(schools)
    guide = fit.guide
    assert guide.recentring is not None and "1 recentred" in fit.choice
    posterior = fit.posterior(400)
    log_tau = posterior.z[:, 1]  # the only coordinate that its site is not equal to
    torch.testing.assert_close(guide.log_prob(posterior.samples), posterior.log_q - log_tau)
    pyro.set_rng_seed(0)
    drawn = Predictive(schools, guide=guide, num_samples=50, parallel=True)()
    assert drawn["theta"].shape[0] == 50
    loss = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(50)).step()
    assert abs(-loss - posterior.elbo) < 1.0


def test_copies_share_the_model_and_a_pickled_guide_says_what_it_lacks():
    guide = fitted(schools).guide
    copied = copy.deepcopy(guide)
    pyro.set_rng_seed(1)
    wanted = guide.get_posterior().sample((3,))
    pyro.set_rng_seed(1)
    assert torch.equal(copied.get_posterior().sample((3,)), wanted)
    unpickled = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="has no model"):
        unpickled.get_posterior().sample()
    assert guide.recentring.joint is not None


def test_the_state_goes_to_a_new_guide():
    guide = fitted(schools).guide
    other = AutoFlow(schools).setup()
    other.load_state_dict(guide.state_dict())
    z = torch.randn(4, 6, dtype=F64)
    torch.testing.assert_close(other.flow().log_prob(z), guide.flow().log_prob(z))


def test_the_param_store_brings_the_recentring_back(tmp_path):
    guide = fitted(schools).guide
    guide()  # tells the store
    z = torch.randn(4, 6, dtype=F64)
    wanted = guide.flow().log_prob(z).detach()
    pyro.get_param_store().save(str(tmp_path / "guide.pt"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "guide.pt"))
    again = AutoFlow(schools).setup()
    assert again.recentring is not None
    torch.testing.assert_close(again.flow().log_prob(z), wanted)


def test_a_checkpoint_brings_the_recentring_back(tmp_path):
    path = tmp_path / "fit.safetensors"
    first = fit_svi(schools, max_steps=30, num_particles=16, progress=False, checkpoint=path)
    second = fit_svi(schools, max_steps=60, num_particles=16, progress=False, checkpoint=path)
    assert second.history.steps == 60
    h = first.guide.recentring.precision
    torch.testing.assert_close(second.guide.recentring.precision, h)
    assert second.posterior(500).ess > 250


def test_a_guide_goes_on_with_other_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(t(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(t(5.0)))
        with pyro.plate("J", 4):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)

    fit = fitted(model, args=(Y,))
    more = fit_svi(model, fit.guide, (Y + 1,), max_steps=20, num_particles=16, progress=False)
    posterior = more.posterior(500)
    torch.testing.assert_close(posterior.log_p, LogJoint(model, (Y + 1,)).log_prob(posterior.z))
    assert more.guide.recentring.joint is more.joint


def test_where_it_does_not_help_the_coordinates_stay_plain():
    """A hundred observations a group: centred is better."""
    y = torch.randn(8, 100, dtype=F64, generator=torch.Generator().manual_seed(0))

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(t(1.0)))
        with pyro.plate("J", 8, dim=-2):
            theta = pyro.sample("theta", dist.Normal(t(0.0), tau))
            with pyro.plate("N", 100, dim=-1):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    fit = fitted(model)
    assert fit.posterior(500).ess > 400


def test_without_a_start_a_guide_is_plain():
    guide = AutoFlow(schools).setup()
    assert guide.recentring is None
    start = GaussianStart(torch.zeros(6, dtype=F64), torch.eye(6, dtype=F64), elbo=0.0)
    guide.start_at(start, Recentre(LogJoint(schools)))
    assert guide.recentring is not None
    guide.start_at(start)
    assert guide.recentring is None
