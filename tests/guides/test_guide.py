"""The flow guide: a drop-in for Pyro's autoguides, exact where it can be, loud where it cannot."""

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_sample, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_nf import AutoFlow, Posterior, fit_svi, flows, transforms
from pyro_nf.search.start import GaussianStart
from pyro_nf.testing import check_guide, randomize
from tests.cases import RECIPES, as_older, numbered
from tests.transforms.test_stock_pyro import FACTORIES

F64 = torch.float64


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """Two coordinates, one of them positive, and data in a plate."""
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 3.0))
    noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 10, dtype=dtype)
    return x, 2 * x + 0.3 * torch.sin(20 * x)


def small(dim: int) -> flows.Flow:
    return flows.iaf(dim, count_layers=2, hidden_dims=(8,))


def steps(model: Callable, guide: AutoFlow, elbo, *args, count: int = 3, lr: float = 0.02):
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr}), elbo)
    return [svi.step(*args) for _ in range(count)]


# Objectives.

ELBOS = {
    "Trace": lambda: Trace_ELBO(),
    "Trace vectorized": lambda: Trace_ELBO(num_particles=8, vectorize_particles=True),
    "Renyi": lambda: RenyiELBO(num_particles=4),
    "Renyi vectorized": lambda: RenyiELBO(num_particles=8, vectorize_particles=True),
    "TraceMeanField": lambda: TraceMeanField_ELBO(num_particles=4),
    "TraceGraph": lambda: TraceGraph_ELBO(num_particles=4),
    "JitTrace": lambda: JitTrace_ELBO(num_particles=4, ignore_jit_warnings=True),
    "JitTrace vectorized": lambda: JitTrace_ELBO(
        num_particles=8, vectorize_particles=True, ignore_jit_warnings=True
    ),
}


@pytest.mark.parametrize("make_elbo", ELBOS.values(), ids=ELBOS)
def test_objectives(make_elbo) -> None:
    pyro.set_rng_seed(1)  # at this rate one seed in eight diverges under Renyi's bound
    guide = AutoFlow(regression, small).setup(*data())
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    losses = steps(regression, guide, make_elbo(), *data(), count=60)
    assert median(losses[-20:]) < median(losses[:10]) - 3
    for name, p in guide.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} did not learn"


def test_no_optimiser_is_made_for_what_is_not_learnt() -> None:
    guide = AutoFlow(regression, small).setup(*data())
    optimizer = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(regression, guide, optimizer, Trace_ELBO())
    for _ in range(5):
        svi.step(*data())
    assert len(optimizer.optim_objs) == len(list(guide.parameters()))
    store = pyro.get_param_store()
    assert len(store._param_to_name) == len(list(store.keys()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str) -> None:
    check_guide(lambda: AutoFlow(regression, lambda d: RECIPES[recipe](d, 0)), regression, data())


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_every_factory(factory) -> None:
    check_guide(lambda: AutoFlow(regression, lambda d: factory(d)), regression, data())


def test_what_check_guide_finds() -> None:
    class Wrong(AutoFlow):
        def log_prob(self, values):
            return super().log_prob(values) + 0.1

    with pytest.raises(AssertionError, match="log_prob"):
        check_guide(lambda: Wrong(regression, small), regression, data())

    class Late(AutoFlow):
        def setup(self, *args, **kwargs):
            return self

    with pytest.raises((AssertionError, RuntimeError)):
        check_guide(lambda: Late(regression, small), regression, data())


# Supports.

SUPPORTS: dict[str, Callable[[], dist.Distribution]] = {
    "beta": lambda: dist.Beta(2.0, 3.0),
    "gamma": lambda: dist.Gamma(2.0, 3.0),
    "uniform": lambda: dist.Uniform(-1.0, 2.0),
    "pareto": lambda: dist.Pareto(1.0, 3.0),
    "dirichlet": lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])),
    "lkj": lambda: dist.LKJCholesky(3, torch.tensor(2.0)),
    "lkj of 2": lambda: dist.LKJCholesky(2, torch.tensor(2.0)),
    "von mises": lambda: dist.VonMises(torch.tensor(0.0), torch.tensor(3.0)),
    "multivariate normal": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "log normals": lambda: dist.LogNormal(torch.zeros(2), 0.5).to_event(1),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-2.0, 2.0]), 1.0)
    ),
    "mixture of vectors": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.LogNormal(torch.zeros(2, 3), 0.5).to_event(1),
    ),
    "positive mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Gamma(torch.tensor([2.0, 5.0]), 2.0)
    ),
}
FLAT = {
    "real": (constraints.real, ()),
    "real vector": (constraints.real_vector, (3,)),
    "positive": (constraints.positive, ()),
    "nonnegative": (constraints.nonnegative, ()),
    "greater than": (constraints.greater_than(2.0), ()),
    "less than": (constraints.less_than(-1.0), ()),
    "unit interval": (constraints.unit_interval, ()),
    "interval": (constraints.interval(-3.0, 5.0), ()),
    "half open": (constraints.half_open_interval(0.0, 2.0), ()),
    "simplex": (constraints.simplex, (4,)),
    "ordered": (constraints.ordered_vector, (3,)),
    "positive ordered": (constraints.positive_ordered_vector, (3,)),
    "softplus positive": (constraints.softplus_positive, ()),
    "corr cholesky": (constraints.corr_cholesky, (3, 3)),
    "corr matrix": (constraints.corr_matrix, (3, 3)),
    "positives": (constraints.independent(constraints.positive, 1), (3,)),
}


