"""Small gradients, and when a gradient may be written by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


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


def unwatched() -> AbstractContextManager[Any]:
    """No anomaly detection inside: it looks at values, which batched gradients do not have.

    Example:
        >>> with unwatched():
        ...     torch.is_anomaly_enabled()
        False
    """
    # The switch is of the whole process: where it is off nothing is touched.
    watched = torch.is_anomaly_enabled()
    return torch.autograd.set_detect_anomaly(False) if watched else nullcontext()


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients of the sum of ``value``, zero where it is constant; the graph is kept.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradients(x.square(), x), gradients(torch.zeros(2), x)
        ((tensor([2., 2.]),), (tensor([0., 0.]),))
    """
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(value.sum(), inputs, retain_graph=True, materialize_grads=True)


def apart(x: Tensor) -> Tensor:
    """The same numbers as a node of their own in the graph.

    A slope by autograd is then that of what is computed from this node alone, although parameters
    beside it may have been computed from ``x`` too.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> node, params = apart(x), 2 * x
        >>> torch.autograd.grad((node * params).sum(), node)[0].tolist()
        [2.0, 2.0]
    """
    return x.view_as(x) if x.requires_grad else x


def leaf(x: Tensor) -> Tensor:
    """A tensor of the same values that a slope can be taken with respect to.

    One that was made in inference mode is copied, since torch never differentiates by those. Call
    it outside of that mode.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(1)
        >>> leaf(x).requires_grad
        True
    """
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def derivative(activation: nn.Module, s: Tensor) -> Tensor:
    r"""Returns :math:`\sigma'(s)` of an activation that acts on each number alone, without a graph.

    Example:
        >>> derivative(nn.ReLU(), torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 1.0]
    """
    if type(activation) is nn.SiLU:  # several times quicker than by autograd
        return torch.ops.aten.silu_backward(torch.ones_like(s), s.detach())
    if type(activation) is nn.ReLU:
        return (s.detach() > 0).to(s)
    with torch.inference_mode(False), torch.enable_grad():
        s = leaf(s)
        return gradients(activation(s.clone()), s)[0]
