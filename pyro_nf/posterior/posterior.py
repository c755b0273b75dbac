"""A posterior: draws with their weights, and what can be said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
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
from pyro_nf.guides.pyro_guides import expect_coordinates, joint_of, law_of, own_model
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.diagnosis import Diagnosis, check_sites, check_unchanged, judge
from pyro_nf.posterior.predict import (
    complete,
)
from pyro_nf.posterior.probe import probe
from pyro_nf.posterior.refine import independence, neutra
from pyro_nf.posterior.views import ShownDraws
from pyro_nf.posterior.weights import CHUNK, check_law, weighed_draws
from pyro_nf.train.modes import evaluating, recording
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.stages import History
from pyro_nf.transforms.kinds import check_exact

if TYPE_CHECKING:
    pass


class Posterior(ShownDraws):
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
            own = own_model(guide) if model is None else model
            check_arguments("Posterior", own, args, kwargs)
        elif model is not None:
            check_model("Posterior", model)
        check_kind("Posterior", "kwargs", kwargs, Mapping, optional=True)
        check_kind("Posterior", "joint", joint, LogJoint, optional=True)
        check_kind("Posterior", "history", history, History, optional=True)
        seed = seed_or_fresh("Posterior", seed)
        check_count("Posterior", "num_draws", num_draws)
        kwargs = dict(kwargs or {})
        with evaluating(), own_randomness(seed):
            if guide.prototype_trace is None:
                guide(*args, **kwargs)
            if not isinstance(guide, AutoFlow):
                expect_coordinates(guide)
            joint = joint_of(guide, model, args, kwargs, seed) if joint is None else joint
            q = law_of(guide, joint, args, kwargs)
            weighed = weighed_draws(q, joint, num_draws)
        return cls._of(q, joint, weighed, history, seed)

    @classmethod
    def from_distribution(
        cls,
        q: dist.TorchDistribution,
        joint: LogJoint,
        *,
        num_draws: int = 1000,
        seed: int | None = 0,
        history: History | None = None,
    ) -> Posterior:
        """Draws from a distribution of the unconstrained coordinates and weighs the draws.

        Args:
            q: The distribution, ``flow()`` or ``flow(context)`` for example, with the event shape
                ``(D,)`` and no batch. Where it has ``rsample_and_log_prob`` draws and densities
                take one pass.
            joint: The log joint density; its ``sites`` say which coordinates are whose.
            num_draws: How many draws.
            seed: Seed of the draws; the global generators are left as they were.
            history: The history of a fit, to be kept with the draws.

        Raises:
            ValueError: If the distribution has another shape, or no draw has a finite density.
            TypeError: If it is no distribution.

        Example:
            >>> import torch, pyro, pyro.distributions as dist
            >>> def model():
            ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            >>> joint = LogJoint(model)
            >>> q = dist.MultivariateNormal(torch.zeros(2), 2.0 * torch.eye(2))
            >>> posterior = Posterior.from_distribution(q, joint, num_draws=4000)
            >>> round(posterior.log_evidence, 1) + 0.0
            0.0
        """
        check_kind("Posterior", "joint", joint, LogJoint)
        check_law(q, joint)
        check_kind("Posterior", "history", history, History, optional=True)
        seed = seed_or_fresh("Posterior", seed)
        check_count("Posterior", "num_draws", num_draws)
        with evaluating(), own_randomness(seed):
            weighed = weighed_draws(q, joint, num_draws)
        return cls._of(q, joint, weighed, history, seed)

    @classmethod
    def _of(
        cls,
        q: dist.TorchDistribution,
        joint: LogJoint,
        weighed: tuple[Tensor, Tensor, Tensor],
        history: History | None,
        seed: int,
    ) -> Posterior:
        """With the sites of the draws, and a draw of what has no coordinates."""
        z, log_q, log_p = weighed
        with evaluating(), own_randomness(seed):
            samples = complete(joint, joint.unpack(z))
        return cls(samples, z, log_p, log_q, joint, history, q)

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
        cumulative = self.shares.double().cumsum(0)
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
        if self.log_q is not None and self.without_weights:
            return Diagnosis.without_weights(self.without_weights)
        weights, compared = self.weights, [other.weights for other in others]
        if len(self) < 2:
            raise ValueError(
                "Posterior.diagnose: one draw tells nothing; draw some thousands, as with "
                "fit.posterior(4000)."
            )
        q = self._distribution()
        check_unchanged(q, self.z, cast(Tensor, self.log_q))
        evidence = weights.log_evidence
        found = probe(
            self.joint, q, self.z, log_evidence=evidence, max_seconds=max_seconds, seed=seed
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
        q = self._distribution()
        check_exact("Posterior.refine", "q", q, "take a flow of exact transforms, or plain NUTS")
        if not isinstance(q, FlowDistribution):
            raise TypeError(
                f"Posterior.refine: {method!r} needs the posterior of an AutoFlow with a single "
                f"transform, got {type(q).__name__}; use 'psis'."
            )
        starts = self.resample(num_chains, seed=seed)
        with recording("Posterior.refine"), own_randomness(seed):
            with torch.no_grad():
                x = q.transform.inverse_and_ladj(starts.z)[0]
            refined = {"neutra": neutra, "independence": independence}[method]
            run = refined(self.joint, q, x, num_draws=num_draws, warmup=warmup, progress=progress)
            with torch.no_grad():
                log_p = torch.cat([self.joint.log_prob(z) for z in run.z.split(CHUNK)])
            samples = complete(self.joint, self.joint.unpack(run.z))
        z, chains = run.z, run.chains
        return replace(self, samples=samples, z=z, log_p=log_p, log_q=None, chains=chains)

    def _distribution(self) -> dist.TorchDistribution:
        if self.q is None:
            raise RuntimeError("Posterior: these draws were made without a guide.")
        return self.q