@pytest.mark.parametrize("prior", SUPPORTS.values(), ids=SUPPORTS)
def test_supports(prior: Callable[[], dist.Distribution]) -> None:
    def model() -> None:
        pyro.sample("x", prior())

    guide = check_guide(lambda: AutoFlow(model, small), model)
    draws = Predictive(model, guide=guide, num_samples=20, parallel=True)()["x"]
    assert bool(prior().support.check(draws).all())


@pytest.mark.parametrize(("support", "shape"), FLAT.values(), ids=FLAT)
def test_flat_priors(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(support, (), shape))
        pyro.factor(
            "near 1",
            -0.5 * (x - 1).square().sum(tuple(range(-len(shape), 0)))
            if shape
            else -0.5 * (x - 1).square(),
        )

    guide = check_guide(lambda: AutoFlow(model, small), model)
    assert bool(support.check(guide()["x"]).all())


def test_all_at_once_in_one_vector() -> None:
    def model() -> None:
        for i, prior in enumerate(SUPPORTS.values()):
            pyro.sample(f"x{i}", prior())

    guide = check_guide(lambda: AutoFlow(model, small), model)
    assert set(guide.median()) == {f"x{i}" for i in range(len(SUPPORTS))}


@pytest.mark.parametrize(
    "prior",
    [
        lambda: dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)),
        lambda: dist.ImproperUniform(constraints.positive_definite, (), (2, 2)),
        lambda: dist.Poisson(3.0),
        lambda: dist.Multinomial(3, torch.ones(2)),
    ],
)
def test_supports_that_cannot_be_mapped(prior) -> None:
    def model() -> None:
        pyro.sample("odd one", prior())

    guide = AutoFlow(model)
    for _ in range(2):  # a failed set-up is no set-up
        with pytest.raises(ValueError, match="odd one"):
            guide.setup()
    with pytest.raises(ValueError, match="odd one"):
        fit_svi(model, max_steps=1, progress=False)


def test_a_support_that_moves_is_refused_by_name() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("u", dist.Uniform(0.0, x))

    with pytest.raises(ValueError, match="'u' depends on other latents"):
        AutoFlow(model, init_loc_fn=init_to_value(values={"x": torch.tensor(2.0)})).setup()

    def fixed() -> None:
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.deterministic("v", x * u)

    check_guide(lambda: AutoFlow(fixed, small), fixed)


# The start.


def far_away() -> None:
    pyro.sample("x", dist.Normal(torch.tensor([500.0, -300.0]), 2.0).to_event(1))


NEAR = init_to_value(values={"x": torch.tensor([500.5, -300.5])})


@pytest.mark.parametrize("init_loc_fn", [None, NEAR], ids=["median", "value"])
def test_starts_at_the_point_of_init_loc_fn(init_loc_fn) -> None:
    options = {} if init_loc_fn is None else {"init_loc_fn": init_loc_fn}
    wanted = torch.tensor([500.0, -300.0])
    guide = AutoFlow(far_away, **options).setup()
    assert (guide.median()["x"] - wanted).abs().max() < 1
    assert (Predictive(far_away, guide=guide, num_samples=50)()["x"] - wanted).abs().max() < 2
    steps(far_away, guide, Trace_ELBO())
    assert (guide.median()["x"] - wanted).abs().max() < 1


