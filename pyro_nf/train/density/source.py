"""Where the rows of a density fit come from: a table, or batches that need not fit in memory."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nf._checks import check_events, check_floating, check_number, shown
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.spaces import is_all_real
from pyro_nf.train.batches import Minibatches, begin_pass
from pyro_nf.train.density.losses import Units, seen
from pyro_nf.train.density.recipe import DensityRecipe
from pyro_nf.train.density.table import (
    FARTHEST,
    FEWEST_DISTINCT,
    REPEATED_ROWS,
    Table,
    at,
    check_columns_vary,
    check_inside,
    check_nothing_far,
    check_rows_of,
    columns_of,
    distinct,
    keys_of_single_rows,
    read_table,
    units_of,
    without,
)
from pyro_nf.train.randomness import Stream
from pyro_nf.train.saved.digest import digest
from pyro_nf.transforms.affine import FixedAffine

Rows = Tensor | Iterable[Any]
Validation = float | Tensor | tuple[Tensor, Tensor] | Iterable[Any]


class Source(ABC):
    """Training rows.

    Attributes:
        table: All of them, or those that units and starts are made from.
        held_out: Validation rows.
        units: Of the training rows.
        count_rows: How many training rows there are, as far as it is known.
        batch_size: Rows in a batch.
        inspected: Rows in which repeated values are looked for.
        keeps_apart: Whether no row that is held out is trained on too, even if it comes again.
        keys: Marks of the validation rows that batches may hold too.
        draws: Whether batches may draw from the global generators.
    """

    table: Table
    held_out: Table
    inspected: Table
    units: Units
    count_rows: int
    batch_size: int
    keys: Tensor | None = None
    keeps_apart = False
    draws = False

    @abstractmethod
    def batches(self, units: Units, seed: int) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Batches of rows and contexts in the units of a flow.

        Args:
            units: Of the flow.
            seed: Of their order.
        """

    def marks(self) -> dict[str, str]:
        """What tells this data from other data."""
        tables = {"x": self.table, "validation": self.held_out}
        return {name: digest(table.y) for name, table in tables.items()} | {
            f"context of {name}": digest(table.context) for name, table in tables.items()
        }

    def _read(
        self, flow: Flow, whole: Table, validation: Validation, seed: int | None, most: int
    ) -> None:
        """Take training rows, validation rows and the units of the former, all checked."""
        check_inside("x", whole.y, flow.transform.codomain)
        if not flow.transform.codomain.is_discrete:
            check_columns_vary("x", whole.y)
        if whole.context is not None and flow.embed is None:
            check_columns_vary("context", whole.context)
        if isinstance(validation, (int, float)):
            self.table, self.held_out = _split(whole, validation, seed)
        else:
            self.table, self.held_out = whole, _validation_rows(flow, validation, most)
        of_rows, of_contexts = _units(self.table.y, whole.y), None
        context = whole.context
        if self.table.context is not None and context is not None and context.is_floating_point():
            of_contexts = _units(self.table.context, context)
        if self.table is whole:
            check_nothing_far("validation", self.held_out.y, of_rows)
            if of_contexts is not None and self.held_out.context is not None:
                check_nothing_far("the contexts of validation", self.held_out.context, of_contexts)
        self._all_units = of_rows, of_contexts
        self.units = of_rows if is_all_real(flow.transform.codomain) else None, of_contexts


