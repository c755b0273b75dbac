"""Posterior: draws, their weights, and what can be made of them."""

import importlib.metadata
import importlib.util
import itertools
import math
import pickle
import random
import re
from collections.abc import Callable

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from pyro_nf import AutoFlow, Posterior, fit_svi, flows
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.summary import summarize
from pyro_nf.posterior.weights import smooth
from pyro_nf.search.points import prior_draws
from tests.reference_models import flat_regression

F64 = torch.float64
Y = torch.tensor([1.0, 2.5, 0.3], dtype=F64)
EVIDENCE = dist.MultivariateNormal(Y.new_zeros(3), torch.eye(3, dtype=F64) + 4).log_prob(Y).item()


def conjugate() -> None:
    """mu ~ N(0, 2), y_i ~ N(mu, 1): y ~ N(0, I + 4 1 1^T)."""
    mu = pyro.sample("mu", dist.Normal(Y.new_zeros(()), 2.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


EXACT_MEAN, EXACT_SD = Y.sum().item() / 3.25, 3.25**-0.5


def schools(y: Tensor | None = None, sigma: Tensor | None = None) -> None:
    """Sites of every shape: scalar, plate, two plates, vector, vector in a plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0)))
    pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("school", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("shape", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("year", 2):
            pyro.sample("effect", dist.Normal(theta, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0 if sigma is None else sigma), obs=y)


SHAPES = {
    "mu": (),
    "tau": (),
    "weights": (3,),
    "theta": (4,),
    "shape": (4, 2),
    "effect": (2, 4),
}
SCHOOLS_Y = torch.tensor([2.8, 0.8, -0.3, 0.7])


def looped() -> None:
    """Each coordinate in Python: it does not run on a batch of particles."""
    total = torch.tensor(0.0)
    for i in range(3):
        x = pyro.sample(f"x{i}", dist.Normal(torch.tensor(0.0), 1.0))
        total = total + float(x.detach()) * 0 + x
    pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(1.0))


def small(dim: int) -> flows.Flow:
    return flows.iaf(dim, count_layers=2, hidden_dims=(8,))


def fitted(model: Callable, args=(), max_steps: int = 60, num_draws: int = 1000) -> Posterior:
    guide = AutoFlow(model, small)
    fit = fit_svi(model, guide, args, max_steps=max_steps, num_particles=16, progress=False)
    return fit.posterior(num_draws)


@pytest.fixture(scope="module")
def truth() -> Posterior:
    return fitted(conjugate, num_draws=3000)


@pytest.fixture(scope="module")
def all_shapes() -> Posterior:
    return fitted(schools, (SCHOOLS_Y,), num_draws=200)


def rough(num_draws: int = 4000, loc: float = 0.4, scale: float = 0.9) -> Posterior:
    """A Gaussian guide beside the exact posterior: its weights matter."""
    guide = AutoFlow(conjugate, lambda d: flows.gaussian(d), init_scale=1.0).setup()
    with torch.no_grad():
        guide.coordinates.loc.fill_(EXACT_MEAN + loc)
        guide.coordinates.scale.fill_(scale)
    return Posterior.from_guide(guide, num_draws=num_draws)


# Draws.


def test_the_errors_of_equal_weights_are_those_of_rounding() -> None:
    weights = smooth(torch.full((500,), 3.0))
    assert weights.elbo_se == weights.log_evidence_se == 1e-4


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_of_rounded_weights_are_smoothed_too(sign: int) -> None:
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).double()
    log_weights = (sign * 0.2 * z.square()).round()  # the least 40 % of a tail are one number
    weights = smooth(log_weights)
    assert weights.khat < 0.7  # 0.4 is the truth for a positive sign
    assert bool(weights.smoothed.isfinite().all())
    evidence = float(log_weights.logsumexp(0)) - math.log(len(z))
    assert abs(weights.log_evidence - evidence) < 3 * weights.log_evidence_se


@pytest.mark.parametrize("far", [[1000.0], [1e37], [800.0, 801.0]])
def test_a_weight_beyond_all_others_is_no_finite_tail(far: list[float]) -> None:
    z = torch.randn(500, generator=torch.Generator().manual_seed(0))
    weights = smooth(torch.cat([z, torch.tensor(far)]))
    assert weights.khat == math.inf
    assert 1 <= weights.ess < 3
    assert weights.log_evidence == pytest.approx(far[-1], rel=0.01)


@pytest.mark.parametrize("size", [0, 3000, 60_000])
@pytest.mark.parametrize("count", [1000, 4000])
def test_weights_that_only_rounding_parts_have_no_tail(size: int, count: int) -> None:
    z = torch.randn(count, generator=torch.Generator().manual_seed(7)).double()
    ulp = float(np.spacing(np.float32(size))) if size else 1e-4
    log_weights = (size + 0.3 * ulp * z).float()
    if not size:
        log_weights = (log_weights / ulp).round() * ulp
    weights = smooth(log_weights)
    assert weights.khat == -math.inf
    assert weights.ess > 0.999 * count


def test_natural_shapes(all_shapes: Posterior) -> None:
    assert {name: tuple(draws.shape) for name, draws in all_shapes.samples.items()} == {
        name: (200, *shape) for name, shape in SHAPES.items()
    }
    assert len(all_shapes) == 200
    assert bool((all_shapes.samples["tau"] > 0).all())
    torch.testing.assert_close(all_shapes.samples["weights"].sum(-1), torch.ones(200))
    assert all_shapes.log_weights.shape == (200,)


def test_log_weights_are_those_of_pyro(all_shapes: Posterior) -> None:
    """log p(x, z) by Pyro's own trace, log q by the guide's own log_prob."""
    guide = AutoFlow(schools, small)
    posterior = fit_svi(schools, guide, (SCHOOLS_Y,), max_steps=3, progress=False).posterior(5)
    for i in range(5):
        values = {name: draws[i] for name, draws in posterior.samples.items()}
        model = pyro.poutine.condition(schools, values)
        log_p = pyro.poutine.trace(model).get_trace(SCHOOLS_Y).log_prob_sum()
        with torch.no_grad():
            wanted = log_p - guide.log_prob(values)
        torch.testing.assert_close(posterior.log_weights[i], wanted, atol=2e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_draws() -> None:
    guide = AutoFlow(conjugate, small).setup()
    one, two, three = (Posterior.from_guide(guide, num_draws=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.z, two.z)
    assert not torch.equal(one.z, three.z)
    assert Posterior.from_guide(guide, num_draws=4500).z.unique(dim=0).shape == (4500, 1)


# Weights.


def test_against_the_exact_evidence(truth: Posterior) -> None:
    assert truth.elbo <= EVIDENCE + 3 * truth.weights.elbo_se + 1e-9
    assert truth.elbo > EVIDENCE - 0.05
    assert abs(truth.log_evidence - EVIDENCE) < 4 * truth.log_evidence_se + 1e-3
    assert truth.ess > 0.9 * len(truth)
    assert truth.khat < 0.7
    row = truth.summary()["mu"]
    assert row.mean == pytest.approx(EXACT_MEAN, abs=4 * EXACT_SD / len(truth) ** 0.5)
    assert row.sd == pytest.approx(EXACT_SD, rel=0.08)


def test_weights_correct_a_rough_guide() -> None:
    posterior = rough()
    plain, weighted = posterior.summary()["mu"], posterior.summary(weighted=True)["mu"]
    assert abs(plain.mean - EXACT_MEAN) > 0.3
    assert weighted.mean == pytest.approx(EXACT_MEAN, abs=0.05)
    assert weighted.sd == pytest.approx(EXACT_SD, rel=0.06)
    z = 1.6449
    assert weighted.q5 == pytest.approx(EXACT_MEAN - z * EXACT_SD, abs=0.08)
    assert weighted.median == pytest.approx(EXACT_MEAN, abs=0.06)
    assert weighted.q95 == pytest.approx(EXACT_MEAN + z * EXACT_SD, abs=0.08)
    assert posterior.elbo < EVIDENCE - 0.1
    assert abs(posterior.log_evidence - EVIDENCE) < 4 * posterior.log_evidence_se
    assert 0 < posterior.ess < len(posterior)


def test_the_standard_error_of_the_evidence_is_honest() -> None:
    guide = AutoFlow(conjugate, lambda d: flows.gaussian(d), init_scale=1.0).setup()
    with torch.no_grad():
        guide.coordinates.loc.fill_(EXACT_MEAN + 0.3)
        guide.coordinates.scale.fill_(0.9)
    posteriors = [Posterior.from_guide(guide, num_draws=400, seed=s) for s in range(60)]
    errors = torch.tensor([p.log_evidence - EVIDENCE for p in posteriors])
    claimed = sum(p.log_evidence_se for p in posteriors) / 60
    assert errors.std() == pytest.approx(claimed, rel=0.35)
    assert errors.mean().abs() < 4 * claimed / 60**0.5


def test_resample() -> None:
    posterior = rough()
    draws = posterior.resample(2000)
    assert len(draws) == 2000
    assert draws.summary()["mu"].mean == pytest.approx(EXACT_MEAN, abs=0.06)
    assert draws.summary()["mu"].sd == pytest.approx(EXACT_SD, rel=0.08)
    # systematic: each draw stands in it as often as its weight says, to within one
    every = posterior.resample()
    times = (every.z.sort(0).values.unsqueeze(0) == posterior.z.unsqueeze(1)[:50]).sum((1, 2))
    wanted = posterior.weights.normalized[:50] * len(every)
    assert bool(((times - wanted).abs() < 1.0 + 1e-6).all())
    # half of them is a fair sample too
    half = draws.samples["mu"][:1000].mean().item()
    assert half == pytest.approx(EXACT_MEAN, abs=0.1)
    assert torch.equal(draws.z, posterior.resample(2000).z)
    assert not torch.equal(draws.z, posterior.resample(2000, seed=1).z)
    for ask in ("log_weights", "elbo", "khat", "ess", "log_evidence", "log_evidence_se"):
        with pytest.raises(RuntimeError, match="no weights"):
            getattr(draws, ask)
    with pytest.raises(ValueError, match="num_draws"):
        posterior.resample(0)


def test_khat_of_both_arviz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside arviz 0.x there is arviz_stats of arviz 1; both smooth the same weights alike."""
    generator = torch.Generator().manual_seed(0)
    real = importlib.util.find_spec
    for heavy in (0.3, 0.6, 1.2):
        log_weights = -heavy * torch.rand(2000, generator=generator, dtype=F64).log()
        assert importlib.util.find_spec("arviz_stats") is not None
        new = smooth(log_weights)
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name: None if name == "arviz_stats" else real(name),
            )
            old = smooth(log_weights)
        # their tails begin at slightly different ranks
        assert old.khat == pytest.approx(float(arviz.psislw(log_weights.numpy())[1]), abs=1e-9)
        assert new.khat == pytest.approx(old.khat, abs=0.02)
        assert new.khat == pytest.approx(heavy, abs=0.2)
        assert new.log_evidence == pytest.approx(old.log_evidence, abs=0.01)
        assert new.ess == pytest.approx(old.ess, rel=0.05)


def test_degenerate_weights() -> None:
    with pytest.raises(ValueError, match="NaN"):
        smooth(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="finite"):
        smooth(torch.full((30,), -math.inf))
    some = smooth(torch.cat([torch.zeros(100), torch.full((100,), -math.inf)]))
    assert some.log_evidence == pytest.approx(-math.log(2))
    assert some.elbo == -math.inf
    assert smooth(torch.zeros(5)).khat == math.inf  # too few to tell


def test_scale_of_the_weights_does_not_matter_for_khat() -> None:
    log_weights = torch.randn(500, dtype=F64)
    one, other = smooth(log_weights), smooth(log_weights + 1000.0)
    assert other.khat == pytest.approx(one.khat, abs=1e-6)
    assert other.log_evidence == pytest.approx(one.log_evidence + 1000.0, abs=1e-6)


# Summary.


def test_summary(all_shapes: Posterior) -> None:
    table = all_shapes.summary()
    names = [row.name for row in table.rows]
    assert names[:5] == ["mu", "tau", "weights[0]", "weights[1]", "weights[2]"]
    assert "effect[1,3]" in names and len(names) == 2 + 3 + 4 + 8 + 8
    draws = all_shapes.samples["effect"][:, 1, 3].double()
    row = table["effect[1,3]"]
    assert row.mean == pytest.approx(draws.mean().item(), rel=1e-5, abs=1e-6)
    assert row.sd == pytest.approx(draws.std().item(), rel=1e-5)
    assert [row.q5, row.median, row.q95] == pytest.approx(
        draws.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=F64)).tolist(), rel=1e-5, abs=1e-6
    )
    assert "effect[1,3]" in str(table) and "mean" in str(table)
    with pytest.raises(KeyError, match="no row 'nothing'"):
        table["nothing"]


