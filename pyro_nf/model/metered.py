"""A log joint density whose evaluations are priced, so that each one fits into a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TypeVar

import torch
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.train.budget import Budget, Clock, OutOfTime

Kind = Literal["value", "gradient", "hessian"]
Result = TypeVar("Result")

# What an evaluation costs, in values, until one of its kind has been timed.
_GUESS: dict[Kind, float] = {"value": 1.0, "gradient": 3.0, "hessian": 9.0}
# A batch that is evaluated at once costs about as much as one row, up to so many rows.
_AT_ONCE = 8
# Sizes of the first evaluations, which show how the cost grows.
_FIRST_SIZES = (1, 8, 64)
# What takes less than such a share of the seconds that are left is nothing to think about.
_SMALL_SHARE = 0.1


class Metered(LogDensity):
    """A log joint density that is evaluated only if there is time for it.

    Each evaluation is timed. What the next one will cost is read off those of its kind: the last of
    the same size, or else a line through the smallest and the largest. One that would end after
    the budget is not begun, but raises :class:`~pyro_nf.train.budget.OutOfTime`. So a search asks
    for what it wants, and keeps what it has when that is raised. Without seconds in the budget no
    clock is looked at.

    Args:
        joint: The log joint density.
        budget: What its evaluations may take.
        rows: Counts the rows that are evaluated; a clock for budgets that must not look at one.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_nf.model.joint import LogJoint
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> rows = Rows()
        >>> meter = Metered(LogJoint(model), Budget(max_seconds=100.0, clock=rows), rows)
        >>> _ = meter.log_prob(torch.zeros(60, 1))
        >>> meter.budget.seconds_left, meter.price("value", 60)
        (40.0, 60.0)
    """

    def __init__(self, joint: LogDensity, budget: Budget, rows: Rows | None = None) -> None:
        super().__init__()
        self.joint, self.budget = joint, budget
        self.init_loc, self.kind = joint.init_loc, joint.kind
        self.is_random, self.has_parameters = joint.is_random, joint.has_parameters
        self.rows = Rows() if rows is None else rows
        self._seconds: dict[Kind, dict[int, float]] = {kind: {} for kind in _GUESS}

    @classmethod
    def of(cls, joint: LogDensity, max_seconds: float | None, clock: Clock) -> Metered:
        """The density itself if it is metered; or else one that may take so many seconds."""
        if isinstance(joint, Metered):
            return joint
        return cls(joint, Budget(max_seconds=max_seconds, clock=clock)).explored()

    def within(self, budget: Budget, joint: LogDensity | None = None) -> Metered:
        """With the prices known so far, under another budget or for another density."""
        other = Metered(self.joint if joint is None else joint, budget, self.rows)
        if joint is None:
            other._seconds = self._seconds
        else:
            other._seconds = {kind: dict(known) for kind, known in self._seconds.items()}
        return other

    def part(self, share: float) -> Metered:
        """Under a share of the budget, which begins now."""
        return self.within(self.budget.part(share))

    def explored(self) -> Metered:
        """Itself, with what the first gradients cost."""
        if not self.budget.has_seconds:
            return self
        with suppress(OutOfTime):
            for rows in _FIRST_SIZES:
                most = _SMALL_SHARE * self.budget.seconds_left
                if rows > 1 and (self.joint.kind == "loop" or self.price("gradient", rows) > most):
                    break
                self.value_and_grad(self.init_loc.expand(rows, -1))
        return self

    # ---- what it costs

    def price(self, kind: Kind, rows: int) -> float:
        """Seconds that an evaluation of so many rows is expected to take.

        Args:
            kind: Of what.
            rows: Rows of the batch; for Hessians, points times coordinates.
        """
        own = self._seconds[kind]
        other: Kind = max(_GUESS, key=lambda k: len(self._seconds[k]))
        if len(own) > 1 or kind == other:
            return self._expected(kind, rows)
        if not own:
            return max(1.0, _GUESS[kind] / _GUESS[other]) * self._expected(other, rows)
        ((size, seconds),) = own.items()  # it grows as the other kind does
        before = self._expected(other, size)
        return seconds * self._expected(other, rows) / before if before > 0 else seconds

    def _expected(self, kind: Kind, rows: int) -> float:
        seen = self._seconds[kind]
        if not seen:  # of nothing at all: that a run costs what the first one did is a guess
            return self.joint.first_seconds * (rows if self.joint.kind == "loop" else 1)
        if rows in seen:
            return seen[rows]
        least, most = min(seen), max(seen)
        if self.joint.kind == "loop":
            return seen[most] * rows / most
        if rows < most:
            return seen[min(n for n in seen if n > rows)]
        if least == most:
            return seen[most] * max(1.0, rows / (most * _AT_ONCE))
        slope = max(0.0, seen[most] - seen[least]) / (most - least)
        return seen[most] + slope * (rows - most)

    def afford(self, kind: Kind, most: int, share: float = 1.0, least: int = 1) -> int:
        """The most rows, halved until they cost no more than a share of the seconds that are left.

        Where few rows cost as much as many, there are many.

        Args:
            kind: Of what.
            most: Rows that are wanted.
            share: Of the seconds that are left.
            least: Rows that are taken in any case.
        """
        if not self.budget.has_seconds:
            return most
        if self.price(kind, least) > 0.5 * self.price(kind, most):
            return most
        seconds, rows = share * self.budget.seconds_left, most
        while rows > least and self.price(kind, rows) > seconds:
            rows //= 2
        return max(rows, least)

    def prefers_one_batch(self, count: int, rows: int) -> bool:
        """Whether so many batches of values had better be one, as time is short."""
        if not self.budget.has_seconds:
            return False
        apart = count * self.price("value", rows)
        return apart > _SMALL_SHARE * self.budget.seconds_left

    def spend(self, kind: Kind, rows: int, work: Callable[[], Result]) -> Result:
        """Does a piece of work and remembers what it cost.

        Raises:
            OutOfTime: If it would end too late.
        """
        if not self.budget.has_seconds:
            return work()
        self.budget.expect(self.price(kind, rows))
        began = self.budget.clock()
        result = work()
        self.rows.count += rows
        self._seconds[kind][rows] = self.budget.clock() - began
        return result

    def forget(self, rows: int) -> None:
        """Forgets what gradients of this size cost: they have been recorded since."""
        self._seconds["gradient"].pop(rows, None)

    # ---- the density

    @property
    def labels(self) -> list[str]:
        """A name for each coordinate."""
        return self.joint.labels

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """``{name: value (..., *shape)}`` of ``z (..., D)``."""
        return self.joint.unpack(z)

    def evaluate(self, z: Tensor) -> Tensor:
        """log p (S,) of z (S, D), differentiable, with NaN or inf wherever the density has them."""
        return self.spend("gradient", len(z), lambda: self.joint.evaluate(z))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) (...,) of z (..., D), differentiable; -inf where it is not finite."""
        kind: Kind = "gradient" if z.requires_grad and torch.is_grad_enabled() else "value"
        return self.spend(kind, math.prod(z.shape[:-1]), lambda: self.joint.log_prob(z))

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z) (S,) and its gradient (S, D), outside of any autograd graph."""
        return self.spend("gradient", len(z), lambda: self.joint.value_and_grad(z))

    def hessian(self, z: Tensor) -> Tensor:
        """d^2 log p / dz^2 (..., D, D) at z (..., D)."""
        return self.spend("hessian", z.numel(), lambda: self.joint.hessian(z))

    def prior_draw(self, seed: int) -> Tensor:
        """The coordinates (D,) of a draw of the prior."""
        return self.spend("value", 1, lambda: self.joint.prior_draw(seed))

    def prior_draws(self, count: int) -> Tensor | None:
        """The coordinates (count, D) of draws of the prior, if they come all at once."""
        return self.spend("value", count, lambda: self.joint.prior_draws(count))

    def record(
        self,
        batch_size: int,
        max_seconds: float | None = 1.0,
        clock: Clock = time.perf_counter,
        compile: bool = False,
        if_faster: bool = True,
    ) -> bool:
        """As the density does; what gradients of this size cost is forgotten."""
        recorded = self.joint.record(batch_size, max_seconds, clock, compile, if_faster)
        self.forget(batch_size)
        return recorded


class Rows:
    """How many rows have been evaluated, as a clock."""

    count = 0

    def __call__(self) -> float:
        return float(self.count)