class TableSource(Source):
    """Rows in memory.

    Args:
        flow: The flow that they are for.
        x: Rows, shape ``(N, *event_shape)``.
        context: Their contexts, or None.
        validation: The share to hold out, or other rows.
        seed: Decides which rows are held out.
        batch_size: Rows in a batch, or None for the recipe's.
        recipe: Of the fit.
    """

    def __init__(
        self,
        flow: Flow,
        x: Tensor,
        context: Tensor | None,
        validation: Validation,
        seed: int | None,
        batch_size: int | None,
        recipe: DensityRecipe,
    ) -> None:
        whole = read_table("x", flow, x, context)
        if len(whole) < 2:
            raise ValueError(
                f"fit_density: x has {len(whole)} row(s), wanted at least 2 (x.shape = "
                f"{tuple(x.shape)}). Give more rows."
            )
        self._read(flow, whole, validation, seed, recipe.max_final_rows)
        of_rows, of_contexts = self._all_units
        if of_contexts is not None and whole.context is not None:
            check_nothing_far("context", whole.context, of_contexts)
        check_nothing_far("x", whole.y, of_rows)
        self.inspected, self.count_rows = whole, len(self.table)
        self.batch_size = batch_size or recipe.batch_size(self.count_rows)

    def batches(self, units: Units, seed: int) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Shuffled batches of the training rows."""
        rows = seen(self.table, units)
        return Minibatches((rows.y, rows.context), self.batch_size, seed)  # type: ignore[return-value]


class BatchSource(Source):
    """Rows that come in batches, of which only the first are kept in memory.

    Units and starts are made from the first rows. A share of those is held out: it is left out of
    all batches, whatever their order, unless the same row is there more than once.

    Args:
        flow: The flow that they are for.
        x: Gives the batches: tensors ``(B, *event_shape)``, or tuples of rows, or of rows and
            contexts.
        validation: The share of the first rows to hold out, or other rows.
        seed: Decides which rows are held out, and what the batches draw.
        recipe: Of the fit.
        is_first: Whether this process looks at the first rows; the others are told.
    """

    draws = True

    def __init__(
        self,
        flow: Flow,
        x: Iterable[Any],
        validation: Validation,
        seed: int | None,
        recipe: DensityRecipe,
        is_first: bool = True,
    ) -> None:
        self.flow, self.x = flow, x
        self._like = next(flow.parameters(), torch.empty(0))
        generator = getattr(x, "generator", None)
        self.generator = generator if isinstance(generator, torch.Generator) else None
        self.generator_state = None if self.generator is None else self.generator.get_state()
        self.is_iterator = isinstance(x, Iterator)
        self.begun: list[Any] = []  # what an iterator has given, to be given again
        self.count_given = 0
        if is_first:
            self._look(validation, seed, recipe)

    def _look(self, validation: Validation, seed: int | None, recipe: DensityRecipe) -> None:
        """Read the first rows."""
        tables: list[Table] = []
        is_all = True
        with Stream(seed or 0).entered():
            for i, batch in enumerate(self._begin(0)):
                tables.append(self._rows(i, batch))
                if self.is_iterator:
                    self.begun.append(batch)
                if sum(map(len, tables)) >= recipe.max_start_rows:
                    is_all = False
                    break
        whole = _joined(tables)
        if len(whole) < 2:
            raise ValueError(
                f"fit_density: x gave {len(tables)} batch(es) with {len(whole)} row(s) in all, "
                "wanted at least 2. Give an iterable of batches that has rows."
            )
        if is_all and self.is_iterator:
            raise self._ended(len(tables))
        read_table("x", self.flow, whole.y, whole.context)  # do the first rows keep their digits?
        cast = whole.to(self._like)
        once = distinct(cast)
        # a stream may draw the same rows again, some of which would be held out, others trained on
        most = len(cast) if self.is_iterator else (1 - REPEATED_ROWS) * len(cast)
        rows = once if FEWEST_DISTINCT <= len(once) < most else cast
        self.inspected = once if self.is_iterator else cast
        self.keeps_apart = rows is once
        self._read(self.flow, rows, validation, seed, recipe.max_final_rows)
        if isinstance(validation, (int, float)):
            self.keys = keys_of_single_rows(self.held_out, rows)
        for i, table in enumerate(tables):
            self._in_units(i, table.to(self._like), self.units)
        self.batch_size = max(map(len, tables))
        self.count_rows = len(self.table) if is_all else self._expected(len(tables), len(rows))

    def _expected(self, count_batches: int, count_rows: int) -> int:
        """How many rows there are, by the number of batches if it is known."""
        try:
            return max(len(self.x) * count_rows // count_batches, count_rows)  # type: ignore[arg-type]
        except TypeError:  # a stream has no length
            return count_rows

    def _begin(self, number: int) -> Iterator[Any]:
        if number == 0 and self.generator is not None and self.generator_state is not None:
            self.generator.set_state(self.generator_state)  # each run sees the same order
        return begin_pass(self.x, number)

    def _rows(self, i: int, batch: Any) -> Table:
        """The rows of the i-th batch and their contexts, checked but for their distance."""
        name = f"batch {i} of x"
        y, context = _pair(f"batch {i}", "x", batch, self.x)
        check_floating("fit_density", name, y)
        check_rows_of(name, self.flow, y, context)
        for what, values in ((name, y), (f"the contexts of {name}", context)):
            if values is not None and not bool(values.isfinite().all()):
                place = tuple((~values.isfinite()).nonzero()[0].tolist())
                raise ValueError(
                    f"fit_density: row {place[0]} of {what} is {values[place].item()} "
                    f"{at(place)}. Drop or fill such rows."
                )
        return Table(y, context)

    def _in_units(self, i: int, table: Table, units: Units) -> Table:
        """The rows in the units of a flow; raises if one is too far out."""
        name, rows = f"batch {i} of x", seen(table, units)
        if units[0] is None:
            check_inside(name, rows.y, self.flow.transform.codomain)
        pairs = ((rows.y, table.y, name), (rows.context, table.context, f"the contexts of {name}"))
        for unit, (near, given, what) in zip(units, pairs, strict=True):
            if unit is None or near is None or given is None:
                continue
            if not bool((near.abs() <= FARTHEST).all()):
                check_nothing_far(what, given, unit)
        return rows

    def _ended(self, count: int) -> ValueError:
        return ValueError(
            f"fit_density: x ended after {count} batch(es) and cannot be started again: it is an "
            "iterator. Give what can be started again (a DataLoader, a list, an object whose "
            "__iter__ makes a new iterator), or an iterator that does not end."
        )

    def batches(self, units: Units, seed: int) -> Iterable[tuple[Tensor, Tensor | None]]:
        """The batches as they come, without the rows that are held out."""
        return _Passes(self, units)


class _Passes:
    """The batches of a source for one run of the loop, which starts them again and again."""

    def __init__(self, source: BatchSource, units: Units) -> None:
        self.source, self.units, self.number = source, units, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        source = self.source
        batches = source._begin(self.number)
        if source.is_iterator:
            batches, source.begun = itertools.chain(source.begun, batches), []
        self.number += 1
        count = count_left = 0
        for i, batch in enumerate(batches):
            count += 1
            source.count_given += 1
            table = without(source._rows(i, batch).to(source._like), source.keys)
            if len(table):
                count_left += 1
                rows = source._in_units(i, table, self.units)
                yield rows.y, rows.context
        if count == 0 and source.is_iterator:
            raise source._ended(source.count_given)
        if count == 0 or count_left == 0:
            raise ValueError(
                f"fit_density: a pass over x gave {count} batch(es), none with rows to train on. "
                "Give more rows, or validation rows of their own."
            )


def source_of(
    flow: Flow,
    x: Rows,
    context: Tensor | None,
    validation: Validation,
    seed: int | None,
    batch_size: int | None,
    recipe: DensityRecipe,
    is_first: bool,
) -> Source:
    """Rows as they were given to `fit_density`."""
    if isinstance(x, Tensor):
        return TableSource(flow, x, context, validation, seed, batch_size, recipe)
    return BatchSource(flow, x, validation, seed, recipe, is_first)


def check_data(
    flow: Flow, x: Rows, context: Tensor | None, validation: Validation, batch_size: int | None
) -> None:
    """Raises unless `fit_density` was given rows, or an iterable of batches, and validation."""
    if isinstance(x, Tensor) or not _is_iterable(x):
        check_events("fit_density", "x", x, flow.event_shape)  # type: ignore[arg-type]
    elif context is not None:
        raise ValueError(
            "fit_density: context belongs to a table of rows; where x gives batches, let it give "
            "pairs of rows and contexts."
        )
    elif batch_size is not None:
        raise ValueError(
            f"fit_density: batch_size is {batch_size}, but x gives batches of its own size."
        )
    if isinstance(validation, tuple):
        if len(validation) != 2:
            raise ValueError(
                f"fit_density: validation is a tuple of {len(validation)}, wanted (rows, contexts)."
            )
    elif not isinstance(validation, Tensor) and not _is_iterable(validation):
        wanted = "a share between 0 and 1, or rows, or rows and their contexts"
        check_number("fit_density", "validation", validation, wanted, above=0, below=1)


def _is_iterable(x: object) -> bool:
    return isinstance(x, Iterable) and not isinstance(
        x, (str, bytes, Mapping, np.ndarray, type, Tensor)
    )


def _validation_rows(flow: Flow, validation: Any, most: int) -> Table:
    """Validation rows that were given, all of a table or the first of batches."""
    if isinstance(validation, Tensor):
        validation = validation, None
    if not isinstance(validation, tuple):
        tables: list[Table] = []
        for i, batch in enumerate(validation):
            pair = _pair(f"batch {i}", "validation", batch, validation)
            tables.append(read_table("validation", flow, *pair))
            if sum(map(len, tables)) >= most:
                break
        validation = _joined(tables).y, _joined(tables).context
    held_out = read_table("validation", flow, *validation)
    if len(held_out) == 0:
        raise ValueError("fit_density: validation has no rows; give some, or a share of x.")
    check_inside("validation", held_out.y, flow.transform.codomain)
    return held_out


def _pair(which: str, name: str, batch: Any, given: Any) -> tuple[Tensor, Tensor | None]:
    """The rows and contexts of a batch, which is one of those given for an argument."""
    parts: Any = (batch,) if isinstance(batch, Tensor) else batch
    is_sequence = isinstance(parts, (tuple, list)) and len(parts) in (1, 2)
    if not is_sequence or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"fit_density: {which} of {name} must be a tensor, or a tuple of rows or of rows and "
            f"contexts, got {shown(batch)}. To give a table, {name} must be a torch.Tensor, got "
            f"{type(given).__name__}; call torch.as_tensor({name}) first."
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def _joined(tables: list[Table]) -> Table:
    if not tables:
        return Table(torch.empty(0, 0), None)
    contexts = [table.context for table in tables if table.context is not None]
    return Table(
        torch.cat([table.y for table in tables]), torch.cat(contexts) if contexts else None
    )


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
