"""A simplified recording computes what the recording did, with fewer operations."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_nf.ops.recording import fold_constants, simplify

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def count(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def recorded(function, x=X):
    graph = make_fx(function)(x)
    fold_constants(graph)
    return graph


def neutral(x):
    y = (x + 0) * 1 - 0.0
    return (y / 1).pow(1.0) * torch.ones_like(x) + x.new_zeros(6, 4)


def twice(x):
    return x.exp() + x.exp() * x.exp()


def reshaped(x):
    return x.view(6, 4).expand(6, 4).detach().sum(-1).expand(6)


def gradient(x):
    x = x.detach().requires_grad_()
    value = (x.cos().sum(-1) - (x**2 / 2).sum(-1)).exp()
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def written(x):
    y = x * 2
    y.masked_fill_(x < 0, 0.0)
    return y + y.exp()  # both see what was written


def broadcast(x):
    """Zeros that widen, and a sum that promotes, are no neutral elements."""
    return x[:, :1] + torch.zeros(6, 4, dtype=x.dtype), x.float() + torch.zeros(6, 4, dtype=x.dtype)


def looked_at(x):
    y = x * 2
    row = y[0]
    y.mul_(3)
    return row + y


def own_input(x):
    return x.clone().add_(0).mul_(2) + x


@pytest.mark.parametrize(
    ("function", "most"),
    [(neutral, 0), (twice, 3), (reshaped, 2), (written, 5), (own_input, 3)],
)
def test_fewer_operations(function, most):
    graph = recorded(function)
    simplify(graph, X)
    assert count(graph) <= most
    x = 3 * X.flip(0)
    torch.testing.assert_close(graph(x), function(x), rtol=0, atol=0)


def test_a_gradient_keeps_its_value():
    graph = recorded(gradient)
    before = count(graph)
    simplify(graph, X)
    assert count(graph) < before
    x = 0.5 * X.flip(0)
    for got, wanted in zip(graph(x), gradient(x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_shapes_and_dtypes_stay():
    graph = recorded(broadcast)
    simplify(graph, X)
    for got, wanted in zip(graph(X), broadcast(X), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)


def test_what_is_written_under_another_name_stays():
    graph = recorded(looked_at)
    before = count(graph)
    simplify(graph, X)
    assert count(graph) == before
    torch.testing.assert_close(graph(X), looked_at(X))
    torch.testing.assert_close(graph(X), torch.cat([6 * X[:1] + 6 * X]))
