"""The rows of a density fit: checked, split, and the units in which they are seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_nf._checks import check_context, check_events, check_kind
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.devices import in_double
from pyro_nf.ops.spaces import at_ends, describe
from pyro_nf.transforms.affine import FixedAffine

MOST_ROUNDING = 0.05
"""Share of a column's spread that the dtype of the flow may round away."""

FAR = 100.0
"""Rows farther from the median, in spreads, count as if they lay there: they set no scale."""

FARTHEST = 1e7
"""A row farther than this, in units of its column, leaves nothing that a flow could learn from."""

LEAST_SCALE = 1 / 3
"""Share of its spread that a column's unit is at least: in a column that mostly repeats one value
the standard deviation is far smaller than the distance of the others."""

SPIKE_SHARE = 0.01
"""A value that so many of the rows share is worth a peak of its own."""

REPEATED_SHARE = 0.05
"""So are values that each repeat often and together make up this share of the rows."""

FEWEST_DISTINCT = 100
"""Of so many distinct rows some are held out, with all that are alike; of fewer, single rows."""

REPEATED_ROWS = 0.2
"""Rows that are not distinct, as a share, above which held-out ones say too little."""

DEPENDENT, MOST_DEPENDENT = 1e-12, 256
"""An eigenvalue of the correlations below which columns depend, and the most columns looked at."""

OFTEN = 1 / 500
FEWEST_REPEATS = 5
MOST_COUNTED_ROWS = 20_000
MOST_COUNTED_ENTRIES = 4_000_000
ROWS_AT_ONCE = 4_096


@dataclass(frozen=True)
class Table:
    """Rows and their contexts.

    Args:
        y: Shape ``(N, *event_shape)``.
        context: Shape ``(N, C)``, or what an embedding takes, or None.
    """

    y: Tensor
    context: Tensor | None

    def __len__(self) -> int:
        return len(self.y)

    def to(self, like: Tensor) -> Table:
        """With the dtype and device of another tensor; what an embedding takes keeps its dtype."""
        context = self.context
        if context is not None:
            is_real = context.is_floating_point()
            context = context.detach().to(like if is_real else like.device)
        return Table(self.y.detach().to(like), context)

    def first(self, count: int) -> Table:
        """The first rows."""
        return Table(self.y[:count], None if self.context is None else self.context[:count])

    def take(self, rows: Tensor) -> Table:
        """The rows with these numbers."""
        return Table(self.y[rows], None if self.context is None else self.context[rows])

    def some(self, most: int) -> Table:
        """At most so many rows, from everywhere in the table and in random order."""
        if len(self) <= most:
            return self
        generator = torch.Generator().manual_seed(0)
        return self.take(torch.randperm(len(self), generator=generator)[:most].to(self.y.device))

    def pieces(self, count: int = ROWS_AT_ONCE) -> Iterator[Table]:
        """The rows in their order, so many at once."""
        for rows in torch.arange(len(self), device=self.y.device).split(count):
            yield self.take(rows)


def columns_of(values: Tensor) -> Tensor:
    """The numbers that share a unit, as columns: the channels of images, else each entry.

    Pixels of a channel are of one kind, and some may be the same in all images.

    Args:
        values: Rows, shape ``(N, *event_shape)``; an event of three or more dimensions is an image,
            channels first.

    Returns:
        Shape ``(N, D)``, or ``(N * pixels, C)`` of images.

    Example:
        >>> columns_of(torch.zeros(5, 3, 8, 8)).shape, columns_of(torch.zeros(5, 2, 4)).shape
        (torch.Size([320, 3]), torch.Size([5, 8]))
    """
    if values.dim() == 2:
        return values
    if _is_image(values):
        return values.movedim(1, -1).reshape(-1, values.shape[1])
    return values.reshape(len(values), values[:1].numel())


def _is_image(values: Tensor) -> bool:
    return values.dim() >= 4


def _of_events(column: Tensor, values: Tensor) -> Tensor:
    """A number of each column as an event of numbers."""
    event_shape = values.shape[1:]
    if _is_image(values):
        return column.reshape(-1, *(1,) * (len(event_shape) - 1)).expand(event_shape)
    return column.reshape(event_shape)


