"""fit_svi: stops, keeps the best, goes on from a checkpoint, and leaves the world as it was."""

import math
import random
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nf import AutoFlow, fit_svi, flows, transforms
from pyro_nf.guides.layers import full_flow
from pyro_nf.model.joint import LogJoint
from pyro_nf.testing import randomize
from pyro_nf.vi.gradients import Reparameterised
from pyro_nf.vi.objectives import ELBO, Estimate, Objective, TemperedELBO
from pyro_nf.vi.stages import Step, elbo_floor, posterior_stages, seconds_per_step

Y = torch.tensor([1.0, 2.5, 0.3])


def conjugate(y: Tensor = Y) -> None:
    """mu ~ N(0, 2), y_i ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 2.0))
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), 1.0).to_event(1), obs=y)


def skewed() -> None:
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.sample("x", dist.Normal(torch.tensor(0.0), tau))


def small(dim: int) -> flows.Flow:
    return flows.iaf(dim, count_layers=2, hidden_dims=(8,))


def fit(model=skewed, **options):
    settings = {"max_steps": 60, "progress": False, "num_particles": 16} | options
    guide = settings.pop("guide", None) or AutoFlow(model, small)
    return fit_svi(model, guide, **settings)


def state(guide: AutoFlow) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in guide.flow.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_result() -> None:
    result = fit(max_steps=120)
    history = result.history
    assert history.stopped == "max_steps"
    assert len(history.losses) == len(history.learning_rates) == len(history.seconds) == 120
    assert np.mean(history.losses[-20:]) < np.mean(history.losses[:20]) + 0.05
    assert history.best_value == min(history.checked_values)
    assert isinstance(result.guide, AutoFlow)
    assert result.start is not None
    assert len(result.posterior(300)) == 300


def test_against_the_exact_posterior() -> None:
    posterior = fit(conjugate, max_steps=100).posterior(4000)
    precision = 1 / 4 + 3
    row = posterior.summary()["mu"]
    assert row.mean == pytest.approx(float(Y.sum()) / precision, abs=0.05)
    assert row.sd == pytest.approx(precision**-0.5, rel=0.05)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_same_seed_gives_the_same_fit(seed: int) -> None:
    torch.manual_seed(11)
    first = fit(seed=seed)
    torch.manual_seed(22)
    second = fit(seed=seed)
    assert same(state(first.guide), state(second.guide))
    assert first.history.losses == second.history.losses
    assert not same(state(first.guide), state(fit(seed=seed + 1).guide))
    assert torch.equal(first.posterior(10).z, second.posterior(10).z)


def test_the_global_generators_are_untouched() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    wanted = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    result = fit(max_steps=5)
    result.posterior(10).predictive()
    result.posterior(10).resample(5)
    result.guide.median()
    assert torch.equal(torch.rand(3), wanted[0])
    assert (random.random(), np.random.rand()) == wanted[1:]  # noqa: NPY002


def test_a_bar_with_the_elbo(capfd: pytest.CaptureFixture[str]) -> None:
    fit(progress=False)
    assert capfd.readouterr().err == ""
    fit(progress=True)
    shown = capfd.readouterr().err
    assert "-ELBO" in shown and "60/60" in shown


def test_patience_stops_early() -> None:
    noisy = ELBO(Reparameterised())
    result = fit(conjugate, max_steps=5000, patience=100, num_particles=4, objective=noisy)
    assert result.history.stopped == "patience"
    assert result.history.steps < 5000
    assert result.history.steps >= result.history.best_step + 100


def test_seconds_stop() -> None:
    result = fit(max_steps=None, max_seconds=0.5)
    assert result.history.stopped == "max_seconds"
    assert result.history.seconds[-1] < 3.0


class Interrupt(Objective):
    """An ELBO that raises after so many steps."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error, self.calls = after, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return ELBO()(*args, **kwargs)


