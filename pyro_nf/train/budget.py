"""What a piece of work may take: steps, seconds of a clock, or both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

Clock = Callable[[], float]


class OutOfTime(Exception):
    """What comes next does not fit into what is left of a budget: what there is, is the result."""


@dataclass(frozen=True)
class Budget:
    """Steps and seconds that a piece of work may take; its seconds run from when it is made.

    Whatever may take long asks it inside its loops. A part of the work gets a part of what is left
    (:meth:`part`), which never reaches beyond the end of the whole.

    Args:
        max_steps: The most steps; None for no bound.
        max_seconds: The most seconds of the clock; None for no bound.
        clock: Returns seconds that only grow.

    Attributes:
        began: What the clock said at the beginning.

    Example:
        >>> ticks = iter(range(100))
        >>> budget = Budget(max_seconds=10.0, clock=lambda: float(next(ticks)))
        >>> budget.seconds_left, budget.is_spent()
        (9.0, False)
        >>> budget.part(0.5).max_seconds
        5.0
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    clock: Clock = field(default=time.monotonic, repr=False)
    began: float = field(default=math.nan, repr=False)

    def __post_init__(self) -> None:
        if math.isnan(self.began):
            object.__setattr__(self, "began", self.clock())

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float:
        """Seconds until the end; inf without a bound, and never below 0."""
        return math.inf if self.max_seconds is None else max(self.max_seconds - self.seconds, 0.0)

    @property
    def has_seconds(self) -> bool:
        """Whether seconds bound it; if not, nobody needs to look at the clock."""
        return self.max_seconds is not None and math.isfinite(self.max_seconds)

    def expect(self, seconds: float = 0.0) -> None:
        """Asks whether there is time for what will take so many seconds.

        Raises:
            OutOfTime: If there is not.
        """
        if self.has_seconds and not self.seconds_left > seconds:
            raise OutOfTime

    def is_spent(self, steps: int = 0) -> bool:
        """Whether nothing is left after so many steps."""
        out_of_steps = self.max_steps is not None and steps >= self.max_steps
        return out_of_steps or self.seconds_left <= 0

    def progress(self, steps: int, seconds: float | None = None) -> float:
        """The share of the budget that is used, by steps or by seconds, whichever is larger.

        Args:
            steps: Steps so far.
            seconds: Seconds so far; those that have passed by default.
        """
        by_steps = steps / self.max_steps if self.max_steps else 0.0
        by_seconds = 0.0
        if self.max_seconds:
            by_seconds = (self.seconds if seconds is None else seconds) / self.max_seconds
        return min(1.0, max(by_steps, by_seconds))

    def part(self, share: float, most_seconds: float = math.inf) -> Budget:
        """A budget of seconds for a part of the work, which begins now.

        Args:
            share: Share of all seconds of this budget.
            most_seconds: A bound of the part's own, which holds without seconds too.
        """
        whole = math.inf if self.max_seconds is None else share * self.max_seconds
        seconds = min(whole, most_seconds, self.seconds_left)
        bound = None if math.isinf(seconds) else seconds
        return replace(self, max_steps=None, max_seconds=bound, began=math.nan)