def test_starts_where_the_diagonal_normal_starts() -> None:
    point = {"slope": torch.tensor(2.0), "noise": torch.tensor(0.7)}
    options = {"init_loc_fn": init_to_value(values=point)}
    ours = AutoFlow(regression, init_scale=0.3, **options).setup(*data())
    theirs = AutoDiagonalNormal(regression, init_scale=0.3, **options)
    theirs(*data())
    x = theirs.get_posterior().sample((50,))
    wanted = theirs.get_posterior().log_prob(x)
    torch.testing.assert_close(ours.get_posterior().log_prob(x), wanted, atol=1e-3, rtol=0)


def test_start_at_takes_a_diagonal() -> None:
    guide = AutoFlow(far_away).setup()
    guide.start_at(GaussianStart(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), elbo=0.0))
    torch.testing.assert_close(guide.coordinates.scale, torch.tensor([[0.5, 0.0], [0.0, 0.25]]))
    z = guide.get_posterior().sample((2000,))
    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 0.25]), rtol=0.1, atol=0)


# What one can ask of it.


def trained() -> AutoFlow:
    guide = AutoFlow(regression, small).setup(*data())
    randomize(guide.flow, 0.5)
    return guide


def test_median_and_quantiles() -> None:
    guide = trained()
    draws = Predictive(regression, guide=guide, num_samples=20_000, parallel=True)(*data())
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    for name in ("slope", "noise"):
        assert quantiles[name].shape == (3,)
        wanted = draws[name].quantile(torch.tensor([0.1, 0.5, 0.9]))
        scale = draws[name].std().item()
        torch.testing.assert_close(quantiles[name], wanted, atol=0.05 * scale, rtol=0)
        torch.testing.assert_close(
            guide.median()[name], quantiles[name][1], atol=1e-2 * scale, rtol=0
        )
    before = torch.get_rng_state()
    assert guide.median()["slope"] == guide.median()["slope"]
    assert torch.equal(before, torch.get_rng_state())


def test_quantiles_of_many_coordinates() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(30, 40), 1.0).to_event(2))

    guide = AutoFlow(model, lambda d: transforms.ActNorm(d)).setup()
    assert guide.quantiles(torch.tensor([0.05, 0.95]))["x"].shape == (2, 30, 40)


def test_log_prob_is_that_of_the_trace() -> None:
    guide = trained()
    trace = poutine.trace(guide).get_trace(*data())
    values = {name: trace.nodes[name]["value"] for name in ("slope", "noise")}
    torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), atol=1e-4, rtol=0)
    many = {name: value.expand(5, 2) for name, value in values.items()}
    assert guide.log_prob(many).shape == (5, 2)
    with pytest.raises(ValueError, match=r"wanted values of \['noise', 'slope'\], got \['slope'\]"):
        guide.log_prob({"slope": values["slope"]})


def _affine(loc: float, scale: float) -> dist.transforms.AffineTransform:
    return dist.transforms.AffineTransform(loc, scale)