# arviz.


@pytest.fixture(params=["installed", "1.x"])
def arviz_version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "1.x":
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name: "1.0.0" if name == "arviz" else version(name),
        )
    return request.param


def test_to_arviz(all_shapes: Posterior, arviz_version: str) -> None:
    data = all_shapes.to_arviz(
        coords={"school": ["A", "B", "C", "D"], "year": [1, 2]},
        dims={"theta": ["school"], "effect": ["year", "school"]},
        log_likelihood=True,
    )
    is_old = arviz_version == "installed" and arviz.__version__ < "1"
    assert isinstance(data, arviz.InferenceData if is_old else xarray.DataTree)
    for name, shape in SHAPES.items():
        assert data.posterior[name].shape == (1, 200, *shape)
    assert data.posterior["theta"].dims == ("chain", "draw", "school")
    one = data.posterior["effect"].sel(year=2, school="C").values[0]
    np.testing.assert_array_equal(one, all_shapes.samples["effect"][:, 1, 2].numpy())
    stats = data.sample_stats
    np.testing.assert_allclose(stats["lp"].values[0], all_shapes.log_p.numpy())
    assert stats["log_weight"].shape == (1, 200)
    assert stats.attrs["khat"] == all_shapes.khat
    assert stats.attrs["elbo"] == all_shapes.elbo
    assert stats.attrs["log_evidence"] == all_shapes.log_evidence
    np.testing.assert_array_equal(data.observed_data["y"].values, SCHOOLS_Y.numpy())
    assert data.log_likelihood["y"].shape == (1, 200, 4)
    # without weights there are none to tell of
    plain = all_shapes.resample(100).to_arviz()
    assert "log_weight" not in plain.sample_stats and "khat" not in plain.sample_stats.attrs
    assert "log_likelihood" not in (plain.groups() if is_old else plain.children)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_loo(all_shapes: Posterior) -> None:
    resampled = all_shapes.resample(200)
    result = arviz.loo(resampled.to_arviz(log_likelihood=True), pointwise=True)
    assert np.isfinite(result.elpd_loo)
    assert result.loo_i.shape == (4,)
    by_hand = dist.Normal(resampled.samples["theta"], 1.0).log_prob(SCHOOLS_Y)
    torch.testing.assert_close(resampled.log_likelihood()["y"], by_hand, atol=1e-5, rtol=1e-5)


