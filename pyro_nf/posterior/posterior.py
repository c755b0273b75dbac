"""A posterior: draws with their weights, and what can be said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor

from pyro_nf._checks import (
    check_arguments,
    check_choice,
    check_count,
    check_entries,
    check_flag,
    check_kind,
    check_model,
    check_positive,
    seed_or_fresh,
    shown,
)
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.diagnosis import Diagnosis, check_sites, judge
from pyro_nf.posterior.export import inference_data
from pyro_nf.posterior.predict import (
    SetFree,
    complete,
    observed_values,
    pointwise_log_likelihood,
    predict,
)
from pyro_nf.posterior.probe import probe
from pyro_nf.posterior.refine import independence, neutra
from pyro_nf.posterior.summary import Summary, summarize
from pyro_nf.posterior.weights import Weights, khat_in_words, smooth
from pyro_nf.sites.improper import masked_priors
from pyro_nf.sites.supports import is_pushed
from pyro_nf.train.loop import History
from pyro_nf.train.modes import evaluating, recording
from pyro_nf.train.randomness import own_randomness

if TYPE_CHECKING:
    import matplotlib.figure

# Draws that are evaluated at once: enough to fill vector units, few enough to fit in memory.
_CHUNK = 2000
# Draws at which the density of the guide is compared with what it was, and how far (nats) it may be
# from that by rounding.
_COMPARED, _CHANGED = 64, 0.1


@dataclass(frozen=True)
class Posterior:
    r"""Draws from a guide with their importance weights :math:`w = p(x, z) / q(z)`.

    Draws of resampling or of a Markov chain have no weights, and neither have those for a model
    that takes a subsample or draws random numbers of its own: its density is another one at each
    look. Whatever needs weights then raises an error with the reason; `resample` and `summary`
    count all draws alike.

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

    @classmethod
    def from_guide(
        cls,
        guide: AutoContinuous | AutoNormal,
        model: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_draws: int = 1000,
        seed: int | None = 0,
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
            TypeError: If the guide is of another kind, or a single point.
        """
        if not isinstance(args, (tuple, list)):
            raise TypeError(
                f"Posterior: args must be a tuple of the model's arguments, got {shown(args)}; "
                "write args=(y,) for one of them."
            )
        check_kind("Posterior", "guide", guide, (AutoContinuous, AutoNormal))
        if joint is None:
            mine = guide._plain_model if isinstance(guide, AutoFlow) else None
            own = mine[0] if mine else guide.model
            check_arguments("Posterior", own if model is None else model, args, kwargs)
        elif model is not None:
            check_model("Posterior", model)
        check_kind("Posterior", "kwargs", kwargs, Mapping, optional=True)
        check_kind("Posterior", "joint", joint, LogJoint, optional=True)
        check_kind("Posterior", "history", history, History, optional=True)
        seed = seed_or_fresh("Posterior", seed)
        check_count("Posterior", "num_draws", num_draws)
        if not isinstance(guide, (AutoContinuous, AutoNormal)):
            raise TypeError(
                f"Posterior: guide must be an AutoFlow, an AutoNormal or an AutoContinuous, got "
                f"{type(guide).__name__}."
            )
        kwargs = dict(kwargs or {})
        with evaluating(), own_randomness(seed):
            if guide.prototype_trace is None:
                guide(*args, **kwargs)
            if not isinstance(guide, AutoFlow):
                _expect_coordinates(guide)
            if joint is None:
                init = getattr(guide, "init_loc_fn", init_to_median)
                own = model or _without_init(guide.model)
                joint = LogJoint(own, args, kwargs, init_loc_fn=init, seed=seed)
            if isinstance(guide, AutoNormal):
                q = _flat_normal(guide, tuple(joint.sites))
            else:
                q = guide.get_posterior(*args, **kwargs)
            _check_not_a_point(guide, q)
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
        if not bool((log_p - log_q).isfinite().any()):
            raise ValueError(
                f"Posterior: none of {num_draws} draws of the guide has a finite density under the "
                "model; fit the guide to this model and these arguments first, or draw more."
            )
        with evaluating(), own_randomness(seed):
            samples = complete(joint, joint.unpack(z))
        return cls(samples, z, log_p, log_q, joint, history, q)

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

    def _shares(self) -> Tensor:
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

    def resample(self, num_draws: int | None = None, *, seed: int | None = 0) -> Posterior:
        """Draws with equal weights, by systematic resampling with the smoothed weights.

        Args:
            num_draws: How many; as many as there are by default.
            seed: Seed of the choice.

        Returns:
            A posterior whose draws need no weights; some stand in it more than once, so that the
            effective sample size is that of the weights, and not the number of these draws.
        """
        seed = seed_or_fresh("Posterior.resample", seed)
        count = len(self) if num_draws is None else num_draws
        check_count("Posterior.resample", "num_draws", count)
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        ladder = (torch.arange(count, dtype=torch.float64) + shift) / count
        cumulative = self._shares().double().cumsum(0)
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
        max_seconds: float | None = None,
        seed: int | None = 1,
    ) -> Diagnosis:
        """Says how far the draws can be trusted, and what to do next.

        Beside k-hat, effective share and the gap between ELBO and evidence it looks for mass that
        the guide misses: new climbs from random starts, and wider laws
        (:func:`~pyro_nf.posterior.probe.probe`). How far it looks follows from what the log joint
        costs, counted in operations; no clock decides anything, so that the same seed gives the
        same diagnosis.

        Args:
            others: Posteriors of independent fits of the same model, whose evidence should agree.
            max_seconds: A bound of seconds for the climbs; None for none. A search that it cuts
                short is no reason to call a posterior good, and the verdict says so.
            seed: Seed of the look elsewhere.

        Returns:
            A :class:`~pyro_nf.posterior.diagnosis.Diagnosis`; print it. For a model that takes a
            subsample it has the reason and no numbers.

        Raises:
            RuntimeError: If the draws come from resampling or a Markov chain, or the guide has
                changed since they were drawn.
            ValueError: If there is a single draw.
        """
        check_entries("Posterior.diagnose", "others", others, Posterior)
        check_positive("Posterior.diagnose", "max_seconds", max_seconds, optional=True)
        seed = seed_or_fresh("Posterior.diagnose", seed)
        if max_seconds is not None:
            check_positive("Posterior.diagnose", "max_seconds", max_seconds)
        if self.log_q is not None and self.without_weights:
            return Diagnosis.without_weights(self.without_weights)
        weights, compared = self.weights, [other.weights for other in others]
        if len(self) < 2:
            raise ValueError(
                "Posterior.diagnose: one draw tells nothing; draw some thousands, as with "
                "fit.posterior(4000)."
            )
        q = self._distribution()
        self._check_guide(q)
        found = probe(
            self.joint,
            q,
            self.z,
            log_evidence=weights.log_evidence,
            max_seconds=max_seconds,
            seed=seed,
        )
        return judge(weights, found, check_sites(self.joint, self.z, weights), compared)

    def refine(
        self,
        method: Literal["psis", "neutra", "independence"] = "psis",
        *,
        num_chains: int = 4,
        num_draws: int = 500,
        warmup: int = 200,
        seed: int | None = 0,
        progress: bool = True,
    ) -> Posterior:
        """Better draws from the same guide.

        Args:
            method: "psis" resamples with the smoothed weights; "neutra" runs NUTS in the flow's
                coordinates (:func:`~pyro_nf.posterior.refine.neutra`); "independence" mixes draws
                of the guide with local steps, for separated modes
                (:func:`~pyro_nf.posterior.refine.independence`).
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
            RuntimeError: If chains are asked for and the density is another one at each look.
        """
        check_choice("Posterior.refine", "method", method, ("psis", "neutra", "independence"))
        check_count("Posterior.refine", "num_chains", num_chains)
        check_count("Posterior.refine", "num_draws", num_draws)
        check_count("Posterior.refine", "warmup", warmup, at_least=0)
        check_flag("Posterior.refine", "progress", progress)
        seed = seed_or_fresh("Posterior.refine", seed)
        if method == "psis":
            return self.resample(seed=seed)
        if self.joint.is_random:
            raise RuntimeError(
                f"Posterior.refine: {method!r} needs a density, but the model takes a subsample or "
                "draws random numbers of its own; take Posterior.from_guide with a model of all "
                "rows."
            )
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
        with recording("Posterior.refine"), own_randomness(seed):
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

    def _check_guide(self, q: dist.TorchDistribution) -> None:
        """Raises if the guide no longer has the density that the draws were drawn with."""
        some = slice(0, _COMPARED)
        try:
            with torch.no_grad():
                now = q.log_prob(self.z[some])
        except (NotImplementedError, ValueError, RuntimeError, KeyError):
            return  # some guides know the density of their own draws only
        assert self.log_q is not None
        gap = float((now - self.log_q[some]).abs().median())
        if gap > _CHANGED:
            raise RuntimeError(
                f"Posterior.diagnose: the log density of the guide at these draws has changed by "
                f"{gap:.2g} since they were drawn; make new ones, as with fit.posterior(4000)."
            )

    def summary(self, *, weighted: bool = False) -> Summary:
        """Mean, sd, 5 %, 50 % and 95 % quantile of every entry of every site.

        Args:
            weighted: Whether the draws count by their smoothed importance weights; without
                weights all count alike.

        Returns:
            A table that prints itself; ``table.rows`` has the numbers.
        """
        check_flag("Posterior.summary", "weighted", weighted)
        has_weights = weighted and not self.without_weights
        weights = self.weights.normalized if has_weights else None
        return summarize(self.samples, weights, self.chains)

    def predictive(
        self,
        *args: Any,
        num_draws: int | None = None,
        sites: Sequence[str] = (),
        seed: int | None = 0,
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
        check_count("Posterior.predictive", "num_draws", num_draws, optional=True)
        if num_draws is not None and num_draws > len(self):
            raise ValueError(
                f"Posterior.predictive: num_draws must be at most {len(self)}, all that there are, "
                f"got {num_draws}; take more draws, as by fit.posterior({num_draws})."
            )
        check_entries("Posterior.predictive", "sites", sites, str)
        seed = seed_or_fresh("Posterior.predictive", seed)
        if args or kwargs:
            check_arguments("Posterior.predictive", self.joint.model, args, kwargs)
        model = self.joint.model
        if not args and not kwargs:
            args, kwargs = self.joint.args, self.joint.kwargs
            model = SetFree()(model)
        count = len(self) if num_draws is None else min(num_draws, len(self))
        chosen = {name: draws[:count] for name, draws in self.samples.items()}
        with evaluating(), own_randomness(seed):
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
        with evaluating():
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
            log_evidence as attributes; without weights the reason as ``without_weights``),
            observed_data and, if asked for, log_likelihood.
        """
        check_kind("Posterior.to_arviz", "coords", coords, Mapping, optional=True)
        check_kind("Posterior.to_arviz", "dims", dims, Mapping, optional=True)
        check_flag("Posterior.to_arviz", "log_likelihood", log_likelihood)
        with evaluating():
            observed = observed_values(self.joint, self.samples)
        # A density that is another one at each look is no property of a draw.
        stats = {} if self.joint.is_random else {"lp": self.log_p}
        attributes: dict[str, float | str]
        if self.without_weights:
            attributes = {"without_weights": self.without_weights}
        else:
            stats["log_weight"] = self.weights.smoothed
            is_equal = self.khat == -math.inf
            attributes = {
                "khat": khat_in_words(self.khat) if is_equal else self.khat,
                "elbo": self.elbo,
                "log_evidence": self.log_evidence,
                "importance_ess": self.ess,
            }
        return inference_data(
            self.samples,
            stats,
            observed=observed,
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
        check_choice("Posterior.plot", "what", what, ("pairs", "loss", "weights"))
        if sites is not None:
            check_entries("Posterior.plot", "sites", sites, str)
            if unknown := set(sites) - set(self.samples):
                raise ValueError(
                    f"Posterior.plot: sites must be of {list(self.samples)}, got {sorted(unknown)}."
                )
        from pyro_nf.plots import loss_curve, pair_plot, weights_plot

        if what == "pairs":
            return pair_plot(self.samples if sites is None else {s: self.samples[s] for s in sites})
        if what == "weights":
            return weights_plot(self.weights)
        if what != "loss":
            raise ValueError(f"Posterior.plot: wanted 'pairs', 'loss' or 'weights', got {what!r}.")
        if self.history is None:
            raise RuntimeError("Posterior.plot: these draws come without the history of a fit.")
        return loss_curve(self.history, ylabel="-ELBO")


def _without_init(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that one of Pyro's guides has wrapped, so that latents take their initial values.

    As it is wrapped it has no draws of the prior.
    """
    for form in (model, getattr(model, "func", None)):
        if isinstance(form, partial) and len(form.args) == 2:
            messenger, inner = form.args
            if isinstance(messenger, InitMessenger):
                return _without_init(inner)
    return model


def _check_not_a_point(guide: object, q: dist.TorchDistribution) -> None:
    inner: Any = q
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    if isinstance(inner, dist.Delta):
        raise TypeError(
            f"Posterior: {type(guide).__name__} has all its mass at one point, so that its draws "
            "have no weights; take guide.laplace_approximation(*args) of an "
            "AutoLaplaceApproximation, or another guide."
        )


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
