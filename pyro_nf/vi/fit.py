"""Fitting a flow guide to a Pyro model in one call."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor
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
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.guides.guide import RECENTRING, AutoFlow
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.density import LogDensity
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.search.gaussians import hessian_rows
from pyro_nf.search.mixtures import PieceSearch
from pyro_nf.search.start import Start, StartSearch
from pyro_nf.sites.latents import Model
from pyro_nf.train.budget import Budget, Clock, OutOfTime
from pyro_nf.train.checkpoint import load_fit
from pyro_nf.train.digest import digest
from pyro_nf.train.loop import History, Stage, train
from pyro_nf.train.modes import ordinary, recording
from pyro_nf.train.randomness import own_randomness
from pyro_nf.vi.objectives import ELBO, DifferentiableLogJoint, Estimate, Objective
from pyro_nf.vi.recipe import (
    AVERAGE,
    MANY_PARTICLES,
    choose_check_particles,
    choose_particles,
    choose_rate,
    elbo_floor,
    posterior_stages,
    seconds_per_step,
)

# What a fit may take if nothing is said.
_MAX_STEPS = 2000
# Shares of the seconds that recording the log joint, the start, and the search for separate pieces
# may take.
_TRACE_SHARE, _START_SHARE, _PIECES_SHARE = 0.15, 0.3, 0.2
# Recording costs so many evaluations, and is not tried where that is too much.
_TRACE_COST = 300.0
# A fit that is bounded by steps alone looks at no clock, so that it can be repeated to the last
# bit. Where each particle is a run of the model, its start and the search for pieces take a share
# of the runs that its steps take; else they end by themselves.
_LEAST_ROWS = 256
# The last check may end so much later than all else, lest what was learned last be lost.
_GRACE = 1.05


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
    seed: int | None = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    compile: bool = False,
    clock: Clock = time.monotonic,
) -> SVIFit:
    r"""Fits a flow guide by maximising the ELBO.

    The model is run once for all particles of a step (:class:`~pyro_nf.model.joint.LogJoint`). The
    fit starts from a Gaussian found by many climbs and the curvature along them
    (:func:`~pyro_nf.search.start.laplace_start`), or from a mixture if the posterior is in separate
    pieces (:func:`~pyro_nf.search.mixtures.separated_mixture`), learns its affine part first and
    then everything (:func:`~pyro_nf.vi.recipe.posterior_stages`), with the
    sticking-the-landing gradient. Sites whose prior's location or scale is latent too are placed by
    that prior (:class:`~pyro_nf.guides.recentre.Recentre`) if the start is the better for it, so
    that a hierarchy has no funnel. What is kept is a moving average of the parameters, at the check
    where its ELBO by a fixed set of draws, less two standard errors, was best; the start is checked
    too.

    The parameters of the guide are in Pyro's param store afterwards, as after ``SVI``, so that
    ``pyro.get_param_store().save(path)`` keeps them for another process: there ``load(path)``, and
    a guide that is built alike takes them in :meth:`AutoFlow.setup`.

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
        max_steps: The most steps; 2000 if ``max_seconds`` is not given either.
        max_seconds: The most seconds of wall clock, the start included. Before an evaluation of the
            model what it costs is held against what is left; if not even one step fits, the fit
            is the best start. What cannot be left out are some six runs of the model, to understand
            it.
        num_particles: Draws a step; if None 64 or 256, by what the log joint costs
            (:func:`~pyro_nf.vi.recipe.choose_particles`).
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
    asked_seed, seed = seed, seed_or_fresh("fit_svi", seed)
    if max_steps is None and max_seconds is None:
        max_steps = _MAX_STEPS
    args, given = ordinary(args), dict[str, Any](ordinary(dict(kwargs or {})))
    budget = Budget(max_steps, max_seconds, clock)
    with recording("fit_svi"):
        with own_randomness(seed):
            joint = _log_joint(model, args, given, budget, seed)
        beginning = _Beginning(joint, guide, budget, num_particles, seed, compile)
        try:
            with own_randomness(seed):
                beginning.find(checkpoint)
                guide, stages = beginning.guide_there(), beginning.stages(objective)
                validate = None if objective else beginning.validation()
        except KeyboardInterrupt:
            with own_randomness(seed):
                beginning.guide_there()
            beginning.take_saved()
            return beginning.fit(History(stopped="interrupted"))
        if progress:
            tqdm.write(f"fit_svi: {beginning.choice}", file=sys.stderr)
        history = train(
            guide._ready(),
            stages,
            max_steps=max_steps,
            max_seconds=max_seconds,
            validate=validate,
            patience=patience,
            average=AVERAGE,
            seed=asked_seed,
            progress=progress,
            metric="-ELBO",
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            explain=lambda _: _explain(guide, joint),
            settings={
                "sites": {name: list(s.shape) for name, s in joint.sites.items()},
                "count_components": guide.count_components,
                "num_particles": beginning.num_particles,
                "objective": digest(objective or ELBO()),
            }
            | ({} if checkpoint is None else _marks(joint)),
            seconds_before=max(budget.seconds, 0.0),
            clock=clock,
        )
        return beginning.fit(history)


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


