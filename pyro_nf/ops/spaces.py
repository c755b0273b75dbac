"""Spaces that maps go between: the points inside of them, and which holds which."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint


def inner_point(value: Tensor, low: float, high: float) -> Tensor:
    """The nearest finite number strictly inside ``(low, high)``; NaN stays NaN.

    What lies inside may be rounded to an end, where densities are 0 or infinite.

    Args:
        value: Any shape.
        low: The left end, -inf for none.
        high: The right end, inf for none.

    Example:
        >>> 1 - inner_point(torch.tensor([0.25, 1.0, 7.0]), 0.0, 1.0)
        tensor([7.5000e-01, 5.9605e-08, 5.9605e-08])
    """
    kind = torch.finfo(value.dtype)
    if low == 0:
        low = kind.tiny
    elif math.isfinite(low):
        low += 0.5 * kind.eps * abs(low)
    if math.isfinite(high):
        high -= 0.5 * kind.eps * abs(high)
    return value.clamp(max(low, kind.min), min(high, kind.max))


def over_events(space: Constraint, event_dim: int) -> Constraint:
    """The space of events whose every entry is in ``space``.

    Args:
        space: A space of numbers.
        event_dim: How many dimensions an event has: 1 for vectors.

    Example:
        >>> over_events(constraints.real, 1) is constraints.real_vector
        True
        >>> over_events(constraints.real, 3).event_dim
        3
    """
    if event_dim == 1 and space is constraints.real:
        return constraints.real_vector
    return constraints.independent(space, event_dim) if event_dim else space


def is_all_real(space: Constraint) -> bool:
    """Whether a space has every event of real numbers.

    Example:
        >>> is_all_real(over_events(constraints.real, 3)), is_all_real(constraints.positive)
        (True, False)
    """
    return _of_coordinates(space) is constraints.real


def zero_outside(ladj: Tensor, value: Tensor, space: Constraint) -> Tensor:
    """The log-determinant ``ladj``, but -inf where ``value`` is outside of ``space``, or infinite.

    A density has the ladj of the inverse as a summand, so it is 0 there.

    Args:
        ladj: Of a map of single numbers that takes ``value``.
        value: Of that shape.
        space: A space of numbers.

    Example:
        >>> unit = constraints.unit_interval
        >>> zero_outside(torch.zeros(3), torch.tensor([-1.0, 1.0, 2.0]), unit).tolist()
        [-inf, 0.0, -inf]
    """
    return torch.where(space.check(value) & ~value.isinf(), ladj, -torch.inf)


def ends(space: Constraint) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest coordinate of the points of a space; None if it is not known.

    Args:
        space: The space; of vectors it may be too.

    Returns:
        Both ends in float64, of shape ``()``, or ``(D,)`` if coordinates differ.

    Example:
        >>> ends(constraints.independent(constraints.unit_interval, 1))
        (tensor(0., dtype=torch.float64), tensor(1., dtype=torch.float64))
        >>> ends(constraints.simplex) is None
        True
    """
    space = _of_coordinates(space)
    if isinstance(space, constraints.cat):
        return _ends_of_parts(space)
    low, high = getattr(space, "lower_bound", None), getattr(space, "upper_bound", None)
    if low is None and high is None and space is not constraints.real:
        return None
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return torch.as_tensor(low).cpu().double(), torch.as_tensor(high).cpu().double()


def _ends_of_parts(space: constraints.cat) -> tuple[Tensor, Tensor] | None:
    """Those of each coordinate, ``(D,)``, or of each entry along the axis of the parts."""
    lows, highs = [], []
    for part, length in zip(space.cseq, space.lengths, strict=True):
        known = ends(part)
        if known is None:
            return None
        lows.append(known[0].expand(length))
        highs.append(known[1].expand(length))
    along = (-1, *(1,) * (-1 - space.dim))
    return torch.cat(lows).reshape(along), torch.cat(highs).reshape(along)


def is_within(inner: Constraint, outer: Constraint) -> bool:
    """Whether the points of ``inner`` are in ``outer``, but for ends; True if it cannot be told.

    Args:
        inner: One space, for example what a map makes.
        outer: Another one, for example what the next map takes.

    Example:
        >>> unit, positive = constraints.unit_interval, constraints.positive
        >>> is_within(unit, positive), is_within(positive, unit)
        (True, False)
    """
    if inner.event_dim != outer.event_dim or (outer.is_discrete and not inner.is_discrete):
        return False
    inside, outside = ends(inner), ends(outer)
    if inside is None or outside is None:
        # a space of another kind, as the simplex: it holds itself, and it lies in R^n
        same = type(_of_coordinates(inner)) is type(_of_coordinates(outer))
        return same or _of_coordinates(outer) is constraints.real
    return bool((outside[0] <= inside[0]).all() and (inside[1] <= outside[1]).all())


def at_ends(value: Tensor, space: Constraint) -> Tensor:
    """Which entries are at an end of a space or beyond it, where no density can be fitted.

    The ends of a discrete space belong to it, and what is no whole number lies outside.

    Args:
        value: Points, shape ``(..., D)``.
        space: The space that they should lie in.

    Returns:
        True for each such entry, ``(..., D)``; all False where the ends are not known.

    Example:
        >>> at_ends(torch.tensor([0.0, 0.5, 2.0]), constraints.unit_interval).tolist()
        [True, False, True]
    """
    known = ends(space)
    outside = torch.zeros_like(value, dtype=torch.bool)
    if space.is_discrete:
        outside = value != value.round()
    if known is None:
        return outside
    low, high = (end.to(value) for end in known)
    if space.is_discrete:
        return outside | (value < low) | (value > high)
    return (value <= low) | (value >= high)


def describe(space: Constraint) -> str:
    """A space in words: its ends if it has some, else its name.

    Example:
        >>> describe(constraints.unit_interval), describe(constraints.real_vector)
        ('(0, 1)', 'the real numbers')
    """
    known = ends(space)
    if known is None:
        return str(_of_coordinates(space))
    pairs = torch.stack(torch.broadcast_tensors(*known), -1).reshape(-1, 2).tolist()
    spans = [
        "the real numbers" if high == math.inf == -low else f"({low:g}, {high:g})"
        for low, high in pairs
    ]
    return spans[0] if len(set(spans)) == 1 else " x ".join(spans)


def _of_coordinates(space: Constraint) -> Constraint:
    while isinstance(space, constraints.independent):
        space = space.base_constraint
    return space
