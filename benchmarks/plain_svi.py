"""The guide in Pyro's own SVI: ELBO after equal steps, and process seconds of a step.

    python -m benchmarks.plain_svi [--steps 1000] [--seeds 3] [--rate 0.01] [--decay 0.01]
        [--smoke]

All guides get the same optimiser: ClippedAdam from ``rate`` down to ``decay`` times it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal
from torch import Tensor

from pyro_nf import AutoFlow

GUIDES: dict[str, Callable[..., Any]] = {
    "AutoFlow": AutoFlow,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
}


def noise(*shape: int) -> Tensor:
    """Fixed standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X = noise(100, 5)
SLOPES = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
GRID = torch.linspace(-2, 2, 30)
CURVE = torch.sin(2 * GRID) + 0.2 * noise(30)


def logistic() -> None:
    """Logistic regression on five columns."""
    b = pyro.sample("b", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    y = (noise(100) < X @ SLOPES).float()
    with pyro.plate("rows", 100):
        pyro.sample("y", dist.Bernoulli(logits=X @ b), obs=y)


def linear() -> None:
    """Linear regression with an unknown scale."""
    b = pyro.sample("b", dist.Normal(torch.zeros(5), 5.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("rows", 100):
        pyro.sample("y", dist.Normal(X @ b, sigma), obs=X @ SLOPES + 0.5 * noise(100))


def covariance() -> None:
    """A covariance of three columns under an LKJ prior."""
    L = pyro.sample("L", dist.LKJCholesky(3, torch.tensor(2.0)))
    scale = pyro.sample("scale", dist.HalfCauchy(torch.full((3,), 2.0)).to_event(1))
    rows = noise(60, 3) @ torch.tensor([[1.0, 0.7, -0.3], [0.0, 1.2, 0.3], [0.0, 0.0, 0.5]])
    with pyro.plate("rows", 60):
        L_y = scale.unsqueeze(-1) * L
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=L_y), obs=rows)


def gaussian_process() -> None:
    """Hyperparameters of a Gaussian process."""
    rho = pyro.sample("rho", dist.Gamma(5.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (GRID.unsqueeze(-1) - GRID).square()
    K = alpha**2 * torch.exp(-distance / (2 * rho**2)) + (sigma**2 + 1e-4) * torch.eye(30)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(30), K), obs=CURVE)


def network() -> None:
    """A Bayesian neural network with five hidden units."""
    w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    v = pyro.sample("v", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", 30):
        mean = torch.tanh(GRID.unsqueeze(-1) * w + b) @ v
        pyro.sample("y", dist.Normal(mean, sigma), obs=CURVE)


MODELS = [logistic, linear, covariance, gaussian_process, network]


def trained(
    name: str, model: Callable[[], None], steps: int, rate: float, decay: float, seed: int
) -> SVI:
    """An SVI of that guide after so many steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    optimiser = pyro.optim.ClippedAdam({"lr": rate, "lrd": decay ** (1 / max(steps, 1))})
    svi = SVI(model, GUIDES[name](model), optimiser, Trace_ELBO())
    for _ in range(steps):
        svi.step()
    return svi


def milliseconds(model: Callable[[], None], steps: int, rounds: int = 10) -> dict[str, float]:
    """The shortest process milliseconds of a step of each guide, in turn."""
    shortest = dict.fromkeys(GUIDES, float("inf"))
    for _ in range(rounds):
        for name in GUIDES:
            svi = trained(name, model, 2, 1e-3, 1.0, seed=0)
            began = time.process_time()
            for _ in range(steps):
                svi.step()
            seconds = (time.process_time() - began) / steps
            shortest[name] = min(shortest[name], 1e3 * seconds)
    return shortest


def main() -> None:
    """Prints one line for each model and guide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--decay", type=float, default=1e-2)
    parser.add_argument("--smoke", action="store_true", help="run on tiny sizes")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.seeds, options.draws = 3, 1, 3
    torch.set_num_threads(1)
    print(f"{'model':18s}{'guide':24s}{'ms a step':>10s}  ELBO of each seed")
    for model in MODELS:
        cost = milliseconds(model, min(options.steps, 20), 1 if options.smoke else 10)
        for name in GUIDES:
            elbos = []
            for seed in range(options.seeds):
                svi = trained(name, model, options.steps, options.rate, options.decay, seed)
                many = Trace_ELBO(num_particles=options.draws)
                elbos.append(-many.loss(svi.model, svi.guide))
            found = " ".join(f"{elbo:9.2f}" for elbo in elbos)
            print(f"{model.__name__:18s}{name:24s}{cost[name]:10.2f}  {found}", flush=True)


if __name__ == "__main__":
    main()
