"""When a gradient may be written by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def by_hand() -> bool:
    """Whether a :class:`torch.autograd.Function` may stand for a formula.

    It saves time and memory, but :mod:`torch.func`, forward-mode derivatives, tracers and compilers
    want the formula itself.

    Example:
        >>> by_hand(), torch.func.vmap(lambda x: x + by_hand())(torch.zeros(2)).tolist()
        (True, [0.0, 0.0])
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def final(*grads: Tensor) -> bool:
    """Whether a backward pass may overwrite memory: nobody differentiates it or asks for many.

    Args:
        grads: The gradients that have arrived.

    Example:
        >>> with torch.no_grad():  # as a backward pass is, unless its graph is wanted
        ...     inside = final(torch.ones(2))
        >>> inside, final(torch.ones(2))
        (True, False)
    """
    if torch.is_grad_enabled() or not by_hand():
        return False
    return not any(map(torch._C._functorch.is_legacy_batchedtensor, grads))  # is_grads_batched
