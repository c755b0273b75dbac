"""A log density need not be of a Pyro model: the contract is enough to search and to fit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nf.flows.flow import Flow
from pyro_nf.model.density import LogDensity
from pyro_nf.model.evaluators import Batched, Loop, RecordedVmap, Vmap
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered, Rows
from pyro_nf.search.effort import Effort
from pyro_nf.search.maxima import find_maxima
from pyro_nf.search.mixtures import separated_mixture
from pyro_nf.search.start import laplace_start
from pyro_nf.train.budget import Budget, OutOfTime
from pyro_nf.transforms.affine import LowerAffine
from pyro_nf.vi.objectives import ELBO

F64 = torch.float64


class Function(LogDensity):
    """A function of a vector as a log density."""

    def __init__(self, function, dim: int) -> None:
        super().__init__()
        self.function, self.init_loc = function, torch.zeros(dim, dtype=F64)

    def evaluate(self, z: Tensor) -> Tensor:
        return self.function(z)

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        return {"z": z}

    @property
    def labels(self) -> list[str]:
        return [f"z[{i}]" for i in range(self.latent_dim)]


CENTRE = torch.tensor([4.0, -1.0], dtype=F64)


def pieces(z: Tensor) -> Tensor:
    """A third of a normal at CENTRE with sds of 1/2, and two thirds of one at its mirror image."""
    norm = math.log(2 * math.pi) - 2 * math.log(2.0)
    one = math.log(1 / 3) - 2 * (z - CENTRE).square().sum(-1)
    other = math.log(2 / 3) - 2 * (z + CENTRE).square().sum(-1)
    return torch.logaddexp(one, other) - norm


def quartic(z: Tensor) -> Tensor:
    return -(z**4).sum(-1) - z.prod(-1).square() + z.sin().sum(-1)


def root(z: Tensor) -> Tensor:
    """NaN where the first coordinate is negative."""
    return z[..., 0].sqrt() - z.square().sum(-1)


def test_values_slopes_and_curvature_are_autograds() -> None:
    density, z = Function(quartic, 3), torch.randn(5, 3, dtype=F64)
    value, grad = density.value_and_grad(z)
    leaf = z.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(quartic(leaf).sum(), leaf)
    torch.testing.assert_close(value, quartic(z))
    torch.testing.assert_close(grad, wanted)
    for zi, hessian in zip(z, density.hessian(z), strict=True):
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(quartic, zi))
    assert density(z.reshape(5, 1, 3)).shape == (5, 1)


def test_a_recording_is_of_one_size_and_equal() -> None:
    density, z = Function(quartic, 3), torch.randn(5, 3, dtype=F64)
    before = density.value_and_grad(z)
    assert density.record(5, max_seconds=None, if_faster=False)
    assert density.recordings.find(z) is not None
    assert density.recordings.find(z[:4]) is None
    torch.testing.assert_close(density.value_and_grad(z), before)
    density.is_random = True
    assert not density.record(4, max_seconds=None, if_faster=False)


def test_what_is_not_finite_spares_the_rest() -> None:
    density, z = Function(root, 2), torch.tensor([[0.25, 1.0], [-1.0, 0.0]], dtype=F64)
    value, grad = density.value_and_grad(z)
    assert value.tolist() == [0.5 - 0.0625 - 1.0, -math.inf]
    assert grad.tolist() == [[1.0 - 0.5, -2.0], [0.0, 0.0]]
    leaf = z.clone().requires_grad_()
    density.log_prob(leaf)[0].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, grad)


def test_a_search_finds_both_pieces_of_a_function() -> None:
    density = Function(pieces, 2)
    start = laplace_start(density, count_starts=64, count_climbers=8, max_seconds=None)
    assert start.elbo == pytest.approx(math.log(2 / 3), abs=0.05)
    points = 5 * torch.randn(64, 2, dtype=F64)
    found = find_maxima(density, points, Effort(64)).found
    assert [round(m.log_mass, 3) for m in found] == [round(math.log(p / 3), 3) for p in (2, 1)]
    mixture = separated_mixture(density, start, max_seconds=None)
    assert mixture is not None
    with torch.no_grad():
        near = mixture().log_prob(torch.stack([CENTRE, -CENTRE]))
    torch.testing.assert_close(near, pieces(torch.stack([CENTRE, -CENTRE])), atol=0.4, rtol=0)


def test_an_objective_takes_a_function() -> None:
    torch.manual_seed(0)
    flow = Flow(LowerAffine(2)).double()
    density = Function(lambda z: -0.5 * z.square().sum(-1) - math.log(2 * math.pi), 2)
    estimate = ELBO()(flow, density, torch.randn(64, 2, dtype=F64))
    assert estimate.loss.item() == pytest.approx(0.0, abs=1e-12)


def test_a_metered_function_counts_its_rows() -> None:
    rows = Rows()
    meter = Metered(Function(quartic, 3), Budget(max_seconds=10.0, clock=rows), rows)
    z = torch.randn(6, 3, dtype=F64)
    torch.testing.assert_close(meter.evaluate(z), quartic(z))
    assert meter.budget.seconds_left == 4.0
    with pytest.raises(OutOfTime):
        meter.log_prob(z)
    assert meter.record(6, max_seconds=None, if_faster=False)
    assert meter.price("gradient", 6) == 0.0
    assert meter.joint.recordings.has(6, F64)


def test_all_ways_to_evaluate_a_model_agree() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=F64), 2.0))
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Gamma(torch.ones((), dtype=F64), loc.exp()))
            pyro.sample("y", dist.Poisson(x), obs=torch.tensor([0.0, 1.0, 5.0], dtype=F64))

    joint = LogJoint(model)
    z = joint.init_loc + torch.randn(4, 4, dtype=F64)
    x = z[:, 1:].exp()
    one = torch.ones((), dtype=F64)
    wanted = dist.Normal(0 * one, 2.0).log_prob(z[:, 0]) + z[:, 1:].sum(-1)
    wanted = wanted + dist.Gamma(one, z[:, :1].exp()).log_prob(x).sum(-1)
    wanted = wanted + dist.Poisson(x).log_prob(torch.tensor([0.0, 1.0, 5.0], dtype=F64)).sum(-1)
    for way in (Batched, Vmap, RecordedVmap, Loop):
        evaluator = joint.evaluator.of(joint.run) if way is Batched else way(joint.run)
        assert type(evaluator) is way
        torch.testing.assert_close(evaluator.robust(z), wanted)
        assert evaluator.disagreement(z, wanted, torch.get_rng_state()) == ""
        assert "single run" in evaluator.disagreement(z, wanted + 1, torch.get_rng_state())
