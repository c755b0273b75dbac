"""Plain densities that a flow has to beat: a Gaussian mixture by EM, and a Gaussian copula."""

from __future__ import annotations

import math
from operator import itemgetter

import torch
from torch import Tensor

from pyro_nf._checks import check_event, check_kind, check_rows, check_work
from pyro_nf.flows.em import expectation_maximisation
from pyro_nf.flows.mixture import GaussianMixture, GaussianMixtureDistribution
from pyro_nf.ops.devices import in_double
from pyro_nf.train.budget import Budget
from pyro_nf.transforms.linear import shrunk_covariance

VARIANCE_FLOOR = 1e-6
"""Added to the variances of a component; the data should be standardised or whitened."""

BACKGROUND_SCALES = (4.0, 16.0, 64.0, 256.0)
"""Scales of the wide components that together have the weight of one row, the wider the less: each
adds as much to the variance of draws."""

PATIENCE_GAIN = 1e-3
"""EM ends when the mean log density of a row rises by less."""

COUNT_KMEANS = 4
"""EM starts from the best of so many runs of k-means: it seldom leaves a poor start."""

WORK_OF_KMEANS = 60.0
"""The work of k-means is that of so many iterations of EM in one dimension."""

MOST_ITERATIONS = 100
MOST_WORK = 2e10
"""Products that EM may take for one size: some seconds, so that no table takes minutes."""

MOST_WORSE_SIZES = 2
"""So many sizes in a row that are no better end the search: one may have had an unlucky start."""

MOST_ROWS = 20_000
MOST_ENTRIES = 30_000_000  # of the table of products, which has D^2 columns
ROWS_PER_COMPONENT = 10


