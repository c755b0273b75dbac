"""Pyro models whose posterior is known exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A model, its evidence and exact draws of its posterior.

    Attributes:
        name: of the target.
        model: a Pyro model without arguments.
        log_evidence: log of the integral of its joint density.
        draw: (count, generator) -> {site: exact draws (count, *shape)}.
    """

    name: str
    model: Callable[[], None]
    log_evidence: float
    draw: Callable[[int, torch.Generator], Draws]


def _randn(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


def gaussian(
    input_dim: int = 50, condition: float = 1e4, dtype: torch.dtype = torch.float32
) -> Target:
    """x ~ N(m, Q diag(lambda) Q^T), lambda from 1/condition to 1, Q a random rotation."""
    generator = torch.Generator().manual_seed(7)
    Q = torch.linalg.qr(_randn(input_dim, input_dim, generator=generator, dtype=torch.float64))[0]
    exponent = torch.linspace(-math.log10(condition), 0, input_dim, dtype=torch.float64)
    L = torch.linalg.cholesky((Q * 10**exponent) @ Q.mT).to(dtype)
    m = (3 * _randn(input_dim, generator=generator, dtype=torch.float64)).to(dtype)

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(m, scale_tril=L))

    def draw(count: int, generator: torch.Generator) -> Draws:
        return {"x": m + _randn(count, input_dim, generator=generator, dtype=dtype) @ L.mT}

    return Target(f"gaussian_{input_dim}", model, 0.0, draw)


def funnel(input_dim: int = 10, dtype: torch.dtype = torch.float32) -> Target:
    """v ~ N(0, 3), x_i ~ N(0, exp(v / 2)): Slice sampling (Neal, 2003)."""
    zero = torch.zeros((), dtype=dtype)

    def model() -> None:
        v = pyro.sample("v", dist.Normal(zero, 3.0))
        with pyro.plate("D", input_dim - 1):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    def draw(count: int, generator: torch.Generator) -> Draws:
        v = 3 * _randn(count, generator=generator, dtype=dtype)
        noise = _randn(count, input_dim - 1, generator=generator, dtype=dtype)
        return {"v": v, "x": noise * (v / 2).exp()[:, None]}

    return Target("funnel", model, 0.0, draw)


def banana(curvature: float = 0.5, dtype: torch.dtype = torch.float32) -> Target:
    """a ~ N(0, 2), b ~ N(curvature (a^2 - 4), 1)."""
    zero = torch.zeros((), dtype=dtype)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(zero, 2.0))
        pyro.sample("b", dist.Normal(curvature * (a**2 - 4), 1.0))

    def draw(count: int, generator: torch.Generator) -> Draws:
        a = 2 * _randn(count, generator=generator, dtype=dtype)
        b = curvature * (a**2 - 4) + _randn(count, generator=generator, dtype=dtype)
        return {"a": a, "b": b}

    return Target("banana", model, 0.0, draw)


def student(input_dim: int = 5, df: float = 3.0, dtype: torch.dtype = torch.float32) -> Target:
    """Independent Student-t coordinates of different locations and scales."""
    loc = torch.linspace(-4, 4, input_dim, dtype=dtype)
    scale = torch.logspace(-1, 1, input_dim, dtype=dtype)
    df_ = torch.full((), df, dtype=dtype)

    def model() -> None:
        pyro.sample("x", dist.StudentT(df_, loc, scale).to_event(1))

    def draw(count: int, generator: torch.Generator) -> Draws:
        noise = _randn(count, input_dim, generator=generator, dtype=dtype)
        normals = _randn(count, input_dim, int(df), generator=generator, dtype=dtype)
        chi2 = (normals**2).sum(-1)
        return {"x": loc + scale * noise / (chi2 / df).sqrt()}

    return Target(f"student_{df:g}", model, 0.0, draw)


