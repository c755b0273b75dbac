"""Draws of the whole posterior by tempering, and Gaussian mixtures that fit them.

One Gaussian, and the flow that grows out of it, finds one mode. A cloud of particles that is cooled
from a wide Gaussian to the posterior finds all that the wide one covers, and in what shares.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.model.joint import LinAlgError, LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.ops.devices import in_double
from pyro_nf.search.start import Start
from pyro_nf.train.budget import Budget, Clock, OutOfTime

# Share of the particles whose effective number survives a cooling step.
_SURVIVORS = 0.5
_COUNT_LEAPFROGS = 4
_COUNT_MOVES = 3
# A cloud takes some ten steps of cooling to its end; one that takes so many is not getting there.
_FEW_COOLINGS, _MOST_COOLINGS = 5, 300
_WANTED_ACCEPTANCE = 0.7
# Runs of expectation maximisation from other centres; the best likelihood wins.
_TRIES = 5


@dataclass(frozen=True)
class Cloud:
    """Particles of the posterior.

    Attributes:
        z: equally weighted, shape (N, D).
        log_evidence: estimated on the way.
        is_complete: whether the cooling came to its end in time.
    """

    z: Tensor
    log_evidence: float
    is_complete: bool


def _root(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and lower root of the covariance of particles (N, D), a little shrunk."""
    mean = z.mean(0)
    centred = in_double(z - mean)
    cov = centred.mT @ centred / (len(z) - 1)
    weight = z.shape[1] / (z.shape[1] + len(z))
    cov = (1 - weight) * cov + weight * cov.diagonal().diag_embed()
    cov = cov + 1e-10 * cov.diagonal().mean() * torch.eye(len(cov)).to(cov)
    return mean, torch.linalg.cholesky(cov).to(z)


