"""The masked network: who sees whom, and the triangular product."""

import pytest
import torch
from torch import nn

from pyro_nf.nn import masked
from pyro_nf.nn.masked import MaskedLinear, MaskedNet
from pyro_nf.ops.layout import features_first

SHAPES = [
    (1, (8,)),
    (2, (3, 3)),
    (5, (16, 16)),
    (5, ()),
    (33, (7,)),
    (70, (256, 256)),
    (9, (4, 40, 6)),
]


def random_net(input_dim, num_params, context_dim=0, scale=0.5, **options):
    net = MaskedNet(input_dim, num_params, context_dim, **options).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=scale)
    return net


def jacobian(function, value):
    return torch.autograd.functional.jacobian(function, value)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("input_dim", "hidden_dims"), SHAPES)
def test_parameters_see_all_coordinates_before_and_none_after(input_dim, hidden_dims, residual):
    net = random_net(input_dim, 2, hidden_dims=hidden_dims, residual=residual, activation=nn.Tanh)
    x = torch.randn(input_dim, dtype=torch.double)
    dependence = jacobian(net, x).abs().sum(1)
    assert dependence.triu().eq(0).all()
    if not hidden_dims or min(hidden_dims) >= input_dim - 1:
        seen = dependence.tril(-1) > 0
        assert seen.sum() == input_dim * (input_dim - 1) // 2


@pytest.mark.parametrize(("input_dim", "hidden_dims"), SHAPES)
def test_every_parameter_sees_the_context(input_dim, hidden_dims):
    net = random_net(input_dim, 2, 3, hidden_dims=hidden_dims, activation=nn.Tanh)
    x, context = torch.randn(input_dim).double(), torch.randn(3).double()
    assert jacobian(lambda c: net(x, c), context).ne(0).all()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.GELU])
def test_overwriting_activations_change_nothing(activation):
    net = random_net(5, 2, 3, hidden_dims=(16, 16), activation=activation)
    x, context = torch.randn(7, 5).double(), torch.randn(7, 3).double()

    def with_gradient():
        theta = net(x, context)
        return theta, *torch.autograd.grad(theta.square().sum(), list(net.parameters()))

    overwriting = with_gradient()
    torch.testing.assert_close(net.sums(x, context)[-1].T.reshape(7, 5, 2), overwriting[0])
    net.activation = activation()
    for one, other in zip(with_gradient(), overwriting, strict=True):
        torch.testing.assert_close(one, other)


def test_narrow_layers_still_reach_the_ends():
    net = random_net(50, 1, hidden_dims=(4,), activation=nn.Tanh)
    dependence = jacobian(net, torch.randn(50).double()).squeeze(1)
    assert dependence[-1, :-1].ne(0).all()  # the last coordinate sees all before it
    assert dependence[1, 0] != 0  # and the second sees the first


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("hidden_dims", [(), (16,), (16, 16)])
def test_starts_at_zero_with_weights_behind_it(hidden_dims, context_dim):
    net = MaskedNet(5, 2, context_dim, hidden_dims=hidden_dims)
    context = torch.randn(3) if context_dim else None
    assert net(torch.randn(7, 5), context).eq(0).all()
    if hidden_dims:
        assert all(s.std() > 0.1 for s in net.sums(torch.randn(7, 5), context)[:-1])


def test_units_start_alike_however_many_inputs_they_see():
    torch.manual_seed(0)
    net = MaskedNet(64, 1, hidden_dims=(630, 630))
    first, second, _ = net.sums(torch.randn(500, 64))
    for s in (first, second):
        spread = s.std(1)
        few, many = spread[:100].mean(), spread[-100:].mean()
        assert 0.6 < few / many < 1.7


def test_context_broadcasts_and_is_multiplied_before():
    net = random_net(4, 2, 3, hidden_dims=(8, 8))
    x, context = torch.randn(6, 5, 4).double(), torch.randn(5, 3).double()
    rows = []
    net.context.register_forward_hook(lambda module, args, out: rows.append(out.shape))
    together = net(x, context)
    assert rows == [(5, 8)]
    torch.testing.assert_close(together, net(x, context.expand(6, 5, 3)))


def test_only_weights_travel_and_only_weights_are_random():
    first, second = MaskedNet(5, 2, 3), MaskedNet(5, 2, 3)
    assert not any("mask" in name for name in first.state_dict())
    second.load_state_dict(first.state_dict())
    x, context = torch.randn(4, 5), torch.randn(4, 3)
    assert all(map(torch.equal, first.sums(x, context), second.sums(x, context)))
    assert first.double().layers[0].mask.dtype == torch.double


@pytest.fixture
def strips_always(monkeypatch):
    monkeypatch.setattr(masked, "WORTH_STRIPS", 0)


def wide_layer():
    degrees = torch.arange(256)
    layer = MaskedLinear(degrees, degrees.repeat_interleave(2), strict=True).double()
    assert layer.strips is not None
    return layer


def dense(layer, a, offset):
    return (layer.weight * layer.mask) @ a + offset


@pytest.mark.usefixtures("strips_always")
@pytest.mark.parametrize("offset_width", [None, 1, 7])
def test_strips_leave_out_zeros_only(offset_width):
    layer = wide_layer()
    a = torch.randn(256, 7, dtype=torch.double, requires_grad=True)
    inputs, offset = [a, layer.weight], None
    if offset_width is None:
        expected = dense(layer, a, layer.bias)
        inputs.append(layer.bias)
    else:
        offset = torch.randn(512, offset_width, dtype=torch.double, requires_grad=True)
        expected = dense(layer, a, offset)
        inputs.append(offset)
    found = layer(a, offset)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weighting = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, weighting),
        torch.autograd.grad(expected, inputs, weighting),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("strips_always")
