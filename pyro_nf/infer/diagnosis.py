"""How far a posterior can be trusted, and what to do next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyro_nf.infer.gaussians import MAX_FULL_DIM
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.start import Start, laplace_start
from pyro_nf.infer.weights import Weights

Verdict = Literal["good", "use the weights", "do not trust"]

# Above this k-hat the weights have no reliable mean (Vehtari et al., 2024).
KHAT_LIMIT = 0.7
# An effective share of draws above which a large k-hat is the noise of nearly equal weights.
ESS_NEARLY_ALL = 0.9
# A guide is good as it is within so many nats, posterior sds, and relative error of an sd.
ELBO_GAP, SHIFT, SD_RATIO = 0.1, 0.1, 0.1
# Mass counts as missed where the guide has less than this share of the density it should have; so
# much missed mass makes a posterior untrustworthy.
UNDER_COVERED, MISSED_MASS = 1 / 20, 0.02
# Share of draws without a finite density that is too much.
FAILED = 0.05
# Widening of the draws' own Gaussian when it looks for missed tails.
WIDE = 2.0


@dataclass(frozen=True)
class SiteCheck:
    """What the importance weights would change in one coordinate.

    Attributes:
        name: Site and index of the unconstrained coordinate.
        shift: Weighted minus plain mean, in weighted sds.
        sd_ratio: Plain over weighted sd.
    """

    name: str
    shift: float
    sd_ratio: float


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its evidence; printing it shows all.

    Attributes:
        verdict: "good" (take the draws as they are), "use the weights" (resample or refine first),
            or "do not trust".
        reasons: Why.
        advice: What to do next.
        khat: Pareto shape of the weights.
        ess_share: Effective sample size over the number of draws.
        elbo: With ``elbo_se``, its standard error.
        log_evidence: With ``log_evidence_se``, its standard error.
        probed_log_evidence: The evidence by draws that also look elsewhere: around maxima found
            by independent climbs, and in a wider Gaussian.
        missed_mass: Share of the posterior mass, as the probe sees it, where the guide has less
            than a twentieth of the density that it should have.
        count_maxima: Distinct maxima that the climbs found.
        worst_sites: The coordinates that the weights would change most.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    advice: str
    khat: float
    ess_share: float
    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    probed_log_evidence: float
    missed_mass: float
    count_maxima: int
    worst_sites: tuple[SiteCheck, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}" + (f": {'; '.join(self.reasons)}" if self.reasons else ""),
            f"  k-hat                {self.khat:.2f}",
            f"  effective share      {self.ess_share:.1%}",
            f"  ELBO                 {self.elbo:.3f} +- {self.elbo_se:.3f}",
            f"  log evidence         {self.log_evidence:.3f} +- {self.log_evidence_se:.3f}",
            f"  probed log evidence  {self.probed_log_evidence:.3f}",
            f"  missed mass          {self.missed_mass:.1%} ({self.count_maxima} maxima found)",
        ]
        lines += [
            f"  {site.name:<20} shift {site.shift:+.2f} sd, sd ratio {site.sd_ratio:.2f}"
            for site in self.worst_sites
        ]
        return "\n".join([*lines, f"  next: {self.advice}"])


@dataclass(frozen=True)
class Probe:
    """What a look elsewhere found.

    Attributes:
        log_evidence: Estimated with draws from the guide, the maxima and the wide Gaussian.
        missed_mass: See :class:`Diagnosis`.
        missed_mass_se: Its standard error.
        count_maxima: Distinct maxima found.
    """

    log_evidence: float
    missed_mass: float
    missed_mass_se: float
    count_maxima: int


def probe(
    joint: LogJoint, q: TorchDistribution, z: Tensor, *, max_seconds: float = 2.0, seed: int = 1
) -> Probe:
    r"""Looks for posterior mass where the guide has none.

    A defensive mixture :math:`r = \frac13 q + \frac13 N(\bar z, 4 S) + \frac13 \sum_k
    \frac1K N(m_k, H_k^{-1})` adds to the guide a wide Gaussian around its draws and a Laplace
    approximation at each maximum that climbs from new random starts find. Its importance weights
    :math:`p / r` are bounded where the guide is good and see mass where it is not.

    Args:
        joint: The log joint density.
        q: The guide's distribution.
        z: Draws of it, ``(S, D)``.
        max_seconds: Most seconds for the climbs.
        seed: Seed of the climbs.
    """
    found = laplace_start(joint, z[0].detach().clone(), max_seconds=max_seconds, seed=seed)
    maxima = (found, *found.modes)
    spread = WIDE * z.std(0) if z.shape[-1] > MAX_FULL_DIM else _wide_factor(z)
    gaussians = [Start(z.mean(0), spread, math.nan), *maxima]
    shares = [1 / 3, 1 / 3, *[1 / 3 / len(maxima)] * len(maxima)]
    count = len(z)
    pieces = [z[: max(1, round(shares[0] * count))]]
    for gaussian, share in zip(gaussians, shares[1:], strict=True):
        eps = torch.randn(max(1, round(share * count)), z.shape[-1]).to(z)
        pieces.append(gaussian.sample(eps)[0])
    points = torch.cat(pieces)
    with torch.no_grad():
        log_p = joint.log_prob(points)
        log_q = _log_prob(q, points)
        each = torch.stack([log_q, *(_gaussian_log_prob(g, points) for g in gaussians)])
    log_r = (each + torch.tensor(shares).log().to(z).unsqueeze(-1)).logsumexp(0)
    log_w = torch.where(log_p.isfinite() & log_r.isfinite(), log_p - log_r, -math.inf)
    log_z = log_w.logsumexp(0) - math.log(len(points))
    weights = log_w.softmax(0)
    missed = (log_p - log_q > log_z - math.log(UNDER_COVERED)).to(z)
    mass = float((weights * missed).sum())
    se = float((weights * (missed - mass)).square().sum().sqrt())
    return Probe(float(log_z), mass, se, len(maxima))


def _wide_factor(z: Tensor) -> Tensor:
    covariance = torch.cov(z.mT).reshape(z.shape[-1], z.shape[-1])
    ridge = torch.finfo(z.dtype).eps * covariance.diagonal().max() * len(covariance)
    return WIDE * torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).to(z))


def _log_prob(q: TorchDistribution, z: Tensor) -> Tensor:
    log_q = q.log_prob(z)
    return torch.where(log_q.isnan(), -math.inf, log_q)


def _gaussian_log_prob(gaussian: Start, z: Tensor) -> Tensor:
    if gaussian.scale.dim() == 1:
        return Normal(gaussian.loc, gaussian.scale).log_prob(z).sum(-1)
    return MultivariateNormal(gaussian.loc, scale_tril=gaussian.scale).log_prob(z)


def check_sites(joint: LogJoint, z: Tensor, weights: Weights) -> list[SiteCheck]:
    """What the weights would change in each unconstrained coordinate, the worst first.

    Args:
        joint: Names the coordinates.
        z: Draws, ``(S, D)``.
        weights: Their weights.
    """
    w = weights.normalized.to(z).unsqueeze(-1)
    mean = (w * z).sum(0)
    sd = (w * (z - mean).square()).sum(0).sqrt()
    shift, ratio = (mean - z.mean(0)) / sd, z.std(0) / sd
    names = [label for site in joint.sites.values() for label in site.labels]
    checks = [SiteCheck(*row) for row in zip(names, shift.tolist(), ratio.tolist(), strict=True)]
    return sorted(checks, key=lambda c: -max(abs(c.shift), abs(c.sd_ratio - 1)))


def judge(
    weights: Weights,
    found: Probe,
    sites: list[SiteCheck],
    others: list[Weights],
    is_random: bool = False,
) -> Diagnosis:
    """Weighs the evidence.

    Args:
        weights: Importance weights of the draws.
        found: What the probe found.
        sites: What the weights would change, the worst first.
        others: Weights of independent fits of the same model, whose evidence should agree.
        is_random: Whether the density that the weights belong to is itself an estimate.
    """
    share = weights.ess / len(weights.raw)
    failed = float((~weights.raw.isfinite()).double().mean())
    elbo = float(weights.raw[weights.raw.isfinite()].mean())
    serious, slight = [], []
    if not math.isfinite(weights.log_evidence):
        serious.append("the evidence is not finite")
    if is_random:
        serious.append("the model takes a subsample or draws random numbers of its own")
    if found.missed_mass > MISSED_MASS + 2 * found.missed_mass_se:
        serious.append(f"the guide misses about {found.missed_mass:.0%} of the mass")
    if not (weights.khat < KHAT_LIMIT or share > ESS_NEARLY_ALL):
        serious.append(f"k-hat is {weights.khat:.2f}, the weights have no reliable mean")
    if failed > FAILED:
        serious.append(f"{failed:.0%} of the draws have no finite density")
    for other in others:
        gap = abs(other.log_evidence - weights.log_evidence)
        noise = math.hypot(other.log_evidence_se, weights.log_evidence_se)
        if gap > max(ELBO_GAP, 4 * noise):
            serious.append(f"the evidence of another fit differs by {gap:.2f} nats")
    gap = weights.log_evidence - elbo
    if gap > ELBO_GAP:
        slight.append(f"the ELBO is {gap:.2f} nats below the evidence")
    if share < 0.5:
        slight.append(f"only {share:.0%} of the draws are effective")
    if sites and (abs(sites[0].shift) > SHIFT or abs(sites[0].sd_ratio - 1) > SD_RATIO):
        slight.append(f"the weights would change {sites[0].name}")
    verdict: Verdict = "do not trust" if serious else "use the weights" if slight else "good"
    advice = {
        "do not trust": "fit longer or with count_components > 1, then "
        "posterior.refine('independence'), or NUTS",
        "use the weights": "posterior.resample(), or posterior.refine('neutra') for exact draws",
        "good": "take the draws as they are",
    }[verdict]
    if is_random:
        advice = "Posterior.from_guide with a model of all rows, and diagnose that"
    return Diagnosis(
        verdict,
        tuple(serious or slight),
        advice,
        weights.khat,
        share,
        elbo,
        weights.elbo_se,
        weights.log_evidence,
        weights.log_evidence_se,
        found.log_evidence,
        found.missed_mass,
        found.count_maxima,
        tuple(sites[:3]),
    )
