"""The solve with a masked network: against D plain passes, and its gradient against autograd's."""

import copy

import pytest
import torch
from torch import nn

from pyro_nf.nn import triangular
from pyro_nf.nn.masked import MaskedNet
from pyro_nf.nn.triangular import solve, solve_transposed
from pyro_nf.ops.gradients import derivative
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.sinh_arcsinh import SinhArcsinh
from pyro_nf.univariate.spline import RationalQuadratic

MAPS = {"affine": Affine(), "spline": RationalQuadratic(5, 1.5), "sinh": SinhArcsinh()}
NETS = {
    "plain": {"hidden_dims": (24, 16)},
    "residual": {"hidden_dims": (24, 24, 24), "residual": True},
    "linear": {"hidden_dims": ()},
    "narrow": {"hidden_dims": (3,)},
}


def random_net(input_dim, num_params, context_dim=0, activation=nn.Tanh, **options):
    net = MaskedNet(input_dim, num_params, context_dim, activation=activation, **options).double()
    # Weak enough that the last of many coordinates does not explode.
    scale = 0.6 / (1 + input_dim / 8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=scale)
    return net


def plain(net, g, v, context):
    """D passes, each for one more coordinate."""
    z = torch.zeros_like(v)
    for i in range(v.shape[-1]):
        z_i = g(v, net(z, context))[0][..., i : i + 1]
        z = torch.cat((z[..., :i], z_i, z[..., i + 1 :]), -1)
    z, ladj = g(v, net(z, context))
    return z, ladj.sum(-1)


@pytest.fixture(params=["substitution", "passes"])
def way(request, monkeypatch):
    """Runs a test once with the substitution alone, once with passes wherever they may be tried."""
    few = 0 if request.param == "substitution" else 10_000
    monkeypatch.setattr(triangular, "FEW_ROWS", few)
    monkeypatch.setattr(triangular, "WEIGHTS_PER_GROUP", 10**9)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("input_dim", [1, 2, 5, 33, 70])
@pytest.mark.usefixtures("way")
def test_equals_plain_passes(input_dim, name):
    univariate = MAPS[name]
    for options in NETS.values():
        for context_dim in (0, 3):
            net = random_net(input_dim, univariate.num_params, context_dim, **options)
            v = torch.randn(4, 2, input_dim).double()
            context = torch.randn(2, 3).double() if context_dim else None
            for g in (univariate.forward_and_ladj, univariate.inverse_and_ladj):
                with torch.no_grad():
                    expected = plain(net, g, v, context)
                    found = solve(net, g, v, context)
                with_gradient = solve(net, g, v, context)
                for a, b, c in zip(expected, found, with_gradient, strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
                    torch.testing.assert_close(c, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_shape", [(), (1,), (4,), (2, 3), (0,), (40,)])
def test_batch_shapes_and_memory(batch_shape):
    net = random_net(5, 2, hidden_dims=(8,))
    v = torch.randn(*batch_shape, 5).double()
    before = v.clone()
    with torch.no_grad():
        z, ladj = solve(net, Affine().forward_and_ladj, v, None)
    assert z.shape == v.shape and ladj.shape == v.shape[:-1]
    assert torch.equal(v, before)
    assert not z.is_inference() and not ladj.is_inference()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU, nn.ELU])
@pytest.mark.parametrize("residual", [False, True])
def test_activations(activation, residual):
    net = random_net(20, 2, hidden_dims=(24, 24), activation=activation, residual=residual)
    v = torch.randn(50, 20).double()
    with torch.no_grad():
        expected, _ = plain(net, Affine().forward_and_ladj, v, None)
        found, _ = solve(net, Affine().forward_and_ladj, v, None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float, 5e-5), (torch.double, 1e-12)])