@pytest.mark.parametrize(
    ("fn", "inside", "end", "outside"),
    [
        (dist.LogNormal(0.0, 1.0), 1.0, 0.0, -1.0),
        (dist.Beta(2.0, 2.0), 0.5, 1.0, 1.5),
        (dist.Uniform(-2.0, 3.0), 0.5, 3.0, -2.5),
        (dist.Pareto(1.0, 2.0), 2.0, 1.0, 0.5),
        (dist.TransformedDistribution(dist.Exponential(1.0), [_affine(0.0, -1.0)]), -1.0, 0.0, 0.5),
        (dist.TransformedDistribution(dist.Exponential(1.0), [_affine(1.0, 1.0)]), 2.0, 1.0, 0.5),
        (dist.Exponential(torch.ones(2)).to_event(1), [1.0, 2.0], [0.0, 1.0], [1.0, -1.0]),
        (
            dist.Uniform(torch.zeros(2), torch.tensor([1.0, 9.0])).to_event(1),
            [0.5] * 2,
            [1.0] * 2,
            [2.0, 2.0],
        ),
        (dist.Dirichlet(torch.ones(3)), [0.2, 0.3, 0.5], [0.0, 0.5, 0.5], [0.5, 0.7, -0.2]),
        (dist.Dirichlet(torch.ones(3)), [0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        (
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
            ),
            [1.0, 2.0, 3.0],
            None,
            [3.0, 2.0, 1.0],
        ),
        (
            dist.TransformedDistribution(dist.Dirichlet(torch.ones(2)), [_affine(1.0, 2.0)]),
            [2.0, 2.0],
            None,
            [9.0, 9.0],
        ),
        (dist.LKJCholesky(2, 1.0), [[1.0, 0.0], [0.6, 0.8]], None, [[2.0, 0.0], [0.0, 1.0]]),
        (dist.Normal(0.0, 1.0), 0.0, None, math.inf),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_10_log_prob_is_minus_infinity_outside_a_support(
    fn, inside, end, outside, dtype: torch.dtype
) -> None:
    points = [torch.tensor(p, dtype=dtype) for p in (inside, end, outside) if p is not None]

    def model() -> None:
        pyro.sample("x", fn)
        with pyro.plate("two", 2):
            pyro.sample("u", dist.Beta(2.0, 2.0))

    guide = AutoFlow(model, small, init_scale=1.0).setup()
    if dtype == F64:
        guide.double()
    u = torch.full((2,), 0.5, dtype=dtype)
    each = torch.stack([guide.log_prob({"x": x, "u": u}) for x in points])
    assert each[:-1].isfinite().all()
    assert each[-1] == -math.inf
    batch = {"x": torch.stack(points), "u": u.expand(len(points), 2).clone()}
    torch.testing.assert_close(guide.log_prob(batch), each, rtol=1e-5, atol=1e-4)
    batch["u"][0, 1] = 1.5
    assert guide.log_prob(batch)[0] == -math.inf
    (gradient,) = torch.autograd.grad(
        guide.log_prob(batch)[1:-1].sum(), next(guide.flow.parameters())
    )
    assert gradient.isfinite().all()


def test_log_prob_integrates_to_one() -> None:
    def model() -> None:
        pyro.sample("x", dist.Beta(2.0, 3.0).expand([]))

    guide = AutoFlow(model).setup()
    randomize(guide.flow, 0.5)
    x = torch.linspace(1e-5, 1 - 1e-5, 20_001)
    with torch.no_grad():
        density = guide.log_prob({"x": x}).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-3)


def test_one_coordinate() -> None:
    def model() -> None:
        pyro.sample("x", dist.Gamma(3.0, 2.0))

    guide = check_guide(lambda: AutoFlow(model, init_scale=0.1), model)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    steps(model, guide, elbo, count=200)
    # one coordinate gets splines: the skew of log x is learnt, which no Gaussian has
    assert Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=0).loss(model, guide) < 0.03


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    guide = trained()
    x, _ = data()
    draws = Predictive(regression, guide=guide, num_samples=9, parallel=parallel)(x)
    assert draws["y"].shape == (9, 10)
    assert draws["slope"].reshape(-1).unique().numel() == 9


def test_neutra_and_nuts() -> None:
    fit = fit_svi(regression, args=data(), max_steps=200, progress=False)
    neutra = NeuTraReparam(fit.guide)  # the guide was never called
    model = neutra.reparam(regression)
    mcmc = MCMC(NUTS(model), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(*data())
    draws = neutra.transform_sample(mcmc.get_samples()["slope_shared_latent"])
    summary = fit.posterior(2000).summary()
    for name in ("slope", "noise"):
        row = summary[name]
        assert abs(draws[name].mean().item() - row.mean) < 0.5 * row.sd


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("around", ["nothing", "event", "plate"])
def test_4_neutra_reparam_refuses_a_support_that_pyro_maps_otherwise(
    validate: bool, around: str
) -> None:
    def model() -> None:
        base = dist.Exponential(torch.ones(2) if around != "nothing" else torch.tensor(1.0))
        prior = dist.TransformedDistribution(base, dist.transforms.AffineTransform(1.0, 1.0))
        if around == "plate":
            with pyro.plate("two", 2):
                pyro.sample("x", prior)
        else:
            pyro.sample("x", prior.to_event(1) if around == "event" else prior)

    guide = AutoFlow(model, small).setup()
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"'x'.*refine"):
        poutine.trace(NeuTraReparam(guide).reparam(model)).get_trace()


def test_9_neutra_reparam_refuses_a_partly_masked_prior() -> None:
    def model() -> None:
        with pyro.plate("three", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model, small).setup()
    assert guide.latent_dim == 2
    with pytest.raises(ValueError, match="'x' is partly masked"):
        poutine.trace(NeuTraReparam(guide).reparam(model)).get_trace()


def test_enumerated_discrete_sites() -> None:
    y = torch.tensor([-2.1, -1.9, -2.0, 2.0, 2.2, 1.8, 2.1, 1.9])

    def model() -> None:
        weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            which = pyro.sample(
                "which", dist.Bernoulli(weight), infer={"enumerate": "parallel"}
            ).long()
            pyro.sample("y", dist.Normal(loc[..., which], 0.5), obs=y)

    start = init_to_value(values={"loc": torch.tensor([-1.0, 1.0])})
    guide = AutoFlow(poutine.block(model, hide=["which"]), small, init_loc_fn=start).setup()
    steps(model, guide, TraceEnum_ELBO(num_particles=4, max_plate_nesting=1), count=150)
    middle = guide.median()
    torch.testing.assert_close(middle["loc"], torch.tensor([-2.0, 2.0]), atol=0.3, rtol=0)
    assert 0.35 < float(middle["weight"]) < 0.85


def test_plates_of_latents() -> None:
    def model() -> None:
        with pyro.plate("a", 3), pyro.plate("b", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    guide = check_guide(lambda: AutoFlow(model, small), model)
    assert guide()["x"].shape == (2, 3)
    assert guide()["p"].shape == (2, 3, 3)
    steps(model, guide, Trace_ELBO(num_particles=3, vectorize_particles=True))


def test_svi_without_setup_takes_latents_in_a_plate() -> None:
    def model() -> None:
        with pyro.plate("a", 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(3))

    steps(model, AutoFlow(model, small), Trace_ELBO())


@pytest.mark.parametrize("lr", [0.001, 0.003])
@pytest.mark.parametrize("seed", range(3))
def test_svi_with_one_particle_stays_finite(lr: float, seed: int) -> None:
    y = torch.tensor([1.0, 2.0, 3.0, 2.5])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        sd = pyro.sample("sd", dist.HalfNormal(2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, sd), obs=y)

    pyro.set_rng_seed(seed)
    losses = steps(model, AutoFlow(model), Trace_ELBO(), count=400, lr=lr)
    assert sum(losses[-100:]) / 100 < 10.0  # the best is 7.8; a fit that diverges has thousands


def test_float64() -> None:
    guide = AutoFlow(regression, small).setup(*data(F64))
    steps(regression, guide, Trace_ELBO(), *data(F64))
    for values in (guide(*data(F64)), guide.median(), guide.quantiles([0.5])):
        assert all(value.dtype == F64 for value in values.values())
    assert guide.log_prob(guide(*data(F64))).dtype == F64


@pytest.mark.parametrize("loud", [False, True])
def test_flat_priors_take_the_dtype_of_the_data(loud: bool) -> None:
    x = torch.eye(2, dtype=F64)

    def model() -> None:
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        loc = x @ beta if loud else x.sum(0) * beta  # a product of matrices refuses to mix dtypes
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=x[0])

    guide = check_guide(lambda: AutoFlow(model, small), model)
    assert guide()["beta"].dtype == F64


# State.


def test_parameters_exist_after_setup_and_before_a_step() -> None:
    guide = AutoFlow(regression, small)
    with pytest.warns(UserWarning, match="no parameters before guide.setup"):
        assert list(guide.parameters()) == []
    assert guide.setup(*data()) is guide
    names = {name for name, _ in guide.named_parameters()}
    assert names
    torch.optim.Adam(guide.parameters())
    guide.setup(*data())
    steps(regression, guide, Trace_ELBO(), *data())
    assert {name for name, _ in guide.named_parameters()} == names


def test_state_dict_into_a_fresh_guide() -> None:
    guide = trained()
    steps(regression, guide, Trace_ELBO(), *data())
    values = guide(*data())
    pyro.clear_param_store()
    pyro.set_rng_seed(77)
    fresh = AutoFlow(regression, small).setup(*data())
    assert not torch.equal(fresh.log_prob(values), guide.log_prob(values))
    fresh.load_state_dict(guide.state_dict())
    torch.testing.assert_close(fresh.log_prob(values), guide.log_prob(values), rtol=0, atol=0)
    fresh(*data())  # the param store now holds the fresh guide's
    torch.testing.assert_close(fresh.log_prob(values), guide.log_prob(values), rtol=0, atol=0)


ELSEWHERE = """
import sys, torch, pyro
from tests.guides.test_guide import regression, data, small
from pyro_nf import AutoFlow
pyro.set_rng_seed(1234)
if sys.argv[1] == "store":
    pyro.get_param_store().load(sys.argv[2])
    guide = AutoFlow(regression, small).setup(*data())
else:
    guide = AutoFlow(regression, small).setup(*data())
    guide.load_state_dict(torch.load(sys.argv[2], weights_only=True))
values = {"slope": torch.linspace(1, 3, 5), "noise": torch.linspace(0.1, 0.5, 5)}
print(guide.log_prob(values).tolist())
guide(*data())
print(guide.log_prob(values).tolist())
"""


@pytest.mark.parametrize("way", ["store", "state_dict"])
def test_restored_in_another_process(way: str, tmp_path: Path) -> None:
    guide = fit_svi(
        regression, AutoFlow(regression, small), data(), max_steps=30, progress=False
    ).guide
    steps(regression, guide, Trace_ELBO(), *data())
    path = tmp_path / "state"
    if way == "store":
        pyro.get_param_store().save(str(path))
    else:
        torch.save(guide.state_dict(), path)
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, way, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    values = {"slope": torch.linspace(1, 3, 5), "noise": torch.linspace(0.1, 0.5, 5)}
    wanted = str(guide.log_prob(values).tolist())
    assert run.stdout.split("\n")[:2] == [wanted, wanted]


@pytest.mark.parametrize("way", ["store", "state_dict"])
def test_19_a_state_with_the_triangle_of_old(way: str) -> None:
    guide = randomize(AutoFlow(regression, small).setup(*data()), scale=0.3)
    values = guide(*data())
    expected = guide.log_prob(values).detach()
    state = numbered(as_older(guide.state_dict()), "flow.")
    assert "flow.transform.parts.1.triangle" in state
    store = pyro.get_param_store()
    if way == "store":
        older = as_older({name: store[name].detach() for name in store})
        older = numbered(older, "AutoFlow.flow$$$")
        pyro.clear_param_store()
        for name, tensor in older.items():
            store[name] = tensor
    fresh = AutoFlow(regression, small).setup(*data())
    if way == "state_dict":
        fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.log_prob(values), expected)
    fresh(*data())
    torch.testing.assert_close(fresh.log_prob(values), expected)
    assert not any(name.endswith(".triangle") for name in store)


