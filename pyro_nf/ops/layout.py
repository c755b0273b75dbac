"""How batches lie in memory."""

from __future__ import annotations

from torch import Tensor


def features_first(t: Tensor) -> Tensor:
    """Turns ``(..., features)`` into ``(features, N)``, which wastes less memory and time.

    Products with narrow matrices are several times faster so, and a feature is one piece of memory.
    The transpose of the result lies so too, and is turned at no cost.

    Example:
        >>> import torch
        >>> features_first(torch.zeros(5, 4, 3)).shape
        torch.Size([3, 20])
    """
    if _in_columns(t):
        return t.T
    return t.reshape(t.shape[:-1].numel(), t.shape[-1]).T.contiguous()


def in_columns(t: Tensor) -> Tensor:
    """The same tensor ``(..., features)``, but each feature is one piece of memory."""
    if _in_columns(t):
        return t
    columns = features_first(t)
    return columns.T if t.dim() == 2 else columns.T.reshape(t.shape)


def _in_columns(t: Tensor) -> bool:
    """Whether it lies so already, like all but the first in a chain."""
    return t.dim() == 2 and t.stride(0) == 1


def turned(t: Tensor) -> Tensor:
    """Turns the order of all dimensions round: batches come last. A view, its own inverse.

    Example:
        >>> import torch
        >>> turned(torch.zeros(5, 4, 3)).shape
        torch.Size([3, 4, 5])
    """
    return t.permute(tuple(reversed(range(t.dim()))))


def flat_event(t: Tensor, event_dim: int) -> Tensor:
    """Makes a vector of each event: ``(..., *event)`` as ``(..., D)``.

    Args:
        t: Any shape.
        event_dim: How many of its last dimensions are the event.

    Example:
        >>> import torch
        >>> flat_event(torch.zeros(5, 4, 3), 2).shape, flat_event(torch.zeros(5), 0).shape
        (torch.Size([5, 12]), torch.Size([5, 1]))
    """
    if event_dim == 1:
        return t
    start = t.dim() - event_dim
    return t.reshape(*t.shape[:start], t.shape[start:].numel())


def sum_event(t: Tensor, event_dim: int) -> Tensor:
    """Sums over the event: ``(..., *event)`` becomes ``(...)``.

    Args:
        t: Any shape.
        event_dim: How many of its last dimensions are the event.

    Example:
        >>> import torch
        >>> sum_event(torch.ones(5, 4, 3), 2).tolist()
        [12.0, 12.0, 12.0, 12.0, 12.0]
    """
    if event_dim == 1:
        return t.sum(-1)
    return flat_event(t, event_dim).sum(-1)
