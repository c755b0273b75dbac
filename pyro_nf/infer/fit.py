"""Fitting a flow guide to a Pyro model in one call."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_nf._checks import check_count
from pyro_nf.flows.flow import Flow
from pyro_nf.infer.guide import AutoFlow
from pyro_nf.infer.joint import LogJoint, Model
from pyro_nf.infer.objectives import ELBO, DifferentiableLogJoint, Estimate, Objective
from pyro_nf.infer.posterior import Posterior
from pyro_nf.infer.recipe import Pace, choose_pace, posterior_stages
from pyro_nf.infer.replay import failing_sites
from pyro_nf.infer.start import Start, laplace_start
from pyro_nf.train.loop import History, train

# What a fit may take if nothing is said.
_MAX_STEPS = 2000
# The start may take this share of the seconds, and at most so many of them.
_START_SHARE, _START_SECONDS = 0.2, 3.0
# A fit that is bounded by steps alone looks at no clock, so that it can be repeated to the last
# bit: its start ends by itself, long before this.
_LONGEST_START = 60.0


@dataclass(frozen=True)
class SVIFit:
    """A fitted guide and how it was fitted.

    Attributes:
        guide: The guide, in its best state.
        history: Losses (negative ELBOs) and the reason why the fit stopped.
        joint: The log joint density that it was fitted to.
        start: The Gaussian that the fit started from; None if it went on from a checkpoint.
    """

    guide: AutoFlow
    history: History
    joint: LogJoint
    start: Start | None

    def posterior(self, num_draws: int = 1000, *, seed: int = 0) -> Posterior:
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


@dataclass(frozen=True)
class _Watched(Objective):
    """An objective whose loss is NaN where every particle failed: of nothing there is no mean."""

    objective: Objective

    def __call__(
        self,
        flow: Flow,
        joint: DifferentiableLogJoint,
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Estimate:
        estimate = self.objective(flow, joint, x, weights)
        failed = estimate.num_failed == len(x)
        return replace(estimate, loss=estimate.loss * math.nan) if failed else estimate


def _explain(guide: AutoFlow, joint: LogJoint) -> str:
    with torch.no_grad():
        sites = failing_sites(joint, guide.get_posterior().sample())
    return f"The log density is not finite at the sites {sites}." if sites else ""


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
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
) -> SVIFit:
    r"""Fits a flow guide by maximising the ELBO.

    The model is run once for all particles of a step (:class:`~pyro_nf.infer.joint.LogJoint`). The
    fit starts from a Gaussian found by many climbs and the curvature along them
    (:func:`~pyro_nf.infer.start.laplace_start`), learns its affine part first and then everything
    (:func:`~pyro_nf.infer.recipe.posterior_stages`), with the sticking-the-landing gradient.

    Ctrl-C ends the fit and keeps the best state. A particle whose log density is not finite counts
    for nothing in its step; a step in which all of them fail, or whose gradient is not finite, is
    skipped. After ten such steps in a row the fit ends, with the step and the failing sites named.

    *Automatic Differentiation Variational Inference* (Kucukelbir, Tran, Ranganath, Gelman, Blei,
    2017); *Sticking the Landing* (Roeder, Wu, Duvenaud, 2017).

    Args:
        model: A Pyro model; its learnable parameters, if any, must be trained by ``SVI`` instead.
        guide: The guide; ``AutoFlow(model)`` by default. One that was fitted before goes on from
            where it is.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        max_steps: The most steps; 2000 if ``max_seconds`` is not given either.
        max_seconds: The most seconds of wall clock, the start included.
        num_particles: Draws a step; if None 64, or, with ``max_seconds``, chosen by the cost of the
            log joint.
        objective: What is maximised; :class:`~pyro_nf.infer.objectives.ELBO` by default.
        patience: Stop after so many steps without a better ELBO; None for never.
        seed: Seed of the fit; the global generators are left as they were.
        progress: Whether to show a progress bar.
        checkpoint: A file to write the state to, and to go on from if it exists.
        checkpoint_every: Steps between two writes of it.

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
    if num_particles is not None:
        check_count("fit_svi", "num_particles", num_particles)
    kwargs = dict(kwargs or {})
    guide = AutoFlow(model) if guide is None else guide
    if not isinstance(guide, AutoFlow):
        raise TypeError(
            f"fit_svi: guide must be an AutoFlow, got {type(guide).__name__}; fit other guides "
            "with pyro.infer.SVI and take Posterior.from_guide(guide, model)."
        )
    if max_steps is None and max_seconds is None:
        max_steps = _MAX_STEPS
    fresh = guide.prototype_trace is None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        guide._build(*args, **kwargs)
    joint = LogJoint(model, args, kwargs, seed=seed)
    if joint.has_parameters:
        raise ValueError(
            "fit_svi: the model has learnable parameters, which it would leave alone; train model "
            "and guide together with pyro.infer.SVI, then take Posterior.from_guide."
        )
    start = None
    if fresh and not (checkpoint is not None and os.path.exists(checkpoint)):
        seconds = _LONGEST_START
        if max_seconds is not None:
            seconds = min(_START_SHARE * max_seconds, _START_SECONDS)
        start = laplace_start(joint, guide._init_loc(), max_seconds=seconds, seed=seed)
        guide.start_at(start)
    pace = Pace() if num_particles is None else Pace(num_particles)
    if num_particles is None and max_seconds is not None:
        pace = choose_pace(joint)
    watched = _Watched(objective or ELBO())
    history = train(
        guide._ready(),
        posterior_stages(guide._ready(), joint, objective=watched, pace=pace),
        max_steps=max_steps,
        max_seconds=max_seconds,
        patience=patience,
        seed=seed,
        progress=progress,
        metric="-ELBO",
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        explain=lambda _: _explain(guide, joint),
        settings={"sites": {name: list(s.shape) for name, s in joint.sites.items()}},
    )
    return SVIFit(guide, history, joint, start)
