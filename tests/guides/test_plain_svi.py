"""The guide in Pyro's own SVI: finite with single particles, and as cheap and near as Gaussians."""

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value

from pyro_nf import AutoFlow, flows
from pyro_nf.guides.layers import auto_flow, full_flow
from pyro_nf.search.start import GaussianStart
from pyro_nf.testing import randomize
from pyro_nf.univariate import SmoothAffine

F64 = torch.float64
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
STACKS = {"realnvp": flows.realnvp, "glow": flows.glow, "maf": flows.maf, "iaf": flows.iaf}


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("x_plate", 5):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def losses(model: Callable[[], None], guide: AutoFlow, rate: float, count: int) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO())
    return [svi.step() for _ in range(count)]


@pytest.mark.parametrize("count_layers", [2, 5])
@pytest.mark.parametrize("name", STACKS)
def test_19_the_layers_of_a_stack_share_one_bound(name: str, count_layers: int) -> None:
    flow = STACKS[name](4, count_layers=count_layers).double()
    for module in flow.modules():
        if hasattr(module, "net"):  # every log-scale far above its bound
            last = [p for key, p in module.net.named_parameters() if key.endswith("bias")][-1]
            torch.nn.init.constant_(last, 1e3)
    x = torch.randn(5, 4, dtype=F64)
    changed = 4 if name in ("maf", "iaf") else 2  # a coupling leaves half of D as it is
    ladj = flow.transform.forward_and_ladj(x)[1]
    wanted = torch.full((5,), 6.0 * changed, dtype=F64)
    torch.testing.assert_close(ladj, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_19_smooth_bounds(sign: float) -> None:
    univariate = SmoothAffine(2.0, 1.5, shift_gain=0.5, scale_gain=0.25)
    x, params = torch.linspace(-3, 3, 7, dtype=F64), torch.full((7, 2), 1e9 * sign, dtype=F64)
    y, ladj = univariate.forward_and_ladj(x, params)
    torch.testing.assert_close(y, x * math.exp(1.5 * sign) + 2.0 * sign)
    torch.testing.assert_close(ladj, torch.full_like(x, 1.5 * sign))
    small = 1e-6 * torch.ones(7, 2, dtype=F64)
    y, ladj = univariate.forward_and_ladj(x, small)
    torch.testing.assert_close(ladj / 1e-6, torch.full_like(x, 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close((y - x * ladj.exp()) / 1e-6, torch.full_like(x, 0.5))


def test_19_the_default_cannot_throw_draws_far() -> None:
    x = torch.randn(1000, 6, dtype=F64)
    for layer in randomize(auto_flow(6).double(), scale=1e4).parts:
        y, ladj = layer.forward_and_ladj(x)
        assert bool((y.abs() <= 10 + x.abs() * math.exp(3.0) + 1e-9).all())
        assert float(ladj.detach().abs().max()) <= 6 * 3.0 + 1e-9


@pytest.mark.parametrize(
    ("model", "recipe", "rate"),
    [
        (schools, flows.realnvp, 0.003),
        (schools, flows.glow, 0.003),
        (schools, "auto", 0.01),
        (funnel, "auto", 0.01),
    ],
)
def test_19_single_particles(model, recipe, rate: float) -> None:
    for seed in range(2):  # unbounded, most of these become NaN within 80 steps, or exceed 1e13
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        found = losses(model, AutoFlow(model, recipe), rate, 80)
        assert all(math.isfinite(loss) for loss in found)
        assert sum(found[-20:]) < sum(found[:20])


def test_21_starts_where_the_multivariate_normal_starts() -> None:
    point = {"mu": torch.tensor(1.0), "tau": torch.tensor(2.0), "theta": torch.arange(8.0)}
    start = init_to_value(values=point)
    ours = AutoFlow(schools, init_loc_fn=start).setup()
    theirs = AutoMultivariateNormal(schools, init_loc_fn=start, init_scale=0.4)
    theirs()
    z = theirs.get_posterior().sample((20,))
    expected = theirs.get_posterior().log_prob(z)
    torch.testing.assert_close(ours.get_posterior().log_prob(z), expected, rtol=1e-4, atol=1e-3)


def test_21_a_step_of_the_affine_part_is_that_of_the_multivariate_normal() -> None:
    """The same optimiser moves location and the scales of narrow coordinates as far."""
    affine = AutoFlow(schools).setup().flow.transform.parts[1]
    affine.requires_grad_(False)
    affine.log_diagonal.fill_(-5.0)
    affine.unit_triangle[2, 0] = 0.01
    L = affine.scale_tril
    torch.testing.assert_close(L[2, 0], 0.01 * L[2, 2])
    torch.testing.assert_close(L.logdet(), torch.tensor(-50.0))
    affine.loc[0] += 0.01
    z = affine(torch.zeros(10))
    torch.testing.assert_close(z[0], torch.tensor(0.01))


def test_21_few_parameters() -> None:
    # Pyro takes one optimiser for each, which is most of what a step costs
    assert len(list(AutoFlow(schools).setup().parameters())) == 8


def started() -> AutoFlow:
    guide = AutoFlow(schools).setup()
    guide.start_at(GaussianStart(torch.zeros(10), torch.eye(10), elbo=0.0))
    return guide


def test_21_a_start_gets_all_layers() -> None:
    guide = started()
    assert len(guide.flow.transform.parts[0].parts) == len(full_flow(10).parts) == 7
    assert len(AutoFlow(schools).setup().flow.transform.parts[0].parts) == 2
    chosen = AutoFlow(schools, flows.iaf).setup()
    layers = chosen.flow.transform.parts[0]
    chosen.start_at(GaussianStart(torch.zeros(10), torch.eye(10), elbo=0.0))
    assert chosen.flow.transform.parts[0] is layers  # what was asked for stays


@pytest.mark.parametrize("is_started", [False, True])
def test_21_either_state_loads_into_either_guide(is_started: bool) -> None:
    make = started if is_started else lambda: AutoFlow(schools).setup()
    guide = randomize(make(), scale=0.1)
    z = torch.randn(5, 10)
    expected = guide.flow().log_prob(z)
    for other in (started(), AutoFlow(schools).setup(), copy.deepcopy(guide)):
        other.load_state_dict(guide.state_dict())
        torch.testing.assert_close(other.flow().log_prob(z), expected)


def test_21_a_constant_rate_leaves_little_noise() -> None:
    """The guide starts at the posterior and would be best off to stay there."""

    def normals() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(10), 0.4).to_event(1))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoFlow(normals)
    losses(normals, guide, 0.01, 300)
    p = dist.Normal(torch.zeros(10), 0.4).to_event(1)
    with torch.no_grad():
        z = guide.get_posterior().sample((4000,))
        kl = (guide.get_posterior().log_prob(z) - p.log_prob(z)).mean()
    assert 0 < float(kl) < 0.45  # with gains as of two coordinates it is above 0.9
