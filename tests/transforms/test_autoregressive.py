"""What is particular to autoregressive transforms: the order, the cost, the numeric map."""

import pytest
import torch
from torch import Tensor, nn

from pyro_nf.ops.roots import solve_increasing
from pyro_nf.testing import randomize, scores_are_pushed
from pyro_nf.transforms.autoregressive import (
    Autoregressive,
    affine_autoregressive,
    spline_autoregressive,
)
from pyro_nf.transforms.elementwise import Elementwise
from pyro_nf.univariate.affine import Additive, Affine
from pyro_nf.univariate.base import UnivariateMap
from pyro_nf.univariate.sinh_arcsinh import SinhArcsinh
from pyro_nf.univariate.spline import RationalQuadratic

ORDERS = {
    "natural": ({}, [0, 1, 2, 3, 4]),
    "reverse": ({"reverse": True}, [4, 3, 2, 1, 0]),
    "given": ({"order": [2, 0, 4, 1, 3]}, [2, 0, 4, 1, 3]),
    "given and turned round": (
        {"order": torch.tensor([2, 0, 4, 1, 3]), "reverse": True},
        [3, 1, 4, 0, 2],
    ),
}


class Cubic(UnivariateMap):
    """y = t + x + e^a x^3, to be inverted numerically."""

    num_params = 2
    exact_inverse = False

    def forward_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t, a = params.unbind(-1)
        cube = torch.tanh(a).exp()
        return t + x + cube * x**3, torch.log1p(3 * cube * x * x)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t, a = params.unbind(-1)
        cube, v = torch.tanh(a).exp(), y - t

        def f(x: Tensor) -> tuple[Tensor, Tensor]:
            return x + cube * x**3, 1 + 3 * cube * x * x

        bound = v.detach().abs() + 1
        x = solve_increasing(f, v, -bound, bound, "Cubic")
        return x, -torch.log1p(3 * cube * x * x)


def make(univariate=None, input_dim=5, context_dim=0, **options):
    options = {"hidden_dims": (16, 16), "activation": nn.SiLU, **options}
    univariate = univariate or Affine()
    return randomize(Autoregressive(univariate, input_dim, context_dim, **options)).double()


