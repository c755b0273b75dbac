"""Pyro models of the posteriors with reference draws, and the loader of their data.

The folder is `PYRO_NF_DATA/posteriors`, or `../shared/data/posteriors` from the project's root.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Arrays = dict[str, np.ndarray]


def data_folder() -> Path:
    """The folder of reference data.

    Raises:
        FileNotFoundError: it is absent.
    """
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("PYRO_NF_DATA", root.parent / "shared" / "data"))
    if not (folder / "posteriors").is_dir():
        raise FileNotFoundError(
            f"no reference posteriors in {folder}: set PYRO_NF_DATA to the folder that holds them."
        )
    return folder


def flat(support: constraints.Constraint, *event_shape: int) -> dist.Distribution:
    return dist.ImproperUniform(support, (), event_shape)


def eight_schools_centred(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentred(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("J", len(y)):
        theta_raw = pyro.sample("theta_raw", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_raw, sigma), obs=y)


def arma11(y: Tensor) -> None:
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 10.0))
    phi = pyro.sample("phi", dist.Normal(zero, 2.0))
    theta = pyro.sample("theta", dist.Normal(zero, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(zero + 2.5))
    err = [y[0] - (mu + phi * mu)]
    for t in range(1, len(y)):
        err.append(y[t] - (mu + phi * y[t - 1] + theta * err[t - 1]))
    pyro.sample("err", dist.Normal(0.0, sigma.unsqueeze(-1)).to_event(1), obs=torch.stack(err, -1))


def kilpisjarvi(x: Tensor, y: Tensor, prior: tuple[float, float, float, float]) -> None:
    zero = y.new_zeros(())
    alpha = pyro.sample("alpha", dist.Normal(zero + prior[0], prior[1]))
    beta = pyro.sample("beta", dist.Normal(zero + prior[2], prior[3]))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def linear_regression(X: Tensor, y: Tensor) -> None:
    """Flat priors on the coefficients and on the scale."""
    beta = pyro.sample("beta", flat(constraints.real_vector, X.shape[-1]))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(beta @ X.T, sigma), obs=y)


def hmm_drive(u: Tensor, v: Tensor, alpha: Tensor, tau: float, rho: float) -> None:
    """Two hidden states, marginalised by the forward algorithm."""
    loc = u.new_tensor([0.0, 3.0])
    ordered = constraints.ordered_vector
    theta1 = pyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = pyro.sample("phi", dist.ImproperUniform(ordered, (), (2,)))
    lambda_ = pyro.sample("lambda", dist.ImproperUniform(ordered, (), (2,)))
    pyro.factor("prior", dist.Normal(loc, 1.0).log_prob(torch.stack([phi, lambda_])).sum((0, -1)))
    log_theta = torch.stack([theta1, theta2], -2).log()
    emission = dist.Normal(phi.unsqueeze(-2), tau).log_prob(u.unsqueeze(-1))
    emission = emission + dist.Normal(lambda_.unsqueeze(-2), rho).log_prob(v.unsqueeze(-1))
    log_alpha = emission[..., 0, :]
    for t in range(1, len(u)):
        step = torch.logsumexp(log_alpha.unsqueeze(-1) + log_theta, -2)
        log_alpha = step + emission[..., t, :]
    pyro.factor("evidence", torch.logsumexp(log_alpha, -1))


def gp_regression(x: Tensor, y: Tensor) -> None:
    one = y.new_ones(())
    rho = pyro.sample("rho", dist.Gamma(25.0 * one, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0 * one))
    sigma = pyro.sample("sigma", dist.HalfNormal(one))
    distance = (x.unsqueeze(-1) - x) ** 2
    rho, alpha, sigma = rho[..., None, None], alpha[..., None, None], sigma[..., None, None]
    K = alpha**2 * torch.exp(-0.5 * distance / rho**2) + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), K), obs=y)


@dataclass(frozen=True)
class Reference:
    """A Pyro model, its arguments and its reference draws {site: (10000, *shape)}."""

    name: str
    model: Callable[..., None]
    args: tuple
    draws: dict[str, Tensor]


def _draws(data: Arrays, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gathers `draws/theta[1]`, `draws/theta[2]`, ... to one site theta (10000, 2)."""
    columns: dict[str, list[Tensor]] = {}
    for key, value in data.items():
        if key.startswith("draws/"):
            site = key.removeprefix("draws/").split("[")[0]
            columns.setdefault(site, []).append(torch.tensor(value.reshape(-1), dtype=dtype))
    vector = {key.removeprefix("draws/").split("[")[0] for key in data if "[" in key}
    return {s: torch.stack(c, -1) if s in vector else c[0] for s, c in columns.items()}


def _arguments(name: str, d: Arrays, dtype: torch.dtype) -> tuple[Callable[..., None], tuple]:
    def tensor(key: str) -> Tensor:
        return torch.tensor(d[f"data/{key}"], dtype=dtype)

    def number(key: str) -> float:
        return float(d[f"data/{key}"])

    if name == "eight_schools":
        return eight_schools_centred, (tensor("sigma"), tensor("y"))
    if name == "arma11":
        return arma11, (tensor("y"),)
    if name == "kilpisjarvi":
        prior = tuple(number(k) for k in ("pmualpha", "psalpha", "pmubeta", "psbeta"))
        return kilpisjarvi, (tensor("x"), tensor("y"), prior)
    if name == "nes1988":
        age = tensor("age_discrete")
        ages = [(age == a).to(dtype) for a in (2, 3, 4)]
        columns = [tensor("real_ideo"), tensor("race_adj"), *ages]
        columns += [tensor(k) for k in ("educ1", "gender", "income")]
        X = torch.stack([torch.ones_like(age), *columns], -1)
        return linear_regression, (X, tensor("partyid7"))
    if name == "logmesquite_logvas":
        d1, d2, height = tensor("diam1"), tensor("diam2"), tensor("canopy_height")
        columns = [(d1 * d2 * height).log(), (d1 * d2).log(), (d1 / d2).log()]
        columns += [tensor("total_height").log(), tensor("density").log(), tensor("group")]
        X = torch.stack([torch.ones_like(d1), *columns], -1)
        return linear_regression, (X, tensor("weight").log())
    if name == "hmm_drive_1":
        arrays = (tensor("u"), tensor("v"), tensor("alpha"))
        return hmm_drive, (*arrays, number("tau"), number("rho"))
    if name == "gp_regr":
        return gp_regression, (tensor("x"), tensor("y"))
    raise ValueError(f"no reference posterior is called {name!r}, only {NAMES}.")


FILES = ["arma11", "kilpisjarvi", "nes1988", "logmesquite_logvas", "hmm_drive_1", "gp_regr"]
NAMES = ["eight_schools_centred", "eight_schools_noncentred", *FILES]


def reference(name: str, dtype: torch.dtype = torch.float32) -> Reference:
    """The reference posterior of that name."""
    file = "eight_schools" if name.startswith("eight_schools") else name
    data = dict(np.load(data_folder() / "posteriors" / f"{file}.npz"))
    draws = _draws(data, dtype)
    model, args = _arguments(file, data, dtype)
    if name == "eight_schools_noncentred":
        mu, tau, theta = draws["mu"], draws["tau"], draws.pop("theta")
        draws["theta_raw"] = (theta - mu[:, None]) / tau[:, None]
        model = eight_schools_noncentred
    return Reference(name, model, args, draws)
