"""Fitting a flow guide to a Pyro model in one call."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from pyro_nf._checks import (
    check_arguments,
    check_budget,
    check_count,
    check_flag,
    check_kind,
    check_patience,
    check_running,
    seed_or_fresh,
)
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.search.start import GaussianStart
from pyro_nf.sites.latents import Model
from pyro_nf.train.budget import Budget, Clock
from pyro_nf.train.loop import train
from pyro_nf.train.modes import ordinary, recording
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.stages import History
from pyro_nf.train.world import SEARCH_SECONDS, World
from pyro_nf.vi.beginning import Beginning
from pyro_nf.vi.objectives import Objective
from pyro_nf.vi.recipe import PosteriorRecipe
from pyro_nf.vi.resume import marks_of, settings_of


@dataclass(frozen=True)
class SVIFit:
    """A fitted guide and how it was fitted.

    Attributes:
        guide: The guide, in its best state.
        history: Losses (negative ELBOs) and the reason why the fit stopped.
        joint: The log joint density that it was fitted to.
        start: The Gaussian, or the mixture, that the fit started from, in the coordinates of
            learning; None if the guide was set up before, or the fit went on from a checkpoint.
        choice: What was chosen for this model, in a line.
        recipe: The settings that it was fitted with, with the particles that were chosen.
    """

    guide: AutoFlow
    history: History
    joint: LogJoint
    start: GaussianStart | GaussianMixture | None
    choice: str
    recipe: PosteriorRecipe = field(default_factory=PosteriorRecipe)

    def __repr__(self) -> str:
        lines = (f"SVIFit({self.choice})", *map(repr, (self.history, self.joint, self.recipe)))
        return "\n  ".join(lines)

    def posterior(self, num_draws: int = 1000, *, seed: int | None = 0) -> Posterior:
        """Draws with their importance weights.

        Args:
            num_draws: How many.
            seed: Seed of the draws; the global generators are left as they were.
        """
        return Posterior.from_guide(
            self.guide,
            args=self.joint.args,
            kwargs=self.joint.kwargs,
            num_draws=num_draws,
            seed=seed,
            joint=self.joint,
            history=self.history,
        )


def fit_svi(
    model: Model,
    guide: AutoFlow | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    num_particles: int | None = None,
    objective: Objective | None = None,
    patience: int | None = None,
    seed: int | None = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    compile: bool = False,
    clock: Clock = time.monotonic,
    recipe: PosteriorRecipe | None = None,
) -> SVIFit:
    r"""Fits a flow guide by maximising the ELBO.

    The model is run once for all particles of a step (:class:`~pyro_nf.model.joint.LogJoint`). The
    fit starts from a Gaussian found by many climbs and the curvature along them
    (:func:`~pyro_nf.search.start.laplace_start`), or from a mixture if the posterior is in separate
    pieces (:func:`~pyro_nf.search.mixtures.separated_mixture`), learns its affine part first and
    then everything (:func:`~pyro_nf.vi.stages.posterior_stages`), with the
    sticking-the-landing gradient. Sites whose prior's location or scale is latent too are placed by
    that prior (:class:`~pyro_nf.guides.recentre.Recentre`) if the start is the better for it, so
    that a hierarchy has no funnel. What is kept is a moving average of the parameters, at the check
    where its ELBO by a fixed set of draws, less two standard errors, was best; the start is checked
    too.

    The parameters of the guide are in Pyro's param store afterwards, as after ``SVI``, so that
    ``pyro.get_param_store().save(path)`` keeps them for another process: there ``load(path)``, and
    a guide that is built alike takes them in :meth:`AutoFlow.setup`.

    Where ``torch.distributed`` is initialised, all processes call this alike. The first one looks
    for the start; each then draws particles of its own, and gradients and ELBOs are averaged
    (:func:`~pyro_nf.train.loop.train`), so that all have the same guide in the end.

    Ctrl-C ends the fit, whatever it is at, and keeps the best state so far: of the training, or of
    the search for a start. The first runs of the model, by which it is understood, are the only
    exception: there is nothing to keep yet, and the interrupt is raised. So is a second Ctrl-C,
    while the first is attended to. A particle whose log density is not finite counts
    for nothing in its step; a step in which all of them fail, or whose gradient is not finite, is
    skipped. After ten such steps in a row the fit ends, with the step and the failing sites named.

    *Automatic Differentiation Variational Inference* (Kucukelbir, Tran, Ranganath, Gelman, Blei,
    2017); *Sticking the Landing* (Roeder, Wu, Duvenaud, 2017).

    Args:
        model: A Pyro model; its learnable parameters, if any, must be trained by ``SVI`` instead.
            Discrete latents that can be enumerated are summed out.
        guide: The guide. By default an ``AutoFlow(model)``, with as many components as the
            posterior has separate pieces. One that is set up already goes on from where it is.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        max_steps: The most steps; those of the recipe, 2000, if ``max_seconds`` is not given
            either.
        max_seconds: The most seconds of wall clock, the start included. Before an evaluation of the
            model what it costs is held against what is left; if not even one step fits, the fit
            is the best start. What cannot be left out are some six runs of the model, to understand
            it.
        num_particles: Draws a step, in each process, whatever the recipe says; if None 64 or 256,
            by what the log joint costs (:func:`~pyro_nf.vi.stages.choose_particles`).
        objective: What is maximised; :class:`~pyro_nf.vi.objectives.ELBO` by default.
        patience: Stop after so many steps without a better ELBO; None for never.
        seed: Seed of the fit, None for a fresh one; the global generators are left as they were.
        progress: Whether to show a progress bar.
        checkpoint: A file to write the state to, and to go on from if it exists, if arguments,
            observed data and settings are those of then. The budget may be another.
        checkpoint_every: Steps between two writes of it.
        compile: Whether to fuse the recorded log joint with ``torch.compile``; the compiler takes
            some ten seconds, so it is for long fits. The recording is made even if no seconds bound
            the fit.
        clock: Returns the seconds that ``max_seconds`` counts.
        recipe: All other settings; ``PosteriorRecipe()`` by default.

    Returns:
        The fit: ``.guide``, ``.history``, ``.posterior(num_draws)``.

    Raises:
        ValueError: If the model has no continuous latent, a latent in a subsampled plate, a support
            that cannot be mapped, or learnable parameters; if its density is not finite wherever
            one looks; if the checkpoint is of another fit.
        TypeError: If the guide is no AutoFlow.
        OSError: If the checkpoint cannot be written.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 3.0])
        >>> fit = fit_svi(model, args=(y,), max_steps=50, progress=False)
        >>> round(fit.posterior(1000).summary()["mu"].mean, 1)
        2.0
    """
    check_arguments("fit_svi", model, args, kwargs)
    if guide is not None and not isinstance(guide, AutoFlow):
        raise TypeError(
            f"fit_svi: guide must be an AutoFlow, got {type(guide).__name__}; fit other guides "
            "with pyro.infer.SVI and take Posterior.from_guide(guide, model)."
        )
    check_budget("fit_svi", max_steps, max_seconds)
    check_count("fit_svi", "num_particles", num_particles, optional=True)
    check_kind("fit_svi", "objective", objective, Objective, "pass ELBO(), or None", optional=True)
    check_patience("fit_svi", patience)
    check_flag("fit_svi", "compile", compile)
    check_running("fit_svi", seed, progress, checkpoint, checkpoint_every, clock)
    check_kind("fit_svi", "recipe", recipe, PosteriorRecipe, optional=True)
    recipe = recipe or PosteriorRecipe()
    recipe = recipe if num_particles is None else replace(recipe, num_particles=num_particles)
    if max_steps is None and max_seconds is None:
        max_steps = recipe.max_steps
    args, given = ordinary(args), dict[str, Any](ordinary(dict(kwargs or {})))
    budget = Budget(max_steps, max_seconds, clock)
    with recording("fit_svi"), World.joined(SEARCH_SECONDS, is_led=True) as world:
        own_seed = world.share(lambda: seed_or_fresh("fit_svi", seed))
        with own_randomness(own_seed):
            joint = world.together(lambda: _log_joint(model, args, given, budget, own_seed))
        beginning = Beginning(joint, guide, budget, recipe, own_seed, world)
        try:
            with own_randomness(own_seed):
                guide = beginning.find(checkpoint, compile)
                stages = beginning.stages(objective)
                validate = None if objective else beginning.validation()
            settings = settings_of(joint, guide.count_components, beginning.recipe, objective)
            if checkpoint is not None:
                settings |= marks_of(joint)
                beginning.renew_checkpoint(settings)
        except KeyboardInterrupt:
            with own_randomness(own_seed):
                guide = beginning.cut_short()
            return _fit(guide, History(stopped="interrupted"), beginning)
        if progress and world.is_first:
            tqdm.write(f"fit_svi: {beginning.choice}", file=sys.stderr)
        history = train(
            guide.flow,
            stages,
            max_steps=max_steps,
            max_seconds=max_seconds,
            validate=validate,
            patience=patience,
            average=recipe.average,
            seed=seed,
            progress=progress,
            metric="-ELBO",
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            explain=lambda _: _explain(guide, joint),
            settings=settings,
            seconds_before=max(budget.seconds, 0.0),
            clock=clock,
        )
        return _fit(guide, history, beginning)


def _log_joint(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], budget: Budget, seed: int
) -> LogJoint:
    joint = LogJoint(model, args, kwargs, seed=seed, budget=budget)
    if joint.has_parameters:
        raise ValueError(
            "fit_svi: the model has learnable parameters, which it would leave alone; train "
            "model and guide together with pyro.infer.SVI, then take Posterior.from_guide."
        )
    return joint


def _explain(guide: AutoFlow, joint: LogJoint) -> str:
    with torch.no_grad():
        sites = joint.failing_sites(guide.get_posterior().sample())
    return f"The log density is not finite at the sites {sites}." if sites else ""


def _fit(guide: AutoFlow, history: History, beginning: Beginning) -> SVIFit:
    """The fit with the guide as it is."""
    guide.register()
    found = beginning
    return SVIFit(guide, history, found.joint, found.start, found.choice, found.recipe)