def test_arviz_summary_and_plots_take_it(truth: Posterior) -> None:
    table = arviz.summary(truth.to_arviz(), kind="stats")
    assert table.loc["mu", "mean"] == pytest.approx(EXACT_MEAN, abs=0.1)


# The model run forward.


def test_predictive_without_arguments_draws_the_data_anew(all_shapes: Posterior) -> None:
    draws = all_shapes.predictive()
    assert draws["y"].shape == (200, 4)
    residual = draws["y"] - all_shapes.samples["theta"]
    assert residual.std().item() == pytest.approx(1.0, rel=0.1)
    assert not bool((draws["y"] == SCHOOLS_Y).any())
    assert set(draws) == {"y"}


def test_predictive_with_arguments(all_shapes: Posterior) -> None:
    draws = all_shapes.predictive(None, sigma=torch.tensor(0.01), num_draws=50)
    assert draws["y"].shape == (50, 4)
    close = (draws["y"] - all_shapes.samples["theta"][:50]).abs().max()
    assert close < 0.06
    again = all_shapes.predictive(None, sigma=torch.tensor(0.01), num_draws=50)
    assert torch.equal(draws["y"], again["y"])
    some = all_shapes.predictive(sites=["y", "theta"], num_draws=10)
    assert set(some) == {"y", "theta"}
    torch.testing.assert_close(some["theta"], all_shapes.samples["theta"][:10])
    with pytest.raises(ValueError, match=r"no site \['nothing'\]"):
        all_shapes.predictive(sites=["nothing"])