def test_ctrl_c_keeps_the_best_state() -> None:
    result = fit(max_steps=500, objective=Interrupt(120, KeyboardInterrupt()))
    assert result.history.stopped == "interrupted"
    assert result.history.steps == 120
    assert len(result.posterior(50)) == 50


def test_ctrl_c_in_the_model() -> None:
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        if calls == 400:
            raise KeyboardInterrupt
        pyro.sample("x", dist.Normal(torch.tensor(3.0), 1.0))

    result = fit(model, max_steps=5000)
    assert result.history.stopped == "interrupted"
    assert 0 < result.history.steps < 5000
    assert abs(float(result.guide.median()["x"]) - 3) < 0.5


def test_the_best_state_is_kept_when_the_fit_ends_badly() -> None:
    guide = AutoFlow(skewed, small)
    with pytest.raises(RuntimeError, match="boom"):
        fit(guide=guide, max_steps=500, objective=Interrupt(120, RuntimeError("boom")))
    reference = fit(max_steps=500, objective=Interrupt(120, KeyboardInterrupt()))
    if reference.history.best_step <= 100:  # the interrupted one looks once more, at step 120
        assert same(state(guide), state(reference.guide))
    assert torch.isfinite(guide.median()["tau"])


@pytest.mark.parametrize("first", [50, 73])
def test_resuming_equals_an_uninterrupted_fit(first: int, tmp_path: Path) -> None:
    never, interrupt = (Interrupt(step, KeyboardInterrupt()) for step in (1000, first))
    whole = fit(max_steps=150, objective=never)
    path = tmp_path / "fit"
    stopped = fit(max_steps=150, checkpoint=path, checkpoint_every=50, objective=interrupt)
    assert stopped.history.steps == first
    torch.manual_seed(99)
    pyro.clear_param_store()
    resumed = fit(max_steps=150, checkpoint=path, objective=never)
    assert resumed.start is None
    assert resumed.history.losses == whole.history.losses
    assert resumed.history.checked_values == whole.history.checked_values
    assert same(state(resumed.guide), state(whole.guide))


@pytest.mark.parametrize("objective", [lambda: None, lambda: TemperedELBO(120)])
def test_resuming_remembers_what_the_objective_does(objective, tmp_path: Path) -> None:
    calls, last = 0, 10**9

    def model() -> None:  # Gaussian: exact from the start, so every step draws from the tails
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        pyro.sample("x", dist.Normal(torch.tensor(3.0), 2.0))

    whole = fit(model, max_steps=150, objective=objective())
    calls, last, path = 0, calls - 20, tmp_path / "fit"
    options = {"max_steps": 150, "checkpoint": path, "checkpoint_every": 50}
    stopped = fit(model, **options, objective=objective())
    assert 100 < stopped.history.steps < 150
    last = 10**9
    resumed = fit(model, **options, objective=objective())
    assert resumed.history.losses == whole.history.losses
    assert same(state(resumed.guide), state(whole.guide))


class Spy(Objective):
    """Notes the draws, and says that their log weights spread by so much."""

    def __init__(self, spread: float) -> None:
        self.spread, self.draws = spread, []

    def __call__(self, flow, joint, x, weights=None):
        self.draws.append(x)
        log_weights = self.spread * torch.linspace(-1, 1, len(x))
        return Estimate(x.sum(), log_weights, 0)


@pytest.mark.parametrize(("spread", "tails"), [(0.5, True), (0.01, True), (0.01, False)])
def test_even_weights_send_a_quarter_of_the_draws_to_the_tails(spread: float, tails: bool) -> None:
    flow, spy = small(2), Spy(spread)
    step = Step(flow, LogJoint(skewed), spy, num_particles=20_000, tails=tails)
    step(), step()
    first, second = spy.draws
    assert abs(float(first.std()) - 1) < 0.02
    wide = 1 + 1 / math.sqrt(2) if tails and spread < 0.05 else 1.0
    assert abs(float(second[:5000].std()) - wide) < 0.03
    assert abs(float(second[5000:].std()) - 1) < 0.02