def units_of(values: Tensor) -> FixedAffine:
    r"""The map :math:`y = m + s y'` after which each column of :math:`y'` has about the unit scale.

    All pixels of a channel of an image have the same :math:`m` and :math:`s` (`columns_of`).

    :math:`m` and :math:`s` are mean and standard deviation of the rows, of which those farther than
    100 spreads from the median count as if they lay there. The spread is the distance from the
    median that nine rows in ten keep, as a multiple of a normal's. All is computed in float64 and
    in spreads, so that no square overflows.

    Args:
        values: Shape ``(N, *event_shape)``.

    Example:
        >>> units = units_of(torch.tensor([[1e30], [3e30]]))
        >>> [float(f"{value:.3g}") for value in (units.loc.item(), units.scale.item())]
        [2e+30, 1e+30]
    """
    few = values
    if _is_image(values):  # of whose pixels a part tells enough
        few = Table(values, None).some(max(MOST_COUNTED_ENTRIES // values[0].numel(), 1)).y
    columns = columns_of(few)
    median, spread = _median_and_spread(columns)
    z = ((in_double(columns) - median) / spread).clamp(-FAR, FAR)
    scale = z.std(0, correction=0).clamp_min(LEAST_SCALE)
    m, s = median + spread * z.mean(0), spread * scale
    return FixedAffine(_of_events(m.to(values), values), _of_events(s.to(values), values))


def _median_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """The median of each column and the distance from it that nine in ten keep.

    Where more than nine in ten are equal, the spread is that of the others. A random part of a
    long table tells enough.
    """
    few = Table(values, None).some(MOST_COUNTED_ROWS).y
    if not bool((few != few[0]).any(0).all()):
        few = values
    y = in_double(few)
    median = y.median(0).values
    spreads = []
    for distance in (y - median).abs().T:
        ninth = _nine_in_ten(distance)
        spreads.append(ninth if ninth > 0 else _nine_in_ten(distance[distance > 0]))
    return median, torch.stack(spreads) / 1.645  # nine in ten draws of N(0, 1) are within


def _nine_in_ten(distance: Tensor) -> Tensor:
    """By the lower of two neighbours, so that a single far row never counts; 1 of no distance."""
    if len(distance) == 0:
        return distance.new_ones(())
    return distance.kthvalue(int(0.9 * (len(distance) - 1)) + 1).values


def read_table(name: str, flow: Flow, y: Tensor, context: Tensor | None) -> Table:
    """Rows and contexts with the dtype and device of the flow, checked each by itself.

    Args:
        name: What the rows are called in messages.
        flow: The flow that they are for.
        y: Rows.
        context: Their contexts, or None.

    Raises:
        TypeError: If they are not floating tensors.
        ValueError: If a shape is wrong, or a column is not finite or loses its digits.
    """
    check_rows_of(name, flow, y, context)
    y = _in_dtype_of(flow, name, y)
    what = "context" if name == "x" else f"the contexts of {name}"
    return Table(y, None if context is None else _in_dtype_of(flow, what, context))


def check_rows_of(name: str, flow: Flow, y: Tensor, context: Tensor | None) -> None:
    """Raises unless rows and contexts have the shapes that a flow takes.

    Args:
        name: What the rows are called in messages.
        flow: The flow that they are for.
        y: Rows.
        context: Their contexts, or None.
    """
    check_events("fit_density", name, y, flow.event_shape)
    if flow.embed is None or context is None:
        check_context("fit_density", context, flow.context_dim)
    else:
        check_kind("fit_density", "context", context, Tensor)
    if context is not None:
        shape = (len(y), flow.context_dim) if flow.embed is None else (len(y), *context.shape[1:])
        if context.shape != shape:
            raise ValueError(
                f"fit_density: {name} has {len(y)} rows, but context has shape "
                f"{tuple(context.shape)}; wanted {shape}."
            )


def _in_dtype_of(flow: Flow, name: str, values: Tensor) -> Tensor:
    """Values with the dtype and device of a flow; raises if they are not finite or lose digits."""
    values = values.detach()
    like = next(flow.parameters(), values)
    if not values.is_floating_point():  # what an embedding may take, as tokens
        return values.to(like.device)
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"fit_density: {_columns(columns_of(bad).any(0), name, values)} not finite (NaN or inf "
            f"in {int(bad.flatten(1).any(1).sum())} of {len(values)} rows). Drop or fill those "
            "rows."
        )
    cast = values.to(like)
    if len(values):
        lost = _rounded_away(columns_of(values), columns_of(cast))
        if bool(lost.any()):
            raise ValueError(
                f"fit_density: {_columns(lost, name, values)} too large, too small or too far from "
                f"0 for the digits of {like.dtype}, the dtype of the flow. Call flow.double(), or "
                "shift and scale the data."
            )
    return cast


def _rounded_away(values: Tensor, cast: Tensor) -> Tensor:
    """Which columns ``(N, D)`` another dtype cannot hold."""
    y = in_double(values)
    median, spread = _median_and_spread(values)
    far = ((y - median) / spread).abs() > FARTHEST  # such a row is named for that
    rounding = (cast.to(y) - y).abs().where(~far | cast.isinf(), 0.0).amax(0)
    varies = (values != values[0]).any(0)
    smallest = torch.finfo(cast.dtype).tiny / torch.finfo(cast.dtype).eps
    lost = (rounding > MOST_ROUNDING * spread) | (spread * 1.645 < smallest)
    return ~rounding.isfinite() | (lost & varies)


def check_columns_vary(name: str, values: Tensor) -> None:
    """Raises if a column is constant.

    Args:
        name: What the rows are called in the message.
        values: Shape ``(N, *event_shape)``.
    """
    columns = columns_of(values)
    constant = (columns == columns[0]).all(0)
    if bool(constant.any()):
        of_rows = (
            "a constant has no density. Drop them, or add noise of the size of their rounding."
        )
        of_contexts = "a constant tells nothing. Drop them, and lower context_dim."
        raise ValueError(
            f"fit_density: {_columns(constant, name, values)} constant, and "
            f"{of_rows if name == 'x' else of_contexts}"
        )


def check_inside(name: str, values: Tensor, space: Constraint) -> None:
    """Raises if an entry is at an end of the space that a flow maps onto, or beyond it.

    In a discrete space, if it is no whole number or beyond an end.

    Args:
        name: What the rows are called in the message.
        values: Shape ``(N, *event_shape)``.
        space: Codomain of the flow.
    """
    outside = at_ends(values, space)
    if bool(outside.any()):
        place = tuple(outside.nonzero()[0].tolist())
        if space.is_discrete:
            raise ValueError(
                f"fit_density: row {place[0]} of {name} is {values[place].item():.9g} "
                f"{at(place)}, but the flow makes whole numbers ({space}); "
                f"{_count_rows(outside)} such row(s) in all. Round, drop or correct them."
            )
        raise ValueError(
            f"fit_density: row {place[0]} of {name} is {values[place].item():.9g} {at(place)}, "
            f"but the flow maps onto {describe(space)}, whose ends have no density "
            f"({_count_rows(outside)} such row(s) in all). Drop or correct the row, move it "
            "inside by less than the rounding of the data, or end the flow with another map."
        )


def check_nothing_far(name: str, values: Tensor, units: FixedAffine) -> None:
    """Raises if an entry is so far out that the others vanish beside it, and names the farthest.

    Args:
        name: What the rows are called in the message.
        values: Shape ``(N, *event_shape)``.
        units: Units of the columns.
    """
    distance = ((in_double(values) - in_double(units.loc)) / in_double(units.scale)).abs()
    far = distance > FARTHEST
    if bool(far.any()):
        place = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
        noun = _noun(values)
        raise ValueError(
            f"fit_density: row {place[0]} of {name} is {values[place].item():.4g} {at(place)}, "
            f"{distance[place].item():.1g} times the spread of that {noun} from the others "
            f"({_count_rows(far)} such row(s) in all). Drop or correct the row, or take the "
            f"logarithm of the {noun}."
        )


def _count_rows(which: Tensor) -> int:
    """In how many rows something holds of an entry."""
    return int(which.flatten(1).any(1).sum())


def at(place: tuple[int, ...]) -> str:
    """Where an entry is in its row, in words."""
    return f"in column {place[1]}" if len(place) == 2 else f"at {place[1:]}"


def _noun(values: Tensor) -> str:
    return "channel" if _is_image(values) else "column"


def warn_of_repeats(table: Table, is_split: bool) -> None:
    """Warns of rows, or else of columns, in which the same numbers come again and again.

    Args:
        table: All rows.
        is_split: Whether some of them are held out, which others may repeat.
    """
    some = table.some(MOST_COUNTED_ROWS)
    once = distinct(some)
    is_repeated = FEWEST_DISTINCT <= len(once) < (1 - REPEATED_ROWS) * len(some)
    if not is_repeated or _notes_of_repeats(once.y):
        warn_of_repeated_values(table.y)
    elif is_split:
        warnings.warn(
            f"fit_density: only {len(once)} of {len(some)} rows of x are distinct. Rows that are "
            "held out are trained on too, and the validation loss says too little. Give each row "
            "once, or validation rows of their own.",
            stacklevel=3,
        )


def warn_of_dependent_columns(y: Tensor) -> None:
    """Warns if some columns are a linear function of others: such rows have no density.

    Args:
        y: Rows, shape ``(N, *event_shape)``; only vectors of a moderate size are looked at.
    """
    d = y.shape[-1]
    if y.dim() != 2 or not 1 < d <= MOST_DEPENDENT:
        return
    x = in_double(y[: 4 * d + 1_000])
    if len(x) < 2 * d:
        return
    x = (x - x.mean(0)) / x.std(0).clamp_min(torch.finfo(x.dtype).tiny)
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    if float(values[0]) < DEPENDENT:
        part = vectors[:, 0].abs()
        which = part > 0.1 * part.max()
        warnings.warn(
            f"fit_density: {_columns(which, 'x', y)} linear functions of each other. Such rows "
            "have no density: the loss falls without bound. Leave one of these columns out.",
            stacklevel=3,
        )


def warn_of_repeated_values(y: Tensor) -> None:
    """Warns once of all columns in which values repeat so often that narrow peaks are rewarded.

    Args:
        y: Rows, shape ``(N, *event_shape)``.
    """
    notes, noun = _notes_of_repeats(y), _noun(y)
    if notes:
        what, verb = (noun, "repeats") if len(notes) == 1 else (f"{noun}s", "repeat")
        shown = ", ".join(notes[:_MOST_NAMED])
        more = f", and {len(notes) - _MOST_NAMED} more" if len(notes) > _MOST_NAMED else ""
        warnings.warn(
            f"fit_density: {what} {shown}{more} of x {verb} values. Such a {noun} has no density: "
            "the loss falls without bound as peaks form on those values, says little, and draws "
            "fall on the peaks. Add noise of the size of the rounding, for example "
            "x + step * (torch.rand_like(x) - 0.5), or fit the rest given that column as context.",
            stacklevel=4,
        )


def _notes_of_repeats(y: Tensor) -> list[str]:
    """The columns in which values repeat often, each with its most frequent value."""
    notes = list[str]()
    for i, column in enumerate(Table(columns_of(y), None).some(MOST_COUNTED_ROWS).y.T):
        value, count = column.unique(return_counts=True)
        most, where = count.max(0)
        often = count >= max(FEWEST_REPEATS, OFTEN * len(column))
        share = (count * often).sum().item() / len(column)
        is_spike = most >= max(FEWEST_REPEATS, SPIKE_SHARE * len(column))
        if is_spike or share >= REPEATED_SHARE:
            notes.append(
                f"{i} ({len(value)} distinct values, {value[where].item():g} in "
                f"{100 * most.item() / len(column):.2g} % of the rows)"
            )
    return notes


def _columns(which: Tensor, table: str, values: Tensor) -> str:
    """Some columns of a table by their numbers, as the subject of a sentence."""
    noun = _noun(values)
    indices = [int(i) for i in which.nonzero().flatten()]
    names = ", ".join(str(i) for i in indices)
    one = len(indices) == 1
    return f"{noun} {names} of {table} is" if one else f"{noun}s {names} of {table} are"


_MOST_NAMED = 8


# Rows are known again by a number made of their bits, so that a loader may shuffle them.


def _keys(table: Table) -> Tensor:
    """A number for each row and its context, the same wherever the row is met."""
    keys = table.y.new_zeros(len(table), dtype=torch.int64)
    for values in (table.y, table.context):
        if values is not None:
            bits = (
                values.reshape(len(values), -1).contiguous().view(_INTEGERS[values.element_size()])
            )
            generator = torch.Generator().manual_seed(bits.shape[1])
            factors = torch.randint(2**62, bits.shape[1:], generator=generator).to(bits.device)
            keys = 31 * keys + (bits.long() * (2 * factors + 1)).sum(1)
    return keys


def distinct(table: Table) -> Table:
    """Each row once."""
    keys, order = _keys(table).sort()
    is_new = torch.ones_like(keys, dtype=torch.bool)
    is_new[1:] = keys[1:] != keys[:-1]
    return table.take(order[is_new])


def keys_of_single_rows(held_out: Table, whole: Table) -> Tensor:
    """Sorted keys of the rows of which there is but one."""
    keys, counts = _keys(whole).unique(return_counts=True)
    mine = _keys(held_out)
    return mine[counts[torch.searchsorted(keys, mine)] == 1].sort().values


def without(table: Table, known: Tensor | None) -> Table:
    """The rows whose keys are not among the known ones, which are sorted."""
    if known is None or len(known) == 0 or len(table) == 0:
        return table
    known, keys = known.to(table.y.device), _keys(table)
    place = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
    return table.take((known[place] != keys).nonzero().flatten())


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
