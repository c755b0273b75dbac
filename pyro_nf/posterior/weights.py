"""Draws, their importance weights, and what the weights say of the draws."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf._checks import check_tensor
from pyro_nf.model.joint import LogJoint
from pyro_nf.train.stages import History
from pyro_nf.transforms.kinds import check_exact

# Pareto smoothing needs a tail to fit: with fewer finite weights k-hat counts as inf.
# Weights that are all equal have no tail at all: k-hat is -inf.
_MIN_WEIGHTS = 25
# If the largest weights differ by less (nats) they are no tail, whatever rounding makes of them.
NO_TAIL = 1e-2
# Log weights that differ by less (nats) are equal up to the rounding of single precision.
ROUNDING = 1e-4
# Beyond so many nats an exponential is 0 in double precision, and a tail has no shape.
WIDEST_TAIL = 700.0
# Its multiples, modulo 1, are spread evenly.
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Weights:
    r"""Pareto-smoothed importance weights, :math:`\log w_s = \log p(x, z_s) - \log q(z_s)`.

    Attributes:
        raw: Log weights as they are, shape ``(S,)``; -inf where the density is zero or failed.
        smoothed: Log weights whose largest are replaced by quantiles of a generalised Pareto
            distribution fitted to them, on the same scale, shape ``(S,)``.
        khat: The shape of that distribution. Below 0.5 importance sampling converges fast, below
            0.7 it can be used; above, ``q`` misses too much of ``p``. Weights that are equal have
            no tail: -inf then stands for no number (:func:`khat_in_words`). With too few weights
            to tell, or with one beyond all others, it is inf.

    *Pareto Smoothed Importance Sampling* (Vehtari, Simpson, Gelman, Yao, Gabry, 2024).
    """

    raw: Tensor
    smoothed: Tensor
    khat: float

    @property
    def normalized(self) -> Tensor:
        """The smoothed weights, summing to 1, shape ``(S,)``."""
        return self.smoothed.softmax(0)

    @property
    def ess(self) -> float:
        r"""Effective sample size :math:`(\sum w)^2 / \sum w^2`, at most S."""
        return float(1 / self.normalized.square().sum())

    @property
    def elbo(self) -> float:
        """Mean of the raw log weights; -inf if one of them is."""
        return float(self.raw.mean())

    @property
    def elbo_se(self) -> float:
        """Standard error of ``elbo``, rounding included; inf if a single draw cannot tell it."""
        return _standard_error(self.raw)

    @property
    def log_evidence(self) -> float:
        r"""Estimate of the log evidence, :math:`\log \frac1S \sum w`."""
        return float(self.smoothed.logsumexp(0)) - math.log(len(self.smoothed))

    @property
    def log_evidence_se(self) -> float:
        """Standard error of ``log_evidence``, by the delta method, rounding included.

        It is inf for a single draw, which cannot tell it.
        """
        return _standard_error(self.normalized * len(self.smoothed))

    def of_finite(self) -> Weights:
        """Only the draws that have a density."""
        finite = self.raw.isfinite()
        return Weights(self.raw[finite], self.smoothed[finite], self.khat)


def _standard_error(values: Tensor) -> float:
    """Of the mean of independent values; inf where they do not tell it."""
    if len(values) < 2 or not bool(values.isfinite().all()):
        return math.inf
    return math.hypot(float(values.std() / math.sqrt(len(values))), ROUNDING)


def khat_in_words(khat: float) -> str:
    """k-hat for print: a number, or why there is none.

    Args:
        khat: As in :class:`Weights`; -inf stands for equal weights, which have no tail.

    Example:
        >>> khat_in_words(0.314), khat_in_words(-math.inf)
        ('0.31', 'none: the weights are equal')
    """
    return "none: the weights are equal" if khat == -math.inf else f"{khat:.2f}"


#: A log weight that far below the largest adds nothing in double precision, however far it is.
NEGLIGIBLE = 700.0


def smooth(log_weights: Tensor) -> Weights:
    """Smooths the tail of importance weights.

    Args:
        log_weights: Shape ``(S,)``; -inf is allowed.

    Raises:
        ValueError: If no weight is finite, or one is NaN or +inf.

    Example:
        >>> import torch
        >>> weights = smooth(torch.zeros(100))
        >>> round(weights.ess), weights.log_evidence
        (100, 0.0)
    """
    check_tensor("smooth", "log_weights", log_weights, (None,), finite=False)
    raw = log_weights.detach().cpu().double()
    finite = raw.isfinite()
    if bool((raw.isnan() | (raw == math.inf)).any()) or not bool(finite.any()):
        raise ValueError(
            f"smooth: wanted log weights that are finite or -inf, got {int((~finite).sum())} of "
            f"{len(raw)} that are NaN, inf or -inf; look for NaN in the model's log density."
        )
    equal = float(raw[finite].max() - raw[finite].min()) < ROUNDING
    if int(finite.sum()) < _MIN_WEIGHTS or equal:
        khat = math.inf if int(finite.sum()) < _MIN_WEIGHTS else -math.inf
        return Weights(raw, raw, khat)
    count = int(finite.sum())
    # no more than the library smooths
    tail = raw[finite].sort().values[-math.floor(min(count / 5, 3 * math.sqrt(count))) :]
    if float(tail[-1] - tail[0]) < NO_TAIL:
        return Weights(raw, raw, -math.inf)
    if float(tail[-1] - tail[0]) > WIDEST_TAIL:
        return Weights(raw, raw, math.inf)
    given = values = raw[finite].clamp_min(float(raw[finite].max()) - NEGLIGIBLE).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        normalized, khat = _psislw(values)
        if not (np.isfinite(normalized).all() and math.isfinite(khat)):
            # Rounding made ties, to which no tail can be fitted: a dither as wide parts them.
            gaps = np.diff(np.unique(given))
            values = given + gaps.min() * (np.arange(count) * GOLDEN % 1 - 0.5)
            normalized, khat = _psislw(values)
    # the library normalises; a weight just below the tail is not smoothed, and gives the scale back
    moved = normalized - values
    below = values.argsort()[-math.ceil(min(count / 5, 3 * math.sqrt(count))) - 2]
    smoothed = raw.clone()
    smoothed[finite] += torch.from_numpy(moved - moved[below])
    return Weights(raw, smoothed, khat)


def _psislw(log_weights: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """Pareto smoothing by the arviz that is installed; the scale of the result is its own."""
    if importlib.util.find_spec("arviz_stats") is not None:  # arviz 1.x, or beside 0.x
        from arviz_stats.base.array import array_stats

        # it takes log likelihoods, of which the weights are the reciprocals
        smoothed, khat = array_stats.psislw(-log_weights)
    else:
        import arviz

        smoothed, khat = arviz.psislw(log_weights)
    return np.asarray(smoothed), float(khat)


_INSTEAD_OF_WEIGHTS = (
    "it gives no importance weights. Draw by guide.get_posterior().sample((1000,)), whose "
    "rsample_and_log_prob has the log weights of paths, and judge the guide by its ELBO; or fit a "
    "flow of exact transforms"
)

CHUNK = 2000
"""Draws that are evaluated at once: enough to fill vector units, few enough to fit in memory."""


@dataclass(frozen=True)
class WeightedDraws(ABC):
    """Draws with what is known of them; :class:`~pyro_nf.posterior.posterior.Posterior` says all.

    The attributes are those of a posterior.
    """

    samples: dict[str, Tensor]
    z: Tensor
    log_p: Tensor
    log_q: Tensor | None
    joint: LogJoint
    history: History | None = None
    q: dist.TorchDistribution | None = field(default=None, repr=False)
    chains: int = 1

    def __len__(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}{list(x.shape[1:]) or ''}" for name, x in self.samples.items())
        sites = sites if len(sites) <= 200 else f"{sites[:200]} ..."
        if self.without_weights:
            quality = "without weights"
        else:
            share = self.ess / len(self)
            quality = f"k-hat {khat_in_words(self.khat)}, effective share {share:.0%}"
        return f"Posterior({len(self)} draws of {sites}; {quality})"

    @property
    def without_weights(self) -> str:
        """Why the draws have no weights, or ""."""
        if self.log_q is None:
            return (
                "these draws come from resampling or a Markov chain and have no weights; take "
                "log_weights, elbo or khat from the posterior they were made from"
            )
        if self.joint.is_random:
            return (
                "the model takes a subsample or draws random numbers of its own, so that its "
                "density is another one at each look and the draws have no weights; take "
                "Posterior.from_guide with a model of all rows"
            )
        return ""

    @cached_property
    def weights(self) -> Weights:
        """Importance weights, raw and Pareto smoothed.

        Raises:
            RuntimeError: If the draws have none.
        """
        return smooth(self.log_weights)

    @property
    def log_weights(self) -> Tensor:
        """``log p(x, z) - log q(z)`` of each draw, ``(S,)``.

        Raises:
            RuntimeError: If the draws have no weights.
        """
        if self.log_q is None or self.without_weights:
            raise RuntimeError(f"Posterior: {self.without_weights}.")
        return self.log_p - self.log_q

    @property
    def shares(self) -> Tensor:
        """The weights, summing to 1; all the same if there are none."""
        if self.without_weights:
            return torch.full_like(self.log_p, 1 / len(self), dtype=torch.float64)
        return self.weights.normalized

    @property
    def elbo(self) -> float:
        """Mean of the log weights, a lower bound of the log evidence."""
        return self.weights.elbo

    @property
    def khat(self) -> float:
        """Pareto shape of the weights: below 0.7 they can be used."""
        return self.weights.khat

    @property
    def ess(self) -> float:
        """Effective sample size of the weighted draws."""
        return self.weights.ess

    @property
    def log_evidence(self) -> float:
        """Estimate of log p(x) from the smoothed weights."""
        return self.weights.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Standard error of ``log_evidence``."""
        return self.weights.log_evidence_se


