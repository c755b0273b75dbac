"""Fits in threads, and under whatever the user has set around them."""

import contextlib
import copy
import multiprocessing
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import runtime
from torch import nn

from pyro_nf import AutoFlow, Posterior, fit_density, fit_svi, flows
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.student import StudentT
from pyro_nf.model.joint import LogJoint
from pyro_nf.ops.gradients import derivative
from pyro_nf.testing import points, randomize
from pyro_nf.train.loop import train
from pyro_nf.train.modes import exclusive
from pyro_nf.train.stages import Stage, adam
from pyro_nf.transforms.coupling import Coupling
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.spline import RationalQuadratic
from pyro_nf.vi.objectives import ELBO

Y = torch.tensor([1.0, 2.5, 0.5])


def model(y: torch.Tensor = Y) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def small(dim: int) -> Flow:
    return flows.iaf(dim, count_layers=1, hidden_dims=(4,))


def table(shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(200, 2, generator=torch.Generator().manual_seed(1))


def fixed(flow: Flow) -> Flow:
    """Weights that are the same in every process, away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return flow


FLOW = fixed(flows.realnvp(2, count_layers=2, hidden_dims=(8,)))
DROPPING = fixed(
    Flow(Coupling(Affine(), 2, hidden_dims=(8, 8), activation=lambda: nn.Dropout(0.5)))
)


def density(shift: float = 0.0, flow: Flow = FLOW) -> torch.Tensor:
    with torch.inference_mode(False):  # or else it could not be trained
        flow = copy.deepcopy(flow)  # to make one draws from the global generators
    fit_density(flow, table(shift), max_steps=30, check_every=10, progress=False)
    with torch.autocast("cpu", enabled=False):  # outside of a fit the user decides
        return flow.eval()().log_prob(table(shift)[:20]).detach().clone()


def svi(y: torch.Tensor = Y) -> torch.Tensor:
    fit = fit_svi(model, AutoFlow(model, small), (y,), max_steps=20, progress=False)
    return fit.posterior(50).log_weights.clone()


def in_threads(*jobs: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """The results of jobs that begin at the same moment, each in a thread of its own."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(i: int, job: Callable[[], torch.Tensor]) -> None:
        barrier.wait(timeout=30)
        try:
            results[i] = job()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def global_state() -> tuple[object, ...]:
    return (
        dist.Normal._validate_args,
        torch.distributions.Distribution._validate_args,
        len(runtime._PYRO_STACK),
        list(warnings.filters),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.is_grad_enabled(),
    )


def test_16_fits_in_threads_are_the_fits_alone_and_leave_the_process_as_it_was() -> None:
    alone = [svi(), svi(Y + 1), density(), density(5.0)]
    before = global_state()
    together = in_threads(svi, lambda: svi(Y + 1), density, lambda: density(5.0))
    assert global_state() == before
    for got, wanted in zip(together, alone, strict=True):
        assert torch.equal(got, wanted)


def test_16_posteriors_in_threads() -> None:
    fit = fit_svi(model, AutoFlow(model, small), max_steps=20, progress=False)
    jobs = [
        lambda: fit.posterior(100).z,
        lambda: fit.posterior(100).predictive()["y"],
        lambda: fit.joint.log_prob(torch.zeros(5, 2)).detach(),
        lambda: fit.posterior(60).refine("independence", num_draws=5, warmup=5, progress=False).z,
        lambda: torch.tensor(fit.posterior(200).diagnose().log_evidence),
    ]
    alone = [job() for job in jobs]
    before = global_state()
    for got, wanted in zip(in_threads(*jobs), alone, strict=True):
        assert torch.equal(got, wanted)
    assert global_state() == before


def test_16_a_flow_with_dropout_draws_but_is_the_same_in_a_thread() -> None:
    def job() -> torch.Tensor:
        return density(flow=DROPPING)

    alone = job()
    before = global_state()
    for got in in_threads(job, job, density)[:2]:
        assert torch.equal(got, alone)
    assert global_state() == before


@contextlib.contextmanager
def busy():
    """Another thread has its turn."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive():
            inside.set()
            leave.wait(timeout=60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(timeout=60)
    try:
        yield
    finally:
        leave.set()
        holder.join(timeout=60)


@pytest.mark.parametrize("call", ["log_likelihood", "predictive", "to_arviz"])
def test_16_whatever_runs_a_model_waits_for_its_turn(call) -> None:
    posterior = fitted().posterior(20)
    if call == "to_arviz":
        pytest.importorskip("arviz")
    runs = threading.Event()

    def watched(y: torch.Tensor = Y) -> None:
        runs.set()
        model(y)

    posterior = replace(posterior, joint=copy.copy(posterior.joint))
    posterior.joint.model = watched
    job = getattr(posterior, call)
    thread = threading.Thread(target=job)
    with busy():
        thread.start()
        assert not runs.wait(timeout=0.2)
    thread.join(timeout=60)
    assert runs.is_set()


def test_16_a_forked_process_has_its_own_turn() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    with busy():
        child = multiprocessing.get_context("fork").Process(target=_enter)
        child.start()
        child.join(timeout=20)
        child.kill()
        child.join(timeout=20)
    assert child.exitcode == 0


def _enter() -> None:
    with exclusive():
        pass


def test_16_an_error_in_one_thread_changes_nothing_for_the_others() -> None:
    def broken() -> torch.Tensor:
        def bad() -> None:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, -1.0), obs=torch.tensor(0.0))

        with contextlib.suppress(ValueError):
            fit_svi(bad, max_steps=5, progress=False)
        return torch.zeros(1)

    wanted, before = svi(), global_state()
    assert torch.equal(in_threads(broken, svi, broken)[1], wanted)
    assert global_state() == before


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad off": lambda: torch.set_grad_enabled(False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def straight_line() -> torch.Tensor:
    line = nn.Linear(1, 1)
    with torch.no_grad():
        line.weight.fill_(0.3)
        line.bias.fill_(0.1)
    x = torch.linspace(-1, 1, 8)[:, None]
    stage = Stage(lambda _: (line(x) - 3 * x).square().mean(), adam(line.parameters(), 0.1))
    train(line, stage, max_steps=20, progress=False)
    return line.weight.detach().clone()


def regression() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    rows = torch.linspace(-1, 1, 20).reshape(10, 2)
    pyro.sample("y", dist.Normal(rows @ w, 0.01).to_event(1), obs=torch.ones(10))


def root() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("root", torch.where(x > 0, x.sqrt(), torch.zeros(())))  # the slope below 0 is NaN


def spline_arguments() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.linspace(-2, 2, 6), torch.randn(
        6, RationalQuadratic(4).num_params, generator=generator
    )


def scores() -> torch.Tensor:
    x = torch.linspace(-1, 1, 6).reshape(3, 2)
    return FLOW.transform.push_score(x, -x)[2]


FIT = None


def fitted():
    global FIT
    FIT = FIT or fit_svi(model, AutoFlow(model, small), max_steps=20, progress=False)
    return FIT


DOORS: dict[str, Callable[[], torch.Tensor]] = {
    "fit_svi": svi,
    "fit_density": density,
    "posterior": lambda: fitted().posterior(50).z,
    "refine": lambda: (
        fitted().posterior(50).refine("independence", num_draws=4, warmup=4, progress=False).z
    ),
    "neutra": lambda: (
        fitted()
        .posterior(50)
        .refine("neutra", num_chains=1, num_draws=4, warmup=4, progress=False)
        .z
    ),
    "diagnose": lambda: torch.tensor(fitted().posterior(100).diagnose().log_evidence),
    "predictive": lambda: fitted().posterior(50).predictive()["y"],
    "from_guide": lambda: Posterior.from_guide(fitted().guide, num_draws=20, args=(Y,)).z,
    "value_and_grad": lambda: LogJoint(model).value_and_grad(torch.ones(3, 2))[1],
    "hessian": lambda: LogJoint(model).hessian(torch.ones(3, 2)),
    "setup": lambda: AutoFlow(model, small).setup().latent_dim * torch.ones(1),
    "push_score": scores,
    "base score": lambda: StudentT(2).log_prob_and_score(torch.ones(3, 2))[1],
    "slopes": lambda: RationalQuadratic(4).slopes(*spline_arguments()).ladj_params,
    "derivative": lambda: derivative(nn.Softplus(), torch.linspace(-2, 2, 5)),
    "log_prob": lambda: LogJoint(regression).log_prob(torch.ones(3, 2)),
    "failing gradients": lambda: LogJoint(root).value_and_grad(torch.tensor([[-1.0], [1.0]]))[1],
    "log_likelihood": lambda: fitted().posterior(50).log_likelihood()["y"],
}
# It evaluates the user's flow, in the precision that the user asks for.
IN_ANOTHER_PRECISION = ("push_score", "autocast")
PAIRS = [pair for pair in product(DOORS, MODES) if pair != IN_ANOTHER_PRECISION]


@pytest.mark.parametrize(("door", "mode"), PAIRS)
def test_17_every_door_works_in_every_mode(door, mode, recwarn) -> None:
    fitted()
    wanted = DOORS[door]().detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with MODES[mode]():
            got = DOORS[door]()
    torch.testing.assert_close(got.detach().clone(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.is_grad_enabled()
    assert not torch.is_anomaly_enabled()


def test_17_copies_and_loaded_flows_of_inference_mode_can_learn(tmp_path) -> None:
    def learned(flow: Flow) -> torch.Tensor:
        x = table().double()
        fit_density(flow, x, max_steps=30, check_every=10, progress=False)
        return flow.log_prob(x[:20]).detach()

    path, flow = tmp_path / "flow.safetensors", copy.deepcopy(FLOW).double()
    flow.save(path)
    guide = AutoFlow(model, small).setup()
    with torch.inference_mode():
        copied, loaded, guide = copy.deepcopy(flow), Flow.load(path), copy.deepcopy(guide)
    for made, outside in ((copied, flow), (loaded, Flow.load(path))):
        torch.testing.assert_close(learned(made), learned(outside), rtol=1e-9, atol=1e-9)
    fit_svi(model, guide, (Y,), max_steps=5, progress=False)


def test_17_a_line_is_trained_in_every_mode_and_stays_trainable() -> None:
    wanted = straight_line()
    for mode in ("no_grad", "grad off", "anomaly"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
            with MODES[mode]():
                assert torch.equal(straight_line(), wanted)


def test_17_what_torch_cannot_do_in_inference_mode_is_said() -> None:
    with torch.inference_mode():
        data, made = table(), flows.realnvp(2, count_layers=2, hidden_dims=(8,))
        with pytest.raises(RuntimeError, match=r"fit_density|train: .*inference_mode"):
            fit_density(made, data, max_steps=5, progress=False)
    flow = flows.realnvp(2, count_layers=2, hidden_dims=(8,))
    fit_density(flow, data, max_steps=5, progress=False)  # data made in that mode are fine
    with torch.inference_mode():
        y = Y.clone()
    fit_svi(model, AutoFlow(model, small), (y,), max_steps=5, progress=False, objective=ELBO())


def test_17_a_model_with_parameters_is_found_out_without_gradients() -> None:
    def learns() -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(0.0, scale))

    with torch.no_grad(), pytest.raises(ValueError, match="learnable parameters"):
        fit_svi(learns, max_steps=5, progress=False)


@pytest.mark.parametrize("recipe", ["planar", "maf", "iaf", "nsf"])
def test_17_scores_are_pushed_under_anomaly_detection(recipe):
    flow = randomize(getattr(flows, recipe)(3)).double()
    x = points(dist.constraints.real, (5, 3))
    wanted = flow.transform.push_score(x, -x)
    torch.autograd.set_detect_anomaly(True)
    try:
        got = flow.transform.push_score(x, -x)
        assert torch.is_anomaly_enabled()
    finally:
        torch.autograd.set_detect_anomaly(False)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
