"""fit_density on flows whose log density is a bound or an estimate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Poisson

from pyro_nf.flows.flow import Flow
from pyro_nf.train.density.fit import fit_density
from pyro_nf.transforms.affine import LowerAffine
from pyro_nf.transforms.coupling import affine_coupling
from pyro_nf.transforms.elementwise import Elementwise, spline
from pyro_nf.transforms.stochastic_chain import StochasticChain
from pyro_nf.univariate.affine import Affine
from tests.stochastic_layers import Abs, Augment, Noise, Rounded, TracedLinear

OPTIONS = {"max_steps": 150, "progress": False, "check_every": 25, "learning_rate": 2e-2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def folded(count: int, seed: int = 0) -> Tensor:
    return (1.0 + 0.7 * torch.randn(count, 1, generator=seeded(seed))).abs()


def log_folded(y: Tensor) -> Tensor:
    n = Normal(1.0, 0.7)
    return torch.logaddexp(n.log_prob(y), n.log_prob(-y)).sum(-1)


def fit_folded(seed: int = 0, **options: object):
    torch.manual_seed(0)
    flow = Flow(StochasticChain([LowerAffine(1), Abs(1)]))
    return fit_density(flow, folded(1500), seed=seed, **OPTIONS | options)


def test_a_bound_trains_and_is_below_the_truth() -> None:
    before = torch.random.get_rng_state()
    fit = fit_folded()
    assert torch.equal(torch.random.get_rng_state(), before)
    y = folded(3000, seed=1)
    torch.manual_seed(1)
    true = log_folded(y).mean().item()
    with torch.no_grad():
        d = fit.flow()
        bound, near = d.log_prob(y).mean(), d.importance_weighted_log_prob(y, 200).mean()
    # the coin costs at most log 2; a normal around 1 of the right width costs little
    assert true - math.log(2) < bound.item() < near.item() < true + 1e-3
    assert near.item() > true - 0.1
    assert abs(fit.validation + bound.item()) < 0.1
    assert "log_prob of the flow is a bound" in str(fit)


def test_a_fit_by_a_bound_repeats_to_the_bit() -> None:
    few = {"max_steps": 20, "check_every": 10, "baselines": False}
    first, second, other = (fit_folded(seed, **few) for seed in (0, 0, 1))
    assert first.validation == second.validation
    assert first.history.losses == second.history.losses
    assert first.history.losses != other.history.losses


def test_whole_numbers_train_by_a_bound() -> None:
    """Counts as integers: no noise has to be added, and the ends of their space belong to it."""
    rate, count = 6.0, 2000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = Poisson(rate).sample((count, 1))
    torch.manual_seed(0)
    flow = Flow(StochasticChain([spline(1, count_bins=6), Elementwise(Affine(), 1), Rounded(1)]))
    fit = fit_density(flow, y, **OPTIONS)
    everything = torch.arange(-20.0, 60.0).unsqueeze(-1)
    with torch.no_grad():
        torch.manual_seed(0)
        log_p = fit.flow().importance_weighted_log_prob(everything, 400)
    assert abs(log_p.logsumexp(0).item()) < 0.02
    p = Poisson(rate).log_prob(everything.clamp_min(0.0)).squeeze(-1).exp()
    p = p * (everything.squeeze(-1) >= 0)
    loss = -(p * log_p.clamp_min(-50.0)).sum().item()
    entropy = -(p * p.clamp_min(1e-30).log()).sum().item()
    assert entropy < loss < entropy + 0.05
    assert "Gaussian copula" not in fit.baselines
    draws = fit.flow.sample(200)
    assert bool((draws == draws.round()).all())


def test_rows_that_are_no_whole_numbers_are_named() -> None:
    flow = Flow(StochasticChain([LowerAffine(1), Rounded(1)]))
    y = torch.arange(20.0).unsqueeze(-1)
    y[7] = 0.5
    with pytest.raises(ValueError, match=r"row 7 of x is 0.5 in column 0.*whole numbers"):
        fit_density(flow, y, **OPTIONS)


@pytest.mark.parametrize("kind", ["exact", "estimate", "bound"])
def test_contexts_units_and_sizes(kind: str) -> None:
    """y = (3 + u c, ...) in large units: what a plain flow can do, one with such layers can."""
    torch.manual_seed(0)
    context = torch.randn(1200, 1, generator=seeded(2))
    e = torch.randn(1200, 2, generator=seeded(3))
    y = 1e3 * (3 + context + e @ torch.tensor([[0.5, 0.3], [0.0, 0.2]]))
    entropy = math.log(2 * math.pi * math.e) + math.log(0.5 * 0.2 * 1e6)
    parts = {
        "exact": [Augment(1, 1, 1), affine_coupling(2, 1, hidden_dims=(16,))],
        "estimate": [TracedLinear(2), affine_coupling(2, 1, hidden_dims=(16,))],
        "bound": [Noise(2, 1), affine_coupling(2, 1, hidden_dims=(16,))],
    }[kind]
    flow = Flow(StochasticChain(parts))
    assert flow.log_prob_kind == kind
    fit = fit_density(flow, y, context=context, **OPTIONS)
    with torch.no_grad():
        torch.manual_seed(0)
        loss = -fit.flow.log_prob(y, context).mean().item()
    assert loss < entropy + 0.35
    assert ("is an estimate" in str(fit)) == (kind == "estimate")
    draws = fit.flow.sample(2000, context=torch.tensor([1.0])) / 1e3
    torch.testing.assert_close(draws.mean(0), torch.full((2,), 4.0), atol=0.15, rtol=0)