def weighed_draws(
    q: dist.TorchDistribution, joint: LogJoint, num_draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of a distribution, its log density there, and that of the model.

    Args:
        q: A distribution over the unconstrained coordinates.
        joint: The log joint density.
        num_draws: S.

    Returns:
        z ``(S, D)``, log q and log p ``(S,)``.

    Raises:
        ValueError: If no draw has a finite density.
        TypeError: If the log density of the distribution is an estimate or a bound.
    """
    check_exact("Posterior", "q", q, _INSTEAD_OF_WEIGHTS)
    pieces = []
    for start in range(0, num_draws, CHUNK):
        z, log_q = _drawn(q, min(CHUNK, num_draws - start))
        pieces.append((z, log_q, joint.log_prob(z)))
    z, log_q, log_p = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    if not bool((log_p - log_q).isfinite().any()):
        raise ValueError(
            f"Posterior: none of {num_draws} draws of the guide has a finite density under the "
            "model; fit the guide to this model and these arguments first, or draw more."
        )
    return z, log_q, log_p


def _drawn(q: Any, count: int) -> tuple[Tensor, Tensor]:
    """In one pass where the distribution can do that."""
    if hasattr(q, "rsample_and_log_prob"):
        return cast("tuple[Tensor, Tensor]", q.rsample_and_log_prob((count,)))
    z = q.sample((count,))
    return z, q.log_prob(z)


def check_law(q: object, joint: LogJoint) -> None:
    """Raises unless a distribution is one over all coordinates of a density.

    Args:
        q: The distribution.
        joint: The density.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If its shape is another one.
    """
    if not (hasattr(q, "event_shape") and callable(getattr(q, "log_prob", None))):
        raise TypeError(
            f"Posterior: q must be a distribution of the unconstrained coordinates, got "
            f"{type(q).__name__}; pass flow(), flow(context), or any with sample and log_prob."
        )
    law = cast(dist.TorchDistribution, q)
    wanted = (torch.Size(), torch.Size([joint.latent_dim]))
    if (law.batch_shape, law.event_shape) != wanted:
        raise ValueError(
            f"Posterior: q must have batch_shape () and event_shape ({joint.latent_dim},), as the "
            f"model has {joint.latent_dim} unconstrained coordinates, got "
            f"{tuple(law.batch_shape)} and {tuple(law.event_shape)}; give a flow one context of "
            "shape (context_dim,)."
        )
