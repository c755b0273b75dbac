"""Events of any shape: what a transform says of them, chains, couplings by axis and by mask."""

import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_nf import transforms as t
from pyro_nf.flows.base import DiagonalNormal
from pyro_nf.nn.conv import ConvNet
from pyro_nf.nn.mlp import MLP
from pyro_nf.testing import check_transform, randomize
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.fixed import Exp
from tests.cases import BOARD, IMAGE, Flatten, Squeeze, small_conv


def image_chain() -> t.Chain:
    return t.Chain(
        [
            Squeeze(),
            t.Coupling(Affine(), event_shape=(4, 2, 2), axis=0, conditioner=small_conv),
            Squeeze().inv,
            Flatten((1, 4, 4)),
        ]
    )


def test_shapes_of_whole_batches():
    chain = image_chain()
    assert chain.event_shape == (1, 4, 4) and chain.output_shape == (16,)
    assert chain.forward_shape((7, 5, 1, 4, 4)) == (7, 5, 16)
    assert chain.inverse_shape((7, 5, 16)) == (7, 5, 1, 4, 4)
    assert chain.inv.forward_shape((7, 16)) == (7, 1, 4, 4)
    assert (chain.domain.event_dim, chain.codomain.event_dim) == (3, 1)
    assert (chain.inv.domain.event_dim, chain.inv.codomain.event_dim) == (1, 3)
    assert chain.inv.input_dim == 16 and chain.input_dim is None
    assert Squeeze().event_shape is None and Squeeze().forward_shape((2, 6, 4)) == (8, 3, 2)


def test_a_vector_is_as_it_was():
    layer = t.LULinear(3)
    assert layer.input_dim == 3 and layer.event_shape == (3,)
    assert layer.domain is constraints.real_vector is layer.codomain
    assert layer.forward_shape((5, 3)) == (5, 3)
    assert t.Tanh().input_dim is None and t.Tanh().event_shape is None
    assert t.Coupling(Affine(), event_shape=(4,)).input_dim == 4


def test_a_space_of_ones_own_stays():
    class Squares(t.FlowTransform):
        """Squares of positive numbers, which the class says."""

        domain = codomain = constraints.independent(constraints.positive, 2)

        def _forward_and_ladj(self, x, context):
            return x.square(), (2 * x).log().sum((-1, -2))

        def _inverse_and_ladj(self, y, context):
            return y.sqrt(), -(2 * y.sqrt()).log().sum((-1, -2))

    squares = Squares(event_shape=(2, 3))
    assert squares.domain is Squares.domain and squares.inv.codomain is Squares.domain
    x = torch.rand(5, 2, 3) + 0.1
    torch.testing.assert_close(squares.inv(squares(x)), x)
    with pytest.raises(
        ValueError, match="makes 2-D events in the real numbers, but part 1, Squares"
    ):
        t.Chain([t.Elementwise(Affine(), event_shape=(2, 3)), squares])


@pytest.mark.parametrize("way", ["forward_shape", "inverse_shape"])
def test_a_shape_that_does_not_fit_is_refused(way):
    with pytest.raises(ValueError, match=r"LULinear: shape must end in event_shape = \(3,\), got"):
        getattr(t.LULinear(3), way)((5, 4))
    with pytest.raises(ValueError, match=r"shape must have at least 3 dimension\(s\)"):
        getattr(t.Sigmoid(event_dim=3), way)((4, 4))


