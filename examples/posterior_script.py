"""A Bayesian regression, its posterior by four guides and by NUTS, side by side.

Ten measurements of 442 patients and the progress of their diabetes a year later (Efron, Hastie,
Johnstone, Tibshirani, *Least Angle Regression*, 2004):

    tau ~ HalfCauchy(1),  beta_j ~ Normal(0, tau)
    sigma ~ HalfNormal(1),  y ~ Normal(X beta, sigma)

Some of the measurements say nearly the same (the serum values s1 to s5), so their coefficients
depend strongly on each other in the posterior.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import arviz
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_diabetes
from torch import Tensor

import pyro_nf as nf
from pyro_nf.plots import pair_plot

DRAWS = 2000


def model(X: Tensor, y: Tensor | None = None) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("features", X.shape[1]):
        beta = pyro.sample("beta", dist.Normal(0.0, tau))
    with pyro.plate("patients", len(X)):
        pyro.sample("y", dist.Normal(beta @ X.T, sigma), obs=y)


@dataclass
class Result:
    """Draws of one method, and what is known of them."""

    name: str
    samples: dict[str, Tensor]
    seconds: float
    posterior: nf.Posterior | None = None

    def __str__(self) -> str:
        s1 = self.samples["beta"][:, 4]
        tau = self.samples["tau"]
        numbers = f"{s1.mean():7.3f} {s1.std():6.3f} {tau.mean():7.3f} {tau.std():6.3f}"
        p = self.posterior
        weights = f"{p.elbo:9.2f} {p.khat:6.2f} {p.ess:6.0f}" if p else f"{'':>9} {'':>6} {'':>6}"
        return f"{self.name:<23} {numbers} {weights} {self.seconds:6.1f}"


def by_svi(guide_class: Callable, args: tuple, steps: int) -> Result:
    """One of Pyro's guides, 16 particles a step, a learning rate that falls to a tenth."""
    start = time.process_time()
    guide = guide_class(model)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
    posterior = nf.Posterior.from_guide(guide, model, args, num_draws=DRAWS)
    return Result(guide_class.__name__, posterior.samples, time.process_time() - start, posterior)


def by_flow(args: tuple, steps: int | None, seed: int) -> Result:
    start = time.process_time()
    fit = nf.fit_svi(model, args=args, max_steps=steps, seed=seed, progress=False)
    posterior = fit.posterior(DRAWS, seed=seed)
    return Result("AutoFlow (fit_svi)", posterior.samples, time.process_time() - start, posterior)


def by_nuts(args: tuple, draws: int) -> Result:
    start = time.process_time()
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=draws // 2, disable_progbar=True)
    mcmc.run(*args)
    return Result("NUTS", mcmc.get_samples(), time.process_time() - start)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description="Compare posteriors of a regression.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where the picture goes")
    parser.add_argument("--steps", type=int, default=2000, help="of each of Pyro's guides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    steps = 5 if options.smoke else options.steps

    data = load_diabetes(scaled=False)
    X, y = (torch.from_numpy((a - a.mean(0)) / a.std(0)).float() for a in (data.data, data.target))
    args = (X, y)

    print(f"{'':<23} {'beta[s1]':^14} {'tau':^14}")
    print(
        f"{'':<23} {'mean':>7} {'sd':>6} {'mean':>7} {'sd':>6} {'ELBO':>9} {'k-hat':>6} "
        f"{'ESS':>6} {'CPU s':>6}"
    )
    results = []
    for guide_class in (AutoNormal, AutoMultivariateNormal, AutoIAFNormal):
        pyro.set_rng_seed(options.seed)
        pyro.clear_param_store()
        results.append(by_svi(guide_class, args, steps))
        print(results[-1])
    results.append(by_flow(args, 20 if options.smoke else None, options.seed))
    print(results[-1])
    pyro.set_rng_seed(options.seed)
    results.append(by_nuts(args, 10 if options.smoke else 1000))
    print(results[-1])

    *_, flow, nuts = results
    assert flow.posterior is not None
    idata = flow.posterior.resample().to_arviz(
        coords={"feature": data.feature_names}, dims={"beta": ["feature"]}
    )
    print("\nAutoFlow, its draws resampled by their weights, in arviz:")
    print(arviz.summary(idata, kind="stats"))

    def shown(samples: dict[str, Tensor]) -> dict[str, Tensor]:
        s1, s2, s5 = samples["beta"][:, [4, 5, 8]].unbind(1)
        return {"s1": s1, "s2": s2, "s5": s5, "log tau": samples["tau"].log()}

    figure = pair_plot(shown(flow.samples), shown(nuts.samples), label="NUTS")
    figure.savefig(options.output / "posterior_script.png")
    print(f"\nPicture: {options.output / 'posterior_script.png'}")
    return results


if __name__ == "__main__":
    main()
