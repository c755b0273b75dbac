"""The settings of a density fit, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from pyro_nf._checks import check_count, check_number, check_positive
from pyro_nf.flows.flow import Flow
from pyro_nf.train.stages import History
from pyro_nf.transforms.kinds import in_words


@dataclass(frozen=True)
class DensityRecipe:
    """What `fit_density` does where its arguments leave it open; it suits most tables as it is.

    Shares are of the budget: of ``max_seconds``, or of ``max_steps`` where only these are given.

    Args:
        max_steps: The most steps if neither steps nor seconds are given.
        batch_share: Rows in a batch, as a share of all rows,
        min_batch: but at least so many,
        max_batch: and at most so many.
        average: Decay of the moving average of the parameters that validation looks at: less noise,
            less loss.
        decay: Weight decay where there are few rows for many columns.
        decay_rows: Rows for each column from which on there is less of it.
        race_share: Share that each start trains for before validation chooses among them.
        min_race: A race that would not last so many looks at validation is not run.
        starts_share: After this share no further start is begun.
        start_share: Share that a start may take to pass its rows through the flow.
        min_start_rows: Where steps bound the fit, a start passes at least so many rows,
        max_start_rows: and at most so many. So many rows of given batches are looked at for units
            and starts, too.
        mixture_share: Share of the seconds that EM may take for the Gaussian mixture.
        mixture_work: Without seconds: share of the products of all steps that EM may take.
        min_mixture_work: But so many, which take some tenths of a second, are always its own.
        mixture_margin: Nats by which the mixture must win among the starts: its draws carry no
            gradient.
        check_share: Share of the seconds that one look at validation may take; then it sees fewer
            rows.
        min_checked_rows: A look at validation sees at least so many rows,
        max_checked_rows: and at most so many.
        final_share: Share of the seconds that is kept for the loss of all validation rows at the
            end,
        max_final_rows: of at most so many.
        max_copula_rows: Validation rows of which the Gaussian copula gives the density.
        rows_at_once: Rows that pass through the flow at once where no gradient is needed.

    Example:
        >>> print(DensityRecipe())
        the default
        >>> print(DensityRecipe(average=0.99))
        average=0.99
    """

    max_steps: int = 5_000
    batch_share: float = 0.1
    min_batch: int = 64
    max_batch: int = 256
    average: float = 0.998
    decay: float = 10.0
    decay_rows: float = 20.0
    race_share: float = 0.08
    min_race: int = 4
    starts_share: float = 0.3
    start_share: float = 0.05
    min_start_rows: int = 2_000
    max_start_rows: int = 20_000
    mixture_share: float = 0.1
    mixture_work: float = 0.3
    min_mixture_work: float = 5e8
    mixture_margin: float = 0.03
    check_share: float = 0.02
    min_checked_rows: int = 64
    max_checked_rows: int = 2_000
    final_share: float = 0.05
    max_final_rows: int = 20_000
    max_copula_rows: int = 500
    rows_at_once: int = 4_096

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if isinstance(setting.default, int):
                check_count("DensityRecipe", name, value)
            elif name.endswith("_share"):
                wanted = "a share from 0 to 1"
                check_number("DensityRecipe", name, value, wanted, at_least=0, at_most=1)
            elif name == "average":
                wanted = "a decay from 0 to below 1"
                check_number("DensityRecipe", name, value, wanted, at_least=0, below=1)
            elif name == "decay_rows":
                check_positive("DensityRecipe", name, value)
            else:
                check_number("DensityRecipe", name, value, "a number >= 0", at_least=0)

    def __str__(self) -> str:
        """What differs from the default."""
        pairs = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        changed = [f"{name}={value!r}" for name, value, usual in pairs if value != usual]
        return ", ".join(changed) or "the default"

    def batch_size(self, count_rows: int) -> int:
        """Rows in a batch.

        Args:
            count_rows: Training rows.
        """
        check_count("DensityRecipe", "count_rows", count_rows)
        return min(max(int(self.batch_share * count_rows), self.min_batch), self.max_batch)

    def weight_decay(self, count_rows: int, count_columns: int) -> float:
        r"""The weight decay to begin with, :math:`10 \min(1, (20 D / N)^3)`.

        Args:
            count_rows: N.
            count_columns: D.
        """
        check_count("DensityRecipe", "count_rows", count_rows)
        check_count("DensityRecipe", "count_columns", count_columns)
        return self.decay * min(1.0, (self.decay_rows * count_columns / count_rows) ** 3)


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
        recipe: The settings of the fit.
    """

    flow: Flow
    history: History
    validation: float
    baselines: dict[str, float] = field(default_factory=dict)
    start: str = ""
    starts: dict[str, float] = field(default_factory=dict)
    recipe: DensityRecipe = field(default_factory=DensityRecipe)

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
        head = f"{'validation loss':<{width}}  {'nats':>10}"
        return "\n".join([head, *lines, stopped, f"recipe: {self.recipe}"])