def test_skewness_and_tails_learn_slowly() -> None:
    guide = AutoFlow(skewed, full_flow).setup()
    shape = guide.flow.transform.parts[0].parts[0]
    flow_stage = posterior_stages(guide.flow, LogJoint(skewed), rate=0.01)[-1]
    rates = {p: g["lr"] for g in flow_stage.optimizer.param_groups for p in g["params"]}
    assert rates.keys() == set(guide.flow.parameters())
    slow = {p for p, rate in rates.items() if rate < 0.01}
    assert slow == set(shape.parameters())

    splines = AutoFlow(skewed, lambda dim: transforms.spline(dim)).setup()
    stages = posterior_stages(splines.flow, LogJoint(skewed), rate=0.01)
    assert [g["lr"] for g in stages[-1].optimizer.param_groups] == [0.01]


def test_timing_a_step_leaves_no_trace() -> None:
    flow, joint = randomize(small(2)), LogJoint(skewed)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in flow.state_dict().items()}
    assert 0 <= seconds_per_step(flow, joint, 16) < 10
    assert torch.equal(torch.get_rng_state(), before)
    assert same(flow.state_dict(), state)
    assert all(p.grad is None for p in flow.parameters())


def test_the_floor_of_the_elbo_is_two_errors_below() -> None:
    flow, joint = randomize(small(1), 0.1), LogJoint(conjugate)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        log_w = torch.cat([log_weights(flow, joint, 500) for _ in range(40)])
    floors = torch.tensor([elbo_floor(flow, joint, 500, seed) for seed in range(40)])
    error = float(log_w.std()) / math.sqrt(500)
    assert abs(float(floors.mean()) - (float(log_w.mean()) - 2 * error)) < error
    assert elbo_floor(flow, joint, seed=5) == elbo_floor(flow, joint, seed=5)


def log_weights(flow: flows.Flow, joint: LogJoint, count: int) -> Tensor:
    with torch.no_grad():
        z, log_q = flow().rsample_and_log_prob((count,))
        return joint.log_prob(z) - log_q


def test_a_finished_checkpoint_is_the_fit(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    whole = fit(checkpoint=path, max_steps=100)
    again = fit(checkpoint=path, max_steps=100)
    assert again.history.losses == whole.history.losses
    assert same(state(again.guide), state(whole.guide))


def test_bad_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    fit(checkpoint=path, max_steps=50)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"another architecture|other data or settings"):
        fit(conjugate, checkpoint=path)
    with pytest.raises(ValueError, match="another architecture"):
        fit(guide=AutoFlow(skewed, lambda d: flows.iaf(d, hidden_dims=(9,))), checkpoint=path)
    with pytest.raises(ValueError, match="seed"):
        fit(seed=1, checkpoint=path)
    assert path.read_bytes() == content  # nothing lost
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        fit(checkpoint=path)
    with pytest.raises(OSError, match="cannot write"):
        fit(checkpoint=path / "in a file")
    flows.realnvp(2).save(path)
    with pytest.raises(ValueError, match="holds a flow"):
        fit(checkpoint=path)


def test_a_fit_goes_on() -> None:
    guide = AutoFlow(conjugate, small)
    first = fit(conjugate, guide=guide)
    before = guide.coordinates.loc.clone()
    second = fit(conjugate, guide=guide)
    assert second.guide is guide and second.start is None
    assert torch.equal(guide.coordinates.loc, before)  # no new start
    assert second.posterior(500).elbo > first.posterior(500).elbo - 0.05


def test_a_density_that_fails_in_places() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.5), 1.0))
        pyro.factor("half", torch.where(x > 0, 0.0, torch.nan))

    result = fit(model, max_steps=100)
    assert all(math.isfinite(loss) for loss in result.history.losses)
    assert torch.isfinite(result.guide.median()["x"])


