"""Gaussian mixtures for a posterior in separate pieces."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor

from pyro_nf.flows.em import EMResult, expectation_maximisation
from pyro_nf.flows.mixture import GaussianMixture, GaussianMixtureDistribution
from pyro_nf.model.density import LogDensity
from pyro_nf.model.metered import Metered
from pyro_nf.ops.devices import in_double
from pyro_nf.search.gaussians import mean_and_root
from pyro_nf.search.start import GaussianStart
from pyro_nf.search.tempering import Particles, tempered_smc
from pyro_nf.sites.substitute import LinAlgError
from pyro_nf.train.budget import Budget, Clock, OutOfTime
from pyro_nf.transforms.linear import shrunk_towards

# Runs of expectation maximisation from other centres; the best likelihood wins.
_TRIES = 5
# Two components are apart if the density between them falls this much (nats) below both.
_VALLEY = 2.0
# A mixture must gain this much ELBO over one Gaussian, and a larger one over a smaller one.
_GAIN = 0.1
_SIZES = (2, 3, 4, 6, 8)
# Maxima whose Gaussian is this much worse (nats) do not widen where particles start.
_FAR_BELOW = 50.0
# Particles start so many times wider than what is known, and again from what it found.
_WIDER, _ROUNDS = 1.5, 3
# Share of the time of all that the mixtures of one set of particles may take.
_MIXTURES_SHARE = 0.4


def fit_mixture(
    z: Tensor,
    count_components: int,
    *,
    max_steps: int = 40,
    seed: int = 0,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian mixture with full covariances by expectation maximisation.

    Args:
        z: points (N, D).
        count_components: K.
        max_steps: of the iteration.
        seed: of the first centres, which are drawn far from each other.
        budget: what it may take; None for no bound.

    Returns:
        Log weights (K,), means (K, D) and lower roots of the covariances (K, D, D).

    Raises:
        OutOfTime: if it does not come to its end in time.
    """
    g = torch.Generator().manual_seed(seed)
    mean, root = mean_and_root(z)
    # In whitened coordinates distances mean something.
    x = in_double(torch.linalg.solve_triangular(root.mT, z - mean, upper=True, left=False))
    budget, tries = budget or Budget(), list[EMResult]()
    for _ in range(_TRIES):
        budget.expect()
        shares = _k_means_plus_plus(x, count_components, g)
        tries.append(
            expectation_maximisation(
                x, shares, _rounded_roots, max_steps=max_steps, is_spent=budget.is_spent
            )
        )
    budget.expect()  # none that was cut short is taken
    best = max(tries, key=lambda result: result.log_prob).mixture
    eye, root64 = torch.eye(x.shape[1]).to(x), in_double(root)
    roots = torch.linalg.solve_triangular(best.factors, eye, upper=True).mT
    means = mean + (best.means @ root64.mT).to(z)
    return best.log_weights.to(z), means, (root64 @ roots).to(z)


def _k_means_plus_plus(x: Tensor, count: int, g: torch.Generator) -> Tensor:
    """The shares (N, K) of each point in K of them that lie far from each other."""
    centres = x[torch.randint(len(x), (1,), generator=g)]
    for _ in range(count - 1):
        distance = torch.cdist(x, centres).amin(-1) ** 2
        centres = torch.cat(
            [centres, x[torch.multinomial(distance.cpu(), 1, generator=g).to(x.device)]]
        )
    return torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(-1), count).to(x)


def _rounded_roots(covariances: Tensor, n: Tensor) -> Tensor:
    """Lower roots of covariances (K, D, D): a component of few points leans on a round one."""
    size = covariances.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-6
    round_one = size * torch.eye(covariances.shape[-1]).to(covariances)
    return torch.linalg.cholesky(shrunk_towards(covariances, round_one, n) + 1e-6 * round_one)


def mixture_of(log_weights: Tensor, means: Tensor, roots: Tensor) -> GaussianMixture:
    """The mixture with lower roots of covariances (K, D, D), as a learnable base of a flow."""
    # Precision U U^T with U = root^-T, upper triangular.
    eye = torch.eye(means.shape[-1]).to(means)
    factors = torch.linalg.solve_triangular(roots, eye.expand_as(roots), upper=False).mT
    return GaussianMixture.from_moments(log_weights, means, factors)


def whitened(mixture: GaussianMixture) -> tuple[GaussianStart, GaussianMixture]:
    """The coordinates in which all of a mixture has mean 0 and covariance 1, and it in them.

    Args:
        mixture: In unconstrained coordinates of the model.
    """
    with torch.no_grad():
        pi, means = mixture.logits.softmax(-1), mixture.means
        factors = mixture.triangles.triu(1) + mixture.log_diagonals.exp().diag_embed()
        roots = torch.linalg.inv(factors).mT
        loc = pi @ means
        centred = means - loc
        cov = (pi[:, None, None] * (roots @ roots.mT)).sum(0) + (pi * centred.mT) @ centred
        scale = torch.linalg.cholesky(in_double(cov)).to(loc)
        white = torch.linalg.solve_triangular(scale.mT, centred, upper=True, left=False)
        white_roots = torch.linalg.solve_triangular(scale, roots, upper=False)
        return GaussianStart(loc, scale, math.nan), mixture_of(mixture.logits, white, white_roots)