def test_predictive_of_a_vector_in_a_plate() -> None:
    """As many draws as rows: a wrong broadcast would be silent."""
    x = torch.randn(30, 3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            loc = pyro.deterministic("loc", (x * beta).sum(-1))
            pyro.sample("y", dist.Normal(loc, 0.01), obs=y)

    posterior = fitted(model, (x, x.sum(-1)), num_draws=30)
    draws = posterior.predictive(x)
    wanted = posterior.samples["beta"] @ x.mT
    torch.testing.assert_close(draws["loc"], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(draws["y"], wanted, atol=0.06, rtol=0)
    assert posterior.predictive(torch.randn(7, 3))["y"].shape == (30, 7)


def test_flat_priors() -> None:
    target = flat_regression(dtype=F64)
    posterior = fitted(target.model, max_steps=150)
    assert posterior.samples["beta"].shape == (1000, 3)
    assert posterior.samples["sigma"].shape == (1000,)
    assert abs(posterior.log_evidence - target.log_evidence) < 4 * posterior.log_evidence_se + 5e-3
    assert posterior.elbo <= target.log_evidence + 3 * posterior.weights.elbo_se
    assert posterior.predictive()["y"].shape == (1000, 40)
    assert posterior.log_likelihood()["y"].shape == (1000,)


def test_flat_prior_in_a_plate() -> None:
    y = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])

    def model() -> None:
        with pyro.plate("group", 3):
            loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
            with pyro.plate("row", 2):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    posterior = fitted(model, num_draws=400)
    assert posterior.samples["loc"].shape == (400, 3)
    torch.testing.assert_close(posterior.samples["loc"].mean(0), y.mean(0), atol=0.2, rtol=0)
    assert posterior.predictive()["y"].shape == (400, 2, 3)
    assert posterior.log_likelihood()["y"].shape == (400, 2, 3)