def test_strips_of_an_empty_batch():
    layer, a = wide_layer(), torch.randn(256, 0, dtype=torch.double, requires_grad=True)
    layer(a).sum().backward()
    assert layer.weight.grad.eq(0).all()


def test_strips_differentiate_twice(monkeypatch):
    monkeypatch.setattr(masked, "MIN_STRIP", 2)
    monkeypatch.setattr(masked, "WORTH_STRIPS", 0)
    degrees = torch.arange(8)
    layer = MaskedLinear(degrees, degrees, strict=True).double()
    assert layer.strips is not None
    a = torch.randn(8, 3, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(layer, (a,))
    torch.autograd.gradgradcheck(layer, (a,))


@pytest.mark.usefixtures("strips_always")
# torch.compile itself instantiates the autograd.Function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_strips_under_compile():
    net = random_net(128, 2, hidden_dims=(128, 128), scale=0.1)
    assert all(layer.strips for layer in net.layers)
    x = torch.randn(5, 128).double()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.usefixtures("strips_always")
def test_strips_under_vmap():
    net = random_net(128, 1, hidden_dims=(128, 128), scale=0.1, activation=nn.Tanh)
    x = torch.randn(5, 128).double().requires_grad_()
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x))
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    per_row = torch.func.vmap(torch.func.grad(lambda row: net(row).square().sum()))(x.detach())
    torch.testing.assert_close(per_row, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim must be an integer >= 1, got 0"),
        ({"context_dim": -1}, "context_dim must be an integer >= 0, got -1"),
        ({"hidden_dims": (8, 0)}, "hidden_dims must be an integer >= 1, got 0"),
    ],
)
def test_dimensions_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedNet(**{"input_dim": 3, "num_params": 2, **options})


@pytest.fixture(params=["whole", "strips"])
def one_step(request, monkeypatch):
    """Runs a test with the gradient by hand, with weights in one piece and in strips."""
    monkeypatch.setattr(masked, "WORTH_ONE_STEP", 0)
    if request.param == "strips":
        monkeypatch.setattr(masked, "WORTH_STRIPS", 0)
        monkeypatch.setattr(masked, "MIN_STRIP", 3)


def step_by_step(net, x, context):
    """What the network computes, in the words of its docstring."""
    first, *rest = net.layers
    offset = first.bias.T if net.context is None else net.context(context) + first.bias.T
    s = x @ (first.weight * first.mask).T + offset
    for layer in rest:
        s = s.relu() @ (layer.weight * layer.mask).T + layer.bias.T
    return s.unflatten(-1, (net.input_dim, net.num_params))


@pytest.mark.usefixtures("one_step")
@pytest.mark.parametrize("hidden_dims", [(), (7,), (12, 9)])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_gradient_by_hand_is_autograds(context_dim, hidden_dims):
    net = random_net(6, 2, context_dim, hidden_dims=hidden_dims)
    assert net.rectified
    x = torch.randn(10, 6, dtype=torch.double, requires_grad=True)
    context = torch.randn(10, 3, dtype=torch.double, requires_grad=True) if context_dim else None
    inputs = [x, *net.parameters(), *([context] if context_dim else [])]
    results = []
    for compute in (net, lambda x, c: step_by_step(net, x, c)):
        theta = compute(x, context)
        weighting = torch.sin(theta.detach())
        first = torch.autograd.grad(theta, inputs, weighting, retain_graph=True)
        again = torch.autograd.grad(theta, inputs, weighting, retain_graph=True)
        loss = (theta.square() * weighting).sum()
        curved = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in curved), inputs)
        many = torch.stack((weighting, 2 * weighting))
        together = torch.autograd.grad(compute(x, context), inputs, many, is_grads_batched=True)
        results.append((theta, *first, *again, *curved, *second, *together))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("one_step")
def test_gradient_by_hand_of_what_is_asked_for():
    net = random_net(6, 2, hidden_dims=(12, 9))
    x = torch.randn(10, 6).double()
    net.layers[0].weight.requires_grad_(False)
    net.layers[1].bias.requires_grad_(False)
    wanted = [p for p in net.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(net(x).square().sum(), wanted),
        torch.autograd.grad(step_by_step(net, x, None).square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    net.requires_grad_(False)
    assert not net(x).requires_grad


# torch's own forward-mode derivatives script something when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.usefixtures("one_step")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_formula_where_no_gradient_by_hand_can_be(activation):
    net = random_net(6, 2, hidden_dims=(12, 9), activation=activation)
    x, direction = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    J = jacobian(lambda x: net(x).sum(0), x)
    expected = torch.einsum("dpni,ni->ndp", J, direction)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        slope = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(torch.func.jvp(net, (x,), (direction,))[1], expected)
    each = torch.func.vmap(torch.func.jacrev(net))(x)
    torch.testing.assert_close(torch.einsum("ndpi,ni->ndp", each, direction), expected)


@pytest.mark.usefixtures("one_step")
def test_a_changed_weight_is_noticed_by_backward():
    net = random_net(6, 2, hidden_dims=(12, 9))
    theta = net(torch.randn(4, 6).double())
    with torch.no_grad():
        net.layers[1].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theta.sum().backward()


@pytest.mark.parametrize("batch_shape", [(), (1,), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_features_first(width, batch_shape):
    t = torch.randn(*batch_shape, width)
    turned = features_first(t)
    assert turned.shape == (width, t.shape[:-1].numel())
    assert torch.equal(turned.T.reshape(t.shape), t)
    assert features_first(turned.T).data_ptr() == turned.data_ptr()
