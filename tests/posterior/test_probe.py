"""A look elsewhere sees what a guide misses, repeats to the bit, and says how far it looked."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.probe import WIDE, Probe, _log_ps, _wide, probe
from pyro_nf.search.effort import Effort
from pyro_nf.train.budget import Budget

F64 = torch.float64


def law(locs, sds, weights) -> dist.MixtureSameFamily:
    """A mixture of round normals, ``(D,)``."""
    locs, sds = torch.tensor(locs, dtype=F64), torch.tensor(sds, dtype=F64)
    parts = dist.Normal(locs, sds.unsqueeze(-1)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights, dtype=F64)), parts)


PIECES = {
    "two far": ([[-4.0, -4.0], [4.0, 4.0]], [1.0, 1.0], [0.8, 0.2]),
    "very far, one narrow": ([[-30.0] * 3, [30.0] * 3], [1.0, 0.3], [0.5, 0.5]),
    "so far that curvature by two backward passes is NaN": (
        [[-60.0], [60.0]],
        [0.5, 0.5],
        [0.6, 0.4],
    ),
    "narrow inside wide": ([[0.0, 0.0], [0.5, 0.5]], [1.0, 0.02], [0.7, 0.3]),
    "five in five dimensions": (
        [[7.0 * i - 14.0] + [3.0 * ((3 * i) % 5 - 2)] * 4 for i in range(5)],
        [1.0, 0.5, 0.8, 0.3, 1.0],
        [0.3, 0.2, 0.1, 0.2, 0.2],
    ),
}


def wide_prior(target: dist.MixtureSameFamily):
    """The target as the posterior of a wide normal prior: its evidence is 1."""
    dim = target.event_shape[0]

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim, dtype=F64), 20.0).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("likelihood", target.log_prob(z) - prior.log_prob(z))

    return model


@pytest.mark.parametrize("name", PIECES)
def test_5_a_piece_taken_out_of_the_guide_is_missed(name: str) -> None:
    locs, sds, weights = PIECES[name]
    joint = LogJoint(wide_prior(law(locs, sds, weights)))
    everything = range(len(weights))
    for out in (None, *everything):
        kept = [i for i in everything if i != out]
        q = law(*([values[i] for i in kept] for values in (locs, sds, weights)))
        torch.manual_seed(0)
        found = probe(joint, q, q.sample((1500,)))
        missing = 0.0 if out is None else weights[out]
        assert found.missed_mass == pytest.approx(missing, abs=0.03 + 3 * found.missed_mass_se)
        assert (found.missed_mass > 0.02 + 2 * found.missed_mass_se) == (out is not None)
        assert found.log_evidence == pytest.approx(0.0, abs=0.02 + 4 * found.log_evidence_se)
        assert found.count_maxima == len(weights)
        assert found.is_finished and not found.blind


def test_5_the_probe_repeats_to_the_bit_whatever_the_clock_says() -> None:
    target = law(*PIECES["two far"])
    joint = LogJoint(wide_prior(target))
    torch.manual_seed(0)
    z = target.sample((500,))
    slow = itertools.count(step=1e6)
    one, two = (probe(joint, target, z, seed=3, clock=c) for c in (lambda: 0.0, slow.__next__))
    assert one == two
    assert one != probe(joint, target, z, seed=4)


def test_5_seconds_that_end_the_probe_are_said() -> None:
    target = law(*PIECES["two far"])
    joint = LogJoint(wide_prior(target))
    ticks = itertools.count()
    found = probe(joint, target, target.sample((500,)), max_seconds=2.5, clock=ticks.__next__)
    assert not found.is_finished
    assert "seconds" in found.unfinished


def test_5_labels_that_may_be_switched() -> None:
    """mu_1 and mu_2 are exchangeable: a guide at one labelling has half of the mass."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([s + 0.3 * torch.randn(20, generator=generator) for s in (-2.0, 2.0)]).to(F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=F64), 5.0).to_event(1))
        each = dist.Normal(mu.unsqueeze(-2), 0.3).log_prob(y.unsqueeze(-1))
        pyro.factor("y", (each.logsumexp(-1) - math.log(2)).sum(-1))

    q = dist.Normal(torch.stack([y[:20].mean(), y[20:].mean()]), 0.3 / 20**0.5).to_event(1)
    torch.manual_seed(0)
    found = probe(LogJoint(model), q, q.sample((1000,)))
    assert found.missed_mass == pytest.approx(0.5, abs=0.05)
    assert found.count_maxima == 2


