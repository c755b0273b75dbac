"""A posterior: draws with their weights, and what can be said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from torch import Tensor

from pyro_nf._checks import check_count
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.infer.diagnosis import Diagnosis, check_sites, judge, probe
from pyro_nf.infer.export import inference_data
from pyro_nf.infer.guide import AutoFlow
from pyro_nf.infer.improper import masked_priors
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.refine import independence, neutra
from pyro_nf.infer.replay import (
    SetFree,
    complete,
    observed_values,
    pointwise_log_likelihood,
    predict,
)
from pyro_nf.infer.summary import Summary, summarize
from pyro_nf.infer.supports import is_pushed
from pyro_nf.infer.weights import Weights, smooth
from pyro_nf.train.loop import History
from pyro_nf.train.randomness import own_randomness

if TYPE_CHECKING:
    import matplotlib.figure

# Draws that are evaluated at once: enough to fill vector units, few enough to fit in memory.
_CHUNK = 2000


@dataclass(frozen=True)
class Posterior:
    r"""Draws from a guide with their importance weights :math:`w = p(x, z) / q(z)`.

    Attributes:
        samples: The draws of each site in their natural shapes, ``(S, *shape)``; a scalar site is
            ``(S,)``.
        z: The draws as unconstrained coordinates, ``(S, D)``.
        log_p: Log joint density of each draw in those coordinates, ``(S,)``.
        log_q: Log density of the guide, ``(S,)``; None if the draws come from a Markov chain.
        joint: The log joint density they belong to.
        history: The history of the fit, or None.
        q: The guide's distribution of ``z``, as it is now; None if there is no guide.
        chains: How many Markov chains the draws come from, one after the other; 1 for plain draws.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(2.0))
        >>> guide = AutoFlow(model)
        >>> posterior = Posterior.from_guide(guide, num_draws=500)
        >>> posterior.samples["mu"].shape
        torch.Size([500])
        >>> posterior.resample(100).samples["mu"].shape
        torch.Size([100])
    """

    samples: dict[str, Tensor]
    z: Tensor
    log_p: Tensor
    log_q: Tensor | None
    joint: LogJoint
    history: History | None = None
    q: dist.TorchDistribution | None = field(default=None, repr=False)
    chains: int = 1

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {tuple(x.shape[1:])}" for name, x in self.samples.items())
        sites = sites if len(sites) <= 200 else f"{sites[:200]} ..."
        weighted = "weighted" if self.log_q is not None else f"{self.chains} chain(s)"
        return f"Posterior({len(self.z)} draws, {weighted}; sites: {sites})"

    @classmethod
    def from_guide(
        cls,
        guide: AutoContinuous | AutoNormal,
        model: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_draws: int = 1000,
        seed: int = 0,
        joint: LogJoint | None = None,
        history: History | None = None,
    ) -> Posterior:
        """Draws from a guide and weighs the draws.

        Args:
            guide: An AutoFlow, an AutoNormal, or any AutoContinuous of Pyro's.
            model: The model; the one that the guide was built for by default.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
            num_draws: How many draws.
            seed: Seed of the draws; the global generators are left as they were.
            joint: The log joint density, if there is one already.
            history: The history of the fit, to be kept with the draws.

        Raises:
            ValueError: If no draw has a finite density.
            TypeError: If the guide is of another kind.
        """
        check_count("Posterior", "num_draws", num_draws)
        if not isinstance(guide, (AutoContinuous, AutoNormal)):
            raise TypeError(
                f"Posterior: guide must be an AutoFlow, an AutoNormal or an AutoContinuous, got "
                f"{type(guide).__name__}."
            )
        kwargs = dict(kwargs or {})
        with own_randomness(seed), torch.no_grad():
            if guide.prototype_trace is None:
                guide(*args, **kwargs)
            if not isinstance(guide, AutoFlow):
                _expect_coordinates(guide)
            if joint is None:
                joint = LogJoint(model or guide.model, args, kwargs, seed=seed)
            if isinstance(guide, AutoNormal):
                q = _flat_normal(guide, tuple(joint.sites))
            else:
                q = guide.get_posterior(*args, **kwargs)
            pieces = []
            for start in range(0, num_draws, _CHUNK):
                shape = (min(_CHUNK, num_draws - start),)
                if isinstance(guide, AutoFlow):
                    z, log_q = q.rsample_and_log_prob(shape)
                else:
                    z = q.sample(shape)
                    log_q = q.log_prob(z)
                pieces.append((z, log_q, joint.log_prob(z)))
        z, log_q, log_p = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        with own_randomness(seed):
            samples = complete(joint, joint.unpack(z))
        return cls(samples, z, log_p, log_q, joint, history, q)

    def __len__(self) -> int:
        return len(self.z)

    @cached_property
    def weights(self) -> Weights:
        """Importance weights, raw and Pareto smoothed; all equal if the draws are of a chain."""
        return smooth(torch.zeros_like(self.log_p) if self.log_q is None else self.log_weights)

    @property
    def log_weights(self) -> Tensor:
        """``log p(x, z) - log q(z)`` of each draw, ``(S,)``.

        Raises:
            RuntimeError: If the draws have no density of their own.
        """
        if self.log_q is None:
            raise RuntimeError(
                "Posterior: these draws come from resampling or a Markov chain and have no "
                "weights; take log_weights, elbo or khat from the posterior they were made from."
            )
        return self.log_p - self.log_q

    @property
    def elbo(self) -> float:
        """Mean of the log weights, a lower bound of the log evidence."""
        return self._weighted().elbo

    @property
    def khat(self) -> float:
        """Pareto shape of the weights: below 0.7 they can be used."""
        return self._weighted().khat

    @property
    def ess(self) -> float:
        """Effective sample size of the weighted draws."""
        return self._weighted().ess

    @property
    def log_evidence(self) -> float:
        """Estimate of log p(x) from the smoothed weights."""
        return self._weighted().log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Standard error of ``log_evidence``."""
        return self._weighted().log_evidence_se

    def _weighted(self) -> Weights:
        _ = self.log_weights  # raises if there are none
        return self.weights

    def resample(self, num_draws: int | None = None, *, seed: int = 0) -> Posterior:
        """Draws with equal weights, by systematic resampling with the smoothed weights.

        Args:
            num_draws: How many; as many as there are by default.
            seed: Seed of the choice.

        Returns:
            A posterior whose draws need no weights; some stand in it more than once.
        """
        count = len(self) if num_draws is None else num_draws
        check_count("Posterior.resample", "num_draws", count)
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        ladder = (torch.arange(count, dtype=torch.float64) + shift) / count
        cumulative = self.weights.normalized.cumsum(0)
        index = torch.searchsorted(cumulative / cumulative[-1], ladder).clamp_max(len(self) - 1)
        # in random order, so that any part of them is a fair sample too
        index = index[torch.randperm(count, generator=generator)].to(self.z.device)
        return replace(
            self,
            samples={name: draws[index] for name, draws in self.samples.items()},
            z=self.z[index],
            log_p=self.log_p[index],
            log_q=None,
            chains=1,
        )

    def diagnose(
        self,
        others: Sequence[Posterior] = (),
        *,
        max_seconds: float = 2.0,
        seed: int = 1,
    ) -> Diagnosis:
        """Says how far the draws can be trusted, and what to do next.

        Beside k-hat, effective share and the gap between ELBO and evidence it looks for mass that
        the guide misses: new climbs from random starts, and a wider Gaussian
        (:func:`~pyro_nf.infer.diagnosis.probe`).

        Args:
            others: Posteriors of independent fits of the same model, whose evidence should agree.
            max_seconds: Most seconds for the climbs.
            seed: Seed of the look elsewhere.

        Returns:
            A :class:`~pyro_nf.infer.diagnosis.Diagnosis`; print it.

        Raises:
            RuntimeError: If the draws have no weights.
            ValueError: If there is a single draw.
        """
        weights = self._weighted()
        if len(self) < 2:
            raise ValueError(
                "Posterior.diagnose: one draw tells nothing; draw some thousands, as with "
                "fit.posterior(4000)."
            )
        with own_randomness(seed):
            found = probe(
                self.joint, self._distribution(), self.z, max_seconds=max_seconds, seed=seed
            )
        sites = check_sites(self.joint, self.z, weights)
        compared = [other._weighted() for other in others]
        return judge(weights, found, sites, compared, self.joint.is_random)

    def refine(
        self,
        method: Literal["psis", "neutra", "independence"] = "psis",
        *,
        num_chains: int = 4,
        num_draws: int = 500,
        warmup: int = 200,
        seed: int = 0,
        progress: bool = True,
    ) -> Posterior:
        """Better draws from the same guide.

        Args:
            method: "psis" resamples with the smoothed weights; "neutra" runs NUTS in the flow's
                coordinates (:func:`~pyro_nf.infer.refine.neutra`); "independence" mixes draws of
                the guide with local steps, for separated modes
                (:func:`~pyro_nf.infer.refine.independence`).
            num_chains: Chains, which start at resampled draws.
            num_draws: Draws a chain.
            warmup: Steps before them.
            seed: Seed of it all; the global generators are left as they were.
            progress: Whether to show a progress bar.

        Returns:
            A posterior whose draws need no weights, with R-hat and effective sample sizes in its
            summary if they come from chains.

        Raises:
            ValueError: If the method is another, or a count is not positive.
            TypeError: If chains are asked for and the guide has no single transform.
        """
        if method == "psis":
            return self.resample(seed=seed)
        ways = {"neutra": neutra, "independence": independence}
        if method not in ways:
            raise ValueError(
                f"Posterior.refine: method must be 'psis', 'neutra' or 'independence', got "
                f"{method!r}."
            )
        q = self._distribution()
        if not isinstance(q, FlowDistribution):
            raise TypeError(
                f"Posterior.refine: {method!r} needs the posterior of an AutoFlow with a single "
                f"transform, got {type(q).__name__}; use 'psis'."
            )
        check_count("Posterior.refine", "num_chains", num_chains)
        starts = self.resample(num_chains, seed=seed)
        with own_randomness(seed):
            with torch.no_grad():
                x = q.transform.inverse_and_ladj(starts.z)[0]
            run = ways[method](
                self.joint, q, x, num_draws=num_draws, warmup=warmup, progress=progress
            )
            with torch.no_grad():
                log_p = torch.cat([self.joint.log_prob(z) for z in run.z.split(_CHUNK)])
            samples = complete(self.joint, self.joint.unpack(run.z))
        return replace(
            self,
            samples=samples,
            z=run.z,
            log_p=log_p,
            log_q=None,
            chains=run.chains,
        )

    def _distribution(self) -> dist.TorchDistribution:
        if self.q is None:
            raise RuntimeError("Posterior: these draws were made without a guide.")
        return self.q

    def summary(self, *, weighted: bool = False) -> Summary:
        """Mean, sd, 5 %, 50 % and 95 % quantile of every entry of every site.

        Args:
            weighted: Whether the draws count by their smoothed importance weights.

        Returns:
            A table that prints itself; ``table.rows`` has the numbers.
        """
        weights = self.weights.normalized if weighted else None
        return summarize(self.samples, weights, self.chains)

    def predictive(
        self,
        *args: Any,
        num_draws: int | None = None,
        sites: Sequence[str] = (),
        seed: int = 0,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Runs the model forward from the draws.

        Args:
            *args: Arguments of the model, for example new inputs and None for what was observed.
                Without any, the model runs with the arguments of the fit and all that was observed
                is drawn anew.
            num_draws: How many draws to use; all by default.
            sites: The sites to return; all that are not latent by default.
            seed: Seed of what is drawn.
            **kwargs: Keyword arguments of the model.

        Returns:
            For each site its draws, ``(S, *shape)``.

        Raises:
            ValueError: If the model has no such site.
        """
        model = self.joint.model
        if not args and not kwargs:
            args, kwargs = self.joint.args, self.joint.kwargs
            model = SetFree()(model)
        count = len(self) if num_draws is None else min(num_draws, len(self))
        chosen = {name: draws[:count] for name, draws in self.samples.items()}
        with own_randomness(seed):
            drawn = predict(self.joint, chosen, model, args, kwargs)
        if not sites:
            return drawn
        known = chosen | drawn
        if unknown := set(sites) - set(known):
            raise ValueError(
                f"Posterior.predictive: the model has no site {sorted(unknown)}, only "
                f"{sorted(known)}."
            )
        return {name: known[name] for name in sites}

    def log_likelihood(self) -> dict[str, Tensor]:
        """The log likelihood of every observation for every draw, ``(S, *batch_shape)`` a site."""
        return pointwise_log_likelihood(self.joint, self.samples)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        log_likelihood: bool = False,
    ) -> Any:
        """The draws as what the installed arviz works with.

        Args:
            coords: Labels of dimensions.
            dims: Names of the dimensions of each site.
            log_likelihood: Whether to compute and store the pointwise log likelihood, which
                ``arviz.loo`` and ``arviz.waic`` need.

        Returns:
            An ``InferenceData`` with arviz 0.x, a ``DataTree`` with arviz 1.x; with the groups
            posterior, sample_stats (lp, and log_weight if there are weights; khat, elbo and
            log_evidence as attributes), observed_data and, if asked for, log_likelihood.
        """
        stats: dict[str, Tensor] = {"lp": self.log_p}
        attributes: dict[str, float] = {}
        if self.log_q is not None:
            stats["log_weight"] = self.weights.smoothed
            attributes = {
                "khat": self.khat,
                "elbo": self.elbo,
                "log_evidence": self.log_evidence,
                "importance_ess": self.ess,
            }
        return inference_data(
            self.samples,
            stats,
            observed=observed_values(self.joint, self.samples),
            log_likelihood=self.log_likelihood() if log_likelihood else None,
            attributes=attributes,
            coords=coords,
            dims=dims,
            chains=self.chains,
        )

    def plot(
        self,
        what: Literal["pairs", "loss", "weights"] = "pairs",
        *,
        sites: Sequence[str] | None = None,
    ) -> matplotlib.figure.Figure:
        """A picture of the draws, of the fit, or of the weights; needs ``pyro-nf[plots]``.

        Args:
            what: "pairs" for every entry against every other, "loss" for the loss of the fit,
                "weights" for the importance weights from the largest to the smallest.
            sites: The sites of "pairs"; the first six entries of all by default.

        Raises:
            ValueError: If there is no such picture.
            RuntimeError: If there is no history, or there are no weights, to draw.
            ImportError: If matplotlib is missing.
        """
        from pyro_nf.plots import loss_curve, pair_plot, weights_plot

        if what == "pairs":
            return pair_plot(self.samples if sites is None else {s: self.samples[s] for s in sites})
        if what == "weights":
            return weights_plot(self._weighted())
        if what != "loss":
            raise ValueError(f"Posterior.plot: wanted 'pairs', 'loss' or 'weights', got {what!r}.")
        if self.history is None:
            raise RuntimeError("Posterior.plot: these draws come without the history of a fit.")
        return loss_curve(self.history, ylabel="-ELBO")


def _expect_coordinates(guide: AutoContinuous | AutoNormal) -> None:
    """Raises if a guide of Pyro's has other coordinates than a log joint."""
    prototype: Any = guide.prototype_trace
    masked = masked_priors(prototype)
    for name, site in prototype.iter_stochastic_nodes():
        if name in masked:
            why = "has entries without a prior density"
        elif is_pushed(site["fn"]):
            why = f"reports the support {site['fn'].support}, but has values in a part of it only"
        else:
            continue
        raise ValueError(
            f"Posterior: {type(guide).__name__} cannot be weighed, since the latent site {name!r} "
            f"{why}, and the guide goes beyond. Use an AutoFlow, which knows of it."
        )


def _flat_normal(guide: AutoNormal, sites: Sequence[str]) -> dist.TorchDistribution:
    """The unconstrained latents of an AutoNormal as one vector: it keeps them site by site."""
    pairs = [guide._get_loc_and_scale(name) for name in sites]
    loc, scale = (
        torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*pairs, strict=True)
    )
    return dist.Normal(loc, scale).to_event(1)
