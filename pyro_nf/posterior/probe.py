"""A look elsewhere: whether a guide misses a part of its posterior, and how far was looked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.ops.devices import in_double
from pyro_nf.search.effort import Effort
from pyro_nf.search.gaussians import MAX_FULL_DIM, StudentT
from pyro_nf.search.maxima import Maxima, find_maxima
from pyro_nf.search.points import prior_draws, prior_reference, starts
from pyro_nf.train.budget import Budget
from pyro_nf.train.modes import recording
from pyro_nf.train.randomness import own_randomness

# Mass counts as missed where the guide has less than this share of the density it should have.
UNDER_COVERED = 1 / 20
# Widenings of the draws' own covariance when it looks for missed tails.
WIDE = (2.0, 8.0)
# A maximum that holds so little (nats) of the evidence is none that matters.
_NEGLIGIBLE = 12.0
# Points that are evaluated between two looks at the seconds, if they are bounded.
_CHUNK = 256
# Points of wide draws from which it climbs because they have more density than the guide gives.
_HUNTED = 64
# With fewer effective points the probe's own estimates are noise.
_LEAST_ESS = 20.0


@dataclass(frozen=True)
class Probe:
    """What a look elsewhere found, and how far it reached.

    Attributes:
        log_evidence: Estimated with draws of the guide, of the maxima, and wider ones.
        missed_mass: Share of the mass where the guide has less than a twentieth of the density that
            it should have.
        missed_mass_se: Its standard error.
        count_maxima: Distinct maxima found.
        log_evidence_se: Standard error of ``log_evidence``.
        count_starts: Points from which it climbed; 0 if it is not known.
        count_prior: How many of them are draws of the prior.
        unfinished: Why the search was cut short, or "".
        blind: What it could not see, or "".
    """

    log_evidence: float
    missed_mass: float
    missed_mass_se: float
    count_maxima: int
    log_evidence_se: float = 0.0
    count_starts: int = 0
    count_prior: int = 0
    unfinished: str = ""
    blind: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether the search came to the end that was planned for it."""
        return not self.unfinished

    @property
    def unseen_share(self) -> float:
        """3 / N: what a piece's basin may hold of the prior and yet have escaped N draws of it.

        (1 - 3/N)^N < 5 %. It is 0 where it is not known: the prior has no draws.
        """
        return 3 / self.count_prior if self.count_prior else 0.0

    @property
    def reach(self) -> str:
        """How far was looked, in words."""
        if not self.count_starts:
            return ""
        if not self.count_prior:
            return f"{self.count_starts} climbs, none from the prior, which has no draws"
        return (
            f"{self.count_starts} climbs, {self.count_prior} from draws of the prior: a piece "
            f"whose basin holds more than {self.unseen_share:.2g} of the prior would have been "
            "seen with 95 %"
        )


