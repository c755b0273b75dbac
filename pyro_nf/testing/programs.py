"""The laws of transforms under torch's own transformations: compilers and vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from pyro_nf.testing.cases import EXACT, close, close_ladj, context_of, fast_directions, points_of
from pyro_nf.transforms.base import FlowTransform


class _Watch(TorchFunctionMode):
    """Sees whether a function calls ``torch.autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= func is torch.autograd.grad
        return func(*args, **(kwargs or {}))


def _differentiates(
    direction: Callable[..., object], value: Tensor, context: Tensor | None
) -> bool:
    """Whether a direction takes slopes by autograd: torch neither maps nor compiles those."""
    with _Watch() as watch:
        direction(value, context)
    return watch.seen


def compiles(transform: FlowTransform) -> None:
    """The fast directions are one graph for torch.compile, but for slopes by autograd."""
    context = context_of(transform, 4)
    for name, direction in fast_directions(transform):
        value = points_of(transform, 4)
        if name == "inverse":
            value = transform.forward_and_ladj(value, context)[0].detach()
        if _differentiates(direction, value, context):
            continue
        torch.compiler.reset()
        compiled = torch.compile(direction, fullgraph=True, backend="aot_eager")
        got, wanted = compiled(value, context), direction(value, context)
        close(f"compiled {name}", got[0], wanted[0], EXACT)
        close_ladj(transform, f"compiled ladj of {name}", got[1], wanted[1], EXACT)


def vmaps(transform: FlowTransform) -> None:
    """The fast directions run under vmap over points, but for slopes by autograd."""
    context = context_of(transform, 4)
    for name, direction in fast_directions(transform):
        value = points_of(transform, 4)
        if name == "inverse":
            value = transform.forward_and_ladj(value, context)[0].detach()
        if _differentiates(direction, value, context):
            continue
        dims, noise = (0, None if context is None else 0), "different"
        got = vmap(direction, in_dims=dims, randomness=noise)(value, context)
        close(f"vmap of {name}", got[0], direction(value, context)[0], EXACT)
        wanted = direction(value, context)[1]
        close_ladj(transform, f"vmap of the ladj of {name}", got[1], wanted, EXACT)
