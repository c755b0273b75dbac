"""The settings of a fit to a posterior, each of which a user may replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

from pyro_nf._checks import check_count, check_number, check_positive, is_sequence, shown

_SHARE = "from 0 to 1"


@dataclass(frozen=True, repr=False)
class PosteriorRecipe:
    """How :func:`~pyro_nf.vi.fit.fit_svi` fits: its sizes, rates and shares of the budget.

    One set of settings serves all posteriors, since in the coordinates of a start they look alike.
    A recipe is frozen; ``PosteriorRecipe(num_particles=16)`` or ``dataclasses.replace`` make
    others, and a recipe prints what is not as by default.

    Args:
        max_steps: Steps of a fit that has no other budget.
        num_particles: Draws a step; None to choose them by what the log joint costs.
        few_particles: Draws a step where many leave too few steps.
        many_particles: Draws a step where they leave enough steps, or are nearly free. More
            particles make the tails of the fit better.
        least_particles: Below ``few_particles``, but never below this, if those leave less than
            ``few_steps``.
        enough_steps: Steps that many particles must leave.
        few_steps: Steps below which there are fewer particles than usual.
        nearly_free: A batch of many particles that costs at most so many times one of few is nearly
            free.
        num_check_particles: Draws that a state is judged by. They are always the same, so that
            states are compared without their noise.
        least_check_particles: They are fewer, but not below this, if a check takes more than
            ``check_share`` of the seconds that are left.
        check_share: See ``least_check_particles``.
        affine_share: Share of the training in which the affine part learns alone.
        affine_rates: The highest and the last learning rate of that stage.
        flow_rates: The least and the most that the highest learning rate of everything may be.
        rate_times_steps: That rate is this over the number of steps, within ``flow_rates``: of few
            steps each must go further. Few particles, whose gradients are noisy, take the least.
        shape_share: Skewness and tails of a coordinate are felt by all draws at once: they learn at
            this share of the rate.
        betas: Decay of the two moments of Adam.
        warmup_steps: Steps in which a learning rate rises.
        average: Decay of the moving average of the parameters, which is what is kept.
        even: Once the log weights of a step spread less than so many nats, some draws are moved
            outwards, as long as the objective is the default one.
        far_share: The share of the draws that is moved.
        far: How far they are moved: their norm is multiplied by ``1 + far / sqrt(D)``.
        recording_share: Share of the seconds that recording the log joint may take.
        recording_cost: What recording costs, in evaluations; it is not tried where that is more
            than ``recording_share``.
        start_share: Share of the budget that the search for a start may take.
        pieces_share: Share of the budget that the search for separate pieces may take.
        least_rows: Runs of the model that such a search may take at least, where each particle is
            a run and steps alone bound the fit.
        timing_share: Share of the seconds that timing batches of particles may take.
        grace: The last check may end so many times later than all else, lest what was learned last
            be lost.

    Raises:
        ValueError: If a number is out of its range, or a pair of rates falls.

    Example:
        >>> PosteriorRecipe(num_particles=16, average=0.9)
        PosteriorRecipe(num_particles=16, average=0.9)
        >>> PosteriorRecipe().flow_rates
        (0.005, 0.01)
    """

    max_steps: int = 2000
    num_particles: int | None = None
    few_particles: int = 64
    many_particles: int = 256
    least_particles: int = 4
    enough_steps: int = 500
    few_steps: int = 100
    nearly_free: float = 1.5
    num_check_particles: int = 512
    least_check_particles: int = 8
    check_share: float = 0.03
    affine_share: float = 0.12
    affine_rates: tuple[float, float] = (2e-2, 1e-3)
    flow_rates: tuple[float, float] = (5e-3, 1e-2)
    rate_times_steps: float = 12.0
    shape_share: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 20
    average: float = 0.99
    even: float = 0.05
    far_share: float = 0.25
    far: float = 1.0
    recording_share: float = 0.15
    recording_cost: float = 300.0
    start_share: float = 0.3
    pieces_share: float = 0.2
    least_rows: int = 256
    timing_share: float = 0.05
    grace: float = 1.05

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_count(_OWNER, name, getattr(self, name))
        check_count(_OWNER, "num_particles", self.num_particles, optional=True)
        check_count(_OWNER, "warmup_steps", self.warmup_steps, at_least=0)
        for name in _POSITIVE:
            check_positive(_OWNER, name, getattr(self, name))
        for name in _SHARES:
            check_number(_OWNER, name, getattr(self, name), _SHARE, at_least=0, at_most=1)
        for name in ("nearly_free", "grace"):
            check_number(_OWNER, name, getattr(self, name), "a number >= 1", at_least=1)
        for name in ("even", "far"):
            check_number(_OWNER, name, getattr(self, name), "a number >= 0", at_least=0)
        wanted = "above 0 and below 1: the rest of the training is for all parameters"
        check_number(_OWNER, "affine_share", self.affine_share, wanted, above=0, below=1)
        check_number(_OWNER, "average", self.average, "from 0 to below 1", at_least=0, below=1)
        for name in ("betas", "affine_rates", "flow_rates"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        for beta in self.betas:
            check_number(_OWNER, "each of betas", beta, "from 0 to below 1", at_least=0, below=1)
        (highest, last), (least, most) = self.affine_rates, self.flow_rates
        for name, rates in (("affine_rates", (last, highest)), ("flow_rates", (least, most))):
            for rate in rates:
                check_positive(_OWNER, f"each of {name}", rate)
            if rates[0] > rates[1]:
                order = "the highest, then the last" if name == "affine_rates" else "least, most"
                raise ValueError(
                    f"{_OWNER}: {name} must be in order ({order}), got {getattr(self, name)}."
                )
        if not self.least_particles <= self.few_particles <= self.many_particles:
            raise ValueError(
                f"{_OWNER}: wanted least_particles <= few_particles <= many_particles, got "
                f"{self.least_particles}, {self.few_particles}, {self.many_particles}."
            )

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.changes().items())
        return f"{_OWNER}({shown})"

    def rate(self, num_steps: float, num_particles: int) -> float:
        """The highest learning rate of everything.

        Args:
            num_steps: Steps of the fit; inf if nobody knows.
            num_particles: Draws a step.

        Example:
            >>> recipe = PosteriorRecipe()
            >>> [recipe.rate(steps, 256) for steps in (600, 2000, 6000)], recipe.rate(600, 64)
            ([0.01, 0.006, 0.005], 0.005)
        """
        least, most = self.flow_rates
        if num_particles < self.many_particles:
            return least
        return min(max(self.rate_times_steps / max(num_steps, 1), least), most)

    def changes(self) -> dict[str, object]:
        """The settings that are not as by default, by their names."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


_OWNER = PosteriorRecipe.__name__
_COUNTS = [
    f.name
    for f in fields(PosteriorRecipe)
    if isinstance(f.default, int) and f.name != "warmup_steps"
]
_POSITIVE = ("rate_times_steps", "shape_share", "recording_cost")
_SHARES = (
    "check_share",
    "far_share",
    "recording_share",
    "start_share",
    "pieces_share",
    "timing_share",
)


def _pair(name: str, values: object) -> tuple[float, float]:
    """Two numbers, or an error."""
    if not is_sequence(values) or len(cast("Sequence[float]", values)) != 2:
        raise TypeError(f"{_OWNER}: {name} must be two numbers, got {shown(values)}.")
    first, second = cast("Sequence[float]", values)
    return first, second