def probe(
    joint: LogDensity,
    q: TorchDistribution,
    z: Tensor,
    *,
    log_evidence: float = -math.inf,
    effort: Effort | None = None,
    max_seconds: float | None = None,
    seed: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> Probe:
    r"""Looks for posterior mass where the guide has none.

    A defensive mixture

    .. math:: r = \tfrac12 q + \tfrac1{12} \big(t(\bar z, 2^2 S) + t(\bar z, 8^2 S) +
              t(\mathrm{prior})\big) + \tfrac14 \sum_k \tfrac1K t(m_k, |H_k|^{-1})

    adds to the guide wide Student-t's around its draws, one as wide as the prior, and one at each
    maximum that climbs from new starts find (:func:`~pyro_nf.search.maxima.find_maxima`). Its
    importance weights :math:`p / r` are bounded where the guide is good and see mass where it is
    not. The starts are draws of the prior, of balls of all sizes, of the guide's surroundings, and
    those of many wide draws at which the posterior exceeds the guide most.

    Counts bound it, not a clock: the same seed gives the same result to the last bit. How many
    points climb follows from what the log joint costs by counted operations.

    Args:
        joint: The log joint density.
        q: The guide's distribution.
        z: Draws of it, ``(S, D)``.
        log_evidence: By the guide's own weights; maxima that hold next to nothing of it are left
            out.
        effort: How far to look; by default as far as the cost of the log joint allows.
        max_seconds: A bound of seconds. If it cuts the search short the result says so.
        seed: Seed of all that is drawn; the global generators are left as they were.
        clock: Returns the seconds that ``max_seconds`` counts.
    """
    budget = Budget(max_seconds=max_seconds, clock=clock)
    effort = effort or Effort.for_joint(joint)
    z, least = z.detach(), log_evidence - _NEGLIGIBLE
    with recording("probe"), own_randomness(seed), torch.no_grad():
        prior = prior_draws(joint, effort.num_starts // 2, budget)
        reference = prior_reference(joint, prior)
        wide = [*_wide(z), reference]
        points = starts(joint, prior, reference, z, effort.num_starts)
        try:
            points = torch.cat([points, _hunted(joint, q, wide, effort.num_points, budget)])
        except (NotImplementedError, ValueError, RuntimeError, KeyError):
            # Some guides know the density of their own draws only.
            maxima = find_maxima(joint, points, effort, least_mass=least, budget=budget)
            found = Probe(
                math.nan,
                math.nan,
                math.nan,
                len(maxima.found),
                unfinished=maxima.unfinished,
                blind="the guide has a density only at its own draws",
            )
        else:
            maxima = find_maxima(joint, points, effort, least_mass=least, budget=budget)
            found = _compared(joint, q, z, wide, maxima, effort.num_points, budget)
        return replace(found, count_starts=len(points), count_prior=len(prior))


def _log_ps(joint: LogDensity, z: Tensor, budget: Budget) -> Tensor:
    """The log joint density of as many of the points ``(S, D)`` as the seconds allow."""
    if budget.max_seconds is None:
        return joint.log_prob(z)
    values: list[Tensor] = []
    for piece in z.split(1 if joint.kind == "loop" else _CHUNK):
        if values and budget.is_spent():
            break
        values.append(joint.log_prob(piece))
    return torch.cat(values)


def _hunted(
    joint: LogDensity, q: TorchDistribution, wide: list[StudentT], count: int, budget: Budget
) -> Tensor:
    """Those of many wide draws at which the posterior exceeds the guide most."""
    seen = torch.cat([t.sample(count // len(wide)) for t in wide])
    seen = seen[torch.randperm(len(seen))]
    log_q = guide_log_prob(q, seen)
    log_p = _log_ps(joint, seen, budget)
    excess = torch.where(log_p.isfinite(), log_p - log_q[: len(log_p)], -torch.inf)
    return seen[excess.topk(min(_HUNTED, len(excess), count // 16)).indices]


def _compared(
    joint: LogDensity,
    q: TorchDistribution,
    z: Tensor,
    wide: list[StudentT],
    maxima: Maxima,
    count: int,
    budget: Budget,
) -> Probe:
    """Importance sampling with the defensive mixture."""
    near = [maximum.near for maximum in maxima.found]
    parts = [*wide, *near]
    counts = [count // 4 // len(wide)] * len(wide)
    counts += [max(8, count // 4 // max(1, len(near)))] * len(near)
    own = z[torch.randperm(len(z))[: count // 2]]
    points = torch.cat([own, *(t.sample(n) for t, n in zip(parts, counts, strict=True))])
    shares = torch.tensor([len(own), *counts]).to(z) / len(points)
    points = points[torch.randperm(len(points))]  # any part of them is a fair sample too
    log_p = _log_ps(joint, points, budget)
    is_whole, points = len(log_p) == len(points), points[: len(log_p)]
    log_q = guide_log_prob(q, points)
    each = torch.stack([log_q, *(t.log_prob(points) for t in parts)])
    log_r = (each + shares.log().unsqueeze(-1)).logsumexp(0)
    usable = log_p.isfinite() & log_r.isfinite()
    log_w = in_double(torch.where(usable, log_p - log_r, -torch.inf))
    log_z = log_w.logsumexp(0) - math.log(len(points))
    weights = log_w.softmax(0)
    least_missed = log_z - math.log(UNDER_COVERED)
    missed = in_double(log_p - log_q > least_missed)
    mass = (weights * missed).sum()
    square = weights.square().sum()
    unfinished = maxima.unfinished or ("" if is_whole else "the seconds ended it")
    blind = ""
    if not float(1 / square) >= _LEAST_ESS:
        blind = f"only {float(1 / square):.0f} of its {len(points)} points are effective"
    elif len(maxima.bare):
        excess = joint.log_prob(maxima.bare) - guide_log_prob(q, maxima.bare)
        if bool((excess > least_missed).any()):
            blind = "where a climb ended and the guide has no mass, there is no finite curvature"
    return Probe(
        float(log_z),
        float(mass),
        float((weights * (missed - mass)).square().sum().sqrt()),
        len(near),
        log_evidence_se=float((square - 1 / len(points)).clamp_min(0).sqrt()),
        unfinished=unfinished,
        blind=blind,
    )


def _wide(z: Tensor) -> list[StudentT]:
    """Around draws (S, D), wider than they are by each of the factors.

    A draw that is not finite is left out, a coordinate that does not vary is as wide as 1, and
    without a root of the covariance each coordinate is taken alone.
    """
    z = z[z.isfinite().all(-1)]
    mean = z.mean(0) if len(z) else z.new_zeros(z.shape[-1])
    sd = z.std(0) if len(z) > 1 else torch.zeros_like(mean)
    root = torch.where(sd > 0, sd, 1.0)
    if z.shape[-1] <= MAX_FULL_DIM:
        root = root.diag_embed()
        if len(z) > 1:
            covariance = torch.cov(z.mT).reshape(root.shape)
            covariance = covariance + (sd == 0).to(z).diag_embed()
            ridge = torch.finfo(z.dtype).eps * covariance.diagonal() * len(covariance)
            full, failed = torch.linalg.cholesky_ex(covariance + ridge.diag_embed())
            root = root if failed else full
    return [StudentT(mean, factor * root) for factor in WIDE]


def guide_log_prob(q: TorchDistribution, z: Tensor) -> Tensor:
    """The guide's log density; -inf where it is NaN."""
    log_q = q.log_prob(z)
    return torch.where(log_q.isnan(), -math.inf, log_q)
