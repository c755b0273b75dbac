"""Expectation maximisation of mixtures of Gaussians."""

import torch
from torch import Tensor

from pyro_nf.flows.em import expectation_maximisation

F64 = torch.float64


def roots(covariances: Tensor, n: Tensor) -> Tensor:
    return torch.linalg.cholesky(covariances)


def rows(count: int = 400) -> tuple[Tensor, Tensor]:
    """Rows of two Gaussians that overlap, and shares to begin with."""
    x = torch.randn(count, 2, dtype=F64)
    x[::3] = 0.5 * x[::3] + torch.tensor([2.0, -1.0], dtype=F64)
    return x, torch.rand(count, 1, dtype=F64).mul(torch.ones(2)).sub(torch.tensor([0.0, 1.0])).abs()


def test_a_step_is_the_formula() -> None:
    x, r = rows()
    one = expectation_maximisation(x, r, roots, max_steps=1).mixture
    for k in range(2):
        w = r[:, k] / r[:, k].sum()
        mean = (w[:, None] * x).sum(0)
        covariance = sum(
            wi * torch.outer(xi - mean, xi - mean) for wi, xi in zip(w, x, strict=True)
        )
        torch.testing.assert_close(one.means[k], mean)
        precision = one.factors[k] @ one.factors[k].mT
        torch.testing.assert_close(precision, torch.linalg.inv(covariance))
        torch.testing.assert_close(one.log_weights[k].exp(), r[:, k].sum() / len(x))


def test_every_step_raises_the_likelihood() -> None:
    x, r = rows()
    values = [
        expectation_maximisation(x, r, roots, max_steps=steps).log_prob for steps in range(1, 12)
    ]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.01


def test_a_table_of_products_gives_the_same() -> None:
    x, r = rows()
    products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(1)
    one = expectation_maximisation(x, r, roots, max_steps=5)
    other = expectation_maximisation(x, r, roots, max_steps=5, products=products)
    torch.testing.assert_close(one.mixture.factors, other.mixture.factors)


def test_a_background_takes_its_share_of_a_far_row() -> None:
    x, r = rows()
    x[0] = 1e3
    wide = -0.5 * (x / 300).square().sum(-1, keepdim=True) - 15.0

    def bounded(covariances: Tensor, n: Tensor) -> Tensor:
        return torch.linalg.cholesky(covariances + 1e-6 * torch.eye(2, dtype=F64))

    alone = expectation_maximisation(x, r, bounded, max_steps=20).mixture
    fit = expectation_maximisation(x, r, bounded, max_steps=20, background=wide)
    assert fit.mixture.means.abs().max() < 3
    assert alone.means.abs().max() > 100


def test_it_ends_when_it_is_told_to() -> None:
    x, r = rows()
    assert expectation_maximisation(x, r, roots, max_steps=50, least_gain=1e9).num_steps == 2
    assert expectation_maximisation(x, r, roots, max_steps=50, is_spent=lambda: True).num_steps == 1