def test_copies() -> None:
    guide = trained()
    values = guide(*data())
    for copied in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(copied.log_prob(values), guide.log_prob(values), rtol=0, atol=0)
        steps(regression, copied, Trace_ELBO(), *data())
        assert not torch.equal(copied.log_prob(values), guide.log_prob(values))
    # the original still knows its model, and so does a deep copy
    Posterior.from_guide(guide, args=data(), num_draws=50)
    Posterior.from_guide(copy.deepcopy(guide), args=data(), num_draws=50)


def test_two_guides_of_one_name() -> None:
    first, second = (AutoFlow(regression, small).setup(*data()) for _ in range(2))
    values = {name: value.detach() for name, value in first(*data()).items()}
    of_second = second.log_prob(values)
    for _ in range(3):
        steps(regression, first, Trace_ELBO(), *data())
    torch.testing.assert_close(second.log_prob(values), of_second, rtol=0, atol=0)
    of_first = first.log_prob(values)
    steps(regression, second, Trace_ELBO(), *data())
    torch.testing.assert_close(first.log_prob(values), of_first, rtol=0, atol=0)
    assert not torch.equal(second.log_prob(values), of_second)
    far = AutoFlow(far_away).setup  # of another size: what is in the store is not its
    with pytest.raises(ValueError, match="clear_param_store"):
        far()


