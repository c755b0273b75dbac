"""Fitting a flow guide to a Pyro model in one call."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_nf._checks import check_count, check_positive
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.infer.guide import RECENTRING, AutoFlow
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.objectives import ELBO, DifferentiableLogJoint, Estimate, Objective
from pyro_nf.infer.posterior import Posterior
from pyro_nf.infer.recentre import Recentre
from pyro_nf.infer.recipe import (
    AVERAGE,
    MANY_PARTICLES,
    choose_particles,
    choose_rate,
    elbo_floor,
    posterior_stages,
    seconds_per_step,
)
from pyro_nf.infer.sites import Model
from pyro_nf.infer.start import Start, laplace_start
from pyro_nf.infer.tempering import separated_mixture
from pyro_nf.train.checkpoint import load_fit
from pyro_nf.train.digest import digest
from pyro_nf.train.loop import History, train
from pyro_nf.train.randomness import own_randomness

# What a fit may take if nothing is said.
_MAX_STEPS = 2000
# Shares of the seconds that recording the log joint, the start, and the search for separate pieces
# may take.
_TRACE_SHARE, _START_SHARE, _PIECES_SHARE = 0.15, 0.3, 0.1
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
        start: The Gaussian, or the mixture, that the fit started from, in the coordinates of
            learning; None if the guide was set up before, or the fit went on from a checkpoint.
        choice: What was chosen for this model, in a line.
    """

    guide: AutoFlow
    history: History
    joint: LogJoint
    start: Start | GaussianMixture | None
    choice: str

    def __repr__(self) -> str:
        return f"SVIFit({self.choice})\n  {self.history!r}\n  {self.joint!r}"

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

    @property
    def memory(self) -> dict[str, float]:
        return self.objective.memory

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
        sites = joint.failing_sites(guide.get_posterior().sample())
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
    compile: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> SVIFit:
    r"""Fits a flow guide by maximising the ELBO.

    The model is run once for all particles of a step (:class:`~pyro_nf.infer.joint.LogJoint`). The
    fit starts from a Gaussian found by many climbs and the curvature along them
    (:func:`~pyro_nf.infer.start.laplace_start`), or from a mixture if the posterior is in separate
    pieces (:func:`~pyro_nf.infer.tempering.separated_mixture`), learns its affine part first and
    then everything (:func:`~pyro_nf.infer.recipe.posterior_stages`), with the
    sticking-the-landing gradient. Sites whose prior's location or scale is latent too are placed by
    that prior (:class:`~pyro_nf.infer.recentre.Recentre`) if the start is the better for it, so
    that a hierarchy has no funnel. What is kept is a moving average of the parameters, at the check
    where its ELBO by a fixed set of draws, less two standard errors, was best; the start is checked
    too.

    The parameters of the guide are in Pyro's param store afterwards, as after ``SVI``, so that
    ``pyro.get_param_store().save(path)`` keeps them for another process: there ``load(path)``, and
    a guide that is built alike takes them in :meth:`AutoFlow.setup`.

    Ctrl-C ends the fit and keeps the best state. A particle whose log density is not finite counts
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
        max_steps: The most steps; 2000 if ``max_seconds`` is not given either.
        max_seconds: The most seconds of wall clock, the start included.
        num_particles: Draws a step; if None 64 or 256, by what the log joint costs
            (:func:`~pyro_nf.infer.recipe.choose_particles`).
        objective: What is maximised; :class:`~pyro_nf.infer.objectives.ELBO` by default.
        patience: Stop after so many steps without a better ELBO; None for never.
        seed: Seed of the fit; the global generators are left as they were.
        progress: Whether to show a progress bar.
        checkpoint: A file to write the state to, and to go on from if it exists, if arguments,
            observed data and settings are those of then. The budget may be another.
        checkpoint_every: Steps between two writes of it.
        compile: Whether to fuse the recorded log joint with ``torch.compile``; the compiler takes
            some ten seconds, so it is for long fits. The recording is made even if no seconds bound
            the fit.
        clock: Returns the seconds that ``max_seconds`` counts.

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
    if max_seconds is not None:
        check_positive("fit_svi", "max_seconds", max_seconds)
    if guide is not None and not isinstance(guide, AutoFlow):
        raise TypeError(
            f"fit_svi: guide must be an AutoFlow, got {type(guide).__name__}; fit other guides "
            "with pyro.infer.SVI and take Posterior.from_guide(guide, model)."
        )
    if max_steps is None and max_seconds is None:
        max_steps = _MAX_STEPS
    began, kwargs = clock(), dict(kwargs or {})
    seconds = _Seconds(max_seconds)
    with own_randomness(seed):
        joint = LogJoint(model, args, kwargs, seed=seed)
        if joint.has_parameters:
            raise ValueError(
                "fit_svi: the model has learnable parameters, which it would leave alone; train "
                "model and guide together with pyro.infer.SVI, then take Posterior.from_guide."
            )
        # these and the rate look at the clock, if there is one; then the fit cannot be repeated
        half = None if max_seconds is None else 0.5 * max_seconds
        resumed = checkpoint is not None and os.path.exists(checkpoint)
        settings, tensors = load_fit(checkpoint) if checkpoint and resumed else ({}, {})
        if num_particles is None:
            num_particles = settings.get("num_particles")  # a clock may choose otherwise today
        if num_particles is None:
            num_particles = choose_particles(joint, half)

        def record(joint: LogJoint, compile: bool = False) -> None:
            # Runs with enumerated sites are long: their recording pays in any fit.
            if max_seconds is not None or compile or joint.enumerated_sites:
                joint.trace(num_particles, seconds.share(_TRACE_SHARE), clock, compile)

        start: Start | GaussianMixture | None = None
        learning: LogJoint | None = None
        if resumed:
            count = settings.get("count_components", 1)
            guide = _default_guide(joint, count) if guide is None else guide
            guide._build(*args, **kwargs)
            guide.expect_layers(tensors)
            guide.recentre(_recentring_of(tensors, joint))
        elif guide is None or guide.prototype_trace is None:
            guide, start, learning = _started(guide, joint, seconds, record, seed, clock)
        if learning is None:
            learning = _learning_joint(guide, joint)
        record(learning, compile)
    recentred = "" if learning is joint else f" and {len(joint.hierarchical_sites)} recentred sites"
    choice = (
        f"{joint.latent_dim} coordinates{recentred}, log joint {joint.kind}, "
        f"{guide.count_components} component(s), {num_particles} particles"
    )
    if progress:
        tqdm.write(f"fit_svi: {choice}", file=sys.stderr)
    flow = guide.recentred_flow
    left, count_steps = None, math.inf if max_steps is None else max_steps
    if max_seconds is not None:
        if num_particles >= MANY_PARTICLES:  # the rate for fewer does not ask how many steps
            per_step = seconds_per_step(flow, learning, num_particles, seed)
            left = max_seconds - (clock() - began)
            count_steps = min(count_steps, left / max(per_step, 1e-6))  # clocks tick
        left = max(max_seconds - (clock() - began), 1e-3)
    stages = posterior_stages(
        flow,
        learning,
        objective=_Watched(objective or ELBO()),
        count_particles=num_particles,
        rate=choose_rate(count_steps, num_particles),
        tails=objective is None,
    )
    history = train(
        guide._ready(),
        stages,
        max_steps=max_steps,
        max_seconds=left,
        validate=None if objective else lambda: -elbo_floor(flow, learning, seed=seed),
        patience=patience,
        average=AVERAGE,
        seed=seed,
        progress=progress,
        metric="-ELBO",
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        explain=lambda _: _explain(guide, joint),
        settings={
            "sites": {name: list(s.shape) for name, s in joint.sites.items()},
            "count_components": guide.count_components,
            "num_particles": num_particles,
            "objective": digest(objective or ELBO()),
        }
        | ({} if checkpoint is None else _marks(joint)),
        clock=clock,
    )
    guide.register()
    return SVIFit(guide, history, joint, start, choice)


def _marks(joint: LogJoint) -> dict[str, Any]:
    """What tells a model and its data from others: its arguments, what it observes, its density.

    A model that draws a subsample of its own shows other data in each run; then the arguments alone
    are compared.
    """
    marks: dict[str, Any] = {f"args[{i}]": digest(value) for i, value in enumerate(joint.args)}
    marks |= {f"kwargs[{name!r}]": digest(value) for name, value in joint.kwargs.items()}
    if joint.is_random:
        return marks
    z = torch.zeros_like(joint.init_loc)
    with torch.no_grad(), own_randomness(seed=0), pyro.validation_enabled(False), poutine.block():
        conditioned = poutine.condition(joint.model, joint.unpack(z))
        trace = poutine.trace(conditioned).get_trace(*joint.args, **joint.kwargs)
        density = float(joint.log_prob(z.unsqueeze(0)))
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] == "sample" and node["is_observed"] and name not in joint.sites:
            marks[f"observed {name!r}"] = digest(node["value"])
    return marks | ({"log density at 0": density} if math.isfinite(density) else {})


@dataclass(frozen=True)
class _Seconds:
    """What a part of the fit may take."""

    total: float | None

    def share(self, share: float) -> float:
        return _LONGEST_START if self.total is None else share * self.total


def _default_guide(joint: LogJoint, count_components: int) -> AutoFlow:
    """For all latents but those that the log joint sums out."""
    model = joint.model
    if joint.enumerated_sites:
        model = poutine.block(model, hide=list(joint.enumerated_sites))
    return AutoFlow(model, count_components=count_components)


def _recentring_of(tensors: Mapping[str, Tensor], joint: LogJoint) -> Recentre | None:
    """The recentring of the guide whose state this is, if it has one."""
    keys = [RECENTRING + name for name in ("precision", "shift")]
    return Recentre(joint, *(tensors[key] for key in keys)) if keys[0] in tensors else None


def _learning_joint(guide: AutoFlow, joint: LogJoint) -> LogJoint:
    """The log joint density in the coordinates in which a guide learns."""
    if guide.recentring is None:
        return joint
    guide.recentring.joint = joint  # with the data of now
    return guide.recentring.recentred()


def _started(
    guide: AutoFlow | None,
    joint: LogJoint,
    seconds: _Seconds,
    record: Callable[[LogJoint], None],
    seed: int,
    clock: Callable[[], float],
) -> tuple[AutoFlow, Start | GaussianMixture, LogJoint]:
    """A guide that is set up and stands where the fit shall begin, and the density that it meets.

    A hierarchy is started in plain and in recentred coordinates; the better ELBO decides.
    """
    init = joint.init_loc
    if guide is not None:
        guide._build(*joint.args, **joint.kwargs)
        init = guide._init_loc()
    record(joint)
    share = _START_SHARE / (2 if joint.hierarchical_sites else 1)

    def started(joint: LogJoint, init: Tensor) -> Start:
        return laplace_start(joint, init, max_seconds=seconds.share(share), seed=seed, clock=clock)

    start, learning, recentring = started(joint, init), joint, None
    if joint.hierarchical_sites:
        candidate = Recentre.at(joint, start.loc)
        there = candidate.recentred()
        record(there)
        other = started(there, candidate.inverse_and_ladj(start.loc)[0].detach())
        if other.elbo > start.elbo:
            start, learning, recentring = other, there, candidate
    mixture = None
    if guide is None or guide.count_components > 1:
        mixture = separated_mixture(
            learning, start, max_seconds=seconds.share(_PIECES_SHARE), seed=seed, clock=clock
        )
    if guide is None:
        count = 1 if mixture is None else mixture.count_components
        guide = _default_guide(joint, count)
        guide._build(*joint.args, **joint.kwargs)
    fits = mixture is not None and mixture.count_components == guide.count_components
    found = mixture if mixture is not None and fits else start
    guide.start_at(found, recentring)
    return guide, found, learning
