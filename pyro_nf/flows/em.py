r"""Expectation maximisation for mixtures of Gaussians with full covariances.

.. math::
    r_{ik} \propto \pi_k N(x_i; m_k, S_k), \qquad n_k = \sum_i r_{ik}, \qquad
    m_k = \tfrac{1}{n_k} \sum_i r_{ik} x_i, \qquad
    S_k = \tfrac{1}{n_k} \sum_i r_{ik} (x_i - m_k) (x_i - m_k)^T

*Maximum Likelihood from Incomplete Data via the EM Algorithm* (Dempster, Laird, Rubin, 1977).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf.flows.mixture import GaussianMixtureDistribution

#: From covariances S (K, D, D) and n (K,) to lower roots of covariances that are positive definite.
Regularise = Callable[[Tensor, Tensor], Tensor]
# No component has less than so much of a row.
_LEAST_MASS = 1e-9


@dataclass(frozen=True)
class EMResult:
    """What expectation maximisation came to.

    Attributes:
        mixture: The mixture.
        log_prob: The mean log density of the rows, the background included.
        num_steps: Steps that it took.
    """

    mixture: GaussianMixtureDistribution
    log_prob: float
    num_steps: int


def expectation_maximisation(
    x: Tensor,
    responsibility: Tensor,
    regularise: Regularise,
    *,
    max_steps: int,
    least_gain: float = -math.inf,
    background: Tensor | None = None,
    products: Tensor | None = None,
    is_spent: Callable[[], bool] | None = None,
) -> EMResult:
    """Fits a mixture of Gaussians, from given shares of the components in each row.

    Args:
        x: Rows, shape ``(N, D)``, whitened or standardised.
        responsibility: r at the beginning, shape ``(N, K)``.
        regularise: Makes lower roots of the covariances.
        max_steps: The most steps.
        least_gain: It ends when the mean log density of a row rises by less.
        background: Log densities of fixed components, with their weights, at the rows, ``(N, B)``.
        products: Row i holds all entries of :math:`x_i x_i^T`, shape ``(N, D * D)``; with them a
            step is faster where the dimension is low.
        is_spent: Asked after each step; it ends when that is true.

    Example:
        >>> x = torch.tensor([[-3.0], [-2.0], [2.0], [3.0]], dtype=torch.float64)
        >>> halves = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
        >>> def roots(S, n):
        ...     return torch.linalg.cholesky(S)
        >>> expectation_maximisation(x, halves, roots, max_steps=9).mixture.means.tolist()
        [[-2.5], [2.5]]
    """
    last, num_steps = -math.inf, 0
    while True:
        num_steps += 1
        mixture = _maximise(x, responsibility, regularise, products)
        joint = mixture.joint_log_prob(x)
        parts = joint if background is None else torch.cat((joint, background), -1)
        total = parts.logsumexp(-1, keepdim=True)
        value = total.mean().item()
        is_over = num_steps >= max_steps or (is_spent is not None and is_spent())
        if value < last + least_gain or is_over:
            return EMResult(mixture, value, num_steps)
        last, responsibility = value, (joint - total).exp()


def _maximise(
    x: Tensor, responsibility: Tensor, regularise: Regularise, products: Tensor | None
) -> GaussianMixtureDistribution:
    """The mixture with the moments of the rows under their shares."""
    d = x.shape[1]
    n = responsibility.sum(0).clamp_min(_LEAST_MASS)
    means = responsibility.mT @ x / n[:, None]
    if products is None:
        spread = (responsibility.mT / n[:, None]).sqrt().unsqueeze(-1) * (x - means.unsqueeze(1))
        covariances = spread.mT @ spread
    else:
        second = (responsibility.mT @ products).unflatten(-1, (d, d)) / n[:, None, None]
        covariances = second - means.unsqueeze(-1) * means.unsqueeze(-2)
    roots = regularise(covariances, n)
    factors = torch.linalg.solve_triangular(roots, torch.eye(d).to(roots), upper=False).mT
    log_dets = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return GaussianMixtureDistribution((n / n.sum()).log(), means, factors, log_dets)