@pytest.mark.filterwarnings("ignore:the model does not run on a batch:UserWarning")
def test_a_model_that_does_not_batch() -> None:
    posterior = fitted(looped, max_steps=20, num_draws=60)
    assert posterior.joint.kind != "batched"
    assert posterior.samples["x0"].shape == (60,)
    assert posterior.predictive()["y"].shape == (60,)
    likelihood = posterior.log_likelihood()["y"]
    total = sum(posterior.samples[f"x{i}"] for i in range(3))
    torch.testing.assert_close(
        likelihood, dist.Normal(total, 1.0).log_prob(torch.tensor(1.0)), atol=1e-5, rtol=0
    )
    assert posterior.to_arviz(log_likelihood=True).log_likelihood["y"].shape == (1, 60)


# Other guides.


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_pyros_guides(make) -> None:
    guide = make(conjugate)
    svi = SVI(conjugate, guide, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO(num_particles=8))
    for _ in range(300):
        svi.step()
    posterior = Posterior.from_guide(guide, num_draws=2000)
    assert posterior.samples["mu"].shape == (2000,)
    assert EVIDENCE - 0.1 < posterior.elbo <= EVIDENCE + 3 * posterior.weights.elbo_se + 1e-6
    assert posterior.log_evidence == pytest.approx(EVIDENCE, abs=0.02)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_pyros_guides_with_sites_of_every_shape(make) -> None:
    guide = make(schools)
    guide(SCHOOLS_Y)
    posterior = Posterior.from_guide(guide, args=(SCHOOLS_Y,), num_draws=50)
    assert {name: tuple(v.shape[1:]) for name, v in posterior.samples.items()} == SHAPES
    assert torch.isfinite(posterior.log_weights).all()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="AutoDelta"):
        Posterior.from_guide(AutoDelta(conjugate))
    with pytest.raises(ValueError, match="num_draws"):
        Posterior.from_guide(AutoFlow(conjugate), num_draws=0)