# Errors.


def test_a_subsampled_plate_of_latents_is_named() -> None:
    def model() -> None:
        with pyro.plate("people", 100, subsample_size=10):
            pyro.sample("ability", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model)
    with pytest.raises(ValueError, match=r"'ability'.*plate 'people'.*10 of 100"):
        guide.setup()
    with pytest.raises(ValueError, match="'people'"):
        SVI(model, AutoFlow(model), pyro.optim.Adam({}), Trace_ELBO()).step()
    with pytest.raises(ValueError, match="'people'"):
        fit_svi(model, max_steps=1, progress=False)


def test_subsampled_data_are_fine() -> None:
    x, y = data()

    def model() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x), subsample_size=4) as i:
            pyro.sample("y", dist.Normal(slope * x[i], 0.3), obs=y[i])

    guide = AutoFlow(model).setup()
    steps(model, guide, Trace_ELBO(num_particles=4), count=100)
    assert abs(float(guide.median()["slope"]) - 2) < 0.5


@pytest.mark.parametrize(
    ("flow", "error", "message"),
    [
        ("iaf", TypeError, "'auto' or a callable"),
        (3, TypeError, "'auto' or a callable"),
        (lambda d: torch.nn.Linear(d, d), TypeError, "must return a Flow or a FlowTransform"),
        (lambda d: flows.iaf(d + 1), ValueError, "2 unconstrained coordinates.*input_dim 3"),
        (lambda d: flows.iaf(d, 2), ValueError, "no context.*context_dim 2"),
    ],
)
def test_wrong_flows(flow, error, message) -> None:
    with pytest.raises(error, match=message):
        AutoFlow(regression, flow).setup(*data())


