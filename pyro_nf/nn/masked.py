"""The masked network of an autoregressive transform."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pyro_nf._checks import check_count, check_counts, check_dims, check_flag, made_by
from pyro_nf.ops.gradients import by_hand, final
from pyro_nf.ops.layout import features_first

# A triangular product is cut into at most MAX_STRIPS strips, none thinner than MIN_STRIP rows: more
# strips skip more of the half that is zero, thinner ones cost more in calls than they save. Nor do
# they pay below WORTH_STRIPS multiplications.
MAX_STRIPS = 8
MIN_STRIP = 32
WORTH_STRIPS = 2**22
# Below this many multiplications in all layers autograd, which is not written in Python, is faster
# with many small steps than with one large one.
WORTH_ONE_STEP = 2**24


class Groups(NamedTuple):
    """How the sorted entries of a layer fall into groups, one for each coordinate.

    Attributes:
        sizes: How many entries each group has, ``D`` numbers.
        ends: Where the groups begin and end, ``D + 1`` numbers.
    """

    sizes: list[int]
    ends: list[int]

    @classmethod
    def of(cls, sizes: list[int]) -> Groups:
        """The groups of these sizes."""
        return cls(sizes, [0, *accumulate(sizes)])

    def span(self, first: int, last: int) -> slice:
        """The entries of the groups from ``first`` to before ``last``."""
        return slice(self.ends[first], self.ends[last])


class MaskedNet(nn.Module):
    r"""A network whose parameters of coordinate ``i`` see only the coordinates before ``i``.

    .. math::
        s_1 = W_1 x + V c + b_1, \qquad
        s_{l+1} = [s_l +] W_{l+1} \sigma(s_l) + b_{l+1}, \qquad
        \theta = s_{L+1}

    with the skip :math:`[s_l +]`, if wanted, between hidden layers of the same width. Every hidden
    unit has a degree: a unit of degree ``m`` sees :math:`x_{<m}`, and :math:`\theta_i` sees the
    units of degree at most ``i``. Units are sorted by degree and the degrees spread evenly, so that
    every :math:`W_l` is block lower triangular, with one row of blocks for each coordinate; nothing
    is random but the weights. Wide layers skip the half of their product that is zero, and
    :mod:`pyro_nf.nn.triangular` solves with the network as one solves with a triangular matrix.

    The last layer starts at zero, and :math:`\theta = 0` is the identity of every univariate map.
    Every coordinate sees the context, whose product with ``V`` is taken before it is broadcast to
    the batch of ``x``.

    *MADE: Masked Autoencoder for Distribution Estimation* (Germain, Gregor, Murray, Larochelle,
    2015).

    Args:
        input_dim: How many coordinates ``x`` has, ``D``.
        num_params: How many parameters each of them gets, ``P``.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the ``L`` hidden layers; with none :math:`\theta` is linear in ``x``.
        activation: Makes :math:`\sigma`, which must act on each number alone. If it can be made to
            overwrite its input (``inplace``), it is, where no skip forbids it.
        residual: Whether hidden layers of equal width are joined by a skip.

    Attributes:
        layers: The :class:`MaskedLinear` layers, ``L + 1`` of them.
        skips: For each layer after the first, whether it has a skip.
        groups: For ``x``, each hidden layer and the parameters: which belong to each coordinate.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> import torch
        >>> net = MaskedNet(3, 2, context_dim=4, hidden_dims=(16, 16))
        >>> net(torch.zeros(7, 3), torch.zeros(4)).shape
        torch.Size([7, 3, 2])
    """

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_dims("MaskedNet", input_dim, context_dim)
        check_count("MaskedNet", "num_params", num_params, at_least=0)
        check_counts("MaskedNet", "hidden_dims", hidden_dims, empty=True)
        check_flag("MaskedNet", "residual", residual)
        made = made_by("MaskedNet", activation)
        self.input_dim, self.num_params, self.context_dim = input_dim, num_params, context_dim
        # Without a context a unit of degree 0 is a constant: there are some only if D is 1.
        lowest = 0 if context_dim else min(1, input_dim - 1)
        degrees = [
            torch.arange(input_dim),
            *(_spread(width, lowest, input_dim - 1) for width in hidden_dims),
            torch.arange(input_dim).repeat_interleave(num_params),
        ]
        # A unit of degree m sees x_j for j < m only, but all units of degree <= m.
        layers = [
            MaskedLinear(before, after, strict=before is degrees[0])
            for before, after in pairwise(degrees)
        ]
        self.layers = nn.ModuleList(layers)
        self.skips = [residual and a == b for a, b in pairwise(hidden_dims)]
        if hidden_dims:
            self.skips.append(False)
        self.groups = [Groups.of(units.bincount(minlength=input_dim).tolist()) for units in degrees]
        self.context = nn.Linear(context_dim, len(degrees[1]), bias=False) if context_dim else None
        self.activation = made if any(self.skips) else _in_place(made)
        self.count_weights = sum(layer.count_weights for layer in layers)
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        if self.context is not None and not hidden_dims:
            nn.init.zeros_(self.context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            batch_shape = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            x = x.expand(*batch_shape, self.input_dim)
        if self.rectified and by_hand() and self._is_worth_one_step(x):
            layers = cast("list[MaskedLinear]", list(self.layers))
            columns, offset = features_first(x), self.offset(x.shape[:-1], context)
            if torch.is_grad_enabled():
                weights, biases = zip(
                    *[(layer.weight, layer.bias) for layer in layers], strict=True
                )
                theta = _RectifiedPass.apply(layers, columns, offset, *weights, *biases[1:])
            else:
                theta = _rectified(layers, columns, offset)
        else:
            for s in self._propagate(x, context, self.activation):
                theta = s  # keep none but the last: memory is dearer than an activation
        return theta.T.reshape(*x.shape, self.num_params)

    def _is_worth_one_step(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return True
        return self.count_weights * x.shape[:-1].numel() >= WORTH_ONE_STEP

    @property
    def rectified(self) -> bool:
        r"""Whether all between the layers is :math:`\max(s, 0)`, which may overwrite ``s``."""
        return type(self.activation) is nn.ReLU and not any(self.skips)

    def sums(self, x: Tensor, context: Tensor | None = None) -> list[Tensor]:
        r"""Returns :math:`s_1, \dots, s_{L+1}`, features first: each of shape ``(width, N)``.

        Args:
            x: Shape ``(..., D)``, a batch of ``N``.
            context: Shape ``(..., C)``, whose batch broadcasts to that of ``x``.
        """
        return list(self._propagate(x, context, lambda s: self.activation(s.clone())))

    def _propagate(
        self, x: Tensor, context: Tensor | None, activation: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        first, *rest = self.layers
        start = first(features_first(x), self.offset(x.shape[:-1], context))
        return propagate(start, rest, self.skips, activation)

    def offset(self, batch_shape: Sequence[int], context: Tensor | None) -> Tensor:
        """Returns :math:`V c + b_1`, of shape ``(width, N)``, or ``(width, 1)`` without context."""
        bias = cast(MaskedLinear, next(iter(self.layers))).bias  # quicker than an index
        if self.context is None:
            return bias
        offset = self.context(context) + bias.squeeze(-1)
        return offset.expand(*batch_shape, -1).reshape(-1, len(bias)).T


def propagate(
    s: Tensor,
    layers: Iterable[Callable[[Tensor], Tensor]],
    skips: Iterable[bool],
    activation: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    r"""Yields ``s`` and what follows: :math:`s_{l+1} = [s_l +] W_{l+1} \sigma(s_l) + b_{l+1}`."""
    yield s
    for layer, skip in zip(layers, skips, strict=True):
        s = s + layer(activation(s)) if skip else layer(activation(s))
        yield s


def _in_place(activation: nn.Module) -> nn.Module:
    """Makes the activation overwrite its input, if it can."""
    if "inplace" in vars(activation):
        activation = copy(activation)
        vars(activation)["inplace"] = True
    return activation


def _spread(width: int, lowest: int, highest: int) -> Tensor:
    """Spreads sorted degrees evenly; if there are more degrees than units, both ends are there."""
    count = highest - lowest + 1
    if width >= count:
        return lowest + torch.arange(width) * count // width
    return torch.linspace(lowest, highest, width).round().long()


class MaskedLinear(nn.Module):
    r"""A linear layer between sorted units that sees lower degrees only, :math:`y = W a + b`.

    Features come first: ``a`` is ``(in_features, N)``, ``y`` is ``(out_features, N)``.

    Args:
        in_degrees: Sorted degrees of the inputs.
        out_degrees: Sorted degrees of the outputs.
        strict: Whether an output sees the inputs of lower degree only, or also those of its own.

    Example:
        >>> import torch
        >>> MaskedLinear(torch.arange(3), torch.arange(3), strict=True).mask.tolist()
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """

    mask: Tensor

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor, *, strict: bool) -> None:
        super().__init__()
        shape = len(out_degrees), len(in_degrees)
        seen = torch.searchsorted(in_degrees, out_degrees, right=not strict)
        # Uniform as in torch.nn.Linear, but by the number of inputs that a unit does see.
        bound = seen.clamp_min(1).to(torch.get_default_dtype()).rsqrt()
        self.weight = nn.Parameter(bound.unsqueeze(-1) * torch.empty(shape).uniform_(-1, 1))
        self.bias = nn.Parameter((bound * torch.empty(len(bound)).uniform_(-1, 1)).unsqueeze(-1))
        # The sizes alone decide the mask, so it does not travel in the state_dict.
        mask = torch.arange(len(in_degrees)) < seen.unsqueeze(-1)
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        self.count_weights = mask.numel()
        self.strips = _cut(seen, len(in_degrees))

    def forward(self, a: Tensor, offset: Tensor | None = None) -> Tensor:
        """Returns ``y``; an ``offset`` of ``(out_features, N or 1)`` replaces the bias."""
        b = self.bias if offset is None else offset
        if not (self._worth_strips(a) and by_hand()):
            return torch.addmm(b, self.weight * self.mask, a)
        if torch.is_grad_enabled():
            return cast(Tensor, _MaskedProduct.apply(self, b, self.weight, a))
        return self.product(b, self.weight, a)

    # The three products of a layer and its gradients, which leave out most of the zeros. The
    # gradients can be differentiated again, densely, where autograd records them.

    def product(self, b: Tensor, weight: Tensor, a: Tensor) -> Tensor:
        r"""Returns :math:`(W \odot M) a + b`; autograd must not record it."""
        weight = weight * self.mask
        if not self._worth_strips(a):
            return torch.addmm(b, weight, a)
        y = a.new_empty(len(weight), a.shape[-1])
        for start, stop, reach in self.strips.rows:
            rows = slice(start, stop)
            torch.addmm(b[rows], weight[rows, :reach], a[:reach], out=y[rows])
        return y

    def gradient_of_weight(self, grad: Tensor, a: Tensor) -> Tensor:
        r"""Returns :math:`\bar y a^\top \odot M`."""
        if not (final(grad) and self._worth_strips(a)):
            return (grad @ a.T) * self.mask
        grad_weight = torch.zeros_like(self.mask)
        for start, stop, reach in self.strips.rows:
            torch.mm(grad[start:stop], a[:reach].T, out=grad_weight[start:stop, :reach])
        return grad_weight.mul_(self.mask)

    def gradient_of_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        r"""Returns :math:`(W \odot M)^\top \bar y`."""
        weight = weight * self.mask
        if not (final(grad) and self._worth_strips(grad)):
            return weight.T @ grad
        grad_a = grad.new_empty(weight.shape[-1], grad.shape[-1])
        for start, stop, reach in self.strips.columns:
            torch.mm(weight[reach:, start:stop].T, grad[reach:], out=grad_a[start:stop])
        return grad_a

    def _worth_strips(self, a: Tensor) -> bool:
        return bool(self.strips.rows) and self.count_weights * a.shape[-1] >= WORTH_STRIPS


class _Strips(NamedTuple):
    """How a triangular weight is cut; empty if it is not.

    Attributes:
        rows: Entries (start, stop, reach): these rows see the columns before ``reach``.
        columns: Entries (start, stop, reach): these columns are seen by the rows from ``reach`` on.
    """

    rows: list[tuple[int, int, int]]
    columns: list[tuple[int, int, int]]


def _cut(seen: Tensor, in_features: int) -> _Strips:
    """Cuts a weight whose row ``r`` sees ``seen[r]`` columns into strips of rows and of columns."""
    count = min(MAX_STRIPS, len(seen) // MIN_STRIP, in_features // MIN_STRIP)
    if count < 2:
        return _Strips([], [])
    row_ends = [len(seen) * i // count for i in range(count + 1)]
    column_ends = [in_features * i // count for i in range(count + 1)]
    return _Strips(
        [(a, b, int(seen[b - 1])) for a, b in pairwise(row_ends)],
        [(a, b, int((seen <= a).sum())) for a, b in pairwise(column_ends)],
    )


class _MaskedProduct(torch.autograd.Function):
    r"""One layer, :math:`y = (W \odot M) a + b`: the masked copy of ``W`` is not kept."""

    @staticmethod
    def forward(ctx: Any, layer: MaskedLinear, b: Tensor, weight: Tensor, a: Tensor) -> Tensor:
        ctx.layer, ctx.is_bias = layer, b.shape[-1] == 1
        ctx.save_for_backward(weight, a)
        return layer.product(b, weight, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a = ctx.saved_tensors
        _, need_b, need_weight, need_a = ctx.needs_input_grad
        return (
            None,
            _gradient_of_offset(grad, ctx.is_bias) if need_b else None,
            ctx.layer.gradient_of_weight(grad, a) if need_weight else None,
            ctx.layer.gradient_of_input(grad, weight) if need_a else None,
        )


def _gradient_of_sum(grad: Tensor, value: Tensor) -> Tensor:
    """The gradient of ``s`` of that of ``max(s, 0)``, which it may overwrite."""
    if final(grad):
        return torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)
    return torch.ops.aten.threshold_backward.default(grad, value, 0)


def _gradient_of_offset(grad: Tensor, is_bias: bool) -> Tensor:
    return grad.sum(-1, keepdim=True) if is_bias else grad


def _rectified(
    layers: Sequence[MaskedLinear],
    a: Tensor,
    offset: Tensor,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Runs a network without skips, whose first bias is in the offset, and keeps the values."""
    first, *rest = layers
    a = first.product(offset, first.weight, a)
    for layer in rest:
        a.relu_()
        if keep is not None:
            keep(a)
        a = layer.product(layer.bias, layer.weight, a)
    return a


