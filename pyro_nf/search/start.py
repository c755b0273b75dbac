"""Where to start: a Gaussian near the posterior, found before the flow learns anything."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_nf._checks import (
    check_clock,
    check_count,
    check_event,
    check_has,
    check_positive,
    check_seed,
    check_tensor,
)
from pyro_nf.model.density import LogDensity
from pyro_nf.model.metered import Metered
from pyro_nf.search.ascent import BatchedLBFGS, mean_field_ascent, newton_ascent
from pyro_nf.search.gaussians import (
    MAX_FULL_DIM,
    MAX_SCALES,
    NUM_PROBES,
    diagonal_precision,
    gaussian_elbos,
    laplace_scale,
    sample_gaussian,
)
from pyro_nf.search.points import random_starts
from pyro_nf.train.budget import Clock, OutOfTime

# Scale of the Gaussian around a point whose curvature is not known.
_NARROW = 0.1
# Shares of the time that the ascent, the curvature, the first ELBOs and the ascent of Gaussians may
# take.
_ASCENT_SHARE, _CURVATURE_SHARE, _ELBO_SHARE, _REFINE_SHARE = 0.5, 0.3, 0.3, 0.5
# As many points climb, and as many draws climb with a Gaussian, as leave time for so many steps.
_LEAST_STEPS = 20


@dataclass(frozen=True)
class GaussianStart:
    r"""A Gaussian :math:`N(m_0, L_0 L_0^\top)` in unconstrained coordinates.

    Attributes:
        loc: m_0, shape (D,).
        scale: L_0, lower triangular (D, D), or its diagonal (D,) in high dimensions.
        elbo: of this Gaussian, estimated.
        modes: Gaussians at other maxima, best first. Those with an ELBO within a few nats of this
            one hold a part of the mass.
    """

    loc: Tensor
    scale: Tensor
    elbo: float
    modes: tuple[GaussianStart, ...] = field(default=(), repr=False)

    @property
    def scale_tril(self) -> Tensor:
        """L_0 as a matrix (D, D)."""
        return self.scale.diag_embed() if self.scale.dim() == 1 else self.scale

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., D) = m_0 + L_0 eps and log q(z) (...,)."""
        check_event("GaussianStart", "eps", eps, len(self.loc), 1)
        return sample_gaussian(self.loc, self.scale, eps)


