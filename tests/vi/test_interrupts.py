"""A fit keeps within its seconds, and what is there when it is interrupted is kept."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf import AutoFlow, fit_svi, flows
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered, Rows
from pyro_nf.search.mixtures import separated_mixture
from pyro_nf.search.start import GaussianStart, laplace_start
from pyro_nf.search.tempering import tempered_smc
from pyro_nf.train.budget import Budget, OutOfTime
from pyro_nf.vi.fit import SVIFit
from pyro_nf.vi.stages import choose_particles

pytestmark = pytest.mark.filterwarnings("ignore:the model does not run on a batch")


class SlowModel:
    """A model each of whose runs takes so many seconds of its own clock, or raises at one run."""

    def __init__(self, kind: str, cost: float = 1.0, raise_at: float = math.inf) -> None:
        self.kind, self.cost, self.raise_at = kind, cost, raise_at
        self.runs, self.now = 0, 0.0

    def clock(self) -> float:
        return self.now

    def __call__(self) -> None:
        self.runs += 1
        self.now += self.cost
        if self.runs == self.raise_at:
            raise KeyboardInterrupt
        getattr(self, self.kind)()

    def batched(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([1.0, -1.0]))

    def vmap(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(x[0] + x[1], 1.0), obs=torch.tensor(1.0))

    def loop(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 2.0))
        sign = 1.0 if x.item() > 0 else -1.0
        pyro.sample("y", dist.Normal(x + 0.0 * sign, 1.0), obs=torch.tensor(1.0))

    def hierarchical(self) -> None:
        log_tau = pyro.sample("log_tau", dist.Normal(torch.tensor(0.0), 1.0))
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), log_tau.exp()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.0))

    def pieces(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 4.0).to_event(1))
        far = torch.tensor([3.0, 3.0])
        modes = [-0.5 * ((x - m) / 0.3).square().sum(-1) for m in (far, -far)]
        pyro.factor("modes", torch.logaddexp(*modes))


KINDS = ("batched", "vmap", "loop", "hierarchical", "pieces")


def small(dim: int) -> flows.Flow:
    return flows.iaf(dim, count_layers=1, hidden_dims=(4,))


def check_usable(fit: SVIFit) -> None:
    """Its guide draws finite latents, and weighs them."""
    posterior = fit.posterior(20)
    assert posterior.z.isfinite().all()
    assert posterior.log_weights.isfinite().any()


# ---- seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cost", "max_seconds"),
    [(0.002, 1.0), (0.05, 8.0), (0.2, 8.0), (0.3, 2.0), (0.5, 4.0), (1, 4), (1, 12)],
)
@pytest.mark.parametrize("own_guide", [False, True])
def test_8_a_fit_keeps_within_its_seconds(kind, cost, max_seconds, own_guide) -> None:
    model = SlowModel(kind, cost)
    fit = fit_svi(
        model,
        AutoFlow(model, small) if own_guide else None,
        max_seconds=max_seconds,
        max_steps=40,
        progress=False,
        clock=model.clock,
    )
    assert model.now <= 1.1 * max_seconds + 0.5
    assert fit.history.stopped in ("max_seconds", "max_steps")
    check_usable(fit)


def test_8_a_slow_fit_still_finds_the_posterior() -> None:
    model = SlowModel("batched", 0.2)
    fit = fit_svi(model, max_seconds=8.0, progress=False, clock=model.clock)
    variance = 1 / (1 / 4 + 1)
    assert isinstance(fit.start, GaussianStart)
    mean = variance * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(fit.start.loc, mean, atol=0.05, rtol=0)
    cov = fit.start.scale_tril @ fit.start.scale_tril.mT
    torch.testing.assert_close(cov, variance * torch.eye(2), atol=0.05, rtol=0)


def test_8_where_no_step_fits_the_start_is_the_fit() -> None:
    model = SlowModel("loop", 0.1)
    fit = fit_svi(model, num_particles=64, max_seconds=5.0, progress=False, clock=model.clock)
    assert (fit.history.stopped, fit.history.steps) == ("max_seconds", 0)
    check_usable(fit)


@pytest.mark.parametrize("kind", ["batched", "loop", "hierarchical"])
def test_8_steps_alone_can_be_repeated_whatever_the_clock_says(kind) -> None:
    def fitted(clock: Callable[[], float]) -> list[float]:
        model = SlowModel(kind)
        options = {"max_steps": 4, "num_particles": 4, "progress": False}
        fit = fit_svi(model, AutoFlow(model, small), clock=clock, **options)
        return [*fit.history.losses, *fit.history.checked_values, *fit.start.loc.tolist()]

    slow, wild = iter(range(10**6)), random.Random(1)
    assert fitted(lambda: 1e3 * next(slow)) == fitted(wild.random)


def test_8_a_start_bounded_by_steps_is_bounded_by_runs() -> None:
    model = SlowModel("loop")
    fit = fit_svi(model, max_steps=20, num_particles=8, progress=False)
    assert fit.history.stopped == "max_steps"
    trained = 20 * 8 + 2 * 512
    assert model.runs < trained + 2 * 256 + 64


@pytest.mark.parametrize("kind", ["batched", "loop"])
@pytest.mark.parametrize("seconds", [0.1, 3.0, 20.0])
def test_8_searches_keep_within_their_seconds(kind, seconds) -> None:
    model = SlowModel(kind, 0.05)
    joint = LogJoint(model)
    start = GaussianStart(joint.init_loc, torch.eye(joint.latent_dim), elbo=-10.0)
    searches = [
        lambda: laplace_start(joint, max_seconds=seconds, clock=model.clock),
        lambda: separated_mixture(joint, start, max_seconds=seconds, clock=model.clock),
        lambda: tempered_smc(joint, start.loc, start.scale, max_seconds=seconds, clock=model.clock),
        lambda: choose_particles(Metered.of(joint, seconds, model.clock), seconds),
    ]
    for search in searches:
        began = model.now
        search()
        assert model.now - began <= 1.1 * seconds + 0.5 + model.cost


def test_8_prices_of_what_has_not_been_tried() -> None:
    """A batch of S rows that takes a + b S seconds."""
    joint = LogJoint(SlowModel("batched"))
    now = 0.0

    def clock() -> float:
        return now

    meter = Metered(joint, Budget(max_seconds=100.0, clock=clock))

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    for rows in (1, 8, 64):
        meter.spend("gradient", rows, lambda rows=rows: work(2 + 0.1 * rows))
    assert meter.price("gradient", 256) == pytest.approx(2 + 0.1 * 256)
    assert meter.price("value", 64) == pytest.approx(2 + 0.1 * 64)
    assert meter.price("hessian", 64) == pytest.approx(3 * (2 + 0.1 * 64))
    meter.spend("hessian", 8, lambda: work(5.6))
    assert meter.price("hessian", 256) == pytest.approx(2 * (2 + 0.1 * 256))
    assert meter.afford("gradient", 1000, 20.0 / meter.budget.seconds_left) == 125
    with pytest.raises(OutOfTime):
        meter.spend("gradient", 1000, lambda: work(102.0))
    assert now == pytest.approx(3 * 2 + 7.3 + 5.6)
    rows = Rows()
    loop = Metered(LogJoint(SlowModel("loop")), Budget(max_seconds=50.0, clock=rows), rows)
    loop.log_prob(torch.zeros(30, 1))
    assert (loop.afford("gradient", 64), loop.budget.seconds_left) == (4, 20.0)


# ---- interrupts


def interrupted(kind: str, raise_at: float, cost: float = 1.0, **options: object):
    model = SlowModel(kind, cost, raise_at)
    settings = {"max_seconds": 30.0, "max_steps": 3, "progress": False} | options
    return model, fit_svi(model, AutoFlow(model, small), clock=model.clock, **settings)


def runs_of_a_log_joint(kind: str, max_seconds: float | None = None) -> int:
    """Those before there is anything to keep."""
    model = SlowModel(kind, 1.0)
    LogJoint(model, budget=Budget(max_seconds=max_seconds, clock=model.clock))
    return model.runs


@pytest.mark.parametrize("kind", KINDS)
def test_15_ctrl_c_at_any_run_of_the_model(kind) -> None:
    whole, _ = interrupted(kind, math.inf)
    first = runs_of_a_log_joint(kind, 30.0) + 1
    before = torch.get_rng_state(), random.getstate(), dict(pyro.settings.get())
    for raise_at in range(first, whole.runs + 1):
        _, fit = interrupted(kind, raise_at)
        assert fit.history.stopped == "interrupted", raise_at
        check_usable(fit)
    for raise_at in (1, first - 1):  # there is nothing to keep yet
        with pytest.raises(KeyboardInterrupt):
            interrupted(kind, raise_at)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), dict(pyro.settings.get())) == before[1:]
    assert not pyro.poutine.runtime._PYRO_STACK


@pytest.mark.parametrize("kind", ["batched", "hierarchical"])
def test_15_ctrl_c_while_the_log_joint_is_recorded(kind) -> None:
    model = SlowModel(kind)
    LogJoint(model)
    for raise_at in range(model.runs + 4, model.runs + 30, 4):
        _, fit = interrupted(kind, raise_at, cost=1e-3)
        assert fit.history.stopped == "interrupted"
        check_usable(fit)
    assert not pyro.poutine.runtime._PYRO_STACK


@pytest.mark.parametrize("kind", ["pieces", "hierarchical"])
def test_15_ctrl_c_keeps_what_the_search_has_found(kind) -> None:
    options = {"max_seconds": None, "max_steps": 3, "num_particles": 4}
    whole, fit = interrupted(kind, math.inf, **options)
    best = fit.start.elbo
    first = runs_of_a_log_joint(kind) + 1
    elbos = []
    for raise_at in (first, whole.runs):
        _, fit = interrupted(kind, raise_at, **options)
        assert fit.history.stopped == "interrupted"
        check_usable(fit)
        elbos.append(fit.start.elbo)
    assert elbos[0] == -math.inf  # the initial point
    assert elbos[-1] == best


def test_15_a_second_ctrl_c_is_raised() -> None:
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise KeyboardInterrupt
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit_svi(model, max_steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.poutine.runtime._PYRO_STACK


def test_15_ctrl_c_while_a_fit_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    options = {"max_seconds": None, "num_particles": 4, "checkpoint": path}
    _, whole = interrupted("batched", math.inf, **options)
    content = path.read_bytes()
    first = runs_of_a_log_joint("batched") + 1
    for raise_at in range(first, first + 2):
        _, fit = interrupted("batched", raise_at, **options)
        assert path.read_bytes() == content
        for name, value in whole.guide.flow.state_dict().items():
            assert fit.guide.flow.state_dict()[name].shape == value.shape
        check_usable(fit)