def fit_gaussian_mixture(
    x: Tensor,
    validation: Tensor,
    *,
    budget: Budget | None = None,
    most_work: float = math.inf,
    generator: torch.Generator | None = None,
) -> GaussianMixture:
    r"""Fit Gaussian mixtures of 1, 2, 4, ... components by EM; keep the best on validation.

    .. math::
        r_{ik} \propto \pi_k N(x_i; m_k, S_k), \quad n_k = \sum_i r_{ik}, \quad
        m_k = \tfrac{1}{n_k} \sum_i r_{ik} x_i, \quad
        S_k = \tfrac{1}{n_k} \sum_i r_{ik} x_i x_i^T - m_k m_k^T + \epsilon I

    Each starts from k-means. Some very wide components with the weight of a single row are added:
    a row far from all others then costs a bounded amount and not the square of its distance. EM
    runs in float64. A component needs more rows than columns: for a table too wide even for one
    the standard normal stays, which with whitened rows is a full Gaussian.

    *Maximum Likelihood from Incomplete Data via the EM Algorithm* (Dempster, Laird, Rubin, 1977).

    Args:
        x: Standardised rows, shape ``(N, D)``; of more than 20,000 a part is used.
        validation: Rows that choose the size, shape ``(M, D)``.
        budget: Seconds that it may take: no larger mixture is begun after them, and k-means and EM
            are cut short.
        most_work: Products that all of it may take; no mixture is begun that would need more.
        generator: Source of randomness.

    Returns:
        The mixture, with the dtype of ``x``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(1000, 1, generator=generator)
        >>> x = torch.cat([x - 9, x + 9])
        >>> mixture = fit_gaussian_mixture(x[::2], x[1::2], generator=generator)
        >>> round(-mixture().log_prob(x).mean().item(), 1)  # log 2 + the entropy of a normal
        2.1
    """
    check_rows("fit_gaussian_mixture", "x", x)
    check_rows("fit_gaussian_mixture", "validation", validation, x.shape[1])
    check_kind("fit_gaussian_mixture", "generator", generator, torch.Generator, optional=True)
    check_kind("fit_gaussian_mixture", "budget", budget, Budget, optional=True)
    check_work("fit_gaussian_mixture", "most_work", most_work)
    budget = Budget() if budget is None else budget
    given, (n, d) = x, x.shape
    most_rows = min(MOST_ROWS, max(MOST_ENTRIES // d**2, 1))
    if n > most_rows:
        x = x[torch.randperm(n, generator=generator)[:most_rows].to(x.device)]
    x, validation = in_double(x), in_double(validation)
    products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(1)  # row i: all entries of x_i x_i^T
    best = GaussianMixture(d, 1).to(x)
    best_value = _mean_log_prob(best, validation)
    worse = 0
    for k in _SIZES:
        iterations = min(MOST_ITERATIONS, int(min(MOST_WORK, most_work) / (k * products.numel())))
        too_large = k * max(ROWS_PER_COMPONENT, d) > len(x) or iterations < 1
        if too_large or worse == MOST_WORSE_SIZES or budget.is_spent():
            break
        mixture, used = _em(x, products, k, iterations, generator, budget)
        most_work -= (used + WORK_OF_KMEANS / d) * k * products.numel()
        value = _mean_log_prob(mixture, validation)
        if value > best_value:
            best, best_value, worse = mixture, value, 0
        else:
            worse += 1
    return best.to(given)


def _mean_log_prob(mixture: GaussianMixture, x: Tensor) -> float:
    with torch.no_grad():
        return mixture().log_prob(x).mean().item()


def _em(
    x: Tensor,
    products: Tensor,
    k: int,
    iterations: int,
    generator: torch.Generator | None,
    budget: Budget,
) -> tuple[GaussianMixture, int]:
    """The mixture, and how many iterations it took."""
    n, d = x.shape
    scales = x.new_tensor(BACKGROUND_SCALES)
    weights = scales**-2 / (scales**-2).sum() / (n + 1)
    wide = GaussianMixtureDistribution(
        weights.log(),
        x.new_zeros(len(scales), d),
        torch.eye(d).to(x) / scales[:, None, None],
        -d * scales.log(),
    )
    background = wide.joint_log_prob(x)
    runs = [_k_means(x, k, generator, budget)]
    while len(runs) < (COUNT_KMEANS if k > 1 else 1) and not budget.is_spent():
        runs.append(_k_means(x, k, generator, budget))
    nearest, _ = min(runs, key=itemgetter(1))
    fit = expectation_maximisation(
        x,
        torch.nn.functional.one_hot(nearest).to(x),
        _roots,
        max_steps=iterations,
        least_gain=PATIENCE_GAIN,
        background=background,
        products=products,
        is_spent=budget.is_spent,
    )
    narrow = fit.mixture
    mixture = GaussianMixture.from_moments(
        torch.cat((narrow.log_weights, wide.log_weights)),
        torch.cat((narrow.means, wide.means)),
        torch.cat((narrow.factors, wide.factors)),
    )
    return mixture, fit.num_steps


def _roots(covariances: Tensor, n: Tensor) -> Tensor:
    """Lower roots of covariances ``(K, D, D)``, to whose variances a little is added."""
    floor = VARIANCE_FLOOR * torch.eye(covariances.shape[-1]).to(covariances)
    covariances = covariances + floor
    factor, failed = torch.linalg.cholesky_ex(covariances)
    # rounding can make a covariance of very few rows indefinite: then only its diagonal counts
    variances = covariances.diagonal(dim1=-2, dim2=-1).clamp_min(VARIANCE_FLOOR)
    return torch.where((failed > 0)[:, None, None], variances.sqrt().diag_embed(), factor)


def _k_means(
    x: Tensor, k: int, generator: torch.Generator | None, budget: Budget, iterations: int = 10
) -> tuple[Tensor, float]:
    """The nearest of k centres for each row, and the sum of the squared distances.

    Greedy k-means++ seeds, then Lloyd's iterations.
    """
    count_trials = 2 + int(math.log(k))
    centres, nearest_square = x[:0], x.new_full((len(x), 1), math.inf)
    weights = x.new_ones(len(x))
    for i in range(k):
        if i > 0 and budget.is_spent():
            break
        picked = torch.multinomial(
            weights.cpu(), count_trials, replacement=True, generator=generator
        )
        trials = x[picked.to(x.device)]
        squares = torch.minimum(nearest_square, torch.cdist(x, trials).square())
        best = squares.sum(0).argmin()
        centres, nearest_square = torch.cat((centres, trials[best, None])), squares[:, best, None]
        weights = nearest_square.squeeze(-1).clamp_min(torch.finfo(x.dtype).tiny)
    for i in range(iterations):
        square, nearest = torch.cdist(x, centres).square().min(-1)
        if i > 0 and budget.is_spent():
            break
        count = torch.bincount(nearest, minlength=len(centres))[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return nearest, square.sum().item()


class GaussianCopula:
    r"""Kernel densities for the columns, tied together by one Gaussian correlation matrix.

    .. math:: p(y) = N(z; 0, R) \prod_j \frac{f_j(y_j)}{N(z_j; 0, 1)}, \qquad
        z_j = \Phi^{-1}(F_j(y_j))

    with :math:`f_j` a Gaussian kernel density of column j (Silverman's bandwidth with the
    interquartile range), :math:`F_j` its distribution function, and :math:`R` the shrunk
    correlation of the :math:`z`.

    *An Introduction to Copulas* (Nelsen, 2006); *Density Estimation for Statistics and Data
    Analysis* (Silverman, 1986).

    Args:
        y: Rows, shape ``(N, D)``; of more than 500, or fewer if it is wide, an even part
            gives the kernels.

    Example:
        >>> copula = GaussianCopula(torch.linspace(-2, 2, 200)[:, None])
        >>> copula.log_prob(torch.zeros(1)).exp().item()  # about 1/4
        0.248...
    """

    def __init__(self, y: Tensor) -> None:
        check_rows("GaussianCopula", "y", y)
        n, d = y.shape
        count = min(_MOST_KERNELS, max(int((_MOST_KERNEL_VALUES / d) ** 0.5), 50))
        self.kernels = in_double(y[:: math.ceil(n / count)])
        low, high = torch.quantile(
            in_double(y[:: math.ceil(n / MOST_ROWS)]), _QUARTILES.to(self.kernels.device), 0
        )
        sd = in_double(y).std(0, correction=0)
        spread = torch.minimum(sd, (high - low) / 1.349)  # 1.349 sd: a normal's interquartile range
        spread = torch.where(spread > 1e-3 * sd, spread, sd).clamp_min(1e-9)
        self.bandwidth = 0.9 * spread * len(self.kernels) ** -0.2
        z, _ = self._scores(self.kernels)
        covariance = shrunk_covariance(z)
        sd = covariance.diagonal().sqrt()
        self.correlation_factor = torch.linalg.cholesky(covariance / sd / sd[:, None])

    def _scores(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The normal scores of rows and the log densities of their columns."""
        h = self.bandwidth
        t = (y.unsqueeze(-2) - self.kernels) / h
        log_f = (-0.5 * t.square()).logsumexp(-2) - math.log(len(self.kernels)) - h.log() - _HALF
        u = torch.special.ndtr(t).mean(-2).clamp(_SMALLEST_TAIL, 1 - _SMALLEST_TAIL)
        return torch.special.ndtri(u), log_f

    def log_prob(self, y: Tensor, budget: Budget | None = None) -> Tensor:
        """Log density, ``(..., D) -> (...)``; of the first rows only, if the budget ends before.

        Args:
            y: Points.
            budget: Seconds that it may take; the result is then flat.
        """
        check_event("GaussianCopula", "y", y, self.kernels.shape[1], 1)
        check_kind("GaussianCopula", "budget", budget, Budget, optional=True)
        rows = in_double(y.reshape(-1, y.shape[-1]))
        at_once = max(_MOST_VALUES_AT_ONCE // (len(self.kernels) * rows.shape[1]), 1)
        pieces = []
        for piece in rows.split(min(at_once, _ROWS_AT_ONCE)):
            pieces.append(self._log_prob(piece))
            if budget is not None and budget.is_spent():
                break
        values = torch.cat(pieces).to(y)
        return values if budget is not None else values.reshape(y.shape[:-1])

    def _log_prob(self, y: Tensor) -> Tensor:
        z, log_f = self._scores(y)
        factor = self.correlation_factor
        w = torch.linalg.solve_triangular(factor, z.mT, upper=False).mT
        log_det = factor.diagonal().log().sum()
        return (log_f + 0.5 * z.square() - 0.5 * w.square()).sum(-1) - log_det


_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_HALF = 0.5 * math.log(2 * math.pi)
_QUARTILES = torch.tensor([0.25, 0.75], dtype=torch.float64)
_MOST_KERNELS = 500
_MOST_KERNEL_VALUES = 20_000_000  # of all kernels at the centres of all, in every column
_ROWS_AT_ONCE = 256
_MOST_VALUES_AT_ONCE = 5_000_000
_SMALLEST_TAIL = 1e-12