def test_both_or_no_sizes_are_refused():
    with pytest.raises(ValueError, match=r"input_dim = 3 and event_shape = \(3,\)"):
        t.Coupling(Affine(), 3, event_shape=(3,))
    for scheme in (t.Coupling, t.Elementwise, t.Autoregressive):
        with pytest.raises(ValueError, match="or give event_shape"):
            scheme(Affine())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([t.LULinear(3), t.LULinear(4)], ["part 0, LULinear", "(3,)", "part 1, LULinear", "(4,)"]),
        ([t.LULinear(3), t.Tanh(), t.ActNorm(4)], ["part 1, Tanh", "part 2, ActNorm", "(4,)"]),
        (
            [Flatten((1, 4, 4)), t.ActNorm(15)],
            ["part 0, Flatten", "(16,)", "part 1, ActNorm", "(15,)"],
        ),
        (
            [Squeeze(), t.Elementwise(Affine(), event_shape=(4, 2, 2)), Flatten((1, 4, 4))],
            ["part 1, Elementwise", "(4, 2, 2)", "part 2, Flatten", "(1, 4, 4)"],
        ),
        ([Squeeze(), t.ActNorm(4)], ["part 0, Squeeze", "3-D events", "part 1, ActNorm"]),
    ],
)
def test_a_chain_names_neighbours_of_other_shapes(parts, words):
    with pytest.raises(ValueError, match=r"^Chain: part") as error:
        t.Chain(parts)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_chain_knows_its_shape_by_any_of_its_parts():
    chain = t.Chain([Squeeze(), t.Sigmoid(event_dim=3), Squeeze().inv, Flatten((2, 6, 4))])
    assert chain.event_shape == (2, 6, 4) and chain.output_shape == (48,)
    free = t.Chain([Squeeze(), Squeeze()])
    assert free.event_shape is None and free.forward_shape((9, 1, 8, 4)) == (9, 16, 2, 1)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_part_along_an_axis_passes(axis, swap):
    layer = randomize(
        t.Coupling(Affine(), event_shape=(3, 4, 5), axis=axis, swap=swap, hidden_dims=(8,))
    )
    x = torch.randn(7, 3, 4, 5)
    y, size = layer(x), (3, 4, 5)[axis]
    at = axis if axis < 0 else axis - 3
    kept = (y == x).flatten(1).all(0).reshape(3, 4, 5).movedim(at, 0).flatten(1)
    passing = torch.arange(size) < size // 2
    if swap:
        passing = torch.arange(size) >= size - size // 2
    assert torch.equal(kept.all(1), passing) and torch.equal(kept.any(1), passing)


@pytest.mark.parametrize("swap", [False, True])
def test_what_a_mask_marks_passes_and_sets_the_rest(swap):
    layer = randomize(
        t.Coupling(Affine(), event_shape=IMAGE, mask=BOARD, swap=swap, conditioner=small_conv)
    ).double()
    x = torch.randn(5, *IMAGE, dtype=torch.float64)
    passes = (~BOARD if swap else BOARD).expand(IMAGE)
    assert torch.equal((layer(x) == x).all(0), passes)
    jacobian = torch.autograd.functional.jacobian(layer, x[0]).reshape(32, 32)
    p = passes.flatten()
    assert torch.equal(jacobian[p], torch.eye(32, dtype=torch.float64)[p])
    among_mapped = jacobian[~p][:, ~p]
    assert torch.equal(among_mapped, among_mapped.diagonal().diag_embed())
    assert bool((jacobian[~p][:, p] != 0).any())


def test_the_map_of_an_image_is_that_of_its_vector():
    image = randomize(t.Elementwise(Affine(), event_shape=(2, 3)))
    vector = t.Elementwise(Affine(), 6)
    vector.net.value.data = image.net.value.data.reshape(6, 2)
    x = torch.randn(4, 2, 3)
    y, ladj = image.forward_and_ladj(x)
    wanted, wanted_ladj = vector.forward_and_ladj(x.flatten(1))
    assert torch.equal(y.flatten(1), wanted)
    torch.testing.assert_close(ladj, wanted_ladj)


def test_an_autoregressive_image_goes_by_its_flat_index():
    layer = randomize(t.Autoregressive(Affine(), event_shape=(2, 2, 2), hidden_dims=(32,))).double()
    y = torch.randn(2, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer.inv, y).reshape(8, 8)
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    assert bool((jacobian.tril(-1) != 0).any(1)[1:].all())


