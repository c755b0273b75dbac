"""Batches of rows, one pass over them after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_nf._checks import check_count, check_kind, check_listed, check_seed


class Minibatches:
    """Shuffled batches of the rows of some tensors, one pass over the rows after the other.

    The last rows of a pass that do not fill a batch are left out of that pass.

    Args:
        tensors: Tensors with the same number of rows; None stays None.
        batch_size: Rows in a batch; at most all of them.
        seed: Seed of the order, which is the batches' own: a resumed fit sees the same one.

    Raises:
        ValueError: If ``batch_size`` is not positive.

    Example:
        >>> batches = iter(Minibatches((torch.arange(6.0),), batch_size=2))
        >>> len({float(v) for _ in range(3) for v in next(batches)[0]})
        6
    """

    def __init__(self, tensors: Sequence[Tensor | None], batch_size: int, seed: int = 0) -> None:
        check_count("Minibatches", "batch_size", batch_size)
        check_seed("Minibatches", seed)
        check_listed("Minibatches", "tensors", tensors, "a tuple of tensors")
        self.tensors = tuple(tensors)
        for tensor in self.tensors:
            check_kind("Minibatches", "every entry of tensors", tensor, Tensor, optional=True)
        sizes = {tuple(t.shape[:1]) for t in self.tensors if t is not None}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            shapes = [None if t is None else tuple(t.shape) for t in self.tensors]
            raise ValueError(
                f"Minibatches: tensors must have one number of rows, at least 1, got {shapes}."
            )
        self.rows = next(len(t) for t in self.tensors if t is not None)
        self.batch_size = min(batch_size, self.rows)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        order = torch.randperm(self.rows, generator=self.generator)
        for i in range(0, self.rows - self.batch_size + 1, self.batch_size):
            rows = order[i : i + self.batch_size]
            yield tuple(None if t is None else t[rows.to(t.device)] for t in self.tensors)


def passes(
    batches: Iterable[Any],
    randomness: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Any]:
    """The batches of an iterable, which is started again whenever it is exhausted.

    Args:
        batches: Gives the batches.
        randomness: Surrounds each step of the iterable, which may draw random numbers.

    Raises:
        ValueError: If a pass gives no batch.
    """
    number = total = 0
    while True:
        count = 0
        with randomness():
            source = begin_pass(batches, number)
        while True:
            with randomness():
                batch = next(source, _END)
            if batch is _END:
                break
            count += 1
            yield batch
        total += count
        if count == 0:
            after = f" in pass {number + 1}, after {total} in all" if number else ""
            raise ValueError(
                f"train: batches gave no batch{after}. Give an iterable that can be started again "
                "(a list, a DataLoader), not an iterator that ends."
            )
        number += 1


def begin_pass(batches: Iterable[Any], number: int) -> Iterator[Any]:
    """Start an iterable; a sampler that shuffles by the number of the pass is told of it.

    Args:
        batches: The iterable.
        number: How many passes came before.
    """
    for name in ("sampler", "batch_sampler", "dataset"):
        set_epoch = getattr(getattr(batches, name, None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
    return iter(batches)


def part_of(batch: Any, rank: int, size: int) -> tuple[Any, float]:
    """The rows of a batch that are one process's, and the weight of their mean.

    The mean over the processes of weight times mean is the mean over all rows. Of a batch without
    rows each process has the whole.

    Args:
        batch: Tensors with the same number of rows, in tuples, lists and dicts.
        rank: The number of the process.
        size: How many there are.

    Example:
        >>> part_of((torch.arange(5), None), rank=1, size=2)
        ((tensor([3, 4]), None), 0.8)
    """
    counts = {len(tensor) if tensor.dim() else 0 for tensor in _tensors_in(batch)}
    count = next(iter(counts), 0)
    if len(counts) != 1 or count == 0:
        return batch, 1.0
    mine = torch.arange(count).tensor_split(size)[rank].tolist()
    if not mine:  # fewer rows than processes
        return _cut(batch, slice(1)), 0.0
    return _cut(batch, slice(mine[0], mine[-1] + 1)), len(mine) * size / count


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (dict, tuple, list)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors_in(part)


def _cut(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, dict):
        return {key: _cut(part, rows) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_cut(part, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


_END = object()