class _RectifiedPass(torch.autograd.Function):
    r"""All layers of a network without skips, :math:`\sigma(s) = \max(s, 0)`, as one step.

    What is between the layers belongs to nobody else, so that :math:`\sigma(s_l)` may take the
    place of :math:`s_l`, and :math:`\bar s_l` that of the gradient of :math:`\sigma(s_l)`.
    """

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[MaskedLinear], x: Tensor, offset: Tensor, *parameters: Tensor
    ) -> Tensor:
        hidden: list[Tensor] = []
        theta = _rectified(layers, x, offset, hidden.append)
        ctx.layers, ctx.is_bias = layers, offset.shape[-1] == 1
        ctx.save_for_backward(x, offset, *parameters, *hidden)
        return theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, len(ctx.layers)
        x, offset, *rest = ctx.saved_tensors
        parameters, hidden = rest[: 2 * count - 1], rest[2 * count - 1 :]
        _, need_x, need_offset, *need = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again: then by autograd alone
            return None, *_again(layers, (x, offset, *parameters), grad, ctx.needs_input_grad[1:])
        values = [x, *hidden]
        grads: list[Tensor | None] = [None] * (2 * count - 1)
        for k in reversed(range(count)):
            if need[k]:
                grads[k] = layers[k].gradient_of_weight(grad, values[k])
            if k and need[count + k - 1]:
                grads[count + k - 1] = grad.sum(-1, keepdim=True)
            if k:
                grad = layers[k].gradient_of_input(grad, parameters[k])
                grad = _gradient_of_sum(grad, values[k])
        grad_x = layers[0].gradient_of_input(grad, parameters[0]) if need_x else None
        grad_offset = _gradient_of_offset(grad, ctx.is_bias) if need_offset else None
        return None, grad_x, grad_offset, *grads


def _again(
    layers: Sequence[MaskedLinear], inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of :class:`_RectifiedPass` as autograd computes them, with their graph."""
    s, b, *parameters = inputs
    weights, biases = parameters[: len(layers)], (b, *parameters[len(layers) :])
    for layer, b, weight in zip(layers, biases, weights, strict=True):
        s = torch.addmm(b, weight * layer.mask, s)
        s = s if layer is layers[-1] else s.relu()
    found = iter(
        torch.autograd.grad(
            s, [t for t, need in zip(inputs, needed, strict=True) if need], grad, create_graph=True
        )
    )
    return [next(found) if need else None for need in needed]
