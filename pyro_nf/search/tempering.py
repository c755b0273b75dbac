"""Tempered sequential Monte Carlo: draws of the whole posterior.

One Gaussian, and the flow that grows out of it, finds one mode. Particles that are tempered from a
wide Gaussian to the posterior find all that the wide one covers, and in what shares.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.model.metered import Metered
from pyro_nf.ops.devices import in_double
from pyro_nf.search.gaussians import mean_and_root
from pyro_nf.sites.substitute import LinAlgError
from pyro_nf.train.budget import Clock, OutOfTime

# The effective number of the particles after a step of tempering, as a share of all.
_ESS_SHARE = 0.5
# Moves of each particle at a temperature, by Hamiltonian Monte Carlo of so many leapfrog steps.
_NUM_MOVES, _NUM_LEAPFROGS = 3, 4
# The first size of a leapfrog step, and the largest, in sds of the particles.
_STEP, _LARGEST_STEP = 0.5, 1.2
_WANTED_ACCEPTANCE = 0.7
# Particles take some ten temperatures to the end; if they take so many, they will not arrive.
_FEW_TEMPERATURES, _MOST_TEMPERATURES = 5, 300


@dataclass(frozen=True)
class Particles:
    """Particles of the posterior.

    Attributes:
        z: equally weighted, shape (N, D).
        log_evidence: estimated on the way.
        is_complete: whether the tempering came to its end in time.
    """

    z: Tensor
    log_evidence: float
    is_complete: bool


def tempered_smc(
    joint: LogDensity,
    loc: Tensor,
    scale_tril: Tensor,
    *,
    num_particles: int = 512,
    max_seconds: float | None = 1.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Particles:
    r"""Tempers particles from a Gaussian to the posterior, by sequential Monte Carlo.

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
        num_particles: N.
        max_seconds: None for no bound, and no look at a clock.
        seed: of the random numbers.
        clock: what the seconds are counted with.
    """
    joint, g = Metered.of(joint, max_seconds, clock), torch.Generator().manual_seed(seed)
    bridge, count = _Bridge(joint, loc, scale_tril), num_particles
    z = loc + _normals(count, loc, g) @ scale_tril.mT
    beta, log_evidence, step = 0.0, 0.0, _STEP
    with suppress(OutOfTime, LinAlgError):
        evaluations = _FEW_TEMPERATURES * _NUM_MOVES * _NUM_LEAPFROGS
        joint.budget.expect(evaluations * joint.price("gradient", count))
        log_p, log_w = joint.value_and_grad(z)[0], bridge.wide(z)[0]
        for _ in range(_MOST_TEMPERATURES):
            ratio = torch.where(torch.isfinite(log_p), log_p - log_w, -torch.inf)
            rise = _rise(ratio, 1 - beta)
            weights = in_double(rise * ratio)
            z = z[_systematic(weights, g)]
            log_evidence += float(weights.logsumexp(0)) - math.log(count)
            next_beta = min(1.0, beta + rise)
            z, log_p, log_w, step = _moved(bridge, z, next_beta, step, g)
            beta = next_beta  # complete only after the moves, without which particles are copies
            if beta >= 1:
                break
    return Particles(z, log_evidence, beta >= 1)


@dataclass(frozen=True)
class _Bridge:
    """The densities between a wide Gaussian and the posterior."""

    joint: Metered
    loc: Tensor
    scale_tril: Tensor

    def wide(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of the Gaussian, and its slope."""
        L = self.scale_tril
        eps = torch.linalg.solve_triangular(L.mT, z - self.loc, upper=True, left=False)
        slope = torch.linalg.solve_triangular(L, eps, upper=False, left=False)
        norm = 0.5 * len(self.loc) * math.log(2 * math.pi)
        return -0.5 * (eps**2).sum(-1) - norm - L.diagonal().log().sum(), -slope

    def at(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log pi_beta, its slope, log p and the log density of the Gaussian."""
        log_p, slope_p = self.joint.value_and_grad(z)
        log_w, slope_w = self.wide(z)
        tempered = (1 - beta) * log_w + beta * log_p
        return tempered, (1 - beta) * slope_w + beta * slope_p, log_p, log_w


def _moved(
    bridge: _Bridge, z: Tensor, beta: float, step: float, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Particles after some moves at one temperature, log p and log N there, and the next step."""
    _, root = mean_and_root(z)
    value, slope, log_p, log_w = bridge.at(z, beta)
    for _ in range(_NUM_MOVES):
        momentum = _normals(len(z), bridge.loc, g)
        new, force, p = z, slope, momentum
        for _ in range(_NUM_LEAPFROGS):
            p = p + 0.5 * step * force @ root
            new = new + step * p @ root.mT
            new_value, force, new_log_p, new_log_w = bridge.at(new, beta)
            p = p + 0.5 * step * force @ root
        gain = new_value - value - 0.5 * (p**2 - momentum**2).sum(-1)
        chance = gain.exp().clamp_max(1.0).nan_to_num(0.0)
        ok = torch.rand(len(z), generator=g).to(chance) < chance
        keep = ok.unsqueeze(-1)
        z, slope = torch.where(keep, new, z), torch.where(keep, force, slope)
        value, log_p = torch.where(ok, new_value, value), torch.where(ok, new_log_p, log_p)
        log_w = torch.where(ok, new_log_w, log_w)
        step *= 1.3 if float(chance.mean()) > _WANTED_ACCEPTANCE else 0.75
        step = min(step, _LARGEST_STEP)
    return z, log_p, log_w, step


def _normals(count: int, loc: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(count, len(loc), generator=g, dtype=loc.dtype).to(loc.device)


def _systematic(log_weights: Tensor, g: torch.Generator) -> Tensor:
    """Which particles survive, each as often as its weight says: systematic resampling."""
    count = len(log_weights)
    cumulative = log_weights.softmax(0).cumsum(0)
    strata = (torch.arange(count) + torch.rand((), generator=g)).to(cumulative) / count
    return torch.searchsorted(cumulative, strata * cumulative[-1]).clamp_max(count - 1)


def _rise(ratio: Tensor, most: float) -> float:
    """The largest rise of beta that leaves half of the particles, by bisection."""

    def survivors(rise: float) -> float:
        w = in_double(rise * ratio).softmax(0)
        return float(1 / (w**2).sum() / len(w))

    if survivors(most) > _ESS_SHARE:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if survivors(middle) > _ESS_SHARE else (low, middle)
    return max(low, 1e-6)