def test_a_density_that_fails_everywhere() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.5), 1.0))
        pyro.factor("broken", x * torch.nan)

    with pytest.raises(ValueError, match=r"not finite|invalid values"):
        fit(model)


def test_nan_in_the_data_is_named() -> None:
    with pytest.raises(ValueError, match=r"site 'y'|\"y\"|not finite"):
        fit(conjugate, args=(torch.tensor([1.0, math.nan]),))


def test_a_density_that_fails_later_names_step_and_site() -> None:
    broken, calls = False, 0

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.5), 1.0))
        pyro.sample("y", dist.Normal(x * (math.nan if broken else 1.0), 1.0), obs=torch.tensor(1.0))

    class Break(ELBO):
        def __call__(self, *args, **kwargs):
            nonlocal broken, calls
            calls += 1
            broken = calls > 70
            return super().__call__(*args, **kwargs)

    guide = AutoFlow(model, small)
    with pytest.raises(ValueError, match=r"not finite at step 7\d") as error:
        fit(model, guide=guide, max_steps=300, objective=Break())
    assert "'y'" in str(error.value)
    assert torch.isfinite(guide.median()["x"])


def test_float64_and_arguments() -> None:
    result = fit(conjugate, args=(Y.double(),), max_steps=5)
    assert result.posterior(10).z.dtype == torch.float64
    result = fit(conjugate, kwargs={"y": Y.double()}, max_steps=5)
    assert result.posterior(10).samples["mu"].dtype == torch.float64


def test_objectives_and_given_guides() -> None:
    guide = AutoFlow(skewed, small).setup()
    randomize(guide.flow, 0.01)
    result = fit(guide=guide, objective=ELBO(Reparameterised()), num_particles=8)
    assert result.guide is guide


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="guide must be an AutoFlow"):
        fit(guide=pyro.infer.autoguide.AutoNormal(skewed))
    with pytest.raises(ValueError, match="num_particles"):
        fit(num_particles=0)
    with pytest.raises(ValueError, match="max_steps"):
        fit(max_steps=0)
    with pytest.raises(ValueError, match="max_seconds"):
        fit(max_seconds=-1.0)
    with pytest.raises((ValueError, RuntimeError), match=r"no .*latent"):
        fit(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))

    def learnable() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0))

    with pytest.raises(ValueError, match="learnable parameters"):
        fit(learnable)


def test_compile_fuses_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def fuse(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", fuse)
    plain = fit(max_steps=60)
    assert not compiled
    fused = fit(max_steps=60, compile=True)
    assert len(compiled) == 1
    assert isinstance(compiled[0], torch.fx.GraphModule)
    assert fused.history.losses[-1] == pytest.approx(plain.history.losses[-1], abs=1e-4)


def clusters(infer: dict[str, str] | None = None) -> None:
    """Two known clusters of unknown weight; which row is of which is summed out."""
    weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 4):
        which = pyro.sample("which", dist.Bernoulli(weight), infer=infer or {})
        pyro.sample("y", dist.Normal(20 * which, 1.0), obs=torch.tensor([0.0, 0.0, 0.0, 20.0]))


@pytest.mark.parametrize("how", ["parallel", "sequential", None])
@pytest.mark.filterwarnings("ignore:the model does not run on a batch")
def test_discrete_latents_are_summed_out(how: str | None) -> None:
    kwargs = {"infer": {"enumerate": how} if how else None}
    fitted = fit_svi(clusters, kwargs=kwargs, max_seconds=3, num_particles=8, progress=False)
    posterior = fitted.posterior(200)
    assert set(posterior.samples) == {"weight"}
    # Beta(2, 4)
    assert posterior.resample().samples["weight"].mean().item() == pytest.approx(1 / 3, abs=0.08)
    assert set(posterior.predictive(num_draws=3)) == {"which", "y"}
    with pytest.raises(ValueError, match="which"):
        posterior.log_likelihood()


