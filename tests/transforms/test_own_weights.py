"""A univariate map with weights of its own, a slope by autograd and a numeric inverse."""

import copy

import pytest
import torch
from torch import nn

from pyro_nf.flows.flow import Flow
from pyro_nf.ops.roots import solve_increasing
from pyro_nf.testing import check_transform, randomize
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.coupling import Coupling
from pyro_nf.transforms.elementwise import Elementwise
from pyro_nf.univariate.base import UnivariateMap


class Bent(UnivariateMap, nn.Module):
    """y = t + x + softplus(w) tanh(x) with a w that all coordinates share; slope by autograd."""

    num_params = 1
    exact_inverse = False

    def __init__(self):
        nn.Module.__init__(self)
        self.raw = nn.Parameter(torch.tensor(0.5))

    def _y_and_slope(self, x, params):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            amount = nn.functional.softplus(self.raw) * params[..., 0].tanh()
            y = x + params[..., 0] + amount.square() * x.tanh()
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, slope

    def forward_and_ladj(self, x, params):
        y, slope = self._y_and_slope(x, params)
        return y, slope.log()

    def inverse_and_ladj(self, y, params):
        bound = y.new_tensor(60.0)
        x = solve_increasing(
            lambda x: self._y_and_slope(x, params), y, y - bound, y + bound, "Bent"
        )
        return x, -self._y_and_slope(x, params)[1].log()


SCHEMES = {
    "Elementwise": lambda: Elementwise(Bent(), 3),
    "Coupling": lambda: Coupling(Bent(), 3, hidden_dims=(8,)),
    "Autoregressive": lambda: Autoregressive(Bent(), 4, hidden_dims=(8,)),
    "Autoregressive-forward": lambda: Autoregressive(Bent(), 4, hidden_dims=(8,), fast="forward"),
}


def naive(layer: Autoregressive, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow direction by one pass of the network for each coordinate."""
    u = layer.univariate
    g = u.forward_and_ladj if layer.fast == "inverse" else u.inverse_and_ladj
    z = torch.zeros_like(value)
    for _ in range(value.shape[-1]):
        z, ladj = g(value.view_as(value), layer.net(z))
    return z, ladj.sum(-1)


@pytest.mark.parametrize("fast", ["inverse", "forward"])
@pytest.mark.parametrize("rows", [1, 7])
def test_13_the_slow_direction_gives_a_maps_own_weights_their_gradient(fast, rows):
    layer = randomize(Autoregressive(Bent(), 4, hidden_dims=(8,), fast=fast)).double()
    value = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    slow = layer.forward_and_ladj if fast == "inverse" else layer.inverse_and_ladj
    inputs = [value, *layer.parameters()]
    found, wanted = [], []
    for way, kept in ((slow, found), (lambda v: naive(layer, v), wanted)):
        z, ladj = way(value)
        kept += [z, ladj]
        total = (z * torch.arange(1.0, 5.0).double()).sum() + 0.7 * ladj.sum()
        kept += torch.autograd.grad(total, inputs)
    assert wanted[2 + 1 + [n for n, _ in layer.named_parameters()].index("univariate.raw")] != 0
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_13_a_slope_by_autograd_works_without_gradients(scheme):
    layer = randomize(SCHEMES[scheme]()).double()
    x = torch.randn(6, layer.input_dim, dtype=torch.float64)
    with torch.no_grad():
        y, ladj = layer.forward_and_ladj(x)
        back, inverse_ladj = layer.inverse_and_ladj(y)
    assert not any(t.requires_grad for t in (y, ladj, back, inverse_ladj))
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)
    J = torch.autograd.functional.jacobian(lambda v: layer.forward_and_ladj(v)[0], x[0])
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(J)[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_13_the_weights_train_move_and_are_copied_with_the_transform(scheme):
    flow = Flow(randomize(SCHEMES[scheme]()))
    assert "transform.univariate.raw" in flow.state_dict()
    y = flow().sample((32,))
    assert not y.requires_grad
    before = copy.deepcopy(flow)
    (-flow().log_prob(2 * y).mean()).backward()
    assert flow.transform.univariate.raw.grad.abs() > 0
    flow.double()
    assert flow.transform.univariate.raw.dtype == torch.float64
    torch.testing.assert_close(
        before().log_prob(y).double(), flow().log_prob(y.double()), rtol=1e-5, atol=1e-5
    )


def test_13_weights_that_nothing_would_train_are_refused():
    class Hidden(Bent):
        pass

    class Plain(UnivariateMap):
        num_params = 0

        def __init__(self, weight):
            self.weight = weight

        def forward_and_ladj(self, x, params):
            return x, torch.zeros_like(x)

        inverse_and_ladj = forward_and_ladj

    for weight in (nn.Parameter(torch.ones(1)), nn.Linear(1, 1), torch.ones(1, requires_grad=True)):
        for scheme in (Elementwise, Coupling, Autoregressive):
            with pytest.raises(TypeError, match=r"Plain has weights in 'weight'.*nn.Module"):
                scheme(Plain(weight), 3)
    assert Elementwise(Plain(torch.ones(1)), 3).univariate.weight == 1  # a constant is no weight


class Cubic(UnivariateMap):
    """A stateless map without slopes of its own: x + e^t x^3."""

    num_params = 1
    exact_inverse = False

    def forward_and_ladj(self, x, params):
        a = torch.tanh(params[..., 0]).square()
        return x + a * x**3, torch.log1p(3 * a * x * x)

    def inverse_and_ladj(self, y, params):
        a = torch.tanh(params[..., 0]).square()
        bound = y.abs()
        x = solve_increasing(lambda x: (x + a * x**3, 1 + 3 * a * x * x), y, -bound, bound, "Cubic")
        return x, -torch.log1p(3 * a * x * x)


@pytest.mark.parametrize("scheme", [Elementwise, Coupling, Autoregressive])
def test_13_a_numeric_map_obeys_all_laws(scheme):
    check_transform(scheme(Cubic(), 3))
