"""A density fit under way: its starts, its baselines, its main run."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_nf.flows.base import DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.train.batches import part_of
from pyro_nf.train.budget import Budget
from pyro_nf.train.density.baselines import GaussianCopula
from pyro_nf.train.density.losses import (
    draws_in_training,
    embedded,
    farthest,
    log_scales,
    mean_loss,
    parameter_groups,
    seen,
    units_in,
)
from pyro_nf.train.density.recipe import DensityFit, DensityRecipe
from pyro_nf.train.density.source import Source
from pyro_nf.train.density.start import (
    FARTHEST_NORMAL_ROW,
    AsGiven,
    MixtureBase,
    Standardised,
    Start,
    StudentTails,
    Whitened,
    has_heavy_tails,
)
from pyro_nf.train.density.table import Table
from pyro_nf.train.loop import train
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.saved.checkpoint import load_fit
from pyro_nf.train.stages import History, Stage, adam
from pyro_nf.train.world import PeerLost, World


@dataclass(frozen=True)
class Options:
    """The arguments of a fit that every run of the loop needs."""

    learning_rate: float
    raise_decay: bool
    patience: float | None
    check_every: int
    seed: int | None
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    compile: bool
    recipe: DensityRecipe
    batch_size: int = 0
    weight_decay: float = 0.0


class State:
    """All that a start or a run may change in a flow: its tensors, its units and its base."""

    def __init__(self, flow: Flow) -> None:
        self.base = flow.base
        self.tensors = {name: t.detach().clone() for name, t in flow.state_dict().items()}

    def on_cpu(self) -> State:
        """A copy that another process can take."""
        other = copy.copy(self)
        other.base = copy.deepcopy(self.base).cpu()
        other.tensors = {name: t.cpu() for name, t in self.tensors.items()}
        return other

    def put_back(self, flow: Flow) -> None:
        """Give a flow this state."""
        flow.base = self.base.to(next(flow.parameters(), torch.empty(0)))
        flow.load_state_dict(self.tensors)


@dataclass
class _Orders:
    """What all processes do next: train the flow from a state for so long."""

    state: State
    steps: int | None
    seconds: float | None
    settings: dict[str, Any]


@dataclass
class _End:
    """What the first process has found, for the others."""

    state: State
    result: dict[str, Any]


class Work:
    """A fit under way. What ``best`` and ``result`` hold is good at any moment.

    Where there are several processes the first one leads: it alone decides what is tried and what
    is kept, and the others follow it into each run of the loop.

    Args:
        result: Is filled in.
        source: Where the rows come from.
        budget: What all may take.
        options: What was asked for.
        world: The processes that take part.
    """

    def __init__(
        self, result: DensityFit, source: Source, budget: Budget, options: Options, world: World
    ) -> None:
        self.result, self.flow, self.budget, self.options = result, result.flow, budget, options
        self.recipe, self.world, self.source = options.recipe, world, source
        self.check_seconds = 0.0
        self.given = self.best = State(self.flow)
        self.best_value = math.inf
        self.largest_gain = 0.0
        self.raced_steps = 0

    # ---- many processes

    def lead(self, starts: Sequence[Start] | None, baselines: bool) -> None:
        """Run the fit, and tell the other processes how it ended."""
        if self.world.size == 1:
            self.run(starts, baselines)
            return
        interrupt: KeyboardInterrupt | None = None
        try:
            self.run(starts, baselines)
        except PeerLost:
            raise
        except KeyboardInterrupt as caught:
            interrupt = caught
        except Exception as error:
            self.world.share(lambda error=error: _raise(error))  # type: ignore[misc]
        result = self.result
        names = ("history", "validation", "baselines", "start", "starts")
        found = {name: getattr(result, name) for name in names}
        if interrupt is not None:
            result.history.stopped = "interrupted"
        self.world.share(lambda: _End(State(self.flow).on_cpu(), found))
        if interrupt is not None:
            raise interrupt

    def follow(self) -> None:
        """Do what the first process says until it says that the fit has ended."""
        mine: Exception | None = None
        self._share_validation()
        while True:
            try:
                orders = self.world.share(_nothing)
            except PeerLost:
                raise
            except Exception as error:
                raise mine or error from None
            orders.state.put_back(self.flow)
            if isinstance(orders, _End):
                break
            try:
                self._train_here(orders.steps, orders.seconds, orders.settings)
            except PeerLost:
                raise
            except Exception as error:  # so did the first one, which will say what follows
                mine = error
        for name, value in orders.result.items():
            setattr(self.result, name, value)

    def _share_validation(self) -> None:
        """Give each process its part of the validation rows, and what goes with them."""
        if self.world.size == 1:
            self.part, self.part_weight = self.checked, 1.0
            return
        checked, options = self.world.share(
            lambda: (self.checked.to(torch.empty(0, dtype=self.checked.y.dtype)), self.options)
        )
        self.options = options
        self.source.keys = self.world.share(lambda: self.source.keys)
        self.source.batch_size = options.batch_size
        checked = checked.to(next(self.flow.parameters(), checked.y))
        rank, size = self.world.rank, self.world.size
        (y, context), self.part_weight = part_of((checked.y, checked.context), rank, size)
        self.part = Table(y, context)

    # ---- the fit

    def run(self, starts: Sequence[Start] | None, baselines: bool) -> None:
        """Try the starts, train on from the best, and look at the result."""
        flow, result, checkpoint = self.flow, self.result, self.options.checkpoint
        self.checked = self.source.held_out.some(self.recipe.max_checked_rows)
        resumes = checkpoint is not None and os.path.exists(checkpoint)
        try:
            self._time_a_check()
            with self.world.attentive():
                self._share_validation()
            if not resumes:
                self._try_starts(starts)
            if baselines:
                self._fit_baselines(may_start=starts is None and not resumes)
            self.best.put_back(flow)
            if checkpoint is not None and resumes:
                self._take_up(checkpoint)
            self._train()
            result.validation = self.best_value
            result.validation = self._final_loss()
        except KeyboardInterrupt:
            self.best.put_back(flow)
            if math.isnan(result.validation):
                result.validation = self._mean_loss(self.checked)
            raise

    def _mean_loss(self, table: Table) -> float:
        return mean_loss(self.flow, table, self.recipe.rows_at_once)

    def _time_a_check(self) -> None:
        """Look at as many validation rows as a small share of the seconds allows."""
        most, count = len(self.checked), self.recipe.min_checked_rows
        if self.budget.max_seconds is None:
            return
        while True:
            before = self.budget.seconds
            self._mean_loss(self.checked.first(count))
            self.check_seconds = self.budget.seconds - before
            affordable = self.recipe.check_share * self.budget.max_seconds
            if count >= most or 4 * self.check_seconds > affordable:
                break
            count *= 4
        self.checked = self.checked.first(count)

    def _try_starts(self, starts: Sequence[Start] | None) -> None:
        if starts is not None:
            if not starts:
                raise ValueError(
                    "fit_density: starts is empty; (AsGiven(),) keeps the flow as it is."
                )
            for start in starts:
                self._try(start, races=len(starts) > 1)
            return
        linear = (Standardised(), Whitened())
        rows = seen(self.source.table, self.source.units)
        if not (_has_plain_base(self.flow) and has_heavy_tails(rows.y)):
            for start in linear:
                self._try(start)
            return
        tails = {start.name: plain for plain in linear for start in (StudentTails(plain),)}
        for plain in tails.values():
            self._try(StudentTails(plain))
        self._try(tails[self.result.start], hopeless_is_left_out=True)

    def _try(
        self,
        start: Start,
        races: bool = True,
        margin: float = 0.0,
        hopeless_is_left_out: bool = False,
        gain: float | None = None,
    ) -> float:
        """Start, race if that may help, and remember the state if it is the best so far.

        Returns:
            The loss before the race.
        """
        result, budget, recipe = self.result, self.budget, self.recipe
        if result.starts and budget.progress(0) > recipe.starts_share:
            return math.nan
        self._start(start)
        before = self._mean_loss(self.checked)
        gain = self.largest_gain if gain is None else gain
        if hopeless_is_left_out and not before - gain <= self.best_value:
            return before
        history, value = None, before
        share = recipe.race_share
        steps = None if budget.max_steps is None else int(share * budget.max_steps)
        seconds = None if budget.max_seconds is None else share * budget.max_seconds
        is_long = seconds is None or seconds > recipe.min_race * self.check_seconds
        if races and steps != 0 and is_long:
            history = self._loop(steps, seconds, progress=False)
            value = history.best_value if math.isfinite(history.best_value) else before
            self.raced_steps += history.steps
            self.largest_gain = max(self.largest_gain, before - value)
        result.starts[start.name] = value
        if not result.start or value < self.best_value - margin:
            self.best, self.best_value, result.start = State(self.flow), value, start.name
        if history is not None and history.stopped == "interrupted":
            result.history, result.validation = history, self.best_value
            raise KeyboardInterrupt
        return before

    def _start(self, start: Start) -> None:
        self.given.put_back(self.flow)
        if not isinstance(start, AsGiven):
            self.flow.units, self.flow.context_units = self.source.units
        rows = seen(self.source.table.some(self._most_rows()), units_in(self.flow))
        if not isinstance(start, MixtureBase) and self.flow.units is not None:
            far = FARTHEST_NORMAL_ROW  # rows beyond decide no scale
            rows = Table(rows.y.clamp(-far, far), rows.context)
        rows = embedded(rows, self.flow)
        # a start of the user's, and a flow with a bound, may draw from the global generators
        own = type(start) not in _OUR_STARTS or self.flow.log_prob_kind != "exact"
        with own_randomness(self.options.seed) if own else nullcontext():
            start(self.flow, rows.y, rows.context)

    def _most_rows(self) -> int:
        """How many rows a start may pass through the flow."""
        budget, recipe, most = self.budget, self.recipe, self.recipe.max_start_rows
        if budget.max_steps is not None:
            rows = 3 * budget.max_steps * self.source.batch_size  # a step is three passes
            most = min(most, max(int(recipe.start_share * rows), recipe.min_start_rows))
        if budget.max_seconds is not None and self.check_seconds > 0:
            rows_a_second = len(self.checked) / self.check_seconds
            affordable = int(recipe.start_share * budget.max_seconds * rows_a_second)
            most = min(most, max(affordable, 2 * recipe.min_checked_rows))
        return most

    def _fit_baselines(self, may_start: bool) -> None:
        """A Gaussian mixture, from which the flow may start, and a copula: of vectors only."""
        flow, budget, result, recipe = self.flow, self.budget, self.result, self.recipe
        are_vectors = flow.input_dim is not None and flow.base.input_dim is not None
        if not are_vectors or budget.progress(0) > recipe.starts_share + 0.1:
            return
        self.given.put_back(flow)
        units = self.source.units
        held_out = embedded(seen(self.checked, units), flow)
        mixture = MixtureBase(
            (held_out.y, held_out.context),
            budget.part(recipe.mixture_share),
            self._mixture_work(),
            self.options.seed,
        )
        if may_start and _has_plain_base(flow):
            margin = recipe.mixture_margin
            loss = self._try(mixture, margin=margin, hopeless_is_left_out=True, gain=0.0)
        else:
            self._start(mixture)
            loss = self._mean_loss(self.checked)
        if not math.isnan(loss):
            result.baselines[mixture.name] = loss
        if flow.transform.codomain.is_discrete:
            return  # a copula has no density of whole numbers
        copula_budget = budget.part(recipe.mixture_share / 2)
        copula = GaussianCopula(seen(self.source.table, units).y)
        some = held_out.y[: recipe.max_copula_rows]
        loss = -copula.log_prob(some, copula_budget).mean().item()
        result.baselines["Gaussian copula"] = loss + log_scales(units[0])

    def _mixture_work(self) -> float:
        """Products that EM may take where no seconds bound it: a share of those of the steps."""
        if self.budget.max_steps is None:
            return math.inf
        weights = sum(p.numel() for p in self.flow.parameters())
        work = 3 * self.budget.max_steps * self.source.batch_size * weights
        return max(self.recipe.mixture_work * work, self.recipe.min_mixture_work)

    def _train(self) -> None:
        """The main run, with what the starts have left of the budget."""
        result, budget, options = self.result, self.budget, self.options
        steps = budget.max_steps and max(budget.max_steps - self.raced_steps, 1)
        seconds = None
        if budget.max_seconds is not None:
            final = min(self._final_seconds(), self.recipe.final_share * budget.max_seconds)
            # a run looks at validation once before its first step, and once after its last
            seconds = max(budget.seconds_left - final - 2 * self.check_seconds, 1e-3)
        base = self.flow.base
        history = self._loop(
            steps,
            seconds,
            patience=options.patience,
            raise_decay=options.raise_decay,
            progress=options.progress,
            checkpoint=options.checkpoint,
            checkpoint_every=options.checkpoint_every,
            settings={
                "rows": len(self.source.table),
                "batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
                "weight_decay": options.weight_decay,
                "start": result.start,
                "base": [type(base).__name__, base.sizes()],
                "raced_steps": self.raced_steps,
            }
            | ({} if options.checkpoint is None else self.source.marks()),
        )
        result.history = history
        self.best = State(self.flow)
        self.best_value = min(self.best_value, history.best_value)

    def _take_up(self, checkpoint: str | os.PathLike[str]) -> None:
        """Give the flow the base and the units of the fit that wrote a checkpoint."""
        settings, tensors = load_fit(checkpoint)
        if "base" in settings:
            self.flow.base = self.flow.base_of_kind(*settings["base"])
        for name, mine in zip(("units", "context_units"), self.source.units, strict=True):
            setattr(self.flow, name, mine if f"{name}.loc" in tensors else None)
        self.result.start = settings.get("start", "")
        self.raced_steps = settings.get("raced_steps", 0)

    # ---- one run of the loop

    def _loop(self, steps: int | None, seconds: float | None, **settings: Any) -> History:
        """Train the flow as it is now for so long, in all processes."""
        with self.world.attentive():
            if self.world.size > 1:
                state = State(self.flow).on_cpu()
                self.world.share(lambda: _Orders(state, steps, seconds, settings))
            return self._train_here(steps, seconds, settings)

    def _train_here(
        self, steps: int | None, seconds: float | None, settings: dict[str, Any]
    ) -> History:
        """This process's side of it."""
        flow, options = self.flow, self.options
        # the rows are in units already, so the flow that is trained needs none
        inner = Flow(flow.transform, flow.base, embed=flow.embed)
        constant = log_scales(flow.units)

        def loss(batch: tuple[Tensor, Tensor | None]) -> Tensor:
            y, c = batch
            return constant - inner(c).log_prob(y).mean()

        batches = self.source.batches(units_in(flow), options.seed or 0)
        return train(
            flow,
            Stage(
                torch.compile(loss) if options.compile else loss,
                adam(parameter_groups(flow, options.weight_decay), options.learning_rate),
            ),
            batches=batches,
            validate=lambda: self.part_weight * self._mean_loss(self.part),
            draws=draws_in_training(flow) or self.source.draws,
            max_steps=steps,
            max_seconds=seconds,
            check_every=options.check_every,
            average=self.recipe.average,
            seed=options.seed,
            metric="validation loss",
            explain=farthest,
            clock=self.budget.clock,
            **settings,
        )

    def _final_seconds(self) -> float:
        count = min(len(self.source.held_out), self.recipe.max_final_rows)
        return self.check_seconds * count / len(self.checked)

    def _final_loss(self) -> float:
        """The loss of all validation rows, or of as many as there is time for."""
        rows = self.source.held_out.some(self.recipe.max_final_rows)
        if len(rows) == len(self.checked):
            return self._mean_loss(rows)
        at_once = min(len(self.checked), self.recipe.rows_at_once)
        return mean_loss(self.flow, rows, at_once, self.budget)


def _nothing() -> Any:
    """What a process contributes that is told what to do."""


def _raise(error: Exception) -> None:
    raise error


def _has_plain_base(flow: Flow) -> bool:
    """Whether the base is the standard normal that a flow has if nobody asks for another."""
    base = flow.base
    if type(base) is not DiagonalNormal:
        return False
    return bool((base.loc == 0).all() and (base.scale == 1).all())


_OUR_STARTS = (AsGiven, MixtureBase, Standardised, StudentTails, Whitened)