def test_half_of_an_image_leaves_its_space():
    layer = t.Coupling(Exp(), event_shape=(3, 2, 2), axis=0)
    x = torch.randn(5, 3, 2, 2)
    y = layer(x)
    assert torch.equal(y[:, :1], x[:, :1])
    torch.testing.assert_close(y[:, 1:], x[:, 1:].exp())
    assert bool(layer.codomain.check(y).all()) and not bool(layer.codomain.check(-y).any())
    check_transform(layer)
    with pytest.raises(ValueError, match="part 1, Inverse, takes"):
        t.Chain([t.Elementwise(Affine(), event_shape=(3, 2, 2)), layer.inv])
    assert t.Chain([layer, layer.inv]).event_shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"axis": 3}, ValueError, r"axis must be an integer from -3 to 2"),
        ({"axis": 0, "mask": BOARD}, ValueError, "both axis and mask"),
        ({"mask": BOARD.int()}, TypeError, r"mask must be a tensor of True.*mask.bool\(\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"\(3,\).*event_shape = \(2, 4, 4"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "32 of 32 that pass"),
        ({"mask": BOARD, "univariate": Exp()}, ValueError, "Exp maps the real numbers onto"),
    ],
)
def test_what_cannot_split_an_event_is_refused(given, kind, words):
    with pytest.raises(kind, match=f"^Coupling: .*{words}"):
        t.Coupling(**({"univariate": Affine(), "event_shape": IMAGE} | given))


def test_wrong_events_are_named():
    layer = t.Elementwise(Affine(), event_shape=IMAGE)
    with pytest.raises(ValueError, match=r"ends in event_shape = \(2, 4, 4\), got x.shape = \(5"):
        layer(torch.zeros(5, 2, 4, 5))
    with pytest.raises(ValueError, match=r"at least 3 dimension\(s\).*the last 3 are the event"):
        layer(torch.zeros(4, 4))


# Conditioners that are given.


class Wide(nn.Module):
    def __init__(self, *sizes):
        super().__init__()

    def forward(self, x, context):
        return x.new_zeros(len(x), 7)


