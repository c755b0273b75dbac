"""Where a fit begins: what is found before the first step of training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from pyro import poutine
from torch import Tensor

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.density import LogDensity
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.search.gaussians import hessian_rows
from pyro_nf.search.mixtures import PieceSearch
from pyro_nf.search.start import GaussianStart, StartSearch
from pyro_nf.train.budget import Budget, OutOfTime
from pyro_nf.train.stages import Stage
from pyro_nf.train.world import World
from pyro_nf.vi.gradients import StickTheLanding, gradient_for
from pyro_nf.vi.objectives import ELBO, Objective, Watched
from pyro_nf.vi.recipe import PosteriorRecipe
from pyro_nf.vi.resume import Saved
from pyro_nf.vi.stages import (
    choose_check_particles,
    choose_particles,
    elbo_floor,
    posterior_stages,
    seconds_per_step,
)


class Beginning:
    """Where a fit begins: found step by step, and usable whenever the finding is interrupted.

    A fit that is bounded by steps alone looks at no clock, so that it can be repeated to the last
    bit. Where each particle is a run of the model, its start and the search for pieces take a share
    of the runs that its steps take; else they end by themselves.

    Args:
        joint: The log joint density.
        guide: The guide that is given, if one is.
        budget: Of the whole fit.
        recipe: The settings.
        seed: Of the fit.
        world: The processes that take part: the first one finds, and the others begin there too.

    Attributes:
        recipe: The settings, with the particles that were chosen.
    """

    def __init__(
        self,
        joint: LogJoint,
        guide: AutoFlow | None,
        budget: Budget,
        recipe: PosteriorRecipe,
        seed: int,
        world: World,
    ) -> None:
        self.joint, self.guide, self.budget, self.seed = joint, guide, budget, seed
        self.world = world
        self.are_particles_given = recipe.num_particles is not None
        self.recipe = recipe
        if not self.are_particles_given:
            self.take_particles(choose_particles(joint, None, recipe))
        self.learning: LogDensity = joint
        self.recentring: Recentre | None = None
        self.meter = Metered(joint, budget)
        self.search: StartSearch | None = None  # in the coordinates of learning
        self.pieces: PieceSearch | None = None
        self.saved: Saved | None = None
        self.is_set_up = guide is not None and guide.is_set_up

    @property
    def num_particles(self) -> int:
        """Draws a step."""
        return cast(int, self.recipe.num_particles)

    def take_particles(self, count: int) -> None:
        """Takes so many draws a step.

        Args:
            count: How many.
        """
        self.recipe = replace(self.recipe, num_particles=count)

    # ---- finding

    def find(self, checkpoint: str | os.PathLike[str] | None, compile: bool) -> AutoFlow:
        """Finds particles, start and pieces, and records what steps will evaluate.

        Args:
            checkpoint: A file that the fit goes on from, if it is there.
            compile: Whether the recording is fused.

        Returns:
            The guide, where the fit shall begin.
        """

        def found() -> Saved:
            self._find(Saved.read(checkpoint), compile)
            self.world.attend()
            return self._as_saved()

        saved = self.world.share(found)
        if not self.world.is_first:
            self._find(saved, compile)
        return cast(AutoFlow, self.guide)

    def _find(self, saved: Saved | None, compile: bool) -> None:
        self.saved = saved
        if self.saved is not None and not self.are_particles_given:  # a clock may choose otherwise
            self.take_particles(self.saved.settings.get("num_particles", self.num_particles))
        with suppress(OutOfTime):
            self.meter.explored()
            is_open = self.saved is None and not self.are_particles_given
            if self.budget.has_seconds and is_open:
                half = 0.5 * self.budget.seconds_left
                self.take_particles(choose_particles(self.meter, half, self.recipe))
        if self.saved is None and not self.is_set_up:
            self._find_start()
        guide = self.guide_there()
        if guide.recentring is not None and self.learning is self.joint:  # it brought its own
            guide.recentring.joint = self.joint  # with the data of now
            self.learning = guide.recentring.recentred()
            self.meter = self.meter.within(self.budget, self.learning)
        self._record(self.meter, compile)

    def _find_start(self) -> None:
        """A hierarchy is started in plain and in recentred coordinates; the better ELBO decides."""
        init = self.joint.init_loc
        if self.guide is not None:
            self.guide.build_on(self.joint)
            init = self.guide.init_loc
        self._record(self.meter)
        share = self.recipe.start_share / (2 if self.joint.hierarchical_sites else 1)
        self.search = self._search(self.meter, init, share)
        self.search.run()
        if self.joint.hierarchical_sites:
            with suppress(OutOfTime):
                self._recentre(share)
        if self.guide is None or self.guide.count_components > 1:
            meter = self._metered(self.meter, self.recipe.pieces_share)
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
        return meter.within(Budget(max_seconds=max(rows, self.recipe.least_rows), clock=meter.rows))

    def _record(self, meter: Metered, compile: bool = False) -> None:
        """Records the log joint if seconds bound the fit, or if it is to be compiled.

        Runs with enumerated sites are long, so that their recording pays in any fit; where steps
        alone bound it, no clock decides.
        """
        count, bounded = self.num_particles, self.budget.has_seconds
        seconds = self.budget.part(self.recipe.recording_share).max_seconds
        cost = self.recipe.recording_cost * meter.price("gradient", count)
        too_dear = seconds is not None and cost > seconds
        is_long = bool(self.joint.enumerated_sites) and not bounded
        if (bounded and not too_dear) or compile or is_long:
            joint, clock = meter.joint, self.budget.clock
            joint.trace(count, seconds, clock, compile, if_faster=bounded)
            meter.forget(count)

    # ---- what is found

    @property
    def start(self) -> GaussianStart | GaussianMixture | None:
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
        start = self.start
        if self.guide is None:
            count = start.count_components if isinstance(start, GaussianMixture) else 1
            count = count if self.saved is None else self.saved.count_components
            self.guide = _default_guide(self.joint, count)
        self.guide.build_on(self.joint)
        if self.saved is not None:
            self.guide.expect_layers(self.saved.tensors)
            self.guide.recentre(self.saved.recentring(self.joint))
        elif start is not None:
            self.guide.start_at(start, self.recentring)
        return self.guide

    def cut_short(self) -> AutoFlow:
        """The guide at the best that is known: the state of the checkpoint, or the best start."""

        def best() -> AutoFlow:
            guide = self.guide_there()
            if self.saved is not None:
                guide.flow.load_state_dict(self.saved.tensors)
            return guide

        def found() -> Saved:
            best()
            return self._as_saved()

        saved = self.world.share(found)
        self.saved = self.saved if self.world.is_first else saved
        return best()

    def _as_saved(self) -> Saved:
        """What the guide is now, as another process can take it."""
        guide = self.guide_there()
        settings = {"count_components": guide.count_components, "num_particles": self.num_particles}
        tensors = {name: t.detach().cpu() for name, t in guide.flow.state_dict().items()}
        return Saved("", settings, tensors, is_old=False)

    def renew_checkpoint(self, settings: dict[str, Any]) -> None:
        """Makes the checkpoint, if an older version wrote it, one of now.

        Args:
            settings: The marks of the fit.
        """
        if self.saved is not None:
            self.saved.renew(cast(AutoFlow, self.guide).flow, settings)

    @property
    def choice(self) -> str:
        """What was chosen for this model, in a line."""
        joint, guide = self.joint, cast(AutoFlow, self.guide)
        count = len(joint.hierarchical_sites)
        recentred = "" if guide.recentring is None else f" and {count} recentred sites"
        kind = guide.flow.log_prob_kind
        worth = "" if kind == "exact" else f", log_prob of the guide: {kind}"
        return (
            f"{joint.latent_dim} coordinates{recentred}, log joint {joint.kind}, "
            f"{guide.count_components} component(s), {self.num_particles} particles{worth}"
        )

    # ---- training

    def _evaluated(self, grace: float = 1.0) -> LogDensity:
        """What steps and checks evaluate: metered if there is a clock to look at."""
        seconds = self.budget.max_seconds
        if seconds is None:
            return self.learning
        return self.meter.within(replace(self.budget, max_seconds=grace * seconds))

    def stages(self, objective: Objective | None) -> list[Stage]:
        """The stages of the training, at the rate that suits the steps that are left.

        Args:
            objective: What is maximised; None for the ELBO.
        """
        flow, joint = cast(AutoFlow, self.guide).recentred_flow, self._evaluated()
        gradient = gradient_for(flow)
        return posterior_stages(
            flow,
            joint,
            objective=Watched(objective or ELBO(gradient)),
            num_particles=self.num_particles,
            rate=self.world.share(lambda: self._rate(flow, joint)),
            tails=objective is None and isinstance(gradient, StickTheLanding),
            recipe=self.recipe,
        )

    def _rate(self, flow: Flow, joint: LogDensity) -> float:
        """The learning rate that suits the steps that are left."""
        budget, count = self.budget, self.num_particles
        steps = math.inf if budget.max_steps is None else budget.max_steps
        # fewer particles do not ask how many steps there will be
        if budget.has_seconds and count >= self.recipe.many_particles:
            with suppress(OutOfTime):
                per_step = seconds_per_step(flow, joint, count, self.seed)
                steps = min(steps, budget.seconds_left / max(per_step, 1e-6))  # clocks tick
        return self.recipe.rate(steps, count)

    def validation(self) -> Callable[[], float]:
        """Minus the ELBO of the guide as it is, at least."""
        flow, joint = cast(AutoFlow, self.guide).recentred_flow, self._evaluated(self.recipe.grace)
        count = choose_check_particles(self.meter, self.recipe)
        return lambda: -elbo_floor(flow, joint, count, self.seed)


def _default_guide(joint: LogJoint, count_components: int) -> AutoFlow:
    """For all latents but those that the log joint sums out."""
    model = joint.model
    if joint.enumerated_sites:
        model = poutine.block(model, hide=list(joint.enumerated_sites))
    return AutoFlow(model, count_components=count_components)
