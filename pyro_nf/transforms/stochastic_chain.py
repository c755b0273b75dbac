"""Transforms and stochastic layers one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TypeAlias, cast

from torch import Tensor, nn

from pyro_nf._checks import check_kind, check_listed
from pyro_nf.transforms.base import FlowTransform, check_start, indented
from pyro_nf.transforms.chain import (
    Chain,
    back_through,
    forward_through,
    sizes_of_chain,
    start_through,
)
from pyro_nf.transforms.kinds import LogProbKind, weakest
from pyro_nf.transforms.stochastic import Random, StochasticTransform

Part: TypeAlias = FlowTransform | StochasticTransform


class StochasticChain(StochasticTransform):
    r"""One layer after the other, transforms and stochastic ones; contributions add up.

    .. math:: V = \sum_k V_k(x_{k-1}, x_k)

    It is as good as its weakest part: a bound if one of them draws in the inverse direction, else
    an estimate if a log-determinant is one. The context goes to the parts that take one.

    Args:
        parts: Transforms and stochastic transforms in forward order, at least one.

    Raises:
        ValueError: If there is no part, or if neighbours do not fit: their sizes differ, or what
            the one makes lies outside of what the next one takes.
        TypeError: If a part is of another kind.

    Example:
        >>> from pyro_nf.transforms.linear import LULinear
        >>> StochasticChain([LULinear(2), LULinear(2)]).ladj_kind
        'exact'
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        check_listed("StochasticChain", "parts", parts, "a list of transforms")
        parts = list(parts)
        for part in parts:
            kinds = (FlowTransform, StochasticTransform)
            check_kind("StochasticChain", "every entry of parts", part, kinds)
        if not parts:
            raise ValueError("StochasticChain: parts must have at least one entry, got none.")
        context_dim, event_shape = sizes_of_chain("StochasticChain", parts)
        output_shape = None
        if event_shape is not None:
            output_shape = reduce(lambda shape, part: part.forward_shape(shape), parts, event_shape)
        super().__init__(None, context_dim, event_shape=event_shape, output_shape=output_shape)
        self.parts = nn.ModuleList(parts)
        self.domain, self.codomain = parts[0].domain, parts[-1].codomain
        mine = [part for part in parts if isinstance(part, StochasticTransform)]
        self.random = _union(part.random for part in mine)
        self.has_rsample = all(part.has_rsample for part in mine)

    def _parts(self) -> list[Part]:
        return cast("list[Part]", list(self.parts))

    @property
    def ladj_kind(self) -> LogProbKind:
        return weakest(part.ladj_kind for part in self._parts())

    @property
    def inv(self) -> StochasticChain:
        return StochasticChain([part.inv for part in reversed(self._parts())])

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return forward_through(self._parts(), x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return back_through(self._parts(), y, context)

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        check_start(self, y, context, whiten)
        return start_through(self._parts(), y, context, whiten)

    def __repr__(self) -> str:
        lines = [f"({i}): {indented(repr(part))}" for i, part in enumerate(self._parts())]
        return "\n  ".join([f"StochasticChain({self.extra_repr()})", *lines])


def chained(parts: Iterable[Part]) -> Chain | StochasticChain:
    """The chain of these parts: a transform if all of them are.

    Args:
        parts: As of :class:`~pyro_nf.transforms.chain.Chain` and :class:`StochasticChain`.

    Example:
        >>> from pyro_nf.transforms.linear import LULinear
        >>> type(chained([LULinear(2)])).__name__
        'Chain'
    """
    parts = list(parts)
    if any(isinstance(part, StochasticTransform) for part in parts):
        return StochasticChain(parts)
    return Chain(cast("list[FlowTransform]", parts))


def _union(ways: Iterable[Random]) -> Random:
    """Which directions draw if one of these does."""
    ways = set(ways) - {"neither"}
    if not ways:
        return "neither"
    return ways.pop() if len(ways) == 1 else "both"