def mixture_draws(
    base: GaussianMixture | GaussianMixtureDistribution, count: int
) -> tuple[Tensor, Tensor]:
    r"""Stratified draws of a mixture with a path to all of its parameters.

    :math:`x = m_k + \epsilon U_k^{-1}`, equally many of each component, with the weights
    :math:`\pi_k / n_k`; the weights have a path to the logits.

    Args:
        base: the mixture.
        count: at least one for each component; rounded down to a multiple of their number.

    Returns:
        x (S, *batch, D) and weights (S,), which sum to 1.
    """
    law = base() if isinstance(base, GaussianMixture) else base
    law = cast(GaussianMixtureDistribution, law)
    (k, dim), batch = law.means.shape, law.batch_shape
    each = max(1, count // k)
    shape = k, each * batch.numel(), dim
    eps = torch.randn(shape, dtype=law.means.dtype, device=law.means.device)
    moved = torch.linalg.solve_triangular(law.factors, eps, upper=True, left=False)
    x = law.means.unsqueeze(1) + moved
    weights = law.log_weights.exp().unsqueeze(-1).expand(k, each) / each
    return x.reshape(k * each, *batch, dim), weights.reshape(-1)


def mixture_elbo(
    joint: LogDensity, base: GaussianMixture, count: int = 512, seed: int = 0
) -> float:
    """The ELBO of a Gaussian mixture, by stratified draws."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, weights = mixture_draws(base, count)
        log_w = joint.log_prob(x) - base().log_prob(x)
    return float((weights * log_w).sum())


def separated_mixture(
    joint: LogDensity,
    start: GaussianStart,
    *,
    max_seconds: float | None = 1.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> GaussianMixture | None:
    """A Gaussian mixture for a posterior in pieces, or None if it has but one.

    The wide Gaussian that particles are tempered from covers the start and the other maxima that
    the climbs found. A posterior is in pieces if a mixture has a better ELBO than the start, and
    between two of its components the density falls far below that at both.

    Args:
        joint: the log joint; one that is metered has its own time, and ``max_seconds`` and
            ``clock`` do not count.
        start: of :func:`~pyro_nf.search.start.laplace_start`.
        max_seconds: for all of it; without particles of the posterior there is no mixture. None
            for no bound, and no look at a clock.
        seed: of the random numbers.
        clock: what the seconds are counted with.
    """
    return PieceSearch(Metered.of(joint, max_seconds, clock), start, seed).run()


class PieceSearch:
    """The search of :func:`separated_mixture`, whose best so far can be had at any time.

    Args:
        joint: the log joint, with the time that the search may take.
        start: of :func:`~pyro_nf.search.start.laplace_start`.
        seed: of the random numbers.

    Attributes:
        best: the best mixture so far, or None.
    """

    def __init__(self, joint: Metered, start: GaussianStart, seed: int) -> None:
        self.joint, self.start, self.seed = joint, start, seed
        self.best: GaussianMixture | None = None

    def run(self) -> GaussianMixture | None:
        """Looks for pieces, and again from what it found, until it is done or its time is up."""
        start, least = self.start, self.start.elbo
        if start.scale.dim() == 1:
            return None
        near = [mode.loc for mode in start.modes if mode.elbo > start.elbo - _FAR_BELOW]
        points = torch.stack([start.loc, *near])
        centred = points - points.mean(0)
        cov = _WIDER**2 * start.scale_tril @ start.scale_tril.mT + centred.mT @ centred
        with suppress(OutOfTime, LinAlgError):
            loc, wide = points.mean(0), torch.linalg.cholesky(in_double(cov)).to(cov)
            # What the start does not reach may lie within reach of the pieces that it does.
            for _ in range(_ROUNDS):
                particles = tempered_smc(self.joint, loc, wide, seed=self.seed)
                if not particles.is_complete:
                    break
                better = _best_mixture(self.joint, particles, least, self.seed)
                if better is None or _deepest_valley(self.joint, better[0].means) <= _VALLEY:
                    break
                self.best, least = better
                loc, root = mean_and_root(particles.z)
                wide = _WIDER * root
        return self.best


def _best_mixture(
    joint: Metered, particles: Particles, least: float, seed: int
) -> tuple[GaussianMixture, float] | None:
    """The mixture of the particles with the best ELBO, if that is above the least by a gain."""
    best, best_elbo, budget = None, least, joint.budget.part(_MIXTURES_SHARE)
    for count in _SIZES:
        try:
            mixture = mixture_of(*fit_mixture(particles.z, count, seed=seed, budget=budget))
        except (LinAlgError, RuntimeError):
            continue  # more components than the particles can hold apart
        except OutOfTime:
            break
        elbo = mixture_elbo(joint, mixture, seed=seed)
        if elbo > best_elbo + _GAIN:
            best, best_elbo = mixture, elbo
    return None if best is None else (best, best_elbo)


def _deepest_valley(joint: Metered, means: Tensor) -> float:
    """How far (nats) the density falls on the way between any two of the points (K, D)."""
    t = torch.linspace(0, 1, 21).to(means).unsqueeze(-1)
    a, b = torch.triu_indices(len(means), len(means), 1)
    with torch.no_grad():
        way = joint.log_prob((1 - t) * means[a].unsqueeze(1) + t * means[b].unsqueeze(1))
    return float((torch.minimum(way[:, 0], way[:, -1]) - way.amin(-1)).max())