def two_modes(
    input_dim: int = 2,
    separation: float = 6.0,
    weight: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> Target:
    """0.3 N(-s/2 e, I) + 0.7 N(s/2 e, I), e the unit diagonal."""
    e = torch.full((input_dim,), input_dim**-0.5, dtype=dtype)
    loc = torch.stack([-0.5 * separation * e, 0.5 * separation * e])
    probs = torch.tensor([weight, 1 - weight], dtype=dtype)

    def model() -> None:
        components = dist.Normal(loc, 1.0).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(probs), components))

    def draw(count: int, generator: torch.Generator) -> Draws:
        which = (torch.rand(count, generator=generator) > weight).long()
        return {"x": loc[which] + _randn(count, input_dim, generator=generator, dtype=dtype)}

    return Target(f"two_modes_{input_dim}", model, 0.0, draw)


def ring(radius: float = 3.0, width: float = 0.3, dtype: torch.dtype = torch.float32) -> Target:
    """p(x) ~ exp(-(|x| - radius)^2 / (2 width^2)) with a flat prior on the plane."""
    r = torch.linspace(1e-4, radius + 12 * width, 20001, dtype=torch.float64)
    density = 2 * math.pi * r * torch.exp(-0.5 * ((r - radius) / width) ** 2)
    log_evidence = float(torch.trapezoid(density, r).log())
    r0 = torch.full((1,), radius, dtype=dtype)

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("ring", -0.5 * ((x.norm(dim=-1) - r0) / width) ** 2)

    def draw(count: int, generator: torch.Generator) -> Draws:
        index = torch.multinomial(density, count, replacement=True, generator=generator)
        angle = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        x = r[index, None] * torch.stack([angle.cos(), angle.sin()], -1)
        return {"x": x.to(dtype)}

    return Target("ring", model, log_evidence, draw)


def flat_regression(count: int = 40, dtype: torch.dtype = torch.float32) -> Target:
    """y ~ N(X beta, sigma), beta flat on R^3, sigma flat on the positive half-line."""
    generator = torch.Generator().manual_seed(3)
    X = _randn(count, 3, generator=generator, dtype=torch.float64)
    X[:, 0] = 1.0
    noise = _randn(count, generator=generator, dtype=torch.float64)
    y = X @ torch.tensor([20.0, -1.0, 0.5], dtype=torch.float64) + 2.0 * noise
    gram = X.mT @ X
    beta = torch.linalg.solve(gram, X.mT @ y)
    rss = float(((y - X @ beta) ** 2).sum())
    # sigma^2 ~ InverseGamma(a, rss / 2) once beta is integrated out.
    a = (count - 3 - 1) / 2
    log_evidence = (
        -0.5 * (count - 3) * math.log(2 * math.pi)
        - 0.5 * float(torch.linalg.slogdet(gram)[1])
        + math.lgamma(a)
        - a * math.log(rss / 2)
        - math.log(2)
    )
    X_, y_ = X.to(dtype), y.to(dtype)

    def model() -> None:
        b = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        s = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
        loc = (X_ @ b.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Normal(loc, s.unsqueeze(-1)).to_event(1), obs=y_)

    def draw(n: int, generator: torch.Generator) -> Draws:
        normals = _randn(n, int(2 * a), generator=generator, dtype=torch.float64)
        sigma = (rss / (normals**2).sum(-1)).sqrt()
        L = torch.linalg.cholesky(torch.linalg.inv(gram))
        z = _randn(n, 3, generator=generator, dtype=torch.float64) @ L.mT
        return {"beta": (beta + sigma[:, None] * z).to(dtype), "sigma": sigma.to(dtype)}

    return Target("flat_regression", model, log_evidence, draw)


def exact_targets(dtype: torch.dtype = torch.float32) -> list[Target]:
    """All of them."""
    return [
        gaussian(dtype=dtype),
        funnel(dtype=dtype),
        banana(dtype=dtype),
        student(dtype=dtype),
        two_modes(2, dtype=dtype),
        two_modes(10, dtype=dtype),
        ring(dtype=dtype),
        flat_regression(dtype=dtype),
    ]
