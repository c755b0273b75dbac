"""The eight schools, centred: a funnel, and the flow posterior that follows it.

Eight schools coached their pupils for a test. Each reports the effect of its coaching and the
standard error of that effect (Rubin, *Estimation in Parallel Randomized Experiments*, 1981):

    mu ~ Normal(0, 5),  tau ~ HalfCauchy(5)
    theta_i ~ Normal(mu, tau),  y_i ~ Normal(theta_i, sigma_i)

Where tau is small all theta_i must be near mu, so the posterior narrows to a neck that a Gaussian
guide cannot follow. Writes two pictures.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_nf as nf
from pyro_nf.plots import loss_curve, pair_plot, weights_plot
from pyro_nf.posterior.weights import khat_in_words

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def main(argv: Sequence[str] | None = None) -> nf.Posterior:
    parser = argparse.ArgumentParser(description="Fit a flow posterior to the eight schools.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where pictures go")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)

    start = time.process_time()
    fit = nf.fit_svi(
        model,
        args=(STANDARD_ERRORS, EFFECTS),
        max_steps=20 if options.smoke else None,
        seed=options.seed,
        progress=not options.smoke,
    )
    posterior = fit.posterior(200 if options.smoke else options.draws, seed=options.seed)
    seconds = time.process_time() - start

    print(f"Centred eight schools: {fit.history.steps} steps, {seconds:.0f} s of CPU\n")
    print(posterior.summary(weighted=True))
    weights = posterior.weights
    print(f"""
ELBO                   {weights.elbo:8.3f} ± {weights.elbo_se:.3f}
log evidence           {weights.log_evidence:8.3f} ± {weights.log_evidence_se:.3f}
PSIS k-hat             {khat_in_words(weights.khat):>8}
effective sample size  {weights.ess:8.0f} of {len(posterior)} draws""")

    if not options.smoke:
        print(f"\nVerdict: {posterior.diagnose()}")

    draws = posterior.resample(seed=options.seed).samples
    pictures = {
        "eight_schools.png": pair_plot({"mu": draws["mu"], "log tau": draws["tau"].log()}),
        "loss.png": loss_curve(fit.history, ylabel="-ELBO"),
        "weights.png": weights_plot(weights),
    }
    for name, figure in pictures.items():
        figure.savefig(options.output / name)
    print(f"\nPictures: {', '.join(str(options.output / name) for name in pictures)}")
    return posterior


if __name__ == "__main__":
    main()
