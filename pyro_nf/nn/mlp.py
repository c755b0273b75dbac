"""Conditioners that see their whole input: a perceptron, and a constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from pyro_nf._checks import (
    check_context,
    check_count,
    check_counts,
    check_event_shape,
    check_flag,
    made_by,
    shape_of,
)
from pyro_nf.ops.layout import features_first, flat_event


class MLP(nn.Module):
    r"""A perceptron from ``(x, context)`` to parameters ``(..., output_dim, num_params)``.

    .. math::
        h_1 = W_1 x + V c + b_1, \qquad
        h_{l+1} = [h_l +] W_{l+1} \sigma(h_l) + b_{l+1}, \qquad
        \theta = W \sigma(h_L) + b

    with the skip :math:`[h_l +]` between hidden layers of the same width. The last layer starts at
    zero, so that every transform that it conditions starts at the identity. The context enters as a
    sum: its product with :math:`V` is taken before it is broadcast to the batch of ``x``.

    It is a conditioner of events of any shape, which it sees as vectors.

    Args:
        input_dim: Width of ``x``, or the shape of its event; may be 0.
        output_dim: How many coordinates get parameters, or the shape of their event.
        num_params: How many parameters each of them gets.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers, at least one.
        activation: Makes :math:`\sigma`, which must act on each number alone.
        residual: Whether layers of equal width are joined by a skip.

    Raises:
        ValueError: If there is no hidden layer, or nothing to see.

    Example:
        >>> import torch
        >>> net = MLP(3, 2, 5, context_dim=4, hidden_dims=(16, 16))
        >>> net(torch.zeros(7, 3), torch.zeros(4)).shape
        torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        output_dim: int | Sequence[int],
        num_params: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = shape_of("MLP", "input_dim", input_dim, at_least=0)
        check_count("MLP", "context_dim", context_dim, at_least=0)
        self.output_shape = (*shape_of("MLP", "output_dim", output_dim), num_params)
        check_count("MLP", "num_params", num_params)
        check_counts("MLP", "hidden_dims", hidden_dims)
        check_flag("MLP", "residual", residual)
        self.input_dim, self.context_dim = self.input_shape.numel(), context_dim
        if self.input_dim + context_dim == 0:
            raise ValueError("MLP: input_dim and context_dim are both 0; use Constant instead.")
        self.first = Linear(self.input_dim, hidden_dims[0]) if self.input_dim else None
        self.context = nn.Linear(context_dim, hidden_dims[0]) if context_dim else None
        last = Linear(hidden_dims[-1], math.prod(self.output_shape))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        layers: list[nn.Module] = []
        for a, b in pairwise(hidden_dims):
            skip = residual and a == b
            made = made_by("MLP", activation)
            layer = (made if skip else _in_place(made), Linear(a, b))
            layers += [Skip(*layer)] if skip else layer
        self.rest = nn.Sequential(*layers, _in_place(made_by("MLP", activation)), last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        event_dim = len(self.input_shape)
        if self.context_dim or context is not None:
            check_context("MLP", context, self.context_dim)
        if self.input_dim:
            check_event_shape("MLP", "x", x, self.input_shape, event_dim)
            x = flat_event(x, event_dim) if event_dim != 1 else x
        if self.context is None:
            batch_shape, h = x.shape[:-1], cast(Linear, self.first)(features_first(x))
        else:
            s = self.context(context)
            if self.first is not None:
                seen = self.first(features_first(x)).T
                s = seen.reshape(*x.shape[:-1], self.first.out_features) + s
            batch_shape, h = s.shape[:-1], features_first(s)
        return self.rest(h).T.reshape(*batch_shape, *self.output_shape)


class Linear(nn.Linear):
    """A linear layer that takes and gives features first, ``(features, N)``, as its bias lies."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(self.bias.detach().unsqueeze(-1))

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``W input + b``."""
        return torch.addmm(self.bias, self.weight, input)


def _in_place(activation: nn.Module) -> nn.Module:
    """The activation in the memory of its input, if it can: fresh memory costs more than ReLU."""
    if isinstance(activation, nn.ReLU):
        activation.inplace = True
    return activation


class Skip(nn.Sequential):
    """Layers with a skip around them, :math:`h + f(h)`."""

    def forward(self, h: Tensor) -> Tensor:
        """Returns ``h + f(h)``, of the shape of ``h``."""
        return h + cast(Tensor, super().forward(h))


class Constant(nn.Module):
    r"""Parameters that see no ``x``: free numbers, plus a perceptron of the context if any.

    .. math:: \theta = \theta_0 + \operatorname{MLP}(c)

    Args:
        output_dim: How many coordinates get parameters, or the shape of their event.
        num_params: How many parameters each of them gets.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers of the perceptron.
        activation: Makes its activation.

    Example:
        >>> Constant(2, 5)(None).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        output_dim: int | Sequence[int],
        num_params: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        output_shape = shape_of("Constant", "output_dim", output_dim)
        check_count("Constant", "num_params", num_params, at_least=0)
        check_count("Constant", "context_dim", context_dim, at_least=0)
        check_counts("Constant", "hidden_dims", hidden_dims)
        made_by("Constant", activation)
        self.context_dim = context_dim
        self.value = nn.Parameter(torch.zeros(*output_shape, num_params))
        self.net = (
            MLP(
                0,
                output_shape,
                num_params,
                context_dim,
                hidden_dims=hidden_dims,
                activation=activation,
            )
            if context_dim and num_params
            else None
        )

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        check_context("Constant", context, self.context_dim)
        return self.value if self.net is None else self.value + self.net(x, context)