@pytest.mark.filterwarnings("ignore:the model does not run on a batch:UserWarning")
def test_5_an_enumerated_mixture_whose_search_is_cut_short_is_not_good() -> None:
    """One of two labellings, with a step of few climbs and with enough of them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([s + 0.3 * torch.randn(5, generator=generator) for s in (-2.0, 2.0)]).to(F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=F64), 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            c = pyro.sample(
                "c", dist.Categorical(torch.ones(2, dtype=F64)), infer={"enumerate": "parallel"}
            )
            pyro.sample("y", dist.Normal(mu[c], 0.3), obs=y)

    joint = LogJoint(model)
    q = dist.Normal(torch.stack([y[:5].mean(), y[5:].mean()]), 0.3 / 5**0.5).to_event(1)
    torch.manual_seed(0)
    z = q.sample((60,))
    short = probe(joint, q, z, effort=Effort(6, 1, 40))
    assert "1 steps" in short.unfinished
    whole = probe(joint, q, z, effort=Effort(12, 100, 96))
    assert whole.is_finished
    assert whole.count_maxima == 2
    assert whole.missed_mass == pytest.approx(0.5, abs=3 * whole.missed_mass_se)


def bananas() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    pyro.sample("y", dist.Normal(x.square(), 0.3))


class Banana(dist.TorchDistribution):
    """The exact posterior of `bananas`."""

    support = dist.constraints.real_vector

    def __init__(self) -> None:
        super().__init__((), (2,), validate_args=False)

    def sample(self, shape=()) -> Tensor:
        x = torch.randn(*shape, dtype=F64)
        return torch.stack([x, x.square() + 0.3 * torch.randn(*shape, dtype=F64)], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        x, y = z.unbind(-1)
        return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x.square(), 0.3).log_prob(y)


def cauchy() -> None:
    pyro.sample("x", dist.Cauchy(torch.zeros(3, dtype=F64), 1.0).to_event(1))


def funnel() -> None:
    """Its density has no bound where the scale goes to 0."""
    v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=F64), 3.0))
    with pyro.plate("coordinates", 5):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


class Funnel(Banana):
    """The exact posterior of `funnel`."""

    def __init__(self) -> None:
        dist.TorchDistribution.__init__(self, (), (6,), validate_args=False)

    def sample(self, shape=()) -> Tensor:
        v = 3 * torch.randn(*shape, 1, dtype=F64)
        return torch.cat([v, (v / 2).exp() * torch.randn(*shape, 5, dtype=F64)], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        v, x = z[..., :1], z[..., 1:]
        of_x = dist.Normal(torch.zeros_like(x), (v / 2).exp().expand_as(x)).log_prob(x).sum(-1)
        return dist.Normal(0.0, 3.0).log_prob(v[..., 0]) + of_x


@pytest.mark.parametrize(
    ("model", "q"),
    [
        (bananas, Banana()),
        (cauchy, dist.Cauchy(torch.zeros(3, dtype=F64), 1.0).to_event(1)),
        (funnel, Funnel()),
    ],
    ids=["banana", "Cauchy", "funnel"],
)
def test_5_an_exact_guide_raises_no_alarm(model, q: dist.TorchDistribution) -> None:
    joint = LogJoint(model)
    for seed in range(2):
        torch.manual_seed(seed)
        found = probe(joint, q, q.sample((1000,)), seed=seed)
        assert found.missed_mass == 0.0
        assert found.log_evidence == pytest.approx(0.0, abs=4 * found.log_evidence_se)
        assert found.is_finished and not found.blind
        assert found.count_maxima <= 1


def test_5_how_far_was_looked_is_said() -> None:
    target = law(*PIECES["two far"])
    found = probe(LogJoint(wide_prior(target)), target, target.sample((500,)), effort=Effort(600))
    assert found.count_prior == 300
    assert "climbs, 300 from draws of the prior" in found.reach
    assert "0.01 of the prior" in found.reach


class OnlyItsDraws(dist.Normal):
    """Like some flows, without a density at points that it did not draw."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


def test_5_a_guide_without_a_density_elsewhere_cannot_be_probed() -> None:
    target = law(*PIECES["two far"])
    q = OnlyItsDraws(torch.full((2,), -4.0, dtype=F64), 1.0).to_event(1)
    found = probe(LogJoint(wide_prior(target)), q, q.sample((500,)))
    assert "only at its own draws" in found.blind
    assert math.isnan(found.missed_mass)
    assert found.count_maxima == 2


@pytest.mark.parametrize("dim", [1, 6])
@pytest.mark.parametrize("count", [0, 1, 4, 50])
@pytest.mark.parametrize("spoil", ["nothing", "constant", "twin", "nan", "inf"])
def test_9_wide_laws_around_degenerate_draws_have_a_density(
    dim: int, count: int, spoil: str
) -> None:
    """No draws, fewer than dimensions, a constant or repeated coordinate, one not finite."""
    z = torch.randn(count, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    if spoil == "constant":
        z[:, 0] = 3.0
    elif spoil == "twin":
        z[:, -1] = z[:, 0]
    elif spoil != "nothing" and count:
        z[0, 0] = float(spoil)
    finite = z[z.isfinite().all(-1)]
    torch.manual_seed(0)
    for t, factor in zip(_wide(z), WIDE, strict=True):
        assert t.log_prob(t.sample(20)).isfinite().all()
        if count == 50 and spoil in ("nothing", "nan", "inf"):
            covariance = finite.mT.cov().reshape(dim, dim)
            torch.testing.assert_close(t.scale @ t.scale.mT, factor**2 * covariance)


def test_5_what_a_basin_may_hold_unseen() -> None:
    """Of N draws of the prior, none falls into a basin of 3/N of it with less than 5 %."""
    for count in (10, 60, 1000):
        share = Probe(0.0, 0.0, 0.0, 1, count_starts=count, count_prior=count).unseen_share
        assert 0.02 < (1 - share) ** count < 0.05
    assert Probe(0.0, 0.0, 0.0, 1, count_starts=9).unseen_share == 0.0


@pytest.mark.filterwarnings("ignore:the model does not run on a batch:UserWarning")
def test_8_seconds_are_asked_between_the_runs_of_a_loop_model() -> None:
    """A second a run: what is compared after ten seconds are a few points, not pieces of 256."""
    runs = itertools.count()
    seen = [0]

    def model() -> None:
        seen[0] = next(runs)
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.factor("f", torch.tensor(float(z), dtype=F64) * 0)

    joint = LogJoint(model)
    assert joint.kind == "loop"
    z = torch.randn(600, 1, dtype=F64)
    before = seen[0]
    budget = Budget(max_seconds=10.0, clock=lambda: float(seen[0]))
    assert 1 <= len(_log_ps(joint, z, budget)) <= 11
    assert seen[0] - before <= 11