def test_a_density_that_is_zero_for_all_draws() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("far", torch.where(x > 50, 0.0, -torch.inf))

    guide = AutoFlow(lambda: pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))).setup()
    with pytest.raises(ValueError, match="not finite"):
        Posterior.from_guide(guide, model)


def test_pictures() -> None:
    fit = fit_svi(conjugate, max_steps=60, progress=False)
    posterior = fit.posterior(300)
    for what in ("pairs", "loss", "weights"):
        assert posterior.plot(what).axes
    with pytest.raises(ValueError, match="'tails'"):
        posterior.plot("tails")
    with pytest.raises(RuntimeError, match="no weights"):
        posterior.resample().plot("weights")
    with pytest.raises(RuntimeError, match="without the history"):
        Posterior.from_guide(fit.guide, num_draws=300).plot("loss")


def test_weights_that_are_equal_up_to_rounding() -> None:
    noise = 1e-5 * torch.rand(1000)
    weights = smooth(-30.0 + noise)
    assert weights.khat == -math.inf
    assert weights.ess == pytest.approx(1000)


def test_a_tail_of_ties_has_no_shape() -> None:
    log_weights = torch.zeros(1000)
    log_weights[:200] = 3.0
    weights = smooth(log_weights)
    assert not math.isnan(weights.khat)
    assert bool(weights.smoothed.isfinite().all())


def averages() -> None:
    """Deterministic sites of every kind, and one that a batch of draws would get wrong."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.deterministic("shifted", theta + torch.arange(3.0))
        with poutine.mask(mask=torch.tensor([True, True, False])):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([1.0, 2.0, 1e3]))
    pyro.deterministic("mean", theta.mean())


def test_deterministic_sites() -> None:
    posterior = fit_svi(averages, max_steps=10, progress=False).posterior(50)
    drawn, theta = posterior.predictive(num_draws=7), posterior.samples["theta"][:7]
    torch.testing.assert_close(drawn["twice"], 2 * posterior.samples["mu"][:7])
    torch.testing.assert_close(drawn["shifted"], theta + torch.arange(3.0))
    torch.testing.assert_close(drawn["mean"], theta.mean(-1))
    assert drawn["y"].shape == (7, 3)
    assert set(posterior.to_arviz().observed_data) == {"y"}


def test_masked_observations_have_no_log_likelihood() -> None:
    posterior = fit_svi(averages, max_steps=10, progress=False).posterior(50)
    found = posterior.log_likelihood()
    assert set(found) == {"y"}
    by_hand = dist.Normal(posterior.samples["theta"], 1.0).log_prob(torch.tensor([1.0, 2.0, 1e3]))
    by_hand[:, 2] = 0.0
    torch.testing.assert_close(found["y"], by_hand)


# Models whose density is another one at each look.

ROWS = torch.randn(60, generator=torch.Generator().manual_seed(0))


def of_rows(choose: Callable[[], Tensor]) -> Callable[[], None]:
    """A mean of rows that the model chooses for itself."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        rows = ROWS[choose()]
        with pyro.plate("rows", len(rows)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=rows)

    return model


def by_plate() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 60, subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=ROWS[rows])


def random_models() -> dict[str, Callable[[], None]]:
    """Each with a source of randomness, or of change, of its own kind."""
    generator, count = torch.Generator().manual_seed(0), itertools.count()
    of_numpy, of_python = np.random.default_rng(0), random.Random(0)
    loader = torch.utils.data.DataLoader(range(60), batch_size=10)
    batches = itertools.cycle(loader)
    shuffled = torch.utils.data.DataLoader(range(60), batch_size=10, shuffle=True)
    dropout = torch.nn.Dropout(0.5)
    return {
        "plate": by_plate,
        "torch": of_rows(lambda: torch.randperm(60)[:10]),
        "torch generator": of_rows(lambda: torch.randperm(60, generator=generator)[:10]),
        "numpy": of_rows(lambda: torch.as_tensor(np.random.choice(60, 10))),  # noqa: NPY002
        "numpy generator": of_rows(lambda: torch.as_tensor(of_numpy.choice(60, 10))),
        "python": of_rows(lambda: torch.tensor(random.sample(range(60), 10))),
        "python generator": of_rows(lambda: torch.tensor(of_python.sample(range(60), 10))),
        "one row of two": of_rows(lambda: torch.randint(2, (1,))),
        "counter": of_rows(lambda: torch.arange(10) + 10 * (next(count) % 6)),
        "loader": of_rows(lambda: next(batches)),
        "shuffled loader": of_rows(lambda: next(iter(shuffled))),
        "dropout": of_rows(lambda: (dropout(torch.ones(60)) > 0).nonzero().squeeze(-1)),
    }


