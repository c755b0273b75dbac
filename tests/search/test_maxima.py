"""Many climbs, the maxima at their ends, and what is drawn to start from."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nf.model.joint import LogJoint
from pyro_nf.search.effort import Effort, nominal_cost
from pyro_nf.search.gaussians import StudentT, curvature_scale, difference_hessian
from pyro_nf.search.maxima import find_maxima
from pyro_nf.search.points import prior_draws
from pyro_nf.train.budget import Budget

F64 = torch.float64


def factor(log_density, dim: int):
    """A model whose posterior is a given function of its one site."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim, dtype=F64), 3.0).to_event(1))
        back = 0.5 * (z / 3).square().sum(-1)
        pyro.factor("density", log_density(z) + back)

    return model


def far_pieces(z: Tensor) -> Tensor:
    """Two normals 80 sds apart, whose second derivative by two backward passes is NaN."""
    apart = torch.stack([-0.5 * (z + s).square().sum(-1) / 0.25 for s in (-20.0, 20.0)])
    return torch.logaddexp(apart[0], apart[1])


def test_5_curvature_between_far_pieces_comes_from_differences() -> None:
    joint = LogJoint(factor(lambda z: far_pieces(z), 2))
    at = torch.full((2,), 20.0, dtype=F64)
    exact = -torch.eye(2, dtype=F64) / 0.25 + 0 * at
    torch.testing.assert_close(difference_hessian(joint, at) - exact, 0 * exact, atol=1e-6, rtol=0)
    scale = curvature_scale(joint, at)
    torch.testing.assert_close(scale, 0.5 * torch.eye(2, dtype=F64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sds", [(1e-3, 1e3), (1.0, 1.0), (50.0, 0.02)])
def test_5_differences_find_the_scale_of_each_coordinate(sds: tuple[float, float]) -> None:
    precision = torch.tensor(sds, dtype=F64) ** -2

    def quartic(z: Tensor) -> Tensor:
        return -0.5 * (precision * z.square()).sum(-1)

    joint = LogJoint(factor(quartic, 2))
    scale = curvature_scale(joint, torch.zeros(2, dtype=F64))
    wanted = torch.tensor(sds, dtype=F64).diag_embed()
    torch.testing.assert_close(scale, wanted, atol=0, rtol=1e-6)
    found = difference_hessian(joint, torch.zeros(2, dtype=F64)).diagonal()
    torch.testing.assert_close(found, -precision, atol=0, rtol=1e-6)


def test_5_maxima_are_distinct_whatever_their_scale() -> None:
    """Two needles 1e-3 apart are two; one wide hill is one, though its climbs end all over it."""
    sd = 1e-4
    centres = torch.tensor([[-5e-4], [5e-4]], dtype=F64)

    def needles(z: Tensor) -> Tensor:
        return (-0.5 * ((z.unsqueeze(-2) - centres) / sd).square().sum(-1)).logsumexp(-1)

    points = 1e-3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).to(F64)
    found = find_maxima(LogJoint(factor(needles, 1)), points, Effort(64)).found
    assert sorted(float(m.near.loc) for m in found) == pytest.approx([-5e-4, 5e-4], abs=1e-6)
    mass = math.log(sd / 3)  # of each: the prior's constant is left in the density
    assert [m.log_mass for m in found] == pytest.approx([mass, mass], abs=1e-4)

    def hill(z: Tensor) -> Tensor:
        return -0.5 * (z / 1e3).square().sum(-1)

    points = 1e3 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(F64)
    (only,) = find_maxima(LogJoint(factor(hill, 3)), points, Effort(64)).found
    torch.testing.assert_close(only.near.scale, 1e3 * torch.eye(3, dtype=F64), rtol=1e-3, atol=1)


def test_5_a_search_that_was_cut_short_says_so() -> None:
    joint = LogJoint(factor(lambda z: -z.square().sum(-1) / 2, 2))
    points = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)).to(F64)
    assert find_maxima(joint, points, Effort(32)).unfinished == ""
    assert "1 steps" in find_maxima(joint, points, Effort(32, max_steps=1)).unfinished
    ticks = iter(range(1000))
    budget = Budget(max_seconds=3.0, clock=lambda: float(next(ticks)))
    assert "seconds" in find_maxima(joint, points, Effort(32), budget=budget).unfinished


