"""Transforms one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any, cast

from pyro.distributions import constraints
from torch import Size, Tensor, nn

from pyro_nf._checks import check_kind, check_listed, size_of
from pyro_nf.ops.spaces import describe, is_within
from pyro_nf.transforms.base import Fast, FlowTransform, check_start, indented
from pyro_nf.transforms.kinds import LadjKind, weakest


class Chain(FlowTransform):
    r"""One transform after the other, :math:`y = T_K(\dots T_2(T_1(x)))`; ladjs add up.

    The context goes to the parts that take one. A direction is fast if it is fast in every part;
    the inverse is exact if every part's is, and so is the ladj.

    Args:
        parts: Transforms in forward order, at least one.

    Raises:
        ValueError: If there is no part, or if neighbours do not fit: their shapes differ, or what
            the one makes lies outside of what the next one takes.
        TypeError: If a part is not a FlowTransform.

    Example:
        >>> import torch
        >>> from pyro_nf.transforms.permutation import Permutation
        >>> chain = Chain([Permutation([1, 2, 0]), Permutation([1, 2, 0])])
        >>> chain(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [3.0, 1.0, 2.0]
    """

    def __init__(self, parts: Iterable[FlowTransform]) -> None:
        check_listed("Chain", "parts", parts, "a list of transforms")
        parts = list(parts)
        for part in parts:
            do = "layers that draw or lose something go into a StochasticChain"
            check_kind("Chain", "every entry of parts", part, FlowTransform, do)
        if not parts:
            raise ValueError("Chain: parts must have at least one transform, got none.")
        context_dim, event_shape = sizes_of_chain("Chain", parts)
        super().__init__(context_dim=context_dim, event_shape=event_shape)
        self.parts = nn.ModuleList(parts)
        self.fast = _common_way([part.fast for part in parts])
        self.inverse_kind = (
            "exact" if all(part.inverse_kind == "exact" for part in parts) else "numeric"
        )
        self.ladj_kind = cast(LadjKind, weakest(part.ladj_kind for part in parts))
        self.domain, self.codomain = parts[0].domain, parts[-1].codomain

    def forward_shape(self, shape: Sequence[int]) -> Size:
        shape = size_of("Chain", "shape", shape)
        for part in self._parts():
            shape = Size(part.forward_shape(shape))
        return shape

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        shape = size_of("Chain", "shape", shape)
        for part in reversed(self._parts()):
            shape = Size(part.inverse_shape(shape))
        return shape

    def __repr__(self) -> str:
        parts = self._parts()
        lines = [f"({i}): {indented(repr(part))}" for i, part in enumerate(parts)]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES - 2 : -1] = [f"... {len(lines) - _MOST_LINES + 1} more ..."]
        return "\n  ".join([f"Chain of {len(parts)}, fast={self.fast!r}", *lines])

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return forward_through(self._parts(), x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return back_through(self._parts(), y, context)

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ladjs = []
        for part in self._parts():
            x, ladj, score = part._push_score(x, score, context if part.context_dim else None)
            ladjs.append(ladj)
        return x, reduce(add, ladjs), score

    def _parts(self) -> list[FlowTransform]:
        return cast("list[FlowTransform]", list(self.parts))

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        check_start(self, y, context, whiten)
        return start_through(self._parts(), y, context, whiten)


_MOST_LINES = 12  # of a chain that is printed


def forward_through(
    parts: Sequence[Any], x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From base to data through parts of either kind, which get the context if they take one.

    Args:
        parts: Transforms or stochastic transforms in forward order.
        x: Points on the base side of the first part.
        context: Of those that take one, or None.

    Returns:
        ``y``, and the sum of what the parts contribute.
    """
    ladjs = []
    for part in parts:
        x, ladj = part._forward_and_ladj(x, context if part.context_dim else None)
        ladjs.append(ladj)
    return x, reduce(add, ladjs)


def back_through(parts: Sequence[Any], y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`forward_through`, from data to base.

    Args:
        parts: Transforms or stochastic transforms in forward order.
        y: Points on the data side of the last part.
        context: Of those that take one, or None.

    Returns:
        ``x``, and the sum of what the parts contribute.
    """
    ladjs = []
    for part in reversed(parts):
        y, ladj = part._inverse_and_ladj(y, context if part.context_dim else None)
        ladjs.append(ladj)
    return y, reduce(add, ladjs)


def start_through(parts: Sequence[Any], y: Tensor, context: Tensor | None, whiten: bool) -> Tensor:
    """Sets all parts from data, the last one first, and returns the data as the base sees them.

    Args:
        parts: Transforms or stochastic transforms in forward order.
        y: Data, the rows first.
        context: Their contexts, or None.
        whiten: Whether linear maps remove correlations too.
    """
    for part in reversed(parts):
        y = part.start_from_data(y, context if part.context_dim else None, whiten=whiten)
    return y


def sizes_of_chain(owner: str, parts: Sequence[Any]) -> tuple[int, Size | None]:
    """The width of the context that parts in a row take, and the shape of the first event.

    Args:
        owner: The chain, in messages.
        parts: What it is made of, in forward order.

    Raises:
        ValueError: If neighbours do not fit.
    """
    for i, (part, following) in enumerate(pairwise(parts)):
        if not is_within(part.codomain, following.domain):
            raise ValueError(
                f"{owner}: part {i}, {type(part).__name__}, makes {_points(part.codomain)}, but "
                f"part {i + 1}, {type(following).__name__}, takes {_points(following.domain)}. "
                "Put a map from the one onto the other between them, or change their order."
            )
    dims = [part.context_dim for part in parts if part.context_dim]
    if len(set(dims)) > 1:
        raise ValueError(f"{owner}: all parts must share one context_dim, got {dims}.")
    return max(dims, default=0), _first_shape(owner, parts)


def _points(space: constraints.Constraint) -> str:
    """A space in words, with the number of dimensions of its events."""
    kind = {0: "single numbers", 1: "vectors"}.get(space.event_dim, f"{space.event_dim}-D events")
    whole = "of whole numbers " if space.is_discrete else ""
    return f"{kind} {whole}in {describe(space)}"


def _first_shape(owner: str, parts: Sequence[Any]) -> Size | None:
    """The event shape that a chain takes, None for any; raises if neighbours do not fit."""
    known = [i for i, part in enumerate(parts) if part.event_shape is not None]
    if not known:
        return None
    first = shape = reduce(
        lambda shape, part: Size(part.inverse_shape(shape)),
        reversed(parts[: known[0]]),
        cast(Size, parts[known[0]].event_shape),
    )
    for i, part in enumerate(parts):
        if part.event_shape not in (None, shape):
            raise ValueError(
                f"{owner}: part {i - 1}, {type(parts[i - 1]).__name__}, makes events of shape "
                f"{tuple(shape)}, but part {i}, {type(part).__name__}, takes events of shape "
                f"{tuple(part.event_shape or ())}. Give both parts the same event_shape (for "
                "vectors, input_dim), or put a map from the one onto the other between them."
            )
        shape = Size(part.forward_shape(shape))
    return first


def _common_way(ways: list[Fast]) -> Fast:
    forward = all(way in ("forward", "both") for way in ways)
    inverse = all(way in ("inverse", "both") for way in ways)
    if forward:
        return "both" if inverse else "forward"
    return "inverse" if inverse else "neither"