def test_round_trip_and_rounding(dtype, bound):
    exact_net = random_net(64, 2, hidden_dims=(128, 128), activation=nn.ReLU)
    v = torch.randn(500, 64).double()
    g, back = Affine().forward_and_ladj, Affine().inverse_and_ladj
    with torch.no_grad():
        exact, _ = solve(exact_net, g, v, None)
        net, v = copy.deepcopy(exact_net).to(dtype), v.to(dtype)
        ours, _ = solve(net, g, v, None)
        theirs, _ = plain(net, g, v, None)
        assert (back(ours, net(ours))[0] - v).abs().max() < bound
    # No farther from the exact solution than D passes are.
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + bound / 100


def test_bad_rows_do_not_spoil_their_neighbours():
    net = random_net(20, 2, hidden_dims=(24,))
    v = torch.randn(50, 20).double()
    with torch.no_grad():
        expected, _ = solve(net, Affine().forward_and_ladj, v, None)
        v[3, 7] = float("nan")
        found, _ = solve(net, Affine().forward_and_ladj, v, None)
    assert found[3].isnan().any()
    keep = torch.arange(50) != 3
    assert torch.equal(found[keep], expected[keep])


def test_passes_that_do_not_settle_are_not_believed(monkeypatch):
    net = random_net(40, 2, hidden_dims=(64,))
    nn.init.normal_(net.layers[-1].weight, std=1.0)  # far from a contraction
    v = torch.randn(2, 40).double()
    tried = []
    by_passes = triangular._by_passes
    monkeypatch.setattr(
        triangular, "_by_passes", lambda *args: tried.append(by_passes(*args)) or tried[-1]
    )
    with torch.no_grad():
        z, _ = solve(net, Affine().forward_and_ladj, v, None)
        expected, _ = plain(net, Affine().forward_and_ladj, v, None)
    assert tried == [False]
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("input_dim", [1, 5, 21])
def test_gradient_equals_autograd_through_plain_passes(input_dim, kind, name):
    univariate = MAPS[name]
    net = random_net(input_dim, univariate.num_params, 3, **NETS[kind])
    v = torch.randn(2, 4, input_dim).double().requires_grad_()
    context = torch.randn(4, 3).double().requires_grad_()
    inputs = (v, context, *net.parameters())
    for g in (univariate.forward_and_ladj, univariate.inverse_and_ladj):
        outputs = solve(net, g, v, context), plain(net, g, v, context)
        weighting = [torch.randn_like(t) for t in outputs[0]]
        for used in (slice(0, 1), slice(1, 2), slice(0, 2)):  # z alone, the ladj alone, both
            ours, theirs = (
                torch.autograd.grad(
                    out[used],
                    inputs,
                    weighting[used],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for out in outputs
            )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.ELU()], ids=repr
)
def test_derivative_of_an_activation(activation):
    s = torch.randn(100).double().requires_grad_()
    before = s.detach().clone()
    (wanted,) = torch.autograd.grad(activation(s.clone()).sum(), s)
    found = derivative(activation, s)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted)
    assert torch.equal(s, before)


@pytest.mark.parametrize("entries", [1, 100, 10**6])  # no Jacobians, of some groups, of all
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("input_dim", [1, 5, 21])
def test_transposed_solve_equals_a_dense_one(input_dim, kind, entries, monkeypatch):
    monkeypatch.setattr(triangular, "JACOBIAN_ENTRIES", entries)
    if entries == 100:
        monkeypatch.setattr(triangular, "FEWEST_JACOBIAN_GROUPS", 1)
    num_params = 3
    net = random_net(input_dim, num_params, 2, **NETS[kind])
    for batch_shape in ((), (0,), (2, 1), (70,)):  # fewer rows than parameters, and more
        x, context = torch.randn(*batch_shape, input_dim), torch.randn(*batch_shape, 2)
        x, context = x.double().requires_grad_(), context.double()
        G, tau = torch.randn(2, *batch_shape, input_dim, num_params).double()
        sums = net.sums(x, context)
        found = solve_transposed(net, sums, G, tau)
        assert not found.requires_grad and not found.is_inference()
        theta_bar = tau + G * found.unsqueeze(-1)
        theta = sums[-1].T.reshape(theta_bar.shape)
        (wanted,) = torch.autograd.grad(theta, x, theta_bar)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("name", ["affine", "spline"])
