"""What a posterior costs: steps, time to trust, chains, a thousand dimensions.

    python -m benchmarks.posterior_costs [step] [time] [neutra] [big] [--json FILE] [--smoke]

Every figure is measured in process CPU seconds on one thread, readings in turn. `big` alone counts
wall seconds and the memory of the whole process, so it comes first.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import cast

import arviz
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from benchmarks import models
from benchmarks.posteriors import OutOfTime
from benchmarks.timing import Figure, add_to, interleave, one_thread, ratio, table
from pyro_nf.flows.flow import Flow
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.refine import Chains, neutra
from pyro_nf.sites.latents import init_anywhere
from pyro_nf.train.stages import adam
from pyro_nf.transforms.affine import FixedAffine
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.chain import Chain
from pyro_nf.univariate.affine import Affine
from pyro_nf.vi.fit import fit_svi
from pyro_nf.vi.gradients import Reparameterised, StickTheLanding
from pyro_nf.vi.objectives import ELBO
from pyro_nf.vi.stages import Step
from tests.reference_models import exact_targets

BUDGETS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
# NUTS is ended when it has taken so many times our seconds, and no less than LEAST_NUTS seconds.
ENOUGH, LEAST_NUTS = 20, 60.0
MEBIBYTE = 2**10  # in the kibibytes of getrusage


def two_layers(dim: int) -> Chain:
    """As many layers as AutoIAFNormal has here; the affine part is the guide's."""
    return Chain(
        Autoregressive(Affine(), dim, hidden_dims=(64,), reverse=turn, fast="forward")
        for turn in (False, True)
    )


def svi_step(smoke: bool) -> list[Figure]:
    """One step of inverse autoregressive guides of two layers of 64 units on eight schools."""
    r = models.reference("eight_schools_centred")
    figures = []
    for count, must, aim in ((1, 0.55, 0.3), (16, 0.5, 0.25)):
        calls: dict[str, Callable[[], object]] = {}
        for name, gradient, compile in (
            ("ours", StickTheLanding(), False),
            ("ours, plain", Reparameterised(), False),
            ("ours, compiled", Reparameterised(), not smoke),
        ):
            guide = AutoFlow(r.model, two_layers)
            guide.setup(*r.args)
            joint = LogJoint(r.model, r.args)
            joint.record(count, max_seconds=20.0, compile=compile)
            calls[name] = _training_step(guide.flow, joint, ELBO(gradient), count)
        pyro.clear_param_store()
        theirs = AutoIAFNormal(r.model, hidden_dim=[64], num_transforms=2)
        loss = Trace_ELBO(num_particles=count, vectorize_particles=count > 1)
        svi = SVI(r.model, theirs, pyro.optim.ClippedAdam({"lr": 1e-3}), loss)
        calls["AutoIAFNormal"] = lambda svi=svi: svi.step(*r.args)
        times = interleave(calls, rounds=1 if smoke else 7)
        peer = {"AutoIAFNormal": times["AutoIAFNormal"]}
        title = f"SVI step, {count} particle(s)"
        figures.append(ratio(title, times["ours"], peer, must, aim))
        figures.append(ratio(f"{title}, plain gradient", times["ours, plain"], peer, must, aim))
        title = f"{title}, plain gradient, compiled log joint"
        figures.append(ratio(title, times["ours, compiled"], peer, must, aim))
    return figures


