"""What is masked is no unknown of the posterior; what nothing holds is an error with a name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_nf import AutoFlow, fit_svi
from pyro_nf.model.joint import LogJoint
from tests.guides.test_guide import small

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


SEEN = torch.tensor([True, False, True, False, True, False])
Y = t(1.0, 9.0, 2.0, 9.0, 3.0, 9.0)
# mu ~ N(0, 2), three rows of N(mu, 1): the precision is 3 + 1/4, the mean 6 over it.
MEAN, SD = 6 / 3.25, 3.25**-0.5
EVIDENCE = float(
    dist.MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64) + 4.0).log_prob(
        t(1.0, 2.0, 3.0)
    )
)


def partly_seen() -> None:
    mu = pyro.sample("mu", dist.Normal(t(0.0), 2.0))
    with pyro.plate("rows", 6):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=Y, obs_mask=SEEN)


def padded() -> None:
    mu = pyro.sample("mu", dist.Normal(t(0.0), 2.0))
    with pyro.plate("rows", 6), poutine.mask(mask=SEEN):
        e = pyro.sample("e", dist.Normal(t(0.0), 0.6))
        pyro.sample("y", dist.Normal(mu + e, 0.8), obs=Y)


def wholly_masked() -> None:
    mu = pyro.sample("mu", dist.Normal(t(0.0), 2.0))
    pyro.sample("free", dist.Gamma(t(2.0, 3.0), 1.0).to_event(1).mask(False))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[SEEN])


def masked_but_held() -> None:
    mu = pyro.sample("mu", dist.Normal(t(5.0), 1.0).mask(False))
    pyro.factor("prior", dist.Normal(t(0.0), 2.0).log_prob(mu))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[SEEN])


MASKED: dict[Callable[[], None], int] = {
    partly_seen: 4,
    padded: 4,
    wholly_masked: 1,
    masked_but_held: 1,
}


@pytest.mark.parametrize("model", MASKED, ids=lambda model: model.__name__)
def test_9_masked_entries_are_no_latents(model: Callable[[], None]) -> None:
    joint = LogJoint(model)
    assert joint.latent_dim == MASKED[model]
    assert joint.kind == "batched"
    posterior = fit_svi(model, max_steps=60, progress=False).posterior(4000)
    mu = posterior.resample().samples["mu"]
    assert abs(posterior.log_evidence - EVIDENCE) < 0.01
    assert abs(float(mu.mean()) - MEAN) < 0.04
    assert abs(float(mu.std()) - SD) < 0.03
    assert posterior.diagnose(max_seconds=0.2).log_evidence == posterior.log_evidence


@pytest.mark.parametrize("model", MASKED, ids=lambda model: model.__name__)
def test_9_the_elbo_of_plain_svi_stays_below_the_evidence(model: Callable[[], None]) -> None:
    pyro.set_rng_seed(0)
    guide = AutoFlow(model, small)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(16, vectorize_particles=True))
    losses = [svi.step() for _ in range(200)]
    assert guide.latent_dim == MASKED[model]
    assert EVIDENCE - 0.3 < -sum(losses[-50:]) / 50 < EVIDENCE + 0.05
    values = guide.median()
    torch.testing.assert_close(guide.log_prob(values), guide.log_prob(values))
    assert values["mu"].shape == ()


def test_9_masked_entries_are_drawn_given_the_rest() -> None:
    posterior = fit_svi(partly_seen, max_steps=60, progress=False).posterior(4000)
    mu, x = posterior.samples["mu"], posterior.samples["x_unobserved"]
    assert x.shape == (4000, 6)
    noise = x - mu.unsqueeze(-1)  # N(0, 1), whether they have coordinates or not
    assert (noise.mean(0).abs() < 0.1).all()
    assert ((noise.std(0) - 1).abs() < 0.07).all()
    drawn = fit_svi(wholly_masked, max_steps=5, progress=False).posterior(2000).predictive()["free"]
    torch.testing.assert_close(drawn.mean(0), t(2.0, 3.0), atol=0.25, rtol=0)


def untouched() -> None:
    mu = pyro.sample("mu", dist.Normal(t(0.0), 2.0))
    pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=t(1.0))


def touched_in_part() -> None:
    b = pyro.sample("b", dist.ImproperUniform(constraints.positive, (), (3,)))
    pyro.sample("y", dist.Normal(b[..., :2], 1.0).to_event(1), obs=t(1.0, 2.0))


def flat_alone() -> None:
    pyro.sample("b", dist.ImproperUniform(constraints.real_vector, (), (2,)))


def sum_alone() -> None:
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(a + 2 * b, t(1.0)), obs=t(1.0))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (untouched, "b of site 'b'"),
        (touched_in_part, r"b\[2\] of site 'b'"),
        (flat_alone, r"b\[0\], b\[1\] of site 'b'"),
        (sum_alone, r"combination .*0\.894 a .*0\.447 b"),
    ],
)
def test_9_a_flat_direction_is_named(model: Callable[[], None], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LogJoint(model)
    with pytest.raises(ValueError, match=named):
        AutoFlow(model, small).setup()


def test_9_what_has_a_posterior_is_not_refused() -> None:
    def bounded() -> None:
        pyro.sample("a", dist.ImproperUniform(constraints.unit_interval, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(b, t(1.0)), obs=t(1.0))

    def far() -> None:
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(b, t(1e6)), obs=t(1e9))

    def ridge() -> None:
        x = torch.linspace(2000, 2020, 21, dtype=F64)
        a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("rows", 21):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=0.1 * x)

    for model, dim in ((bounded, 2), (far, 1), (ridge, 2)):
        assert LogJoint(model).latent_dim == dim


@pytest.mark.parametrize("events", [False, True])
def test_9_nan_at_masked_entries_leaves_value_and_gradient_right(events: bool) -> None:
    """The exact posterior of a normal mean, from the rows that are seen."""
    rows = torch.tensor([[1.0, 2.0], [0.5, 1.0], [math.nan, 3.0], [math.nan, math.nan]])
    seen = torch.tensor([True, True, False, False])
    y = rows if events else rows[:, 0]

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2 if events else 1), 2.0).to_event(1))
        with pyro.plate("rows", len(y)):
            if events:
                law = dist.MultivariateNormal(mu, torch.eye(2))
            else:
                law = dist.Normal(mu[..., 0, None], 1.0)
            pyro.sample("y", law.mask(seen), obs=y)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model does not run on a batch")
        joint = LogJoint(model, (y,))
    z = torch.tensor([[0.3, -0.2], [1.0, 2.0]])[:, : joint.latent_dim]
    value, grad = joint.value_and_grad(z)
    held = rows[:2, : joint.latent_dim]
    wanted = -z / 4 + (held - z.unsqueeze(1)).sum(1)
    torch.testing.assert_close(grad, wanted)
    normal = torch.distributions.Normal(z.unsqueeze(1), 1.0).log_prob(held).sum((1, 2))
    prior = torch.distributions.Normal(0.0, 2.0).log_prob(z).sum(-1)
    torch.testing.assert_close(value, normal + prior)
