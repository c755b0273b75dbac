"""What a part of a chain makes must be what the next part takes."""

import pytest
import torch
from pyro.distributions import constraints

from pyro_nf import transforms as t
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.univariate.spline import RationalQuadratic


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([t.Tanh(), t.Sigmoid().inv], ["part 0, Tanh", "(-1, 1)", "part 1, Inverse", "(0, 1)"]),
        ([t.Softplus(), t.Sigmoid().inv], ["Softplus", "(0, inf)", "(0, 1)"]),
        ([t.LULinear(2), t.Exp().inv], ["LULinear", "the real numbers", "(0, inf)"]),
        ([t.Sigmoid(), t.LeakyReLU(), t.Tanh().inv], ["part 1", "LeakyReLU", "part 2"]),
        ([t.Chain([t.Exp(), t.LULinear(2)]), t.Softplus().inv], ["part 0, Chain", "Inverse"]),
        (
            [t.Tanh(), t.Elementwise(RationalQuadratic(4, interval=(0.0, 1.0)), 2)],
            ["Tanh", "Elementwise", "(0, 1)"],
        ),
    ],
)
def test_12_a_chain_names_both_neighbours_that_do_not_fit(parts, words):
    with pytest.raises(ValueError, match=r"^Chain: part") as error:
        t.Chain(parts)
    assert all(word in str(error.value) for word in words)


def test_12_what_lies_inside_fits():
    for parts in (
        [t.Sigmoid(), t.Exp().inv],  # (0, 1) lies in (0, inf)
        [t.Tanh(), t.LULinear(2)],
        [t.Sigmoid(), t.Tanh().inv],
        [t.Exp(), t.Softplus().inv, t.LULinear(2), t.Sigmoid()],
        [t.Sigmoid(), t.Elementwise(RationalQuadratic(4, interval=(0.0, 1.0)), 2)],
    ):
        chain = t.Chain(parts).double()
        x = torch.randn(5, 2, dtype=torch.float64)
        y, ladj = chain.forward_and_ladj(x)
        back, inverse_ladj = chain.inverse_and_ladj(y)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(inverse_ladj, -ladj)


class Uniform(Base):
    def forward(self, batch_shape=()):
        low, high = torch.zeros(self.input_dim), torch.ones(self.input_dim)
        made = torch.distributions.Uniform(low, high)
        return torch.distributions.Independent(made.expand((*batch_shape, self.input_dim)), 1)


def test_12_a_flow_needs_a_base_that_its_transform_takes():
    with pytest.raises(ValueError, match=r"^Flow: the base DiagonalNormal draws from the real"):
        Flow(t.Sigmoid().inv, DiagonalNormal(2))
    assert Uniform(2)().support.event_dim == 1
    assert Flow(t.Sigmoid().inv, Uniform(2)).transform.domain.event_dim == 1
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        Flow(t.Elementwise(RationalQuadratic(4, interval=(0.2, 0.8)), 2), Uniform(2))


class Vectors(t.FlowTransform):
    """The identity of matrices: events of two dimensions."""

    domain = codomain = constraints.independent(constraints.real, 2)

    def __init__(self):
        super().__init__(None)

    def _forward_and_ladj(self, x, context):
        return x, x.new_zeros(x.shape[:-2])

    _inverse_and_ladj = _forward_and_ladj


def test_12_events_of_other_dimensions_do_not_fit():
    with pytest.raises(ValueError, match=r"vectors in the real numbers.*2-D events"):
        t.Chain([t.LULinear(2), Vectors()])
