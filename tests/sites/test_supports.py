"""The support of a latent is where its values lie, whatever its distribution reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as maps
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from torch import Tensor

from pyro_nf import AutoFlow, Posterior, fit_svi
from pyro_nf.model.joint import LogJoint
from pyro_nf.sites.supports import bijection, event_ladj, is_pushed
from pyro_nf.testing import check_guide
from tests.guides.test_guide import small

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


def pushed(base: Any, *transforms: Any) -> Any:
    return dist.TransformedDistribution(base, list(transforms))


def exponential() -> Any:
    return dist.Exponential(t(1.0))


SHIFT = maps.AffineTransform(1.0, 1.0)

# A prior of one number, and the interval that it lives on.
SCALARS: dict[str, tuple[Callable[[], Any], float, float]] = {
    "1 + Exponential": (lambda: pushed(exponential(), SHIFT), 1.0, 41.0),
    "-Exponential": (lambda: pushed(exponential(), maps.AffineTransform(0.0, -1.0)), -40.0, 0.0),
    "2 - 3 Exponential": (
        lambda: pushed(exponential(), maps.AffineTransform(2.0, -3.0)),
        -118.0,
        2.0,
    ),
    "a + exp(u)": (
        lambda: pushed(dist.Normal(t(0.0), 0.5), maps.ExpTransform(), SHIFT),
        1.0,
        40.0,
    ),
    "LogNormal shifted": (lambda: pushed(dist.LogNormal(t(0.0), 0.5), SHIFT), 1.0, 40.0),
    "Beta on (-1, 1)": (
        lambda: pushed(dist.Beta(t(2.0), t(3.0)), maps.AffineTransform(-1.0, 2.0)),
        -1.0,
        1.0,
    ),
    "1 + Gamma": (lambda: pushed(dist.Gamma(t(2.0), t(1.0)), SHIFT), 1.0, 41.0),
    "exp of Uniform": (
        lambda: pushed(dist.Uniform(t(0.0), t(1.0)), maps.ExpTransform()),
        1.0,
        2.718281828459045,
    ),
    "logit of Uniform": (
        lambda: pushed(dist.Uniform(t(0.0), t(1.0)), maps.SigmoidTransform().inv),
        -40.0,
        40.0,
    ),
    "tanh of Exponential": (lambda: pushed(exponential(), maps.TanhTransform()), 0.0, 1.0),
    "1 / (1 + LogNormal)": (
        lambda: pushed(dist.LogNormal(t(0.0), 1.0), SHIFT, maps.PowerTransform(t(-1.0))),
        0.0,
        1.0,
    ),
    "truncated normal": (
        lambda: pushed(
            dist.Uniform(t(0.2), t(0.9)),
            maps.CumulativeDistributionTransform(torch.distributions.Normal(t(0.0), t(1.0))).inv,
        ),
        -0.8416212335729142,
        1.2815515655446004,
    ),
    "nested": (lambda: pushed(pushed(exponential(), SHIFT), maps.ExpTransform().inv), 0.0, 21.0),
    "folded Normal": (lambda: dist.FoldedDistribution(dist.Normal(t(1.0), 1.0)), 0.0, 21.0),
    "mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(t(0.5, 0.5)), pushed(dist.Exponential(t(1.0, 3.0)), SHIFT)
        ),
        1.0,
        41.0,
    ),
    "masked and expanded": (
        lambda: pushed(exponential(), SHIFT).mask(True).expand([]),
        1.0,
        41.0,
    ),
}


def truth(prior: Any, lower: float, upper: float, y: float) -> tuple[float, float, float]:
    """Mean, sd and log evidence of y ~ N(x, 0.5), by quadrature inside of the support."""
    u = torch.linspace(-12, 12, 200_001, dtype=F64).tanh() * 0.5 + 0.5  # dense at both ends
    x = lower + (upper - lower) * u
    middle = 0.5 * (x[1:] + x[:-1])
    width = x[1:] - x[:-1]
    inside = width > 0
    middle, width = middle[inside], width[inside]
    log_w = prior.log_prob(middle) + dist.Normal(middle, 0.5).log_prob(t(y)) + width.log()
    w = log_w.softmax(0)
    mean = float((w * middle).sum())
    return mean, float((w * (middle - mean) ** 2).sum().sqrt()), float(log_w.logsumexp(0))


def model_of(make: Callable[[], Any], y: float) -> Callable[[], None]:
    def model() -> None:
        x = pyro.sample("x", make())
        pyro.sample("y", dist.Normal(x, 0.5), obs=t(y))

    return model


def test_4_the_quadrature_is_right() -> None:
    mean, sd, evidence = truth(pushed(exponential(), SHIFT), 1.0, 41.0, 0.9)
    assert abs(mean - 1.295) < 1e-3
    assert abs(sd - 0.244) < 1e-3
    assert abs(evidence + 1.193) < 1e-3


@pytest.mark.parametrize("name", SCALARS)
def test_4_evidence_of_a_pushed_prior(name: str) -> None:
    make, lower, upper = SCALARS[name]
    y = 0.9 if upper > 0.9 else -0.4
    joint = LogJoint(model_of(make, y))
    z = torch.linspace(-40, 40, 20_001, dtype=F64).unsqueeze(-1)
    x = joint.unpack(z)["x"]
    near = x[z.squeeze(-1).abs() < 3]
    assert bool(((near >= lower - 1e-9) & (near <= upper + 1e-9)).all())
    log_w = joint.log_prob(z) + (z[1, 0] - z[0, 0]).log()
    w = log_w.softmax(0)
    mean, sd, evidence = truth(make(), lower, upper, y)
    assert abs(float(log_w.logsumexp(0)) - evidence) < 1e-3
    assert abs(float((w * x).sum()) - mean) < 1e-3
    assert abs(float((w * (x - mean) ** 2).sum().sqrt()) - sd) < 1e-3


@pytest.mark.parametrize("name", ["1 + Exponential", "-Exponential", "Beta on (-1, 1)"])
def test_4_both_ways_of_fitting(name: str) -> None:
    make, lower, upper = SCALARS[name]
    y = 0.9 if upper > 0.9 else -0.4
    model = model_of(make, y)
    mean, sd, evidence = truth(make(), lower, upper, y)
    posterior = fit_svi(model, max_steps=100, progress=False).posterior(4000)
    x = posterior.resample().samples["x"]
    assert bool(((x >= lower) & (x <= upper)).all())
    assert abs(posterior.log_evidence - evidence) < 0.01
    assert abs(float(x.mean()) - mean) < 0.05 * sd + 4 * sd / len(x) ** 0.5
    pyro.set_rng_seed(0)
    guide = AutoFlow(model, small)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(8, vectorize_particles=True))
    losses = [svi.step() for _ in range(200)]
    assert evidence - 0.3 < -sum(losses[-50:]) / 50 < evidence + 0.05
    for value in (guide()["x"], guide.median()["x"], guide.quantiles([0.01, 0.99])["x"]):
        assert bool(((value >= lower) & (value <= upper)).all())


EVENTS: dict[str, Callable[[], Any]] = {
    "bounds of each": lambda: pushed(
        exponential().expand([3]).to_event(1), maps.AffineTransform(t(1.0, 2.0, 3.0), 1.0)
    ),
    "signs of each": lambda: pushed(
        exponential().expand([2]), maps.AffineTransform(0.0, t(1.0, -1.0))
    ),
    "event of the map": lambda: pushed(
        exponential().expand([4, 3]).to_event(1), maps.AffineTransform(1.0, 2.0, event_dim=1)
    ),
    "made an event": lambda: pushed(exponential().expand([3]), SHIFT).to_event(1),
    "ordered": lambda: pushed(exponential().expand([3]).to_event(1), maps.OrderedTransform()),
    "sticks": lambda: pushed(exponential().expand([3]).to_event(1), maps.StickBreakingTransform()),
    "scaled simplex": lambda: pushed(
        dist.Dirichlet(torch.ones(3, dtype=F64)), maps.AffineTransform(0.0, 2.0, event_dim=1)
    ),
    "correlations": lambda: pushed(
        dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1), maps.CorrCholeskyTransform()
    ),
    "reshaped": lambda: pushed(
        exponential().expand([6]).to_event(1),
        maps.ReshapeTransform((6,), (2, 3)),
        maps.AffineTransform(1.0, 1.0, event_dim=2),
    ),
}


@pytest.mark.parametrize("name", EVENTS)
def test_4_events(name: str) -> None:
    prior = EVENTS[name]()
    x = prior.sample()
    transform = bijection("x", prior)
    u = transform.inv(x)
    torch.testing.assert_close(transform(u), x)
    assert event_ladj(transform, u, x, prior.event_dim).shape == prior.batch_shape

    def model() -> None:
        with pyro.plate_stack("rows", prior.batch_shape):
            pyro.sample("x", prior)

    check_guide(lambda: AutoFlow(model, small), model)


def test_4_what_was_right_keeps_its_coordinates() -> None:
    loc = t(3.0).requires_grad_()
    assert not is_pushed(pushed(dist.Normal(t(0.0), 1.0), maps.AffineTransform(loc, 2.0)))
    assert not is_pushed(dist.LogNormal(t(0.0), 1.0))
    assert not is_pushed(
        pushed(dist.Normal(torch.zeros(3), 1.0).to_event(1), maps.OrderedTransform())
    )
    assert is_pushed(pushed(exponential(), SHIFT))


def test_4_a_scale_that_is_latent_moves_no_support() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.LogNormal(t(0.0), 1.0))
        x = pyro.sample("x", pushed(exponential(), maps.AffineTransform(0.0, tau)))
        pyro.sample("y", dist.Normal(x, 1.0), obs=t(1.0))

    joint = LogJoint(model)
    assert joint.kind == "batched"
    assert joint.dynamic_sites == ()
    z = torch.randn(5, 2, dtype=F64)
    tau, x = z.exp().unbind(-1)
    wanted = (
        dist.LogNormal(t(0.0), 1.0).log_prob(tau)
        + dist.Exponential(1 / tau).log_prob(x)
        + dist.Normal(x, 1.0).log_prob(t(1.0))
        + z.sum(-1)
    )
    torch.testing.assert_close(joint.log_prob(z), wanted)


def test_4_a_bound_that_is_latent_moves_with_it() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(t(0.0), 1.0))
        x = pyro.sample("x", pushed(exponential(), maps.AffineTransform(a, 1.0)))
        pyro.sample("y", dist.Normal(x, 1.0), obs=t(1.0))

    joint = LogJoint(model)
    assert joint.dynamic_sites == ("x",)
    z = torch.randn(5, 2, dtype=F64)
    x = z[:, 0] + z[:, 1].exp()
    wanted = (
        dist.Normal(t(0.0), 1.0).log_prob(z[:, 0])
        - z[:, 1].exp()
        + z[:, 1]
        + dist.Normal(x, 1.0).log_prob(t(1.0))
    )
    torch.testing.assert_close(joint.log_prob(z), wanted)
    with pytest.raises(ValueError, match="'x' depends on other latents"):
        AutoFlow(model).setup()


@pytest.mark.parametrize(
    "init", [init_to_median, init_to_mean, init_to_sample, init_to_feasible, init_to_uniform]
)
@pytest.mark.parametrize("event", ["bounds of each", "made an event", "sticks"])
def test_4_starts_lie_in_the_support(init: Any, event: str) -> None:
    make = EVENTS[event]
    joint = LogJoint(lambda: pyro.sample("x", make()), init_loc_fn=init)
    assert bool(joint.init_loc.isfinite().all())
    guide = AutoFlow(lambda: pyro.sample("x", make()), small, init_loc_fn=init).setup()
    assert bool(make().log_prob(guide()["x"]).isfinite().all())


class HalfTold(dist.Normal):
    """Says that it lives on the whole line, but has a density on one half."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value > 0, super().log_prob(value), -torch.inf)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Abs": (lambda: pushed(dist.Normal(t(0.0), 1.0), maps.AbsTransform()), "one-to-one"),
    "square": (lambda: pushed(dist.Normal(t(0.0), 1.0), maps.PowerTransform(2.0)), "defined on"),
    "log of a Normal": (
        lambda: pushed(dist.Normal(t(0.0), 1.0), maps.ExpTransform().inv),
        "defined on",
    ),
    "mixture of supports": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(t(0.5, 0.5)),
            pushed(exponential().expand([2]), maps.AffineTransform(t(0.0, 5.0), 1.0)),
        ),
        "different supports",
    ),
    "folded Uniform": (
        lambda: dist.FoldedDistribution(dist.Uniform(t(-1.0), t(2.0))),
        "refused by its own prior",
    ),
    "half told": (lambda: HalfTold(t(0.5), 1.0), "prior log density"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_4_what_cannot_be_mapped_is_refused_by_name(name: str) -> None:
    make, why = REFUSED[name]
    with pytest.raises(ValueError, match=rf"'odd'.*{why}"):
        LogJoint(lambda: pyro.sample("odd", make()))


def test_4_a_guide_of_pyros_that_goes_beyond_is_refused() -> None:
    model = model_of(SCALARS["1 + Exponential"][0], 0.9)
    guide = AutoNormal(model)
    guide()
    with pytest.raises(ValueError, match=r"AutoNormal cannot be weighed.*'x'"):
        Posterior.from_guide(guide)