def test_5_the_effort_follows_the_cost_and_asks_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock() -> float:
        raise AssertionError("a clock was asked")

    def dear(z: Tensor) -> Tensor:
        for _ in range(400):
            z = z + 1e-6 * z.sin()
        return -0.5 * z.square().sum(-1)

    cheap = LogJoint(factor(lambda z: -z.square().sum(-1) / 2, 2))
    costly = LogJoint(factor(dear, 2))
    for name in ("time", "monotonic", "perf_counter", "process_time"):
        monkeypatch.setattr(f"time.{name}", no_clock)
    efforts = Effort.for_joint(cheap), Effort.for_joint(costly)
    assert efforts == (Effort.for_joint(cheap), Effort.for_joint(costly))
    assert efforts[0].num_starts > 2 * efforts[1].num_starts
    assert not efforts[0].is_cut_short
    assert sum(nominal_cost(costly)) > 20 * sum(nominal_cost(cheap))


def every_kind() -> None:
    """Sites of all shapes, constrained ones, a flat one."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(3.0), 2.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.tensor(1.0), 0.5))
    flat = pyro.sample("flat", dist.ImproperUniform(constraints.real, (), (2,)))
    pyro.sample("seen", dist.Normal(flat, 1.0).to_event(1), obs=torch.zeros(2))
    with pyro.plate("row", 4), pyro.plate("column", 3):
        pyro.sample("x", dist.Normal(mu, tau))
        pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(2)).to_event(1))
    with pyro.plate("other", 5):
        pyro.sample("y", dist.Normal(mu, tau), obs=torch.zeros(5))


def by_vmap() -> None:
    """Does not broadcast: its sites are stacked along the first dimension."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(3.0), 2.0))
    log_tau = pyro.sample("log_tau", dist.Normal(torch.tensor(1.0), 0.5))
    both = torch.stack([mu, log_tau])  # with particles this is (2, S)
    both = both.reshape(-1)[:2]
    pyro.sample("y", dist.Normal(both[0], both[1].exp()), obs=torch.tensor(0.0))


def test_5_prior_draws_come_from_one_run() -> None:
    joint, runs = LogJoint(every_kind), []
    model = joint.model
    joint.model = lambda *args: (runs.append(1), model(*args))[1]
    torch.manual_seed(0)
    draws = joint.unpack(prior_draws(joint, 20_000))
    assert len(runs) == 1
    assert draws["mu"].mean() == pytest.approx(3.0, abs=0.06)
    assert draws["mu"].std() == pytest.approx(2.0, rel=0.03)
    assert draws["tau"].log().mean() == pytest.approx(1.0, abs=0.02)
    assert bool((draws["flat"] == 0).all())
    assert draws["x"].shape == (20_000, 3, 4) and draws["v"].shape == (20_000, 3, 4, 2)
    white = (draws["x"] - draws["mu"][:, None, None]) / draws["tau"][:, None, None]
    torch.testing.assert_close(white.mean(0), torch.zeros(3, 4), atol=0.04, rtol=0)
    torch.testing.assert_close(white.std(0), torch.ones(3, 4), atol=0.04, rtol=0)
    cross = torch.stack([white[:, 0, 0], white[:, 0, 1]]).corrcoef()[0, 1]
    assert abs(float(cross)) < 0.04


@pytest.mark.filterwarnings("ignore:the model does not run on a batch:UserWarning")
def test_5_prior_draws_of_a_model_that_does_not_broadcast() -> None:
    joint = LogJoint(by_vmap)
    assert joint.kind == "vmap"
    torch.manual_seed(0)
    z = prior_draws(joint, 5000)
    assert z.shape == (5000, 2)
    torch.testing.assert_close(z.mean(0), torch.tensor([3.0, 1.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([2.0, 0.5]), rtol=0.05, atol=0)


def test_the_student_t_integrates_to_one_and_draws_itself() -> None:
    root = torch.tensor([[0.5, 0.0], [0.7, 2.0]], dtype=F64)
    for scale in (root, root.diagonal().clone()):
        t = StudentT(torch.tensor([1.0, -2.0], dtype=F64), scale)
        x = torch.linspace(-60, 60, 1201, dtype=F64)
        grid = torch.cartesian_prod(x, x)
        assert float(t.log_prob(grid).exp().sum() * 0.01) == pytest.approx(1.0, abs=1e-3)
        torch.manual_seed(0)
        distance = t.distance(t.sample(20_000))
        # of D / F(D, 5): the median of F(2, 5) is 2.5 (2^(2/5) - 1)
        median = 2 * 2.5 * (2 ** (2 / 5) - 1)
        assert float(distance.median()) == pytest.approx(median, rel=0.03)