@pytest.mark.filterwarnings("ignore:the model does not run on a batch:UserWarning")
@pytest.mark.parametrize("source", random_models())
def test_6_a_model_that_is_random_has_no_weights(source: str) -> None:
    model = random_models()[source]
    posterior = Posterior.from_guide(AutoNormal(model), num_draws=40)
    for ask in ("log_weights", "weights", "elbo", "khat", "ess", "log_evidence", "log_evidence_se"):
        with pytest.raises(RuntimeError, match="takes a subsample or draws random numbers"):
            getattr(posterior, ask)
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not trust"
    assert "subsample" in diagnosis.reasons[0] and "all rows" in diagnosis.advice
    assert not re.search(r"\d", str(diagnosis))


def test_6_what_can_be_done_without_weights() -> None:
    posterior = fit_svi(by_plate, max_steps=5, num_particles=4, progress=False).posterior(100)
    assert "100 draws of mu; without weights" in repr(posterior)
    plain, weighted = posterior.summary()["mu"], posterior.summary(weighted=True)["mu"]
    assert plain == weighted
    assert plain.mean == pytest.approx(posterior.samples["mu"].double().mean().item())
    for chosen in (posterior.resample(), posterior.refine("psis")):
        # all weights are the same, so that each draw stands in it once
        assert torch.equal(chosen.z.sort(0).values, posterior.z.sort(0).values)
    for method in ("neutra", "independence"):
        with pytest.raises(RuntimeError, match="subsample"):
            posterior.refine(method)
    data = posterior.to_arviz()
    assert data.posterior["mu"].shape == (1, 100)
    assert "subsample" in data.posterior.attrs["without_weights"]
    assert not hasattr(data, "sample_stats")
    assert posterior.plot("pairs").axes
    with pytest.raises(RuntimeError, match="subsample"):
        posterior.plot("weights")
    with pytest.raises(ValueError, match="subsample"):
        posterior.log_likelihood()


def test_6_a_model_that_draws_what_it_does_not_use_is_not_random() -> None:
    def model() -> None:
        torch.randn(3)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))

    assert Posterior.from_guide(AutoNormal(model), num_draws=40).ess > 1


# Numbers that mean nothing.


def test_5_khat_of_equal_weights_is_a_word_where_people_read_it() -> None:
    guide = AutoFlow(conjugate, lambda d: flows.gaussian(d), init_scale=1.0).setup()
    with torch.no_grad():
        guide.coordinates.loc.fill_(EXACT_MEAN)
        guide.coordinates.scale.fill_(EXACT_SD)
    posterior = Posterior.from_guide(guide, num_draws=300)
    assert posterior.khat == -math.inf
    assert posterior.to_arviz().sample_stats.attrs["khat"] == "none: the weights are equal"
    assert "k-hat none: the weights are equal, effective share 100%" in repr(posterior)
    title = posterior.plot("weights").axes[0].get_title()
    assert title == "k-hat -, effective sample size 300 of 300"


def test_one_draw_has_no_spread() -> None:
    posterior = rough(num_draws=1)
    assert posterior.weights.elbo_se == posterior.log_evidence_se == math.inf
    row = posterior.summary()["mu"]
    assert math.isnan(row.sd) and math.isnan(posterior.summary(weighted=True)["mu"].sd)
    assert str(posterior.summary()).split().count("-") == 1


def test_an_error_that_a_zero_density_hides() -> None:
    weights = smooth(torch.cat([torch.zeros(100), torch.tensor([-math.inf])]))
    assert weights.elbo == -math.inf and weights.elbo_se == math.inf
    assert weights.of_finite().elbo == 0.0