def test_gradcheck(name, kind):
    univariate = MAPS[name]
    net = random_net(10, univariate.num_params, 2, **NETS[kind])
    v = torch.randn(3, 10).double().requires_grad_()
    context = torch.randn(3, 2).double().requires_grad_()
    for g in (univariate.forward_and_ladj, univariate.inverse_and_ladj):
        assert torch.autograd.gradcheck(lambda v, c, g=g: solve(net, g, v, c), (v, context))


def test_second_derivatives_raise():
    net, v = random_net(5, 2, hidden_dims=(8,)), torch.randn(3, 5).double().requires_grad_()
    z, _ = solve(net, Affine().forward_and_ladj, v, None)
    (first,) = torch.autograd.grad(z.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_no_graph_where_none_is_wanted():
    net, v = random_net(5, 2, hidden_dims=(8,)), torch.randn(3, 5).double()
    with torch.no_grad():
        assert not solve(net, Affine().forward_and_ladj, v, None)[0].requires_grad
    passes = []
    net.layers[0].register_forward_hook(lambda *args: passes.append(1))
    net.requires_grad_(False)
    assert not solve(net, Affine().forward_and_ladj, v, None)[0].requires_grad
    assert not passes


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", MAPS)
def test_vmap_over_inputs_and_contexts(name, kind):
    univariate = MAPS[name]
    net = random_net(12, univariate.num_params, 2, **NETS[kind])
    v, context = torch.randn(6, 12).double(), torch.randn(6, 2).double()

    def one(v, context):
        return solve(net, univariate.forward_and_ladj, v, context)

    def loss(v, context):
        z, ladj = one(v, context)
        return z.square().sum() + ladj

    expected = solve(net, univariate.forward_and_ladj, v, context)
    for dims in ((0, 0), (0, None), (None, 0)):
        args = [t if dim == 0 else t[0] for t, dim in zip((v, context), dims, strict=True)]
        for a, b in zip(
            torch.func.vmap(one, dims)(*args),
            one(*torch.broadcast_tensors(args[0], v)[:1], args[1].expand(6, 2)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    v.requires_grad_(), context.requires_grad_()
    z, ladj = solve(net, univariate.forward_and_ladj, v, context)
    expected = torch.autograd.grad(z.square().sum() + ladj.sum(), (v, context))
    found = torch.func.vmap(torch.func.grad(loss, (0, 1)))(v.detach(), context.detach())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_vmap_over_weights_raises():
    net = random_net(5, 2, hidden_dims=(8,))
    stacked = {name: torch.stack((p, p)) for name, p in net.named_parameters()}

    def run(parameters):
        class Call(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, v):
                return solve(self.net, Affine().forward_and_ladj, v, None)

        named = {f"net.{name}": p for name, p in parameters.items()}
        return torch.func.functional_call(Call(), named, torch.zeros(3, 5).double())

    with pytest.raises(NotImplementedError, match="vmapped over its weights"):
        torch.func.vmap(run)(stacked)


@pytest.mark.parametrize("input_dim", [5, 40])
def test_many_gradients_at_once(input_dim):
    net = random_net(input_dim, 2, hidden_dims=(24, 16))
    v = torch.randn(7, input_dim).double().requires_grad_()
    z, _ = solve(net, Affine().inverse_and_ladj, v, None)
    grads = torch.randn(3, 7, input_dim).double()
    (found,) = torch.autograd.grad(z, v, grads, retain_graph=True, is_grads_batched=True)
    for got, grad in zip(found, grads, strict=True):
        (wanted,) = torch.autograd.grad(z, v, grad, retain_graph=True)
        torch.testing.assert_close(got, wanted)