def tempered_cloud(
    joint: LogJoint | Metered,
    loc: Tensor,
    scale_tril: Tensor,
    *,
    count: int = 512,
    max_seconds: float | None = 1.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Cloud:
    r"""Cools particles from a Gaussian to the posterior.

    .. math:: \log \pi_\beta = (1 - \beta) \log N(z; m, L L^\top) + \beta \log p(z),
              \qquad \beta: 0 \to 1

    Each step raises :math:`\beta` as far as half of the particles survive, resamples, and moves all
    by Hamiltonian Monte Carlo in the coordinates of their own covariance.

    *Sequential Monte Carlo Samplers* (Del Moral, Doucet, Jasra, 2006).

    Args:
        joint: the log joint; one that is metered has its own time, and ``max_seconds`` and
            ``clock`` do not count.
        loc: m (D,).
        scale_tril: L (D, D); wide enough to cover all modes.
        count: N.
        max_seconds: None for no bound, and no look at a clock.
        seed: of the random numbers.
        clock: what the seconds are counted with.
    """
    joint = Metered.of(joint, max_seconds, clock)
    g = torch.Generator().manual_seed(seed)
    dim = len(loc)

    def normals(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=loc.dtype).to(loc.device)

    def wide(z: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.linalg.solve_triangular(scale_tril.mT, z - loc, upper=True, left=False)
        slope = torch.linalg.solve_triangular(scale_tril, eps, upper=False, left=False)
        ladj = scale_tril.diagonal().log().sum()
        return -0.5 * (eps**2).sum(-1) - 0.5 * dim * math.log(2 * math.pi) - ladj, -slope

    def density(z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log pi_beta, its slope, log p and log of the wide Gaussian."""
        log_p, slope_p = joint.value_and_grad(z)
        log_w, slope_w = wide(z)
        tempered = (1 - beta) * log_w + beta * log_p
        return tempered, (1 - beta) * slope_w + beta * slope_p, log_p, log_w

    z = loc + normals(count, dim) @ scale_tril.mT
    beta, log_evidence, step = 0.0, 0.0, 0.5
    with suppress(OutOfTime, LinAlgError):
        evaluations = _FEW_COOLINGS * _COUNT_MOVES * _COUNT_LEAPFROGS
        joint.budget.expect(evaluations * joint.price("gradient", count))
        log_p, log_w = joint.value_and_grad(z)[0], wide(z)[0]
        for _ in range(_MOST_COOLINGS):
            ratio = torch.where(torch.isfinite(log_p), log_p - log_w, -torch.inf)
            rise = _rise(ratio, 1 - beta)
            weights = in_double(rise * ratio)
            cumulative = weights.softmax(0).cumsum(0)
            strata = (torch.arange(count) + torch.rand((), generator=g)).to(cumulative) / count
            z = z[torch.searchsorted(cumulative, strata * cumulative[-1]).clamp_max(count - 1)]
            log_evidence += float(weights.logsumexp(0)) - math.log(count)
            next_beta = min(1.0, beta + rise)
            _, root = _root(z)
            value, slope, log_p, log_w = density(z, next_beta)
            for _ in range(_COUNT_MOVES):
                momentum = normals(count, dim)
                new, force, p = z, slope, momentum
                for _ in range(_COUNT_LEAPFROGS):
                    p = p + 0.5 * step * force @ root
                    new = new + step * p @ root.mT
                    new_value, force, new_log_p, new_log_w = density(new, next_beta)
                    p = p + 0.5 * step * force @ root
                gain = new_value - value - 0.5 * (p**2 - momentum**2).sum(-1)
                chance = gain.exp().clamp_max(1.0).nan_to_num(0.0)
                ok = torch.rand(count, generator=g).to(chance) < chance
                keep = ok.unsqueeze(-1)
                z, slope = torch.where(keep, new, z), torch.where(keep, force, slope)
                value, log_p = torch.where(ok, new_value, value), torch.where(ok, new_log_p, log_p)
                log_w = torch.where(ok, new_log_w, log_w)
                step *= 1.3 if float(chance.mean()) > _WANTED_ACCEPTANCE else 0.75
                step = min(step, 1.2)
            beta = next_beta  # complete only after the moves, without which particles are copies
            if beta >= 1:
                break
    return Cloud(z, log_evidence, beta >= 1)


def _rise(ratio: Tensor, most: float) -> float:
    """The largest rise of beta that leaves half of the particles, by bisection."""

    def survivors(rise: float) -> float:
        w = in_double(rise * ratio).softmax(0)
        return float(1 / (w**2).sum() / len(w))

    if survivors(most) > _SURVIVORS:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if survivors(middle) > _SURVIVORS else (low, middle)
    return max(low, 1e-6)


def fit_mixture(
    z: Tensor,
    count_components: int,
    *,
    count_steps: int = 40,
    seed: int = 0,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian mixture with full covariances by expectation maximisation.

    Args:
        z: points (N, D).
        count_components: K.
        count_steps: of the iteration.
        seed: of the first centres, which are drawn far from each other.
        budget: what it may take; None for no bound.

    Returns:
        Log weights (K,), means (K, D) and lower roots of the covariances (K, D, D).

    Raises:
        OutOfTime: if it does not come to its end in time.
    """
    g = torch.Generator().manual_seed(seed)
    mean, root = _root(z)
    # In whitened coordinates distances mean something.
    x = in_double(torch.linalg.solve_triangular(root.mT, z - mean, upper=True, left=False))
    budget = budget or Budget()
    tries = [
        _expectation_maximisation(x, count_components, count_steps, g, budget)
        for _ in range(_TRIES)
    ]
    _, log_weights, centres, L = max(tries, key=lambda result: result[0])
    root64 = in_double(root)
    means = mean + (centres @ root64.mT).to(z)
    return log_weights.to(z), means, (root64 @ L).to(z)


def _expectation_maximisation(
    x: Tensor, count_components: int, count_steps: int, g: torch.Generator, budget: Budget
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Log likelihood, log weights, means and lower roots, from random centres."""
    n, dim = x.shape
    eye = torch.eye(dim, dtype=x.dtype, device=x.device)
    centres = x[torch.randint(n, (1,), generator=g)]
    for _ in range(count_components - 1):
        distance = torch.cdist(x, centres).amin(-1) ** 2
        centres = torch.cat(
            [centres, x[torch.multinomial(distance.cpu(), 1, generator=g).to(x.device)]]
        )
    share = torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(-1), count_components).to(x)
    for _ in range(count_steps):
        budget.expect()
        mass = share.sum(0) + 1e-6
        centres = share.mT @ x / mass.unsqueeze(-1)
        centred = (x - centres.unsqueeze(1)) * (share.mT / mass.unsqueeze(-1)).sqrt().unsqueeze(-1)
        cov = centred.mT @ centred
        # A component of few points leans on a round one.
        lean = (dim / (dim + mass))[:, None, None]
        size = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-6
        L = torch.linalg.cholesky((1 - lean) * cov + (lean + 1e-6) * size * eye)
        eps = torch.linalg.solve_triangular(L, (x - centres.unsqueeze(1)).mT, upper=False)
        log_norm = (mass / n).log() - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        each = log_norm.unsqueeze(-1) - 0.5 * (eps**2).sum(-2)
        share = each.softmax(0).mT
    return float(each.logsumexp(0).mean()), (mass / mass.sum()).log(), centres, L


def mixture_of(log_weights: Tensor, means: Tensor, roots: Tensor) -> GaussianMixture:
    """The mixture with lower roots of covariances (K, D, D), as a learnable base of a flow."""
    # Precision U U^T with U = root^-T, upper triangular.
    eye = torch.eye(means.shape[-1]).to(means)
    factors = torch.linalg.solve_triangular(roots, eye.expand_as(roots), upper=False).mT
    return GaussianMixture.from_moments(log_weights, means, factors)


def whitened(mixture: GaussianMixture) -> tuple[Start, GaussianMixture]:
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
        return Start(loc, scale, math.nan), mixture_of(mixture.logits, white, white_roots)


def mixture_draws(base: GaussianMixture, count: int) -> tuple[Tensor, Tensor]:
    r"""Stratified draws of a mixture with a path to all of its parameters.

    :math:`x = m_k + \epsilon U_k^{-1}`, equally many of each component, with the weights
    :math:`\pi_k / n_k`; the weights have a path to the logits.

    Args:
        base: the mixture.
        count: at least one for each component; rounded down to a multiple of their number.

    Returns:
        x (S, D) and weights (S,), which sum to 1.
    """
    k, dim = base.means.shape
    each = max(1, count // k)
    eps = torch.randn(k, each, dim, dtype=base.means.dtype, device=base.means.device)
    factors = base.triangles.triu(1) + base.log_diagonals.exp().diag_embed()
    moved = torch.linalg.solve_triangular(factors, eps, upper=True, left=False)
    x = base.means.unsqueeze(1) + moved
    weights = base.logits.softmax(-1).unsqueeze(-1).expand(k, each) / each
    return x.reshape(-1, dim), weights.reshape(-1)


def mixture_elbo(
    joint: LogJoint | Metered, base: GaussianMixture, count: int = 512, seed: int = 0
) -> float:
    """The ELBO of a Gaussian mixture, by stratified draws."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, weights = mixture_draws(base, count)
        log_w = joint.log_prob(x) - base().log_prob(x)
    return float((weights * log_w).sum())


# Two components are apart if the density between them falls this much (nats) below both.
_VALLEY = 2.0
# A mixture must gain this much ELBO over one Gaussian, and a larger one over a smaller one.
_GAIN = 0.1
_COUNTS = (2, 3, 4, 6, 8)
# Maxima whose Gaussian is this much worse (nats) do not widen the cloud.
_FAR_BELOW = 50.0
# The cloud starts so many times wider than what is known, and again from what it found.
_WIDER, _ROUNDS = 1.5, 3
# Share of the time of all that the mixtures of one cloud may take.
_MIXTURES_SHARE = 0.4


def separated_mixture(
    joint: LogJoint | Metered,
    start: Start,
    *,
    max_seconds: float | None = 1.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> GaussianMixture | None:
    """A Gaussian mixture for a posterior in pieces, or None if it has but one.

    The wide Gaussian of the cloud covers the start and the other maxima that the climbs found. A
    posterior is in pieces if a mixture has a better ELBO than the start, and between two of its
    components the density falls far below that at both.

    Args:
        joint: the log joint; one that is metered has its own time, and ``max_seconds`` and
            ``clock`` do not count.
        start: of :func:`~pyro_nf.search.start.laplace_start`.
        max_seconds: for all of it; without a complete cloud there is no mixture. None for no bound,
            and no look at a clock.
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

    def __init__(self, joint: Metered, start: Start, seed: int) -> None:
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
                cloud = tempered_cloud(self.joint, loc, wide, seed=self.seed)
                if not cloud.is_complete:
                    break
                better = _best_mixture(self.joint, cloud, least, self.seed)
                if better is None or _deepest_valley(self.joint, better[0].means) <= _VALLEY:
                    break
                self.best, least = better
                loc, root = _root(cloud.z)
                wide = _WIDER * root
        return self.best


def _best_mixture(
    joint: Metered, cloud: Cloud, least: float, seed: int
) -> tuple[GaussianMixture, float] | None:
    """The mixture of the cloud with the best ELBO, if that is above the least by a gain."""
    best, best_elbo, budget = None, least, joint.budget.part(_MIXTURES_SHARE)
    for count in _COUNTS:
        try:
            mixture = mixture_of(*fit_mixture(cloud.z, count, seed=seed, budget=budget))
        except (LinAlgError, RuntimeError):
            continue  # more components than the cloud can hold apart
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