def test_the_sd_of_equal_weights_is_that_of_the_draws() -> None:
    x = torch.randn(7, dtype=F64)
    plain = summarize({"x": x})["x"]
    weighted = summarize({"x": x}, torch.full((7,), 1 / 7, dtype=F64))["x"]
    assert weighted.sd == pytest.approx(plain.sd, rel=1e-12)
    one = torch.zeros(7, dtype=F64)
    one[3] = 1.0
    assert math.isnan(summarize({"x": x}, one)["x"].sd)


def test_a_chain_that_never_moved_has_no_rhat() -> None:
    stuck = torch.randn(200)
    stuck[:100] = 1.0
    table = summarize({"x": stuck}, chains=2)
    assert math.isnan(table["x"].rhat) and math.isnan(table["x"].ess)
    assert str(table).splitlines()[1].split()[-2:] == ["-", "-"]


def test_a_point_has_no_weights() -> None:
    guide = AutoLaplaceApproximation(conjugate)
    guide()
    with pytest.raises(TypeError, match="laplace_approximation"):
        Posterior.from_guide(guide)


def test_draws_that_are_all_outside_the_support() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("near", torch.where(x.abs() < 1, 0.0, -torch.inf))

    def elsewhere() -> None:
        pyro.sample("x", dist.Normal(torch.tensor(40.0), 0.1))

    there = init_to_value(values={"x": torch.tensor(40.0)})
    guide = AutoNormal(elsewhere, init_loc_fn=there)
    joint = LogJoint(model)
    guide()
    with pytest.raises(ValueError, match="none of 50 draws"):
        Posterior.from_guide(guide, num_draws=50, joint=joint)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoFlow])
def test_5_the_prior_of_a_guides_model_can_be_drawn(make) -> None:
    """Pyro's guides wrap their model so that it gives the initial values of its latents."""
    joint = Posterior.from_guide(make(conjugate), num_draws=10).joint
    torch.manual_seed(0)
    prior = prior_draws(joint, 2000)
    assert prior.std().item() == pytest.approx(2.0, rel=0.06)


@pytest.mark.parametrize("least", [-60.0, -1e3, -1e16, -1e20])
def test_5_a_draw_of_no_weight_leaves_the_evidence_alone(least: float) -> None:
    log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() - 50
    log_weights[0] = least
    rest = log_weights[1:]
    expected = float(rest.logsumexp(0)) - math.log(1000)
    # smoothing moves the largest weights, by as much as it does without that draw
    moved = smooth(rest).log_evidence - (float(rest.logsumexp(0)) - math.log(999))
    assert smooth(log_weights).log_evidence == pytest.approx(expected + moved, abs=1e-2)


def test_5_most_draws_of_no_weight_leave_the_evidence_alone() -> None:
    log_weights = torch.full((1000,), -1e20, dtype=torch.float64)
    count = 95  # as many as are smoothed, of which all are ordinary
    log_weights[:count] = torch.randn(count, generator=torch.Generator().manual_seed(0)).double()
    expected = float(log_weights.logsumexp(0)) - math.log(1000)
    assert smooth(log_weights).log_evidence == pytest.approx(expected, abs=0.1)


def test_a_guide_that_was_pickled_takes_the_model_again() -> None:
    guide = AutoFlow(plain).setup()
    loaded = pickle.loads(pickle.dumps(guide))
    whole, again = (Posterior.from_guide(g, plain, num_draws=50) for g in (guide, loaded))
    assert torch.equal(whole.z, again.z)
    with pytest.raises(TypeError, match=r"AutoFlow has no model.*pass model="):
        Posterior.from_guide(loaded)


def plain() -> None:
    """A normal site that is seen once."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


def test_a_log_joint_with_recordings_is_pickled() -> None:
    joint = LogJoint(plain)
    assert joint.record(4, if_faster=False)
    again = pickle.loads(pickle.dumps(joint))
    z = torch.randn(4, 1)
    torch.testing.assert_close(again.value_and_grad(z), joint.value_and_grad(z))