def _training_step(
    flow: Flow, joint: LogJoint, objective: ELBO, count: int
) -> Callable[[], object]:
    loss, optimizer = Step(flow, joint, objective, count), adam(flow.parameters(), 1e-3)
    parameters = list(flow.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    return step


def time_to_trust(smoke: bool) -> list[Figure]:
    """Seconds of the shortest fit with k-hat < 0.7 over those of Pyro's NUTS, 500 + 1000 draws."""
    figures = []
    for name in models.NAMES[-1:] if smoke else models.NAMES:
        r = models.reference(name)
        for budget in BUDGETS:
            begin = time.process_time()
            fit = fit_svi(
                r.model, args=r.args, max_seconds=budget, progress=False, clock=time.process_time
            )
            ours = time.process_time() - begin
            if fit.posterior(10_000).khat < 0.7:
                break
        else:
            ours = math.inf
        longest = 1.0 if smoke else max(LEAST_NUTS, ENOUGH * ours)
        theirs, ended = _seconds_of_nuts(r, longest)
        more = "" if ended else "more than "
        detail = f"ours {ours:.1f} s, NUTS {more}{theirs:.1f} s"
        figures.append(
            Figure(f"time to k-hat < 0.7, {name}", ours / theirs, 0.25, 0.1, None, detail)
        )
        print(f"{name}: {detail}", file=sys.stderr, flush=True)
    middle = median(f.value for f in figures)
    return [*figures, Figure("time to k-hat < 0.7, median", middle, 0.25, 0.1)]


def _seconds_of_nuts(r: models.Reference, longest: float) -> tuple[float, bool]:
    """What 500 + 1000 draws took, and whether they ended in time."""
    pyro.set_rng_seed(0)
    # Pyro draws flat priors when it first runs a model; they have none, so they get a value.
    init = init_anywhere(init_to_median)
    kernel = NUTS(InitMessenger(init)(r.model), init_strategy=init)
    begin = time.process_time()

    def watch(*_: object) -> None:
        if time.process_time() - begin > longest:
            raise OutOfTime

    mcmc = MCMC(kernel, 1000, warmup_steps=500, disable_progbar=True, hook_fn=watch)
    ended = True
    try:
        mcmc.run(*r.args)
    except OutOfTime:
        ended = False
    return time.process_time() - begin, ended


def chains(smoke: bool) -> list[Figure]:
    """Gradients for an effective draw: NUTS in a flow's coordinates over NUTS in the plain ones."""
    eight = models.reference("eight_schools_centred")
    funnel = next(t for t in exact_targets() if t.name == "funnel")
    num_draws, warmup = (20, 10) if smoke else (500, 300)
    figures = []
    for name, model, args in (
        ("eight_schools_centred", eight.model, eight.args),
        ("funnel", funnel.model, ()),
    ):
        seconds = 1.0 if smoke else 10.0
        fit = fit_svi(
            model, args=args, max_seconds=seconds, progress=False, clock=time.process_time
        )
        joint, q = fit.joint, fit.guide.get_posterior()
        joint.record(1, max_seconds=20.0)
        starts = fit.posterior(1000).resample(2).z
        dim = joint.latent_dim
        plain = Flow(FixedAffine(torch.zeros(dim), torch.ones(dim)))()
        costs = []
        for law in (q, plain):
            pyro.set_rng_seed(0)
            with torch.no_grad():
                x = law.transform.inverse_and_ladj(starts)[0]
            run = neutra(joint, law, x, num_draws=num_draws, warmup=warmup, progress=False)
            costs.append(run.count_gradients / _least_ess(run))
        detail = f"NeuTra {costs[0]:.1f}, plain {costs[1]:.1f} gradients for an effective draw"
        title = f"NeuTra NUTS over plain NUTS, {name}"
        figures.append(Figure(title, costs[0] / costs[1], 1 / 3, 0.1, None, detail))
    return figures


def _least_ess(run: Chains) -> float:
    z = run.z.reshape(run.chains, -1, run.z.shape[-1]).double().numpy()
    return min(float(arviz.ess(z[..., i])) for i in range(z.shape[-1]))


def regression(X: Tensor, group: Tensor, y: Tensor, count_groups: int) -> None:
    """A linear regression whose coefficients differ from group to group."""
    dim = X.shape[-1]
    mu = pyro.sample("mu", dist.Normal(X.new_zeros(dim), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(X.new_ones(dim)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(X.new_ones(())))
    shape = (count_groups, dim)
    eps = pyro.sample("eps", dist.Normal(X.new_zeros(shape), 1.0).to_event(2))
    beta = mu.unsqueeze(-2) + tau.unsqueeze(-2) * eps
    mean = (beta[..., group, :] * X).sum(-1)
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def big(smoke: bool) -> list[Figure]:
    """A hierarchical regression with 1,101 latents: minutes and memory."""
    count_groups, dim, rows = (3, 5, 60) if smoke else (20, 50, 2000)
    g = torch.Generator().manual_seed(0)
    X = torch.randn(rows, dim, generator=g)
    group = torch.arange(rows) % count_groups
    mu = torch.randn(dim, generator=g)
    beta = mu + 0.5 * torch.randn(count_groups, dim, generator=g)
    y = (beta[group] * X).sum(-1) + 0.5 * torch.randn(rows, generator=g)
    begin = time.monotonic()
    args = (X, group, y, count_groups)
    fit = fit_svi(regression, args=args, max_seconds=2 if smoke else 120, progress=False)
    seconds = time.monotonic() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBIBYTE / 1024
    posterior = fit.posterior(1000)
    s = posterior.samples
    mine = s["mu"].unsqueeze(-2) + s["tau"].unsqueeze(-2) * s["eps"]
    score = ((mine.mean(0) - beta) / mine.std(0)).square().mean().sqrt()
    error = (mine.mean(0) - beta).square().mean().sqrt()
    detail = (
        f"{fit.choice}, {fit.history.steps} steps, ELBO of the start "
        f"{cast(float, getattr(fit.start, 'elbo', math.nan)):.0f}, of the fit "
        f"{posterior.elbo:.0f}; true coefficients within {float(score):.2f} posterior sds, "
        f"{float(error):.2f} (root mean square)"
    )
    return [
        Figure("hierarchical regression, 1,101 latents: minutes", seconds / 60, 5.0, detail=detail),
        Figure("hierarchical regression, 1,101 latents: GiB", memory, 2.0),
    ]


PARTS: dict[str, Callable[[bool], list[Figure]]] = {
    "big": big,
    "step": svi_step,
    "time": time_to_trust,
    "neutra": chains,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures the parts that are named.

    Args:
        arguments: As on the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", type=Path, help="file that the figures are added to")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    one_thread()
    warnings.simplefilter("ignore")
    for part in options.parts or PARTS:
        figures = PARTS[part](options.smoke)
        print(table(figures), flush=True)
        if options.json:
            add_to(options.json, part, figures, f"python -m benchmarks.posterior_costs {part}")


if __name__ == "__main__":
    main()
