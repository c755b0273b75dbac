"""How far a posterior can be trusted, and what to do next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.posterior.probe import Probe
from pyro_nf.posterior.weights import Weights, khat_in_words

Verdict = Literal["good", "one piece as far as was seen", "use the weights", "do not trust"]

# Above this k-hat the weights have no reliable mean (Vehtari et al., 2024).
KHAT_LIMIT = 0.7
# Above this one they are estimated to have no mean at all.
KHAT_NO_MEAN = 1.0
# An effective share of draws above which a large k-hat is the noise of nearly equal weights.
ESS_NEARLY_ALL = 0.9
# A guide is good as it is within so many nats, posterior sds, and relative error of an sd.
ELBO_GAP, SHIFT, SD_RATIO = 0.1, 0.1, 0.1
# So much missed mass makes a posterior untrustworthy.
MISSED_MASS = 0.02
# Share of draws without a finite density that is too much, and that the weights should correct.
FAILED, SOME_FAILED = 0.05, 0.005
# A look that a piece with this share of the prior may have escaped has not seen enough.
REACH_LIMIT = 0.05
# Two estimates of the evidence agree within so many standard errors, or ELBO_GAP nats.
AGREE = 4.0
# Draws at which the density of the guide is compared with what it was, and how far (nats) it may be
# from that by rounding.
COMPARED, CHANGED = 64, 0.1


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

    A number that means nothing here is NaN, and is not printed.

    Attributes:
        verdict: "good" (take the draws as they are); "one piece as far as was seen" (the same, but
            the look for other pieces was cut short, could not see, or had too few starts to see a
            piece whose basin holds ``REACH_LIMIT`` of the prior); "use the weights" (resample
            or refine first); or "do not trust".
        reasons: Why.
        advice: What to do next.
        khat: Pareto shape of the weights; -inf if they are equal, so that they have no tail.
        ess_share: Effective sample size over the number of draws.
        elbo: Mean log weight of the draws that have a density; with ``elbo_se``, its standard
            error.
        log_evidence: With ``log_evidence_se``, its standard error.
        probed_log_evidence: The evidence by draws that also look elsewhere: around maxima found
            by independent climbs, and in wider laws.
        missed_mass: Share of the posterior mass, as the probe sees it, where the guide has less
            than a twentieth of the density that it should have.
        count_maxima: Distinct maxima that the climbs found.
        worst_sites: The coordinates that the weights would change most.
        reach: How far was looked for other pieces, in words.
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
    reach: str = ""

    def __str__(self) -> str:
        numbers = [
            ("k-hat", self.khat, khat_in_words(self.khat)),
            ("effective share", self.ess_share, f"{self.ess_share:.1%}"),
            ("ELBO", self.elbo, f"{self.elbo:.3f} +- {self.elbo_se:.3f}"),
            (
                "log evidence",
                self.log_evidence,
                f"{self.log_evidence:.3f} +- {self.log_evidence_se:.3f}",
            ),
            ("probed log evidence", self.probed_log_evidence, f"{self.probed_log_evidence:.3f}"),
            (
                "missed mass",
                self.missed_mass,
                f"{self.missed_mass:.1%} ({self.count_maxima} maxima found)",
            ),
        ]
        lines = [f"{self.verdict}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")]
        lines += [f"  {name:<20} {text}" for name, value, text in numbers if not math.isnan(value)]
        lines += [f"  looked                {self.reach}"] if self.reach else []
        lines += [
            f"  {site.name:<20} shift {site.shift:+.2f} sd, sd ratio {site.sd_ratio:.2f}"
            for site in self.worst_sites
            if math.isfinite(site.shift) and math.isfinite(site.sd_ratio)
        ]
        return "\n".join([*lines, f"  next: {self.advice}"])

    @classmethod
    def without_weights(cls, reason: str) -> Diagnosis:
        """The diagnosis of draws that cannot be weighed.

        Args:
            reason: Why they cannot.
        """
        nothing = math.nan
        return cls(
            "do not trust",
            (reason,),
            "Posterior.from_guide with a model of all rows and without random numbers of its own, "
            "and diagnose that",
            *(nothing,) * 8,
            count_maxima=0,
            worst_sites=(),
        )


def check_unchanged(q: TorchDistribution, z: Tensor, log_q: Tensor) -> None:
    """Raises if a distribution no longer has the density that draws were drawn with.

    Args:
        q: The distribution.
        z: The draws, ``(S, D)``.
        log_q: Its log density then, ``(S,)``.

    Raises:
        RuntimeError: If it has changed.
    """
    try:
        with torch.no_grad():
            now = q.log_prob(z[:COMPARED])
    except (NotImplementedError, ValueError, RuntimeError, KeyError):
        return  # some guides know the density of their own draws only
    gap = float((now - log_q[:COMPARED]).abs().median())
    if gap > CHANGED:
        raise RuntimeError(
            f"Posterior.diagnose: the log density of the guide at these draws has changed by "
            f"{gap:.2g} since they were drawn; make new ones, as with fit.posterior(4000)."
        )


def check_sites(joint: LogDensity, z: Tensor, weights: Weights) -> list[SiteCheck]:
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
    names = joint.labels
    checks = [SiteCheck(*row) for row in zip(names, shift.tolist(), ratio.tolist(), strict=True)]
    # Where one draw has all the weight there is no sd, and nothing is worse.
    return sorted(checks, key=lambda c: -max(_size(c.shift), _size(c.sd_ratio - 1)))


def _size(change: float) -> float:
    return abs(change) if math.isfinite(change) else math.inf


def judge(
    weights: Weights, found: Probe, sites: list[SiteCheck], others: list[Weights]
) -> Diagnosis:
    """Weighs the evidence.

    A k-hat that is too large for its limit is overruled by weights that are nearly all effective
    only if the probe came to its end, could see, and found the same evidence and no missed mass:
    where a piece is missed the weights are even too.

    Args:
        weights: Importance weights of the draws.
        found: What the probe found.
        sites: What the weights would change, the worst first.
        others: Weights of independent fits of the same model, whose evidence should agree.
    """
    share = weights.ess / len(weights.raw)
    finite = weights.of_finite()
    failed = 1 - len(finite.raw) / len(weights.raw)
    unseen = [
        *(
            [f"the search for other pieces was cut short: {found.unfinished}"]
            * bool(found.unfinished)
        ),
        *([f"the search for other pieces cannot see: {found.blind}"] * bool(found.blind)),
        *(
            [f"the search for other pieces had few starts: {found.reach}"]
            * (found.unseen_share > REACH_LIMIT)
        ),
    ]
    excess = found.log_evidence - weights.log_evidence
    noise = math.hypot(found.log_evidence_se, weights.log_evidence_se)
    misses = found.missed_mass > MISSED_MASS + 2 * found.missed_mass_se
    agrees = abs(excess) <= max(ELBO_GAP, AGREE * noise)
    vouched = not unseen and not misses and agrees
    serious, slight = [], []
    if not math.isfinite(weights.log_evidence):
        serious.append("the evidence is not finite")
    if misses:
        serious.append(f"the guide misses about {found.missed_mass:.0%} of the mass")
    even = share > ESS_NEARLY_ALL and weights.khat < KHAT_NO_MEAN
    if not (weights.khat < KHAT_LIMIT or (even and vouched)):
        serious.append(f"k-hat is {weights.khat:.2f}, the weights have no reliable mean")
    if failed > FAILED:
        serious.append(f"{failed:.0%} of the draws have no finite density")
    if excess > 0 and not (misses or agrees or serious):
        serious.append(f"the evidence is {excess:.2f} nats larger if one looks elsewhere too")
    for other in others:
        gap = abs(other.log_evidence - weights.log_evidence)
        noise = math.hypot(other.log_evidence_se, weights.log_evidence_se)
        if not gap <= max(ELBO_GAP, AGREE * noise):
            serious.append(f"the evidence of another fit differs by {gap:.2f} nats")
    gap = weights.log_evidence - finite.elbo
    if gap > ELBO_GAP:
        slight.append(f"the ELBO is {gap:.2f} nats below the evidence")
    if share < 0.5:
        slight.append(f"only {share:.0%} of the draws are effective")
    if SOME_FAILED < failed <= FAILED:
        slight.append(f"{failed:.1%} of the draws have no finite density")
    if sites and not (abs(sites[0].shift) <= SHIFT and abs(sites[0].sd_ratio - 1) <= SD_RATIO):
        slight.append(f"the weights would change {sites[0].name}")
    verdict: Verdict = (
        "do not trust"
        if serious
        else "use the weights"
        if slight
        else "one piece as far as was seen"
        if unseen
        else "good"
    )
    advice = {
        "do not trust": "fit longer or with count_components > 1, then "
        "posterior.refine('independence'), or NUTS",
        "use the weights": "posterior.resample(), or posterior.refine('neutra') for exact draws",
        "one piece as far as was seen": "take the draws as they are if there are no other pieces; "
        "compare independent fits by diagnose(others=...)",
        "good": "take the draws as they are",
    }[verdict]
    return Diagnosis(
        verdict,
        (*(serious or slight), *unseen),
        advice,
        weights.khat,
        share,
        finite.elbo,
        finite.elbo_se,
        weights.log_evidence,
        weights.log_evidence_se,
        found.log_evidence,
        found.missed_mass,
        found.count_maxima,
        tuple(sites[:3]),
        found.reach,
    )
