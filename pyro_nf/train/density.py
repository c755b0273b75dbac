"""Fit a flow to rows of numbers, or of events of any shape."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf._checks import (
    check_budget,
    check_count,
    check_entries,
    check_events,
    check_flag,
    check_kind,
    check_number,
    check_patience,
    check_positive,
    check_running,
)
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.devices import in_double
from pyro_nf.ops.spaces import is_all_real
from pyro_nf.train.baselines import GaussianCopula
from pyro_nf.train.budget import Budget
from pyro_nf.train.checkpoint import load_fit
from pyro_nf.train.digest import digest
from pyro_nf.train.loop import History, Minibatches, Stage, adam, train
from pyro_nf.train.modes import ordinary, recording
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.start import (
    FARTHEST_NORMAL_ROW,
    AsGiven,
    MixtureBase,
    Standardised,
    Start,
    StudentTails,
    Whitened,
    has_heavy_tails,
)
from pyro_nf.train.table import (
    Table,
    check_columns_vary,
    check_inside,
    check_nothing_far,
    columns_of,
    read_table,
    units_of,
    warn_of_repeated_values,
)
from pyro_nf.transforms.affine import FixedAffine
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.kinds import in_words
from pyro_nf.transforms.stochastic import StochasticTransform

DEFAULT_STEPS = 5_000
RACE_SHARE = 0.08
"""Share of the budget that each start gets before validation chooses among them."""

AVERAGE = 0.998
"""Decay of the moving average of the parameters that validation looks at: less noise, less loss."""

MIXTURE_SHARE = 0.1
"""Share of ``max_seconds`` that EM may take for the Gaussian mixture."""

MIXTURE_WORK = 0.3
"""Without seconds: share of the products of all steps that EM may take."""

LEAST_MIXTURE_WORK = 5e8
"""But so many, which take some tenths of a second, are always its own."""

MIXTURE_MARGIN = 0.03
"""Nats by which the mixture must win among the starts: its draws carry no gradient."""

STARTS_SHARE = 0.3
"""After this share of ``max_seconds`` no further start is begun."""

START_SHARE = 0.05
"""Share of the budget that a start may take to pass its rows through the flow."""

CHECK_SHARE = 0.02
"""Share of ``max_seconds`` that one look at validation may take: then it sees fewer rows."""

LEAST_RACE = 4
"""A race that would not last so many looks at validation is not run."""

FINAL_SHARE = 0.05
"""Share of ``max_seconds`` that is kept for the loss of all validation rows at the end."""

FEWEST_ROWS = 64
MOST_CHECKED_ROWS = 2_000
MOST_FINAL_ROWS = 20_000
MOST_STARTING_ROWS = 20_000
FEWEST_STARTING_ROWS = 2_000
MOST_COPULA_ROWS = 500
ROWS_AT_ONCE = 4_096


@dataclass
class DensityFit:
    """The result of `fit_density`.

    Attributes:
        flow: The flow that was given, with its best parameters.
        history: What happened in the main run, or in the race of a start if that was interrupted.
        validation: Mean negative log density of the validation rows, in nats; nan if the fit was
            interrupted before it knew any.
        baselines: The same of plain densities, by name, for comparison only.
        start: The name of the start from which the flow was trained.
        starts: The validation loss of every start that was tried, after its race.
    """

    flow: Flow
    history: History
    validation: float
    baselines: dict[str, float] = field(default_factory=dict)
    start: str = ""
    starts: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"DensityFit({self.history!r})\n{self}"

    def __str__(self) -> str:
        flow = f"flow, trained from the start {self.start!r}" if self.start else "flow"
        rows = {flow: self.validation}
        rows |= {f"for comparison: {name}": value for name, value in self.baselines.items()}
        rows |= {f"start after its race: {name}": value for name, value in self.starts.items()}
        width = max(len(name) for name in rows)
        lines = [f"{name:<{width}}  {value:10.4f}" for name, value in rows.items()]
        if self.flow.log_prob_kind != "exact":
            lines.append(f"log_prob of the flow is {in_words(self.flow.log_prob_kind)}")
        stopped = f"stopped by {self.history.stopped} after {self.history.steps} steps"
        return "\n".join([f"{'validation loss':<{width}}  {'nats':>10}", *lines, stopped])


def fit_density(
    flow: Flow,
    x: Tensor,
    *,
    context: Tensor | None = None,
    validation: float | Tensor | tuple[Tensor, Tensor] = 0.1,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    learning_rate: float = 3e-3,
    weight_decay: float | None = None,
    starts: Sequence[Start] | None = None,
    baselines: bool = True,
    patience: float | None = 0.5,
    check_every: int = 50,
    seed: int | None = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    compile: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> DensityFit:
    r"""Fit a flow to rows by maximum likelihood.

    .. math:: \min_\theta \; -\tfrac{1}{N} \sum_i \log q_\theta(x_i \mid c_i)

    A part of the rows is held out. Columns and contexts are brought to the unit scale by fixed
    maps that become part of the flow (``flow.units``, ``flow.context_units``), so that the fit does
    not depend on units. Each start sets linear layers from the data and trains for a
    small share of the budget; validation chooses the one that goes on. The learning rate rises,
    then falls along a cosine that ends with the budget. The flow ends with the moving average of
    the parameters that was best on the validation rows. Few rows for many columns bring weight
    decay on the networks, which rises when the flow overfits: when validation becomes worse while
    the loss falls, the fit goes back to its best state under more decay. Biases do not decay, so
    that what is left is linear maps and free marginals.

    A row is an event of any shape. Of images ``(C, H, W)`` each channel is a column and has one
    unit, of other events each entry. Contexts that the flow embeds may be whatever the embedding
    takes; floating tensors get units before it.

    By default the starts are `Standardised` and `Whitened`. If the base of the flow is the standard
    normal, heavy tails bring `StudentTails` of both, and the better of them is tried with
    the normal too; and if a Gaussian mixture found by EM is better on the validation rows than all
    others after their race, the flow starts from that base (`MixtureBase`) and trains on, layers
    and all. The mixture and the copula are of vectors: for other events they are left out.

    A flow with layers that draw or lose something is trained by the bound that its ``log_prob`` is,
    with fresh draws in each step and the same ones in each look at validation; one whose
    log-determinants are estimated likewise.

    Ctrl-C at any moment ends the fit with the best state so far.

    Args:
        flow: The flow, changed in place.
        x: Rows, shape ``(N, D)`` or ``(N, *event_shape)``, N at least 2.
        context: Contexts of the rows, shape ``(N, C)``, for a flow that takes them; or N of what
            its embedding takes.
        validation: The share of rows to hold out, or rows, or rows and their contexts.
        max_steps: The most steps, those of the starts included; 5,000 if ``max_seconds`` is not
            given either.
        max_seconds: The most seconds, all included.
        batch_size: Rows in a batch; by default a tenth of the rows, but 64 to 256.
        learning_rate: The highest learning rate of Adam.
        weight_decay: Decay of the networks' weights; by default :math:`10 \min(1, (20 D / N)^3)` at
            first, and more whenever the flow overfits.
        starts: What to try, and nothing else; ``(AsGiven(),)`` goes on with a flow that was trained
            before, in the units that it has.
        baselines: Whether to fit the Gaussian mixture and the Gaussian copula, for comparison;
            without them the mixture is no start either.
        patience: Stop when validation has not improved for this share of the budget.
        check_every: Steps between two looks at validation.
        seed: Seed of the fit; the global generators are left as they were.
        progress: Whether to show a progress bar.
        checkpoint: A file for the state of the fit; if it exists the fit goes on from there, if
            data and settings are those of then. The budget may be another.
        checkpoint_every: Steps between two writes of it, rounded up to a check.
        compile: Whether to compile the loss with ``torch.compile``: a step then took about half as
            long in two dimensions, but compiling some 20 seconds of CPU at the first step, so that
            it pays from about 10,000 steps on.
        clock: Returns the seconds that ``max_seconds`` counts.

    Returns:
        The flow with history, validation loss and baselines; print it for a small table.

    Raises:
        TypeError: If the data are not floating tensors.
        ValueError: If a shape is wrong, there are too few rows, or a column of rows or contexts is
            constant, has NaN or inf, loses its digits in the dtype of the flow, or has an entry so
            far out that the others vanish beside it; the message names the column.
        OSError: If the checkpoint cannot be written.

    Example:
        >>> from pyro_nf.flows.recipes import gaussian
        >>> x = 3 + 2 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        >>> fit = fit_density(gaussian(1), x, max_steps=100, progress=False)
        >>> abs(fit.flow().sample((10_000,)).mean().item() - 3) < 0.3
        True
    """
    check_kind("fit_density", "flow", flow, Flow, "make one, as nsf(2)")
    check_events("fit_density", "x", x, flow.event_shape)
    if not isinstance(validation, (Tensor, tuple)):
        wanted = "a share between 0 and 1, or rows, or rows and their contexts"
        check_number("fit_density", "validation", validation, wanted, above=0, below=1)
    elif isinstance(validation, tuple) and len(validation) != 2:
        raise ValueError(
            f"fit_density: validation is a tuple of {len(validation)}, wanted (rows, contexts)."
        )
    check_budget("fit_density", max_steps, max_seconds)
    check_count("fit_density", "batch_size", batch_size, optional=True)
    check_positive("fit_density", "learning_rate", learning_rate)
    wanted = "a number >= 0, or None"
    check_number("fit_density", "weight_decay", weight_decay, wanted, at_least=0, optional=True)
    if starts is not None:
        check_entries("fit_density", "starts", starts, Start)
    check_flag("fit_density", "baselines", baselines)
    check_flag("fit_density", "compile", compile)
    check_patience("fit_density", patience)
    check_count("fit_density", "check_every", check_every)
    check_running("fit_density", seed, progress, checkpoint, checkpoint_every, clock)
    result, was_training = DensityFit(flow, History(), math.nan), flow.training
    flow.eval()  # dropout is for the steps, and the loop turns it on
    if max_steps is None and max_seconds is None:
        max_steps = DEFAULT_STEPS
    try:
        budget = Budget(max_steps, max_seconds, clock)
        x, context, validation = ordinary((x, context, validation))
        with recording("fit_density"):
            table, held_out, units = _read(flow, x, context, validation, seed)
            n, d = len(table), table.y[0].numel()
            decay = 10 * min(1.0, (20 * d / n) ** 3) if weight_decay is None else weight_decay
            options = _Options(
                batch_size=min(max(n // 10, 64), 256) if batch_size is None else batch_size,
                learning_rate=learning_rate,
                weight_decay=decay,
                raise_decay=weight_decay is None,
                patience=patience,
                check_every=check_every,
                seed=seed,
                progress=progress,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                compile=compile,
            )
            _Work(result, table, held_out, units, budget, options).run(starts, baselines)
    except KeyboardInterrupt:
        result.history.stopped = "interrupted"
    finally:
        flow.train(was_training)
    return result


@dataclass(frozen=True)
class _Options:
    """The arguments of a fit that every run of the loop needs."""

    batch_size: int
    learning_rate: float
    weight_decay: float
    raise_decay: bool
    patience: float | None
    check_every: int
    seed: int | None
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    compile: bool


class _State:
    """All that a start or a run may change in a flow: its tensors, its units and its base."""

    def __init__(self, flow: Flow) -> None:
        self.base = flow.base
        self.tensors = {name: t.detach().clone() for name, t in flow.state_dict().items()}

    def put_back(self, flow: Flow) -> None:
        flow.base = self.base
        flow.load_state_dict(self.tensors)


Units = tuple[FixedAffine | None, FixedAffine | None]


class _Work:
    """A fit under way. What ``best`` and ``result`` hold is good at any moment."""

    def __init__(
        self,
        result: DensityFit,
        table: Table,
        held_out: Table,
        units: Units,
        budget: Budget,
        options: _Options,
    ) -> None:
        self.result, self.flow, self.budget, self.options = result, result.flow, budget, options
        self.table, self.held_out, self.units = table, held_out, units
        self.checked = held_out.some(MOST_CHECKED_ROWS)
        self.check_seconds = 0.0
        self.given = self.best = _State(self.flow)
        self.best_value = math.inf
        self.largest_gain = 0.0
        self.raced_steps = 0

    def run(self, starts: Sequence[Start] | None, baselines: bool) -> None:
        """Try the starts, train on from the best, and look at the result."""
        flow, result, checkpoint = self.flow, self.result, self.options.checkpoint
        resumes = checkpoint is not None and os.path.exists(checkpoint)
        try:
            self._time_a_check()
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
                result.validation = _mean_loss(flow, self.checked)
            raise

    def _time_a_check(self) -> None:
        """Look at as many validation rows as a small share of the seconds allows."""
        most, count = len(self.checked), FEWEST_ROWS
        if self.budget.max_seconds is None:
            return
        while True:
            before = self.budget.seconds
            _mean_loss(self.flow, self.checked.first(count))
            self.check_seconds = self.budget.seconds - before
            if count >= most or 4 * self.check_seconds > CHECK_SHARE * self.budget.max_seconds:
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
        if not (
            _has_plain_base(self.flow) and has_heavy_tails(self._seen(self.table, self.units).y)
        ):
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
        result, budget = self.result, self.budget
        if result.starts and budget.progress(0) > STARTS_SHARE:
            return math.nan
        self._start(start)
        before = _mean_loss(self.flow, self.checked)
        gain = self.largest_gain if gain is None else gain
        if hopeless_is_left_out and not before - gain <= self.best_value:
            return before
        history, value = None, before
        steps = None if budget.max_steps is None else int(RACE_SHARE * budget.max_steps)
        seconds = None if budget.max_seconds is None else RACE_SHARE * budget.max_seconds
        is_long = seconds is None or seconds > LEAST_RACE * self.check_seconds
        if races and steps != 0 and is_long:
            history = self._loop(steps, seconds, progress=False)
            value = history.best_value if math.isfinite(history.best_value) else before
            self.raced_steps += history.steps
            self.largest_gain = max(self.largest_gain, before - value)
        result.starts[start.name] = value
        if not result.start or value < self.best_value - margin:
            self.best, self.best_value, result.start = _State(self.flow), value, start.name
        if history is not None and history.stopped == "interrupted":
            result.history, result.validation = history, self.best_value
            raise KeyboardInterrupt
        return before

    def _start(self, start: Start) -> None:
        self.given.put_back(self.flow)
        if not isinstance(start, AsGiven):
            self.flow.units, self.flow.context_units = self.units
        rows = self._seen(self.table.some(self._most_rows()), self._own_units())
        if not isinstance(start, MixtureBase):  # far rows decide no scale
            rows = (
                Table(rows.y.clamp(-FARTHEST_NORMAL_ROW, FARTHEST_NORMAL_ROW), rows.context)
                if (self.flow.units is not None)
                else rows
            )
        # which may draw from the global generators
        own = type(start) not in _OUR_STARTS or self.flow.log_prob_kind != "exact"
        rows = self._embedded(rows)
        with own_randomness(self.options.seed) if own else nullcontext():
            start(self.flow, rows.y, rows.context)

    def _most_rows(self) -> int:
        """How many rows a start may pass through the flow."""
        budget, most = self.budget, MOST_STARTING_ROWS
        if budget.max_steps is not None:
            rows = 3 * budget.max_steps * self.options.batch_size  # a step is three passes
            most = min(most, max(int(START_SHARE * rows), FEWEST_STARTING_ROWS))
        if budget.max_seconds is not None and self.check_seconds > 0:
            rows_a_second = len(self.checked) / self.check_seconds
            affordable = int(START_SHARE * budget.max_seconds * rows_a_second)
            most = min(most, max(affordable, 2 * FEWEST_ROWS))
        return most

    def _own_units(self) -> Units:
        return self.flow.units, self.flow.context_units

    @staticmethod
    def _seen(table: Table, units: Units) -> Table:
        """Rows and contexts as the transform of a flow with these units sees them."""
        y, context = table.y, table.context
        if units[0] is not None:
            y = units[0].inverse_and_ladj(y)[0]
        if units[1] is not None and context is not None:
            context = units[1].inverse_and_ladj(context)[0]
        return Table(y, context)

    def _embedded(self, seen: Table) -> Table:
        """Rows and contexts in units, the contexts as an embedding makes them."""
        embed = self.flow.embed
        if embed is None or seen.context is None:
            return seen
        with torch.no_grad():
            return Table(seen.y, torch.cat([embed(part.context) for part in seen.pieces()]))

    def _fit_baselines(self, may_start: bool) -> None:
        """A Gaussian mixture, from which the flow may start, and a copula: of vectors only."""
        flow, budget, result = self.flow, self.budget, self.result
        are_vectors = flow.input_dim is not None and flow.base.input_dim is not None
        if not are_vectors or budget.progress(0) > STARTS_SHARE + 0.1:
            return
        self.given.put_back(flow)
        held_out = self._embedded(self._seen(self.checked, self.units))
        mixture = MixtureBase(
            (held_out.y, held_out.context),
            budget.part(MIXTURE_SHARE),
            self._mixture_work(),
            self.options.seed,
        )
        if may_start and _has_plain_base(flow):
            loss = self._try(mixture, margin=MIXTURE_MARGIN, hopeless_is_left_out=True, gain=0.0)
        else:
            self._start(mixture)
            loss = _mean_loss(flow, self.checked)
        if not math.isnan(loss):
            result.baselines[mixture.name] = loss
        if flow.transform.codomain.is_discrete:
            return  # of which a copula has no density
        copula_budget = budget.part(MIXTURE_SHARE / 2)
        copula = GaussianCopula(self._seen(self.table, self.units).y)
        loss = -copula.log_prob(held_out.y[:MOST_COPULA_ROWS], copula_budget).mean().item()
        result.baselines["Gaussian copula"] = loss + _log_scales(self.units[0])

    def _mixture_work(self) -> float:
        """Products that EM may take where no seconds bound it: a share of those of the steps."""
        if self.budget.max_steps is None:
            return math.inf
        weights = sum(p.numel() for p in self.flow.parameters())
        work = 3 * self.budget.max_steps * self.options.batch_size * weights
        return max(MIXTURE_WORK * work, LEAST_MIXTURE_WORK)

    def _train(self) -> None:
        """The main run, with what the starts have left of the budget."""
        result, budget, options = self.result, self.budget, self.options
        steps = budget.max_steps and max(budget.max_steps - self.raced_steps, 1)
        seconds = None
        if budget.max_seconds is not None:
            final = min(self._final_seconds(), FINAL_SHARE * budget.max_seconds)
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
                "rows": len(self.table),
                "batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
                "weight_decay": options.weight_decay,
                "start": result.start,
                "base": [type(base).__name__, base.sizes()],
                "raced_steps": self.raced_steps,
            }
            | ({} if options.checkpoint is None else self._marks()),
        )
        result.history = history
        self.best = _State(self.flow)
        self.best_value = min(self.best_value, history.best_value)

    def _marks(self) -> dict[str, str]:
        """What tells this data from other data."""
        tables = {"x": self.table, "validation": self.held_out}
        return {name: digest(table.y) for name, table in tables.items()} | {
            f"context of {name}": digest(table.context) for name, table in tables.items()
        }

    def _take_up(self, checkpoint: str | os.PathLike[str]) -> None:
        """Give the flow the base and the units of the fit that wrote a checkpoint."""
        settings, tensors = load_fit(checkpoint)
        if "base" in settings:
            self.flow.base = self.flow.base_of_kind(*settings["base"])
        for name, mine in zip(("units", "context_units"), self.units, strict=True):
            setattr(self.flow, name, mine if f"{name}.loc" in tensors else None)
        self.result.start = settings.get("start", "")
        self.raced_steps = settings.get("raced_steps", 0)

    def _loop(self, steps: int | None, seconds: float | None, **settings: Any) -> History:
        """Train the flow as it is now for so long."""
        flow, options = self.flow, self.options
        seen = self._seen(self.table, self._own_units())
        # the same without units, which cost nothing so
        inner = Flow(flow.transform, flow.base, embed=flow.embed)
        log_scales = _log_scales(flow.units)

        def loss(batch: tuple[Tensor, Tensor | None]) -> Tensor:
            y, c = batch
            return log_scales - inner(c).log_prob(y).mean()

        return train(
            flow,
            Stage(
                torch.compile(loss) if options.compile else loss,
                adam(_groups(flow, options.weight_decay), options.learning_rate),
            ),
            batches=Minibatches((seen.y, seen.context), options.batch_size, options.seed or 0),
            validate=lambda: _mean_loss(flow, self.checked),
            draws=_draws(flow),
            max_steps=steps,
            max_seconds=seconds,
            check_every=options.check_every,
            average=AVERAGE,
            seed=options.seed,
            metric="validation loss",
            explain=_explain,
            clock=self.budget.clock,
            **settings,
        )

    def _final_seconds(self) -> float:
        return self.check_seconds * min(len(self.held_out), MOST_FINAL_ROWS) / len(self.checked)

    def _final_loss(self) -> float:
        """The loss of all validation rows, or of as many as there is time for."""
        rows = self.held_out.some(MOST_FINAL_ROWS)
        if len(rows) == len(self.checked):
            return _mean_loss(self.flow, rows)
        return _mean_loss(self.flow, rows, self.budget, len(self.checked))


def _has_plain_base(flow: Flow) -> bool:
    """Whether the base is the standard normal that a flow has if nobody asks for another."""
    base = flow.base
    if type(base) is not DiagonalNormal:
        return False
    return bool((base.loc == 0).all() and (base.scale == 1).all())


_OUR_STARTS = (AsGiven, MixtureBase, Standardised, StudentTails, Whitened)


def _draws(flow: Flow) -> bool:
    """Whether a flow may draw random numbers in training, as dropout does."""
    return flow.log_prob_kind != "exact" or any(
        type(module).__module__.split(".")[0] not in ("pyro_nf", "torch")
        or isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU))
        for module in flow.modules()
    )


def _log_scales(units: FixedAffine | None) -> float:
    """What units add to a negative log density."""
    return 0.0 if units is None else in_double(units.scale).log().sum().item()


def _mean_loss(
    flow: Flow, table: Table, budget: Budget | None = None, at_once: int = ROWS_AT_ONCE
) -> float:
    """The mean over the rows, or over the first of them if the budget ends before."""
    total, count = 0.0, 0
    # bounds and estimates by the same draws at each look, so that states are compared without noise
    draws = own_randomness(0) if flow.log_prob_kind != "exact" else nullcontext()
    with torch.no_grad(), draws:
        for part in table.pieces(min(at_once, ROWS_AT_ONCE)):
            total += flow(part.context).log_prob(part.y).sum().item()
            count += len(part)
            if budget is not None and budget.is_spent():
                break
    return -total / count


def _groups(flow: Flow, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of networks decay; what their biases make of each coordinate stays."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay},
    ]
    for module in flow.modules():
        network = not isinstance(module, (FlowTransform, StochasticTransform, Base, Flow))
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups[network and name.startswith("weight") and p.dim() > 1]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("fit_density: the flow has no parameter that requires a gradient.")
    return groups


def _explain(batch: tuple[Tensor, Tensor | None]) -> str:
    y = columns_of(batch[0])
    far = (y.abs() / y.abs().median(0).values.clamp_min(1e-30)).amax(0)
    return f"The farthest entry of that batch is in column {int(far.argmax())}."


def _read(
    flow: Flow,
    x: Tensor,
    context: Tensor | None,
    validation: float | Tensor | tuple[Tensor, Tensor],
    seed: int | None,
) -> tuple[Table, Table, Units]:
    """Training rows, validation rows and the units of the former, all checked."""
    whole = read_table("x", flow, x, context)
    if len(whole) < 2:
        raise ValueError(
            f"fit_density: x has {len(whole)} row(s), wanted at least 2 (x.shape = "
            f"{tuple(x.shape)}). Give more rows."
        )
    codomain = flow.transform.codomain
    check_inside("x", whole.y, codomain)
    if not codomain.is_discrete:
        check_columns_vary("x", whole.y)
    if whole.context is not None and flow.embed is None:
        check_columns_vary("context", whole.context)
    if isinstance(validation, (Tensor, tuple)):
        pair = validation if isinstance(validation, tuple) else (validation, None)
        table, held_out = whole, read_table("validation", flow, *pair)
        if len(held_out) == 0:
            raise ValueError("fit_density: validation has no rows; give some, or a share of x.")
        check_inside("validation", held_out.y, codomain)
    else:
        table, held_out = _split(whole, validation, seed)
    of_rows = _units(table.y, whole.y)
    of_contexts, context = None, whole.context
    if table.context is not None and context is not None and context.is_floating_point():
        of_contexts = _units(table.context, context)
        check_nothing_far("context", context, of_contexts)
    check_nothing_far("x", whole.y, of_rows)
    if table is whole:
        check_nothing_far("validation", held_out.y, of_rows)
        if of_contexts is not None and held_out.context is not None:
            check_nothing_far("the contexts of validation", held_out.context, of_contexts)
    if not codomain.is_discrete:
        warn_of_repeated_values(whole.y)
    return table, held_out, (of_rows if is_all_real(codomain) else None, of_contexts)


def _units(training: Tensor, whole: Tensor) -> FixedAffine:
    """Of the training rows, or of all where a column is constant in the former."""
    columns = columns_of(training)
    varies = (columns != columns[0]).any(0).all()
    return units_of(training if bool(varies) else whole)


def _split(whole: Table, validation: float, seed: int | None) -> tuple[Table, Table]:
    """Rows to train with and rows to hold out."""
    if not 0 < validation < 1:
        raise ValueError(
            f"fit_density: validation is {validation}, wanted a share between 0 and 1, or rows."
        )
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    order = torch.randperm(len(whole), generator=generator).to(whole.y.device)
    count = min(max(round(validation * len(order)), 1), len(order) - 1)
    return whole.take(order[count:]), whole.take(order[:count])
