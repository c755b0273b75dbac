"""Densities integrate to 1, with any batch of contexts."""

import pytest
import torch
from torch import Tensor

from pyro_nf import flows, transforms
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.flows.student import StudentT
from pyro_nf.testing import randomize
from tests.cases import CONTEXT_DIM, RECIPES

# Points a side of the grid: a density of width one is far smoother than its spacing.
COUNT = 400


def integral(flow: Flow, context: tuple[Tensor, ...] = ()) -> float:
    """The integral of a 2-D density, on a grid wide enough for all but its last 1e-5."""
    with torch.no_grad():
        d = flow(*context)
        draws = d.sample((10_000,))
        centre, spread = draws.mean(0), draws.std(0)
        half = 3 * (draws - centre).abs().amax(0) + spread  # tails reach three times as far
        t = torch.linspace(-1, 1, COUNT, dtype=torch.float64)
        # u -> u^3 + u/4 makes the grid fine where the mass is
        u, du = t**3 + t / 4, 3 * t**2 + 0.25
        x, y = centre[0] + half[0] * u, centre[1] + half[1] * u
        grid = torch.cartesian_prod(x, y)
        density = torch.cat([d.log_prob(part) for part in grid.split(20_000)]).exp()
        cell = torch.outer(half[0] * du, half[1] * du) * (t[1] - t[0]) ** 2
        return float((density.reshape(COUNT, COUNT) * cell).sum())


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["plain", "conditional"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_density_integrates_to_one(recipe: str, context_dim: int) -> None:
    flow = randomize(RECIPES[recipe](2, context_dim), scale=0.4).double()
    context = (torch.tensor([0.7, -1.3], dtype=torch.float64),) if context_dim else ()
    assert integral(flow, context) == pytest.approx(1.0, abs=1e-3)


def test_a_wrong_ladj_does_not_integrate_to_one() -> None:
    class Wrong(transforms.LULinear):
        def _inverse_and_ladj(self, y, context):
            x, ladj = super()._inverse_and_ladj(y, context)
            return x, ladj + 0.01

    assert integral(Flow(randomize(Wrong(2))).double()) == pytest.approx(1.01, abs=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_of_contexts_is_a_batch_of_distributions(recipe: str) -> None:
    flow = randomize(RECIPES[recipe](3, CONTEXT_DIM)).double()
    context = torch.randn(4, CONTEXT_DIM, dtype=torch.float64)
    d = flow(context)
    assert d.batch_shape == (4,)
    assert d.event_shape == (3,)
    draws = d.sample((5,))
    assert draws.shape == (5, 4, 3)
    # one event broadcasts against all contexts, and each context has its own density
    one = draws[0, 0]
    log_prob = d.log_prob(one)
    assert log_prob.shape == (4,)
    for b in range(4):
        torch.testing.assert_close(log_prob[b], flow(context[b]).log_prob(one))
    assert log_prob.unique().numel() == 4
    # the noise of one context says nothing of that of the next
    x, _ = d.transform.inverse_and_ladj(d.sample((2000,)))
    correlation = torch.corrcoef(x[..., 0].mT) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.1  # 4.5 standard errors


def test_contexts_of_more_dimensions() -> None:
    flow = randomize(flows.nsf(2, 3, count_layers=2, hidden_dims=(8,)))
    d = flow(torch.randn(6, 1, 3))
    assert d.batch_shape == (6, 1)
    assert d.sample((5,)).shape == (5, 6, 1, 2)
    assert d.log_prob(torch.randn(7, 2)).shape == (6, 7)


def test_softsign_after_a_wide_normal_has_two_humps() -> None:
    flow = Flow(transforms.Softsign(), flows.DiagonalNormal(1, scale=3.0)).double()
    y = torch.linspace(-0.9990, 0.9985, 2001, dtype=torch.float64)[:, None]
    log_prob = flow().log_prob(y)
    slope = log_prob.diff().sign()
    turns = y[1:-1, 0][slope[1:] != slope[:-1]]
    assert turns.shape == (3,)  # a hump, a valley, a hump
    assert turns[1].abs() < 2e-3
    torch.testing.assert_close(turns[0], -turns[2], atol=2e-3, rtol=0)
    assert float(torch.trapezoid(log_prob.exp(), y[:, 0])) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "base",
    [DiagonalNormal(3, loc=0.5, scale=2.0), GaussianMixture(3, 2), StudentT(3)],
    ids=lambda base: type(base).__name__,
)
def test_the_score_of_a_base_is_the_slope_of_its_log_density(base: Base) -> None:
    base, x = randomize(base).double(), torch.randn(4, 5, 3).double().requires_grad_()
    log_prob, score = base.log_prob_and_score(x)
    assert not (log_prob.requires_grad or score.requires_grad)
    wanted = base().log_prob(x)
    torch.testing.assert_close(log_prob, wanted)
    torch.testing.assert_close(score, torch.autograd.grad(wanted.sum(), x)[0])
