"""Where tensors live, and what their device can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Devices without double precision.
_SINGLE_ONLY = ("mps",)


def in_double(x: Tensor) -> Tensor:
    """A tensor in double precision: where it is, or on the CPU if its device has only single.

    Args:
        x: Any tensor.

    Example:
        >>> in_double(torch.ones(2)).dtype, in_double(torch.ones(2)).device.type
        (torch.float64, 'cpu')
    """
    return (x.cpu() if x.device.type in _SINGLE_ONLY else x).double()


def device_of(*values: Any) -> torch.device | None:
    """The device of the first tensor among values, in lists, mappings and Modules too.

    Args:
        *values: Anything.

    Returns:
        None if there is no tensor.

    Example:
        >>> device_of(3, {"x": [torch.ones(2, device="meta")]})
        device(type='meta')
        >>> device_of("text") is None
        True
    """
    for value in values:
        found: torch.device | None = None
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, nn.Module):
            found = device_of(*value.parameters(), *value.buffers())
        elif isinstance(value, Mapping):
            found = device_of(*value.values())
        elif isinstance(value, (list, tuple)):
            found = device_of(*value)
        if found is not None:
            return found
    return None
