"""The density of two moons, from 10,000 points.

Fits a neural spline flow by maximum likelihood, prints how many nats it needs for a point that it
has not seen beside what the true density needs, and draws data, samples and density side by side.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import Tensor

import pyro_nf as nf
from pyro_nf.plots import loss_curve, plot_density

NOISE = 0.05


def moons(count: int, seed: int) -> Tensor:
    return torch.from_numpy(make_moons(count, noise=NOISE, random_state=seed)[0]).float()


def true_log_prob(y: Tensor, count: int = 500) -> Tensor:
    """A point uniform on one of the two half circles, moved by Gaussian noise."""
    t = (torch.arange(count) + 0.5) * math.pi / count
    upper = torch.stack((t.cos(), t.sin()), -1)
    lower = torch.stack((1 - t.cos(), 0.5 - t.sin()), -1)
    distance = torch.cdist(y, torch.cat((upper, lower)))
    log_normal = -0.5 * (distance / NOISE).square() - math.log(2 * math.pi * NOISE**2)
    return log_normal.logsumexp(-1) - math.log(2 * count)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Fit a flow to two moons.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where pictures go")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)

    train, test = moons(500 if options.smoke else 10_000, seed=0), moons(10_000, seed=1)
    start = time.process_time()
    fit = nf.fit_density(
        nf.flows.nsf(2),
        train,
        max_steps=40 if options.smoke else None,
        max_seconds=options.seconds,
        seed=options.seed,
        progress=not options.smoke,
    )
    seconds = time.process_time() - start

    with torch.no_grad():
        nll = -fit.flow().log_prob(test).mean().item()
    print(f"Two moons: {fit.history.steps} steps, {seconds:.0f} s of CPU")
    print(fit)
    print(f"test NLL of the flow          {nll:.3f} nats")
    print(f"test NLL of the true density  {-true_log_prob(test).mean().item():.3f} nats")

    pictures = {
        "two_moons.png": plot_density(fit.flow, train),
        "two_moons_loss.png": loss_curve(fit.history, ylabel="NLL"),
    }
    for name, figure in pictures.items():
        figure.savefig(options.output / name)
    print(f"Pictures: {', '.join(str(options.output / name) for name in pictures)}")
    return nll


if __name__ == "__main__":
    main()