def laplace_start(
    joint: LogDensity,
    init: Tensor | None = None,
    *,
    count_starts: int = 512,
    count_climbers: int = 64,
    count_modes: int = 4,
    count_draws: int = 256,
    count_refine: int = 2,
    max_steps: int = 200,
    max_seconds: float | None = 2.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> GaussianStart:
    r"""A Gaussian with a good ELBO, from many climbs and the curvature along them.

    From the initial point and some of many random points, most of them the best, L-BFGS climbs in
    one batch, of which every ten steps the better half goes on. Laplace's approximation
    :math:`N(z, |-\nabla^2 \log p(z)|^{-1})` is a candidate at the best distinct maxima and at
    earlier points of the climbs. The best of them climb on by their ELBO
    (:func:`mean_field_ascent`, :func:`newton_ascent`). The one with the best *ELBO* wins, never the
    best density: a funnel has its greatest density where its scale is 0.

    Args:
        joint: the log joint; one that is metered has its own time, and ``max_seconds`` and
            ``clock`` do not count.
        init: first point (D,); `joint.init_loc` by default.
        count_starts: random points to look at.
        count_climbers: how many points climb, the initial one among them.
        count_modes: distinct maxima that become candidates.
        count_draws: draws of an ELBO; the best few are estimated again with twice as many.
        count_refine: how many of the best Gaussians climb on by their ELBO.
        max_steps: of the climb.
        max_seconds: what is found by then is used; None for no bound, and no look at a clock.
        seed: of the random numbers.
        clock: what the seconds are counted with.

    Returns:
        The best Gaussian and, in `modes`, those of the other maxima.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_nf.model.joint import LogJoint
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.tensor([500.0, -300.0]), 2.0).to_event(1))
        >>> start = laplace_start(LogJoint(model), max_seconds=None)
        >>> start.loc.round().tolist(), (start.scale_tril.diagonal() * 10).round().tolist()
        ([500.0, -300.0], [20.0, 20.0])
    """
    check_has("laplace_start", "joint", joint, ("value_and_grad", "init_loc"), "a LogJoint")
    check_tensor("laplace_start", "init", init, (len(joint.init_loc),), optional=True)
    check_count("laplace_start", "count_starts", count_starts)
    check_count("laplace_start", "count_climbers", count_climbers)
    check_count("laplace_start", "count_modes", count_modes)
    check_count("laplace_start", "count_draws", count_draws)
    check_count("laplace_start", "count_refine", count_refine, at_least=0)
    check_count("laplace_start", "max_steps", max_steps)
    check_positive("laplace_start", "max_seconds", max_seconds, optional=True)
    check_seed("laplace_start", seed)
    check_clock("laplace_start", clock)
    search = StartSearch(
        Metered.of(joint, max_seconds, clock),
        joint.init_loc if init is None else init,
        num_modes=count_modes,
        num_draws=count_draws,
        seed=seed,
    )
    search.run(count_starts, count_climbers, count_refine, max_steps)
    return search.best()


@dataclass
class _Candidate:
    """A Gaussian that may become the start, and its ELBO as far as it is known."""

    loc: Tensor
    scale: Tensor
    is_maximum: bool = False
    elbo: float = -math.inf


class StartSearch:
    """The search of :func:`laplace_start`, whose best so far can be had at any time.

    Args:
        joint: the log joint, with the time that the search may take.
        init: first point (D,).
        num_modes: distinct maxima that become candidates.
        num_draws: draws of an ELBO.
        seed: of the random numbers.
    """

    def __init__(
        self,
        joint: Metered,
        init: Tensor,
        *,
        num_modes: int = 4,
        num_draws: int = 256,
        seed: int = 0,
    ) -> None:
        self.joint, self.init = joint, init
        self.num_modes, self.num_draws, self.seed = num_modes, num_draws, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.candidates = [_Candidate(init, torch.full_like(init, _NARROW))]
        self.winner = self.candidates[0]

    def best(self) -> GaussianStart:
        """The best Gaussian so far and, in `modes`, those of the other maxima."""
        others = [
            GaussianStart(c.loc, c.scale, c.elbo)
            for c in self.candidates
            if c.is_maximum and c is not self.winner and math.isfinite(c.elbo)
        ]
        others.sort(key=lambda start: -start.elbo)
        loc, scale = self.winner.loc, self.winner.scale
        if scale.dim() == 1 and len(loc) <= MAX_FULL_DIM:
            scale = scale.diag_embed()  # one form for one size
        return GaussianStart(loc, scale, self.winner.elbo, tuple(others))

    def run(
        self,
        num_starts: int = 512,
        num_climbers: int = 64,
        num_refine: int = 2,
        max_steps: int = 200,
    ) -> None:
        """Climbs, takes the curvature, and chooses, until it is done or its time is up."""
        with suppress(OutOfTime):
            points = self._points(self._climb(num_starts, num_climbers), max_steps)
            shape = self.num_draws, len(self.init)
            normals = torch.randn(shape, generator=self.generator, dtype=self.init.dtype)
            normals = normals.to(self.init.device)
            self._curve(points)
            share = _ELBO_SHARE / len(self.candidates)
            eps = normals[: self.joint.afford("value", self.num_draws, share)]
            self._offer(self.candidates, eps)
            if num_refine:
                self._refine(num_refine, normals, eps)
            self._decide(torch.cat([eps, -eps]))

    def _climb(self, num_starts: int, num_climbers: int) -> BatchedLBFGS:
        """Many points, ready to climb; the initial point is number 0."""
        z, log_prob = random_starts(self.joint, self.init, num_starts, self.generator)
        # The better half by density; the others are any, lest all stand near one maximum.
        ranked = log_prob.argsort(descending=True)
        ranked = ranked[: int(torch.isfinite(log_prob).sum().clamp_min(1))]
        share = _ASCENT_SHARE / _LEAST_STEPS
        num_climbers = self.joint.afford("gradient", num_climbers, share)
        half = min(num_climbers // 2, len(ranked))
        rest = ranked[half:][torch.randperm(len(ranked) - half, generator=self.generator)]
        best = torch.cat([ranked[:half], rest])[: num_climbers - 1]
        joint = self.joint.part(_ASCENT_SHARE)
        return BatchedLBFGS(joint.value_and_grad, torch.cat([self.init.unsqueeze(0), z[best]]))

    def _points(self, climb: BatchedLBFGS, max_steps: int) -> list[tuple[Tensor, bool]]:
        """Where a climb came to and what it passed, and whether it is a maximum, in that order."""
        # Where the initial point, number 0 until the first selection, and the leader passed.
        passed: list[Tensor] = [climb.z[0].clone()]
        scouts: list[Tensor] = []
        with suppress(OutOfTime):
            for step in range(1, max_steps + 1):
                climb.step()
                if step in (1, 2, 4, 8, 16, 32, 64, 128):
                    passed.append(climb.z[climb.value.argmax()].clone())
                    passed += [climb.z[0].clone()] if step < 10 else []
                if bool(climb.done.all()):
                    break
                if step % 10 == 0:
                    # A lower maximum may hold a part of the mass: it is noted before it is left.
                    scouts = scouts or _distinct(climb, self.num_modes)
                    climb.keep(max(len(climb.z) // 2, min(8, len(climb.z))))
        points = [(z, True) for z in _distinct(climb, self.num_modes)]
        return points + [(z, False) for z in passed[::-1]] + [(z, True) for z in scouts]

    def _curve(self, points: list[tuple[Tensor, bool]]) -> None:
        """A candidate for each point and each bound of its scales."""
        joint, probes = self.joint.part(_CURVATURE_SHARE), torch.Generator().manual_seed(self.seed)
        found: list[_Candidate] = []
        with suppress(OutOfTime):
            for point, is_maximum in points:
                if not any(torch.equal(point, other.loc) for other in found):
                    scales = _scales(joint, point, probes)
                    found += [_Candidate(point, scale, is_maximum) for scale in scales]
        if not found and points:
            found = [_Candidate(points[0][0], torch.full_like(self.init, _NARROW))]
        self.candidates = [*found, *self.candidates]

    def _elbos(self, candidates: list[_Candidate], eps: Tensor) -> list[float]:
        elbos = gaussian_elbos(self.joint, [(c.loc, c.scale) for c in candidates], eps).tolist()
        return [elbo if math.isfinite(elbo) else -math.inf for elbo in elbos]

    def _offer(self, candidates: list[_Candidate], eps: Tensor) -> None:
        """Finds the ELBO of candidates, by draws that are the same for all, and the best."""
        for c, elbo in zip(candidates, self._elbos(candidates, eps), strict=True):
            c.elbo = elbo
            if elbo > self.winner.elbo:
                self.winner = c

    def _refine(self, count: int, normals: Tensor, eps: Tensor) -> None:
        """Lets the best Gaussians climb on by their ELBO on fixed draws."""
        best_few = sorted(self.candidates, key=lambda c: -c.elbo)[:count]
        # The last candidate is the initial point itself, from where no climb has gone astray.
        first = self.candidates[-1]
        chosen = best_few if any(c is first for c in best_few) else [*best_few, first]
        few = normals[: self.joint.afford("gradient", 32, _REFINE_SHARE / _LEAST_STEPS, least=2)]
        fixed = torch.cat([few, -few])  # as many as a recorded step takes
        joint = self.joint.part(_REFINE_SHARE)
        finer = [f for c in chosen if math.isfinite(c.elbo) for f in _refined(joint, c, fixed)]
        self._offer(finer, eps)
        self.candidates += finer

    def _decide(self, eps: Tensor) -> None:
        """Chooses among the best three by more draws."""
        finalists = sorted(self.candidates, key=lambda c: -c.elbo)[:3]
        elbos = self._elbos(finalists, eps)
        best = max(elbos)
        self.winner = finalists[elbos.index(best)]
        self.winner.elbo = best


def _scales(joint: Metered, point: Tensor, probes: torch.Generator) -> list[Tensor]:
    """Scales by the curvature at a point; none where it is not finite."""
    try:
        if len(point) > MAX_FULL_DIM:
            precision = joint.spend(
                "hessian", NUM_PROBES, lambda: diagonal_precision(joint.joint, point, probes)
            )
            scales = [precision.clamp_min(s**-2) ** -0.5 for s in MAX_SCALES]
        else:
            hessian = joint.hessian(point)
            scales = [laplace_scale(hessian, s) for s in MAX_SCALES]
    except (ValueError, RuntimeError):
        return []
    return scales[1:] if torch.equal(*scales) else scales


def _refined(joint: Metered, c: _Candidate, eps: Tensor) -> list[_Candidate]:
    """Gaussians that climbed on by their ELBO, from this one and from its diagonal."""
    spread = c.scale if c.scale.dim() == 1 else c.scale.norm(dim=-1)
    diagonal = mean_field_ascent(joint, c.loc, spread, eps)
    if len(c.loc) > MAX_FULL_DIM:
        return [_Candidate(*diagonal)]
    full = [newton_ascent(joint, m, s, eps) for m, s in [(c.loc, c.scale), diagonal]]
    return [_Candidate(*gaussian) for gaussian in [*full, diagonal]]


def _distinct(climb: BatchedLBFGS, count: int) -> list[Tensor]:
    """The best maxima that are not the same point twice."""
    found: list[Tensor] = []
    values: list[float] = []
    for i in climb.value.argsort(descending=True):
        if len(found) == count or not bool(torch.isfinite(climb.value[i])):
            break
        z, value = climb.z[i], float(climb.value[i])
        near = any(
            abs(value - v) < 1.0 and float((z - other).norm()) < 0.3 * math.sqrt(len(z))
            for other, v in zip(found, values, strict=True)
        )
        if not near:
            found.append(z.clone())
            values.append(value)
    return found
