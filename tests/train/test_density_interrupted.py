"""fit_density under Ctrl-C and under a clock: what was learned is kept, seconds are kept to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.recipes import nice
from pyro_nf.train.density import fit as density
from pyro_nf.train.density import source, table, work
from pyro_nf.train.density import start as starts
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.recipe import DensityFit, DensityRecipe
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.chain import Chain


def rows(count: int = 60) -> Tensor:
    """Two clusters, with heavy tails in the first column: every start is worth a try."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    x[::2] += 6
    x[5, 0] = 200.0
    return x


def flow() -> Flow:
    torch.manual_seed(0)
    return nice(2, count_layers=2, hidden_dims=(4,))


def check_usable(fit: DensityFit, x: Tensor) -> None:
    assert fit.history.stopped == "interrupted"
    assert fit.flow().sample((3,)).isfinite().all()
    assert fit.flow().log_prob(x).isfinite().all()
    assert math.isnan(fit.validation) or math.isfinite(fit.validation)
    str(fit)


def test_15_ctrl_c_at_any_reading_of_the_clock_returns_a_usable_flow():
    x, n = rows(), 0
    step = 1
    while True:
        n += step
        calls = [0]

        def interrupting(calls=calls, n=n) -> float:
            calls[0] += 1
            if calls[0] == n:
                raise KeyboardInterrupt
            return 0.01 * calls[0]

        fit = fit_density(
            flow(),
            x,
            max_steps=26,
            max_seconds=1e3,
            check_every=10,
            progress=False,
            clock=interrupting,
        )
        if calls[0] < n:
            assert fit.history.stopped != "interrupted"
            break
        check_usable(fit, x)
        step = 1 if n < 12 else 17
    assert n > 60


PHASES = {
    "checks of rows": (table, "_median_and_spread"),
    "units": (source, "units_of"),
    "repeated values": (density, "warn_of_repeats"),
    "start": (starts.Standardised, "__call__"),
    "second start": (starts.Whitened, "__call__"),
    "tails": (starts.StudentTails, "__call__"),
    "mixture": (starts, "fit_gaussian_mixture"),
    "copula": (work, "GaussianCopula"),
    "race or training": (work, "train"),
    "a loss": (work, "mean_loss"),
    "putting back": (work.State, "put_back"),
    "the last loss": (work.Work, "_final_loss"),
}


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_15_ctrl_c_in_every_phase_returns_the_best_so_far(phase, call, monkeypatch):
    owner, name = PHASES[phase]
    plain, calls = getattr(owner, name), [0]

    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    x = rows()
    fit = fit_density(flow(), x, max_steps=26, check_every=10, progress=False)
    if calls[0] >= call:
        check_usable(fit, x)
    if fit.starts:  # the margin of the mixture aside
        assert fit.validation <= min(fit.starts.values()) + DensityRecipe().mixture_margin


def test_15_an_interrupted_refit_leaves_a_trained_flow_as_it_was(monkeypatch):
    x = rows()
    trained = fit_density(flow(), x, max_steps=26, progress=False).flow
    before = trained().log_prob(x)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(starts.Standardised, "__call__", interrupted)
    again = fit_density(trained, 50 + x, max_steps=26, progress=False)
    assert again.history.stopped == "interrupted"
    torch.testing.assert_close(again.flow().log_prob(x), before, rtol=0, atol=0)


class Slow(FlowTransform):
    """The identity, which takes seconds of a clock: so many for a pass, so many for a row."""

    def __init__(self, a_pass: float, a_row: float) -> None:
        super().__init__(2)
        self.now, self.a_pass, self.a_row = 0.0, a_pass, a_row

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.now += self.a_pass + self.a_row * len(x)
        return x, x.new_zeros(x.shape[:-1])

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._pass(x)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._pass(y)


@pytest.mark.parametrize("count", [100, 20_000])
@pytest.mark.parametrize(("a_pass", "a_row"), [(0.1, 0.0), (0.5, 0.0), (0.0, 1e-3)])
def test_8_seconds_hold_for_slow_flows(a_pass, a_row, count):
    slow, last = Slow(a_pass, a_row), nice(2, count_layers=1, hidden_dims=(4,)).transform

    def clock() -> float:
        slow.now += 1e-4  # the rest of the work
        return slow.now

    x = rows(count)
    fit = fit_density(
        Flow(Chain([slow, last])), x, max_seconds=10.0, patience=None, progress=False, clock=clock
    )
    one_step = 2 * (a_pass + 256 * a_row)
    assert slow.now < 11.5 + one_step
    assert slow.now > 6
    assert fit.history.steps > 0
    assert math.isfinite(fit.validation)


def test_8_em_asks_its_budget_in_its_loops():
    from pyro_nf.train.budget import Budget
    from pyro_nf.train.density.baselines import fit_gaussian_mixture

    readings = [0]

    def clock() -> float:
        readings[0] += 1
        return float(readings[0])

    x = rows(2000)
    fit_gaussian_mixture(x, x, budget=Budget(max_seconds=20.0, clock=clock))
    assert readings[0] < 40  # it ends soon after the twentieth reading, in the middle of a loop


def test_8_baselines_cost_a_share_of_few_steps(monkeypatch):
    works = []
    fit_mixture = starts.fit_gaussian_mixture
    monkeypatch.setattr(
        starts,
        "fit_gaussian_mixture",
        lambda x, v, **options: works.append((len(x), options["most_work"])) or fit_mixture(x, v),
    )
    x = torch.randn(60_000, 2, generator=torch.Generator().manual_seed(0))
    fit_density(flow(), x, max_steps=26, progress=False)
    ((count, most_work),) = works
    assert count <= 20_000
    assert most_work <= 5e8