def regression(x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


X = torch.tensor([0.5, -1.0, 2.0, 0.1])
X_Y = torch.tensor([1.0, -1.5, 4.5, 0.0])
ORDER = torch.tensor([1, 0, 3, 2])


def closing_over(data: Tensor, scale: float = 2.0):
    """The data come by a closure, not by an argument."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), scale))
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data)

    return model


CHANGES = {
    "other data": ({"args": (X, X_Y + 100)}, r"args\[1\]"),
    "other units": ({"args": (X * 50 + 1000, X_Y)}, r"args\[0\]"),
    "other order": ({"args": (X[ORDER], X_Y[ORDER])}, r"args\[0\].*args\[1\].*observed 'y'"),
    "one number": ({"args": (X, X_Y + torch.eye(4)[2] * 1e-3)}, r"args\[1\]"),
    "another scale": ({"kwargs": {"scale": 3.0}}, r"kwargs\['scale'\] was 2.0 .*, now 3.0 "),
    "without scale": ({"kwargs": {}}, r"kwargs\['scale'\]"),
    "particles": ({"num_particles": 17}, "num_particles was 16, now 17"),
    "objective": ({"objective": ELBO(Reparameterised())}, "objective"),
    "seed": ({"seed": 4}, "seed was 0, now 4"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_14_a_fit_of_other_data_or_settings_is_not_resumed(change, named, tmp_path) -> None:
    options = {"args": (X, X_Y), "kwargs": {"scale": 2.0}, "max_steps": 4}
    options |= {"checkpoint": tmp_path / "fit"}
    fit(regression, **options)
    fit(regression, **options | {"args": (X.clone(), X_Y.clone())})  # the same data, elsewhere
    fit(regression, **options | {"max_steps": 6})  # more of the same
    content = options["checkpoint"].read_bytes()
    with pytest.raises(ValueError, match=f"other data or settings: .*{named}"):
        fit(regression, **options | change)
    assert options["checkpoint"].read_bytes() == content


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (closing_over(X_Y + 1), "observed 'y'"),
        (closing_over(X_Y[ORDER]), "observed 'y'"),
        (closing_over(X_Y, scale=5.0), "log density at 0"),
    ],
)
def test_14_data_of_a_closure_are_noticed(model, named, tmp_path) -> None:
    options = {"max_steps": 4, "checkpoint": tmp_path / "fit"}
    fit(closing_over(X_Y), **options)
    fit(closing_over(X_Y.clone()), **options)
    with pytest.raises(ValueError, match=named):
        fit(model, **options)


def test_14_the_number_of_particles_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    options = {"max_steps": 4, "checkpoint": tmp_path / "fit"}
    fit(conjugate, **options)
    assert "16 particles" in fit(conjugate, **options, num_particles=None).choice


def test_25_the_param_store_keeps_a_fit(tmp_path: Path) -> None:
    result = fit(conjugate)
    z = torch.linspace(-1, 1, 5).unsqueeze(-1)
    wanted = result.guide.get_posterior().log_prob(z).detach()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = AutoFlow(conjugate, small).setup()
    torch.testing.assert_close(fresh.get_posterior().log_prob(z).detach(), wanted)


def test_25_what_is_printed_is_short() -> None:
    result = fit(conjugate)
    posterior = result.posterior(50)
    for thing in (result, result.history, result.joint, posterior, result.guide, AutoFlow(skewed)):
        assert repr(thing) == str(thing)
        assert len(repr(thing)) < 1000
        assert repr(thing).startswith(type(thing).__name__)
    assert "60 steps" in repr(result)
    assert "50 draws" in repr(posterior)
    assert "mu ()" in repr(result.joint)


def test_25_no_parameters_before_setup_is_said() -> None:
    guide = AutoFlow(conjugate)
    with pytest.warns(UserWarning, match=r"no parameters before guide\.setup"):
        assert not list(guide.parameters())
    assert list(guide.setup().parameters())