class _Beginning:
    """Where a fit begins: found step by step, and usable whenever the finding is interrupted.

    Args:
        joint: The log joint density.
        guide: The guide that is given, if one is.
        budget: Of the whole fit.
        num_particles: Of a step; chosen if it is None.
        seed: Of the fit.
        compile: Whether recordings are fused.
    """

    def __init__(
        self,
        joint: LogJoint,
        guide: AutoFlow | None,
        budget: Budget,
        num_particles: int | None,
        seed: int,
        compile: bool,
    ) -> None:
        self.joint, self.guide, self.budget, self.seed = joint, guide, budget, seed
        self.compile = compile
        self.num_particles = num_particles or choose_particles(joint, None)
        self.are_particles_given = num_particles is not None
        self.learning: LogDensity = joint
        self.recentring: Recentre | None = None
        self.meter = Metered(joint, budget)
        self.search: StartSearch | None = None  # in the coordinates of learning
        self.pieces: PieceSearch | None = None
        self.saved: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self.is_set_up = guide is not None and guide.prototype_trace is not None

    # ---- finding

    def find(self, checkpoint: str | os.PathLike[str] | None) -> None:
        """Finds particles, start and pieces, and records what steps will evaluate."""
        if checkpoint is not None and os.path.exists(checkpoint):
            self.saved = load_fit(checkpoint)
            if not self.are_particles_given:  # a clock may choose otherwise today
                self.num_particles = self.saved[0].get("num_particles", self.num_particles)
        with suppress(OutOfTime):
            self.meter.explored()
            is_open = self.saved is None and not self.are_particles_given
            if self.budget.has_seconds and is_open:
                self.num_particles = choose_particles(self.meter, 0.5 * self.budget.seconds_left)
        if self.saved is None and not self.is_set_up:
            self._find_start()
        guide = self.guide_there()
        if guide.recentring is not None and self.learning is self.joint:  # it brought its own
            guide.recentring.joint = self.joint  # with the data of now
            self.learning = guide.recentring.recentred()
            self.meter = self.meter.within(self.budget, self.learning)
        self._record(self.meter, self.compile)

    def _find_start(self) -> None:
        """A hierarchy is started in plain and in recentred coordinates; the better ELBO decides."""
        init = self.joint.init_loc
        if self.guide is not None:
            self.guide._build(*self.joint.args, **self.joint.kwargs)
            init = self.guide._init_loc()
        self._record(self.meter)
        share = _START_SHARE / (2 if self.joint.hierarchical_sites else 1)
        self.search = self._search(self.meter, init, share)
        self.search.run()
        if self.joint.hierarchical_sites:
            with suppress(OutOfTime):
                self._recentre(share)
        if self.guide is None or self.guide.count_components > 1:
            meter = self._metered(self.meter, _PIECES_SHARE)
            self.pieces = PieceSearch(meter, self.search.best(), self.seed)
            self.pieces.run()

    def _recentre(self, share: float) -> None:
        plain = cast(StartSearch, self.search).best()
        rows = hessian_rows(self.joint.latent_dim)
        self.meter.part(share).budget.expect(self.meter.price("hessian", rows))
        recentring = self.meter.spend("hessian", rows, lambda: Recentre.at(self.joint, plain.loc))
        learning = recentring.recentred()
        meter = self.meter.within(self.budget, learning)
        self._record(meter)
        there = recentring.inverse_and_ladj(plain.loc)[0].detach()
        search = self._search(meter, there, share)
        search.run()
        if search.best().elbo > plain.elbo:
            self.search, self.meter = search, meter
            self.learning, self.recentring = learning, recentring

    def _search(self, meter: Metered, init: Tensor, share: float) -> StartSearch:
        return StartSearch(self._metered(meter, share), init, seed=self.seed)

    def _metered(self, meter: Metered, share: float) -> Metered:
        """For a part of the finding: seconds of the clock, or rows where each is a run."""
        if self.budget.has_seconds or self.joint.kind != "loop":
            return meter.part(share)
        rows = share * cast(int, self.budget.max_steps) * self.num_particles
        return meter.within(Budget(max_seconds=max(rows, _LEAST_ROWS), clock=meter.rows))

    def _record(self, meter: Metered, compile: bool = False) -> None:
        """Records the log joint if seconds bound the fit, or if it is to be compiled.

        Runs with enumerated sites are long, so that their recording pays in any fit; where steps
        alone bound it, no clock decides.
        """
        count, bounded = self.num_particles, self.budget.has_seconds
        seconds = self.budget.part(_TRACE_SHARE).max_seconds
        too_dear = seconds is not None and _TRACE_COST * meter.price("gradient", count) > seconds
        is_long = bool(self.joint.enumerated_sites) and not bounded
        if (bounded and not too_dear) or compile or is_long:
            joint, clock = meter.joint, self.budget.clock
            joint.trace(count, seconds, clock, compile, if_faster=bounded)
            meter.forget(count)

    # ---- what is found

    @property
    def start(self) -> Start | GaussianMixture | None:
        """The mixture or the Gaussian that is best so far; None if the guide brings its own."""
        if self.saved is not None or self.is_set_up:
            return None
        mixture = None if self.pieces is None else self.pieces.best
        if mixture is not None:
            count = None if self.guide is None else self.guide.count_components
            if count in (None, mixture.count_components):
                return mixture
        return self._no_search().best() if self.search is None else self.search.best()

    def _no_search(self) -> StartSearch:
        return StartSearch(self.meter, self.joint.init_loc, seed=self.seed)

    def guide_there(self) -> AutoFlow:
        """The guide, set up, where the fit shall begin; nothing changes if it is there."""
        start, args, kwargs = self.start, self.joint.args, self.joint.kwargs
        if self.guide is None:
            count = start.count_components if isinstance(start, GaussianMixture) else 1
            if self.saved is not None:
                count = self.saved[0].get("count_components", 1)
            self.guide = _default_guide(self.joint, count)
        self.guide._build(*args, **kwargs)
        if self.saved is not None:
            self.guide.expect_layers(self.saved[1])
            self.guide.recentre(_recentring_of(self.saved[1], self.joint))
        elif start is not None:
            self.guide.start_at(start, self.recentring)
        return self.guide

    def take_saved(self) -> None:
        """Takes the state in the checkpoint, if the fit is to go on from one."""
        if self.saved is not None:
            cast(AutoFlow, self.guide)._ready().load_state_dict(self.saved[1])

    @property
    def choice(self) -> str:
        """What was chosen for this model, in a line."""
        joint, guide = self.joint, cast(AutoFlow, self.guide)
        count = len(joint.hierarchical_sites)
        recentred = "" if guide.recentring is None else f" and {count} recentred sites"
        return (
            f"{joint.latent_dim} coordinates{recentred}, log joint {joint.kind}, "
            f"{guide.count_components} component(s), {self.num_particles} particles"
        )

    # ---- training

    def _evaluated(self, grace: float = 1.0) -> LogDensity:
        """What steps and checks evaluate: metered if there is a clock to look at."""
        seconds = self.budget.max_seconds
        if seconds is None:
            return self.learning
        return self.meter.within(replace(self.budget, max_seconds=grace * seconds))

    def stages(self, objective: Objective | None) -> list[Stage]:
        """The stages of the training, at the rate that suits the steps that are left."""
        guide, budget = cast(AutoFlow, self.guide), self.budget
        flow, joint, count = guide.recentred_flow, self._evaluated(), self.num_particles
        steps = math.inf if budget.max_steps is None else budget.max_steps
        if budget.has_seconds and count >= MANY_PARTICLES:  # fewer do not ask how many steps
            with suppress(OutOfTime):
                per_step = seconds_per_step(flow, joint, count, self.seed)
                steps = min(steps, budget.seconds_left / max(per_step, 1e-6))  # clocks tick
        return posterior_stages(
            flow,
            joint,
            objective=_Watched(objective or ELBO()),
            count_particles=count,
            rate=choose_rate(steps, count),
            tails=objective is None,
        )

    def validation(self) -> Callable[[], float]:
        """Minus the ELBO of the guide as it is, at least."""
        flow, joint = cast(AutoFlow, self.guide).recentred_flow, self._evaluated(_GRACE)
        count = choose_check_particles(self.meter)
        return lambda: -elbo_floor(flow, joint, count, self.seed)

    def fit(self, history: History) -> SVIFit:
        """The fit with the guide as it is."""
        guide = cast(AutoFlow, self.guide)
        guide.register()
        return SVIFit(guide, history, self.joint, self.start, self.choice)


def _default_guide(joint: LogJoint, count_components: int) -> AutoFlow:
    """For all latents but those that the log joint sums out."""
    model = joint.model
    if joint.enumerated_sites:
        model = poutine.block(model, hide=list(joint.enumerated_sites))
    return AutoFlow(model, count_components=count_components)


def _recentring_of(tensors: Mapping[str, Tensor], joint: LogJoint) -> Recentre | None:
    """The recentring of the guide whose state this is, if it has one."""
    keys = [RECENTRING + name for name in ("precision", "shift")]
    if keys[0] in tensors and tensors[keys[0]].shape != joint.init_loc.shape:
        raise ValueError(
            "fit_svi: the checkpoint is of another architecture: its guide has "
            f"{tensors[keys[0]].numel()} unconstrained coordinates, the model {joint.latent_dim}. "
            "Resume with the model and the arguments that it had, or give another file."
        )
    return Recentre(joint, *(tensors[key] for key in keys)) if keys[0] in tensors else None
