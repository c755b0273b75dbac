"""Fit a flow to a table of numbers."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_nf._checks import check_context, check_event
from pyro_nf.flows.base import Base
from pyro_nf.flows.flow import Flow
from pyro_nf.train.baselines import MOST_ROWS, GaussianCopula, fit_gaussian_mixture
from pyro_nf.train.loop import History, Minibatches, Stage, adam, train
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.start import AsGiven, Standardised, Start, Whitened, start_tails
from pyro_nf.transforms.base import FlowTransform

DEFAULT_STEPS = 5_000
RACE_SHARE = 0.08
"""Share of the budget that each start gets before validation chooses among them."""

AVERAGE = 0.998
"""Decay of the moving average of the parameters that validation looks at: less noise, less loss."""

MIXTURE_SHARE = 0.1
"""Share of ``max_seconds`` that the Gaussian mixture may take."""

MIXTURE_MARGIN = 0.03
"""Nats by which the mixture must win to take the flow's place: less is within the noise."""

MOST_ROUNDING = 0.05
"""Share of a column's standard deviation that the dtype of the flow may round away."""

MOST_CHECKED_ROWS = 2_000
MOST_COPULA_ROWS = 500
ROWS_AT_ONCE = 4_096


@dataclass
class DensityFit:
    """The result of `fit_density`.

    Attributes:
        flow: The flow that was given, with its best parameters.
        history: What happened in the main run.
        validation: Mean negative log density of the validation rows, in nats.
        baselines: The same of plain densities, by name.
        start: The name of the start that was chosen.
        starts: The validation loss of every start after the race.
    """

    flow: Flow
    history: History
    validation: float
    baselines: dict[str, float] = field(default_factory=dict)
    start: str = ""
    starts: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = {f"flow ({self.start})": self.validation, **self.baselines}
        width = max(len(name) for name in rows)
        lines = [f"{name:<{width}}  {value:10.4f}" for name, value in rows.items()]
        return "\n".join([f"{'validation loss':<{width}}  {'nats':>10}", *lines])


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
    starts: Sequence[Start] = (Standardised(), Whitened()),
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

    A part of the rows is held out. Each start sets linear layers from the data and trains for a
    small share of the budget; validation chooses the one that goes on. The learning rate rises,
    then falls along a cosine that ends with the budget. The flow ends with the moving average of
    the parameters that was best on the validation rows. Few rows for many columns bring weight
    decay on the networks, which rises when the flow overfits: when validation becomes worse while
    the loss falls, the fit goes back to its best state under more decay. Biases do not decay, so
    that what is left is linear maps and free marginals. Heavy tails bring a Student t base in place
    of a fixed normal one. If a Gaussian mixture is clearly better than the flow on the validation
    rows, it becomes the base of the flow, which then starts from it at the next fit.

    Args:
        flow: The flow, changed in place.
        x: Rows, shape ``(N, D)``, N at least 2.
        context: Contexts of the rows, shape ``(N, C)``, for a flow that takes them.
        validation: The share of rows to hold out, or rows, or rows and their contexts.
        max_steps: The most steps, those of the starts included; 5,000 if ``max_seconds`` is not
            given either.
        max_seconds: The most seconds, all included.
        batch_size: Rows in a batch; by default a tenth of the rows, but 64 to 256.
        learning_rate: The highest learning rate of Adam.
        weight_decay: Decay of the networks' weights; by default :math:`10 \min(1, (20 D / N)^3)` at
            first, and more whenever the flow overfits.
        starts: What to try; ``(AsGiven(),)`` goes on with a flow that was trained before.
        baselines: Whether to fit the Gaussian mixture and the Gaussian copula.
        patience: Stop when validation has not improved for this share of the budget.
        check_every: Steps between two looks at validation.
        seed: Seed of the fit; the global generators are left as they were.
        progress: Whether to show a progress bar.
        checkpoint: A file for the state of the fit; if it exists the fit goes on from there.
        checkpoint_every: Steps between two writes of it, rounded up to a check.
        compile: Whether to compile the loss with ``torch.compile``: a step then took about half as
            long in two dimensions, but compiling some 20 seconds of CPU at the first step, so that
            it pays from about 10,000 steps on.
        clock: Returns the seconds that ``max_seconds`` counts.

    Returns:
        The flow with history, validation loss and baselines; print it for a small table.

    Raises:
        TypeError: If the data are not floating tensors.
        ValueError: If a shape is wrong, there are too few rows, a column is constant, has NaN or
            inf, or loses its digits in the dtype of the flow; the message names the column.
        OSError: If the checkpoint cannot be written.

    Example:
        >>> from pyro_nf.flows.recipes import gaussian
        >>> x = 3 + 2 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        >>> fit = fit_density(gaussian(1), x, max_steps=100, progress=False)
        >>> abs(fit.flow().sample((10_000,)).mean().item() - 3) < 0.3
        True
    """
    started = clock()
    if max_steps is None and max_seconds is None:
        max_steps = DEFAULT_STEPS
    table, held_out = _split(flow, x, context, validation, seed)
    checked = held_out.first(MOST_CHECKED_ROWS)
    n, d = table.y.shape
    batch_size = min(max(n // 10, 64), 256) if batch_size is None else batch_size
    decay = 10 * min(1.0, (20 * d / n) ** 3) if weight_decay is None else weight_decay

    def loss(batch: tuple[Tensor, Tensor | None]) -> Tensor:
        y, c = batch
        return -flow(c).log_prob(y).mean()

    training_loss = torch.compile(loss) if compile else loss

    def run(steps: int | None, seconds: float | None, **options: Any) -> History:
        return train(
            flow,
            Stage(training_loss, adam(_groups(flow, decay), learning_rate)),
            batches=Minibatches((table.y, table.context), batch_size, seed or 0),
            validate=lambda: _mean_loss(flow, checked),
            max_steps=steps,
            max_seconds=seconds,
            check_every=check_every,
            average=AVERAGE,
            seed=seed,
            metric="validation loss",
            explain=_explain,
            clock=clock,
            **options,
        )

    if not starts:
        raise ValueError("fit_density: starts is empty; (AsGiven(),) keeps the flow as it is.")
    if not any(isinstance(start, AsGiven) for start in starts):
        start_tails(flow, table.y)
    mixture_seconds = math.inf if max_seconds is None else MIXTURE_SHARE * max_seconds
    with own_randomness(seed):
        rivals = _Rivals(flow, table, checked, mixture_seconds, clock) if baselines else None

    race = len(starts) > 1 and not (checkpoint is not None and os.path.exists(checkpoint))
    race_steps = None if max_steps is None else int(RACE_SHARE * max_steps)
    race_seconds = None if max_seconds is None else RACE_SHARE * max_seconds
    given = copy.deepcopy(flow.state_dict())
    best, values = given, dict[str, float]()
    raced: list[History] = []
    for start in starts:
        flow.load_state_dict(given)
        with own_randomness(seed):
            start(flow, table.y, table.context)
        if race and race_steps != 0:
            raced.append(run(race_steps, race_seconds, progress=False))
        values[start.name] = _mean_loss(flow, checked)
        if values[start.name] <= min(values.values()):
            best = copy.deepcopy(flow.state_dict())
        if raced and raced[-1].stopped == "interrupted":
            break
    flow.load_state_dict(best)

    name = min(values, key=lambda key: values[key])
    if raced and raced[-1].stopped == "interrupted":
        return DensityFit(flow, raced[-1], _mean_loss(flow, held_out), start=name, starts=values)
    count_raced = len(starts) if len(starts) > 1 else 0
    history = run(
        None if max_steps is None or race_steps is None else max_steps - count_raced * race_steps,
        None if max_seconds is None else max(max_seconds - (clock() - started), 1e-3),
        patience=patience,
        raise_decay=weight_decay is None,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        settings={
            "rows": n,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": decay,
        },
    )
    fit = DensityFit(flow, history, _mean_loss(flow, held_out), start=name, starts=values)
    if rivals is not None:
        fit.baselines = rivals.losses(held_out)
        if not fit.baselines["Gaussian mixture"] >= fit.validation - MIXTURE_MARGIN:
            rivals.move_into(flow)
            fit.start, fit.validation = "Gaussian mixture", fit.baselines["Gaussian mixture"]
    return fit


@dataclass(frozen=True)
class _Table:
    """Rows and their contexts."""

    y: Tensor
    context: Tensor | None

    def first(self, count: int) -> _Table:
        return _Table(self.y[:count], None if self.context is None else self.context[:count])

    def take(self, rows: Tensor) -> _Table:
        return _Table(self.y[rows], None if self.context is None else self.context[rows])

    def pieces(self) -> Iterator[_Table]:
        for rows in torch.arange(len(self.y), device=self.y.device).split(ROWS_AT_ONCE):
            yield self.take(rows)


class _Rivals:
    """Plain densities beside the flow: a mixture in its whitened coordinates, and a copula."""

    def __init__(
        self,
        flow: Flow,
        table: _Table,
        checked: _Table,
        max_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.mixture = copy.deepcopy(flow)
        Whitened()(self.mixture, table.y, table.context)
        with torch.no_grad():
            x, v = (
                self.mixture.transform.inverse_and_ladj(part.y, part.context)[0]
                for part in (table.first(MOST_ROWS), checked)
            )
        self.mixture.base = fit_gaussian_mixture(x, v, max_seconds=max_seconds, clock=clock)
        self.copula = GaussianCopula(table.y)

    def losses(self, table: _Table) -> dict[str, float]:
        few = table.first(MOST_COPULA_ROWS)
        return {
            "Gaussian mixture": _mean_loss(self.mixture, table),
            "Gaussian copula": -self.copula.log_prob(few.y).mean().item(),
        }

    def move_into(self, flow: Flow) -> None:
        flow.base = self.mixture.base
        flow.load_state_dict(self.mixture.state_dict())


def _mean_loss(flow: Flow, table: _Table) -> float:
    with torch.no_grad():
        total = sum(flow(part.context).log_prob(part.y).sum().item() for part in table.pieces())
    return -total / len(table.y)


def _groups(flow: Flow, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of networks decay; what their biases make of each coordinate stays."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay},
    ]
    for module in flow.modules():
        network = not isinstance(module, (FlowTransform, Base, Flow))
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups[network and name.startswith("weight") and p.dim() > 1]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("fit_density: the flow has no parameter that requires a gradient.")
    return groups


def _explain(batch: tuple[Tensor, Tensor | None]) -> str:
    y = batch[0]
    far = (y.abs() / y.abs().median(0).values.clamp_min(1e-30)).amax(0)
    return f"The farthest entry of that batch is in column {int(far.argmax())}."


def _split(
    flow: Flow,
    x: Tensor,
    context: Tensor | None,
    validation: float | Tensor | tuple[Tensor, Tensor],
    seed: int | None,
) -> tuple[_Table, _Table]:
    """Training rows and validation rows, checked, with the dtype and device of the flow."""
    table = _checked(flow, "x", x, context)
    if len(table.y) < 2:
        raise ValueError(
            f"fit_density: x has {len(table.y)} row(s), wanted at least 2 (x.shape = "
            f"{tuple(x.shape)}). Give more rows."
        )
    constant = (table.y == table.y[0]).all(0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"fit_density: {_columns(constant, 'x')} constant, and a constant has no density. "
            "Drop them, or add noise of the size of their rounding."
        )
    if isinstance(validation, (Tensor, tuple)):
        pair = validation if isinstance(validation, tuple) else (validation, None)
        held_out = _checked(flow, "validation", *pair)
        if len(held_out.y) == 0:
            raise ValueError("fit_density: validation has no rows; give some, or a share of x.")
        return table, held_out
    if not 0 < validation < 1:
        raise ValueError(
            f"fit_density: validation is {validation}, wanted a share between 0 and 1, or rows."
        )
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    order = torch.randperm(len(table.y), generator=generator).to(table.y.device)
    count = min(max(round(validation * len(order)), 1), len(order) - 1)
    return table.take(order[count:]), table.take(order[:count])


def _checked(flow: Flow, name: str, y: Tensor, context: Tensor | None) -> _Table:
    check_event("fit_density", name, y, flow.input_dim, 1)
    check_context("fit_density", context, flow.context_dim)
    if y.dim() != 2:
        raise ValueError(
            f"fit_density: {name} must be rows of shape (N, {flow.input_dim}), got "
            f"{tuple(y.shape)}."
        )
    if context is not None and context.shape[:-1] != y.shape[:1]:
        raise ValueError(
            f"fit_density: {name} has {len(y)} rows, but context has shape {tuple(context.shape)}; "
            f"wanted ({len(y)}, {flow.context_dim})."
        )
    for what, values in ((name, y), ("context", context)):
        if values is not None:
            bad = (~values.isfinite()).any(0).nonzero().flatten().tolist()
            if bad:
                rows = int((~values.isfinite()).any(-1).sum())
                raise ValueError(
                    f"fit_density: {_columns(bad, what)} not finite (NaN or inf in {rows} of "
                    f"{len(values)} rows). Drop or fill those rows."
                )
    like = next(iter(flow.parameters()), y)
    lost = _rounded_away(y, y.to(like).to(y)) if len(y) else []
    if lost:
        raise ValueError(
            f"fit_density: {_columns(lost, name)} too large or too far from 0 for the digits of "
            f"{like.dtype}, the dtype of the flow. Call flow.double(), or shift and scale the data."
        )
    return _Table(y.detach().to(like), None if context is None else context.detach().to(like))


def _rounded_away(y: Tensor, cast: Tensor) -> list[int]:
    """The columns that another dtype cannot hold."""
    rounding, sd = (cast - y).abs().amax(0), y.std(0, correction=0)
    lost = ~rounding.isfinite() | ((rounding > MOST_ROUNDING * sd) & (sd > 0))
    return [int(i) for i in lost.nonzero().flatten()]


def _columns(indices: list[int], table: str) -> str:
    names = ", ".join(str(i) for i in indices)
    one = len(indices) == 1
    return f"column {names} of {table} is" if one else f"columns {names} of {table} are"