def test_before_setup() -> None:
    guide = AutoFlow(regression)
    for call in (
        guide.median,
        guide.get_transform,
        guide.get_posterior,
        guide.get_base_dist,
        lambda: guide.quantiles([0.5]),
        lambda: guide.log_prob({}),
        lambda: guide.coordinates,
        lambda: guide.start_at(GaussianStart(torch.zeros(2), torch.ones(2), 0.0)),
    ):
        with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\)"):
            call()
    guide(*data())  # the first call sets it up
    guide.median()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="init_scale"):
        AutoFlow(regression, init_scale=0.0)
    with pytest.raises(RuntimeError, match="no latent"):
        AutoFlow(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(()))).setup()
    with pytest.raises(ValueError, match="no continuous latent"):
        Posterior.from_guide(
            trained(), lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(()))
        )


# Against a known evidence.


@pytest.mark.parametrize("recipe", ["iaf", "maf", "nsf", "planar"])
def test_the_elbo_never_exceeds_a_known_evidence(recipe: str) -> None:
    """mu ~ N(0, 2), y_i ~ N(mu, 1): y ~ N(0, I + 4 1 1^T)."""
    y = torch.tensor([1.0, 2.5, 0.3], dtype=F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 2.0))
        nu = pyro.sample("nu", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1), 1.0).to_event(1), obs=y)
        assert nu.shape == mu.shape

    covariance = torch.eye(3, dtype=F64) + 4
    evidence = dist.MultivariateNormal(torch.zeros(3, dtype=F64), covariance).log_prob(y).item()
    guide = AutoFlow(model, lambda d: RECIPES[recipe](d, 0), init_loc_fn=init_to_sample).setup()
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    for done in range(3):
        posterior = Posterior.from_guide(guide, num_draws=2000, seed=done)
        assert posterior.elbo <= evidence + 3 * posterior.weights.elbo_se
        steps(model, guide, elbo, count=100, lr=0.05 if done == 0 else 0.01)
    posterior = Posterior.from_guide(guide, num_draws=4000)
    assert evidence - 0.05 < posterior.elbo <= evidence + 3 * posterior.weights.elbo_se
    assert abs(posterior.log_evidence - evidence) <= 4 * posterior.log_evidence_se + 1e-3
    # Pyro's own estimate of the same guide agrees
    loss = Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    assert math.isclose(-loss, posterior.elbo, abs_tol=0.05)


def test_3_a_flow_that_was_fitted_to_data_keeps_its_units() -> None:
    fitted = flows.gaussian(2)
    fitted.units = transforms.FixedAffine(torch.tensor([50.0, -3.0]), torch.tensor([10.0, 0.1]))

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model, flow=lambda _: fitted, init_scale=1.0).setup()
    z = torch.randn(5, 2)
    z_draws = guide.get_posterior().sample((20_000,))
    torch.testing.assert_close(z_draws.std(0), fitted.units.scale, rtol=0.05, atol=0)
    loc = guide.coordinates.loc + fitted.units.loc
    exact = dist.Normal(loc, fitted.units.scale).to_event(1).log_prob(z)
    torch.testing.assert_close(guide.log_prob({"z": z}), exact, rtol=1e-4, atol=0)
