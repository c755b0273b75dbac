"""Where numbers round to the ends of an interval, or overflow: finite, or a density of 0."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_nf import flows, transforms
from pyro_nf.flows.base import DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.spaces import at_ends
from pyro_nf.testing import points, randomize
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.coupling import Coupling
from pyro_nf.univariate.fixed import Sigmoid
from pyro_nf.univariate.spline import RationalQuadratic
from tests.cases import RECIPES

ONTO = [
    transforms.Sigmoid,
    transforms.Tanh,
    transforms.Softsign,
    transforms.Exp,
    transforms.Softplus,
]


def silent(flow: Flow) -> dist.TorchDistribution:
    """The distribution of a flow without validation, which would raise off the support."""
    made = flow()
    made._validate_args = False
    return made


@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_10_every_draw_has_a_finite_density_and_gradient(onto, dtype):
    flow = Flow(onto(), DiagonalNormal(2, scale=torch.tensor(6.0, dtype=dtype)))
    y = flow().sample((20_000,)).requires_grad_()
    log_prob = flow().log_prob(y)
    (slope,) = torch.autograd.grad(log_prob.sum(), y)
    assert log_prob.isfinite().all()
    assert slope.isfinite().all()


def test_10_a_density_near_the_end_is_that_of_where_the_draw_came_from():
    base = DiagonalNormal(1, scale=6.0).double()
    x = torch.tensor([[-30.0], [-14.0], [5.0], [14.0]], dtype=torch.float64)
    for onto in (transforms.Sigmoid(), transforms.Tanh()):
        y, ladj = onto.forward_and_ladj(0.5 * x)
        wanted = base().log_prob(0.5 * x) - ladj
        torch.testing.assert_close(Flow(onto, base)().log_prob(y), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("onto", "inside", "outside"),
    [
        (transforms.Sigmoid(), 0.3, [-0.1, 1.1, 3e38, -3e38, math.inf, -math.inf]),
        (transforms.Tanh(), 0.3, [-1.1, 1.1, 3e38, -3e38, math.inf]),
        (transforms.Softsign(), 0.3, [-1.1, 1.1, 3e38, -math.inf]),
        (transforms.Exp(), 0.3, [-0.1, 0.0, -3e38, math.inf]),
        (transforms.Softplus(), 0.3, [-0.1, 0.0, -3e38, math.inf]),
        (Chain([transforms.Tanh(), transforms.LeakyReLU(0.5)]), 0.3, [1.1, -1.1, 3e38]),
        (Chain([transforms.Sigmoid().inv.inv]), 0.3, [-0.1, 1.1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_10_there_is_no_density_off_the_support(onto, inside, outside):
    flow = Flow(onto, DiagonalNormal(2))
    y = torch.tensor([[inside, value] for value in outside])
    assert (silent(flow).log_prob(y) == -math.inf).all()
    assert (silent(flow).log_prob(y.flip(-1)) == -math.inf).all()
    assert silent(flow).log_prob(torch.tensor([inside, inside])).isfinite()


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "planar"])
def test_10_huge_values_have_no_density_but_never_nan(recipe, dim):
    flow = randomize(RECIPES[recipe](dim, 0))
    y = torch.tensor([1e19, 3e38, -3e38, math.inf, -math.inf])[:, None].expand(-1, dim)
    log_prob = silent(flow).log_prob(y)
    assert (log_prob < -1e30).all()  # False for NaN
    assert (log_prob[1:] == -math.inf).all()
    nan = torch.full((1, dim), math.nan)
    assert silent(flow).log_prob(nan).isnan().all()  # what is no number has no density either


def test_10_maps_of_an_interval_serve_every_scheme():
    unit = RationalQuadratic(4, interval=(0.0, 1.0))
    for layer in (
        Coupling(unit, 3),
        Autoregressive(unit, 3),
        Autoregressive(unit, 3, fast="forward"),
    ):
        flow = randomize(Flow(Chain([transforms.Sigmoid(), layer]), DiagonalNormal(3, scale=9.0)))
        assert flow().log_prob(flow().sample((5_000,))).isfinite().all()
        off = torch.tensor([[0.5, 0.5, 1.5], [-0.1, 0.5, 0.5], [0.2, math.inf, 0.1]])
        assert (silent(flow).log_prob(off) == -math.inf).all()


def test_10_training_on_rows_at_an_end_has_no_nan():
    torch.manual_seed(0)
    flow = Flow(Chain([flows.nsf(2, count_layers=1).transform, transforms.Sigmoid()]))
    rows = torch.rand(256, 2)
    rows[7, 1], rows[8, 0] = 0.0, 1.0
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow().log_prob(rows).mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(p.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("swap", [False, True])
def test_10_the_half_that_passes_a_coupling_keeps_its_space(swap):
    layer = Coupling(Sigmoid(), 3, swap=swap)
    flow = Flow(layer, DiagonalNormal(3, scale=6.0))
    y = flow().sample((5_000,))
    assert layer.codomain.check(y).all()
    assert flow().log_prob(y).isfinite().all()  # validation agrees
    mapped = slice(0, 2) if swap else slice(1, 3)
    assert ((y[:, mapped] > 0) & (y[:, mapped] < 1)).all()
    assert (y[:, 2 if swap else 0].abs() > 1).any()
    assert torch.equal(at_ends(y, layer.codomain), torch.zeros_like(y, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the real numbers x .*\(0, 1\)|\(0, 1\) x .*real"):
        Chain([layer, transforms.Sigmoid().inv])


@pytest.mark.parametrize("recipe", ["realnvp", "maf", "nsf", "glow"])
def test_10_huge_values_leave_the_gradients_of_the_others_alone(recipe):
    flow = randomize(RECIPES[recipe](3, 0)).double()
    y = points(constraints.real, (4, 3))
    parameters = list(flow.parameters())
    wanted = torch.autograd.grad(flow().log_prob(y).sum(), parameters, materialize_grads=True)
    far = torch.cat((y, y.new_tensor([[1.7e308, 0.1, 0.2], [0.1, math.inf, 0.0]])))
    log_prob = flow().log_prob(far)
    assert (log_prob[4:] == -math.inf).all()
    got = torch.autograd.grad(log_prob[:4].sum(), parameters, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_10_parameters_that_are_nan_are_not_hidden():
    flow = flows.realnvp(2)
    with torch.no_grad():
        next(flow.parameters()).fill_(math.nan)
    assert flow().log_prob(torch.randn(3, 2)).isnan().all()