@pytest.mark.parametrize("fast", ["inverse", "forward"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_dependence(name, fast):
    options, order = ORDERS[name]
    transform = make(fast=fast, **options)
    x = torch.randn(5).double()
    jacobian = torch.autograd.functional.jacobian(transform, x)[order][:, order]
    assert jacobian.triu(1).eq(0).all()
    assert (jacobian.tril(-1) != 0).sum() == 10
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x)
    torch.testing.assert_close(jacobian.diagonal().log().sum(), ladj)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_the_two_kinds_are_each_others_inverse(context_dim):
    maf = make(context_dim=context_dim, fast="inverse")
    iaf = make(context_dim=context_dim, fast="forward")
    iaf.load_state_dict(maf.state_dict())
    x = torch.randn(7, 5).double()
    context = torch.randn(7, 3).double() if context_dim else None

    class Swapped(Affine):
        def forward_and_ladj(self, x, params):
            return super().inverse_and_ladj(x, params)

        def inverse_and_ladj(self, y, params):
            return super().forward_and_ladj(y, params)

    maf.univariate = Swapped()  # y_i = (x_i - t(y_<i)) / s(y_<i): what an IAF inverts
    for a, b in zip(
        maf.inverse_and_ladj(x, context), iaf.forward_and_ladj(x, context), strict=True
    ):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        maf.forward_and_ladj(x, context), iaf.inverse_and_ladj(x, context), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fast", ["inverse", "forward"])
def test_fast_direction_is_one_pass(fast):
    transform = make(fast=fast)
    passes = []
    transform.net.register_forward_hook(lambda *args: passes.append(1))
    one = transform.forward_and_ladj if fast == "forward" else transform.inverse_and_ladj
    one(torch.randn(9, 5).double())
    assert len(passes) == 1


@pytest.mark.parametrize("fast", ["inverse", "forward"])
def test_numeric_map_inverts_and_learns(fast):
    transform = make(Cubic(), fast=fast, context_dim=2)
    assert transform.inverse_kind == "numeric"
    x, context = torch.randn(6, 5).double(), torch.randn(6, 2).double()
    y, ladj = transform.forward_and_ladj(x, context)
    back, back_ladj = transform.inverse_and_ladj(y, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-8)
    for direction, value in (
        (transform.forward_and_ladj, x),
        (transform.inverse_and_ladj, y.detach()),
    ):
        assert torch.autograd.gradcheck(
            direction, (value.clone().requires_grad_(), context.clone().requires_grad_())
        )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "univariate", [Affine(), RationalQuadratic(4, 2.0)], ids=["affine", "spline"]
)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_22_the_slow_direction_can_be_traced(univariate: UnivariateMap, context_dim: int) -> None:
    """What torch.jit.trace recorded at one point holds at others, the gradient included."""
    slow = Autoregressive(univariate, 4, context_dim, hidden_dims=(8, 8), reverse=True)
    slow = randomize(slow).double().requires_grad_(False)
    contexts = (torch.randn(3, context_dim).double(),) if context_dim else ()
    given = torch.randn(3, 4).double()
    traced = torch.jit.trace(
        lambda *inputs: slow.forward_and_ladj(*inputs), (given, *contexts), check_trace=False
    )
    x = torch.randn(3, 4).double().requires_grad_()
    # a trace has the bounds of the bins in single precision
    tolerance = 1e-10 if isinstance(univariate, Affine) else 1e-6
    for want, got in zip(slow.forward_and_ladj(x, *contexts), traced(x, *contexts), strict=True):
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance)
        a, b = (torch.autograd.grad(v.sin().sum(), x, retain_graph=True)[0] for v in (got, want))
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_what_the_fast_direction_learned_the_slow_one_draws():
    torch.manual_seed(0)
    transform = affine_autoregressive(2, hidden_dims=(32, 32))
    optimizer = torch.optim.Adam(transform.parameters(), 1e-2)
    a = torch.randn(4000)
    y = torch.stack((a, a**2 + 0.3 * torch.randn(4000)), -1)
    for _ in range(300):
        x, ladj = transform.inverse_and_ladj(y)
        loss = (x.square().sum(-1) / 2 - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = transform(torch.randn(4000, 2))
    rest = drawn[:, 1] - drawn[:, 0].square()
    assert abs(rest.mean()) < 0.1
    assert abs(rest.std() - 0.3) < 0.1


def test_order_travels():
    maker, taker = make(order=[2, 0, 4, 1, 3]), make(order=[0, 1, 2, 3, 4])
    taker.load_state_dict(maker.state_dict())
    x = torch.randn(3, 5).double()
    torch.testing.assert_close(taker(x), maker(x))


def test_factories_start_at_the_identity():
    x = torch.randn(7, 4)
    for factory in (affine_autoregressive, spline_autoregressive):
        for transform in (factory(4), factory(4, 2)):
            context = torch.randn(7, 2) if transform.context_dim else None
            torch.testing.assert_close(transform.forward_and_ladj(x, context)[0], x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": [0, 1, 1, 2, 3]}, r"order must have each of 0 to 4 once, got \[0, 1, 1, 2, 3\]"),
        ({"order": [0, 1]}, "order must have each of 0 to 4 once"),
        ({"fast": "both"}, "fast must be one of .*, got 'both'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Autoregressive(Affine(), 5, **options)


@pytest.mark.parametrize(
    "univariate",
    [Additive(), Affine(0.2), SinhArcsinh(), RationalQuadratic(5, 1.5), Cubic()],
    ids=repr,
)
def test_every_map_pushes_scores(univariate: UnivariateMap) -> None:
    for transform in (
        make(univariate, fast="forward"),
        make(univariate, context_dim=2, fast="forward", residual=True, activation=nn.Tanh),
        make(univariate, fast="inverse"),
        randomize(Elementwise(univariate, 5, 2)).double(),
    ):
        scores_are_pushed(transform)


@pytest.mark.parametrize("input_dim", [5, 40])  # by the Jacobian, by the slow inverse
def test_an_inverse_pushes_scores(input_dim: int) -> None:
    scores_are_pushed(randomize(affine_autoregressive(input_dim, 2)).double().inv)


def test_a_filled_in_context_pushes_scores_the_same_way() -> None:
    iaf = randomize(Autoregressive(Affine(), 5, 2, fast="forward")).double()
    x, context = torch.randn(2, 5).double(), torch.randn(2, 2).double()
    wanted = iaf.push_score(x, -x, context)
    for got, want in zip(iaf.condition(context).push_score(x, -x), wanted, strict=True):
        assert torch.equal(got, want)  # by the same substitution, not by a Jacobian