class Alone(Wide):
    """A Module that takes no context."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("scheme", [t.Coupling, t.Elementwise, t.Autoregressive])
@pytest.mark.parametrize(
    ("conditioner", "kind", "words"),
    [
        (nn.Linear(2, 2), TypeError, "the Module Linear itself"),
        (3, TypeError, "conditioner must be a function"),
        (lambda in_shape, out_shape: None, TypeError, "conditioner must be a function"),
        (lambda *sizes: len(sizes), TypeError, "makes a Module.*it made 4"),
        (lambda *sizes: 1 / 0, ValueError, "made no network for in_shape = .*ZeroDivisionError"),
        (Wide, ValueError, r"network Wide .* which is \(2, \d, 2\) for two rows, got .*\(2, 7\)"),
        (Alone, ValueError, r"network Alone .* does not run as net\(x, context\)"),
        (lambda *sizes: MLP(9, 3, 2), ValueError, "does not run.*input_dim is 9|made no|shape"),
    ],
)
def test_a_conditioner_that_is_none_is_refused(scheme, conditioner, kind, words):
    with pytest.raises(kind, match=f"^{scheme.__name__}: .*{words}"):
        scheme(Affine(), 3, conditioner=conditioner)


class Upto(nn.Module):
    """Parameters that see the entries up to their own, or before it."""

    def __init__(self, in_shape, num_params, diagonal):
        super().__init__()
        d = in_shape.numel()
        self.weight = nn.Parameter(torch.zeros(num_params, d, d))
        self.register_buffer("mask", torch.ones(d, d).tril(diagonal))
        self.out_shape = (*in_shape, num_params)

    def forward(self, x, context):
        theta = (self.weight * self.mask) @ x.flatten(1).T  # (P, D, N)
        return theta.movedim(-1, 0).movedim(1, -1).reshape(len(x), *self.out_shape)


def upto(diagonal):
    return lambda in_shape, out_shape, num_params, context_dim: Upto(in_shape, num_params, diagonal)


def test_only_an_autoregressive_network_conditions_by_the_coordinates_before():
    for shape in ((4,), (2, 2), (150,)):
        with pytest.raises(ValueError, match="network Upto of conditioner is not autoregressive"):
            t.Autoregressive(Affine(), event_shape=shape, conditioner=upto(0))
        with pytest.raises(ValueError, match="network MLP of conditioner is not autoregressive"):
            t.Autoregressive(Affine(), event_shape=shape, conditioner=MLP)
        assert t.Autoregressive(Affine(), event_shape=shape, conditioner=upto(-1)).is_given


@pytest.mark.parametrize("fast", ["inverse", "forward"])
def test_a_given_autoregressive_network_obeys_all_laws(fast):
    check_transform(
        t.Autoregressive(
            Affine(), event_shape=(2, 2), fast=fast, order=[2, 0, 3, 1], conditioner=upto(-1)
        )
    )


def test_a_trial_changes_nothing():
    class Normed(nn.Module):
        def __init__(self, in_shape, out_shape, num_params, context_dim):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(in_shape[0]), nn.Dropout(0.5)
            self.last = nn.Linear(in_shape[0], out_shape[0] * num_params)
            self.shape = (*out_shape, num_params)

        def forward(self, x, context):
            return self.last(self.drop(self.norm(x))).unflatten(1, self.shape)

    torch.manual_seed(0)
    layer = t.Coupling(Affine(), 4, conditioner=Normed)
    after = torch.rand(1)
    torch.manual_seed(0)
    Normed((2,), (2,), 2, 0)
    assert torch.equal(after, torch.rand(1))
    assert layer.net.training and layer.net.norm.training
    assert layer.net.norm.num_batches_tracked == 0


def test_a_given_conditioner_is_asked_for_what_the_scheme_needs():
    asked = []

    def note(*sizes):
        asked.append(tuple(sizes))
        return MLP(*sizes, hidden_dims=(4,))

    t.Coupling(Affine(), 5, 3, conditioner=note)
    t.Coupling(Affine(), None, 3, event_shape=(3, 4, 4), axis=0, swap=True, conditioner=note)
    t.Coupling(Affine(), event_shape=IMAGE, mask=BOARD, conditioner=note)
    t.Elementwise(Affine(), None, 3, event_shape=(2, 2), conditioner=note)
    assert asked == [
        ((2,), (3,), 2, 3),
        ((1, 4, 4), (2, 4, 4), 2, 3),
        (IMAGE, IMAGE, 2, 0),
        ((0,), (2, 2), 2, 3),
    ]


def test_a_given_perceptron_is_the_default():
    torch.manual_seed(0)
    given = t.Coupling(Affine(), 5, 2, conditioner=lambda *s: MLP(*s, hidden_dims=(8,)))
    ours = t.Coupling(Affine(), 5, 2, hidden_dims=(8,))
    ours.load_state_dict(randomize(given).state_dict())
    x, c = torch.randn(6, 1, 5), torch.randn(3, 2)
    for got, wanted in zip(given.forward_and_ladj(x, c), ours.forward_and_ladj(x, c), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_base_of_images_has_their_shape():
    base = DiagonalNormal((2, 3), loc=torch.arange(6.0).reshape(2, 3), scale=2.0)
    d = base((4,))
    assert (d.batch_shape, d.event_shape, base.input_dim) == ((4,), (2, 3), None)
    x = torch.randn(4, 2, 3)
    wanted = torch.distributions.Normal(base.loc, base.scale).log_prob(x).sum((-1, -2))
    torch.testing.assert_close(d.log_prob(x), wanted)
    assert d.support.event_dim == 2 and base(()).sample((5,)).shape == (5, 2, 3)


def test_convolutions_condition_a_whole_layer():
    layer = t.Coupling(Affine(), event_shape=(2, 6, 6), axis=0, conditioner=ConvNet)
    assert torch.equal(layer(torch.ones(3, 2, 6, 6)), torch.ones(3, 2, 6, 6))  # the identity
