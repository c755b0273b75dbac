"""Coupling: a part of the event sets the map of the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_nf._checks import check_flag, check_kind, event_shape_of, is_count, shown
from pyro_nf.nn.conditioner import Conditioner, in_one_batch, network_of
from pyro_nf.nn.mlp import MLP, Constant
from pyro_nf.ops.layout import features_first, in_columns, sum_event
from pyro_nf.ops.spaces import describe, over_events
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.chain import Chain
from pyro_nf.univariate.affine import Additive, Affine
from pyro_nf.univariate.base import HINT, UnivariateMap
from pyro_nf.univariate.spline import RationalQuadratic


class Coupling(FlowTransform):
    r"""One part of the event passes through and sets the map of the other part.

    .. math:: y_A = x_A, \qquad y_B = u(x_B; \theta(x_A, c))

    Both directions cost one pass of the conditioner, and the inverse is exact if the map's is. By
    default ``A`` has :math:`\lfloor D/2 \rfloor` coordinates and comes first; with ``swap`` it
    comes last. A layer and a swapped layer together touch every coordinate.

    Events of any shape are split in two along an ``axis``, images by channels for example, or by a
    ``mask``, as a chessboard. The network of a masked coupling sees the whole event with zeros in
    ``B``, and its parameters of ``A`` are not used.

    *NICE: Non-linear Independent Components Estimation* (Dinh, Krueger, Bengio, 2014) and *Density
    estimation using Real NVP* (Dinh, Sohl-Dickstein, Bengio, 2017).

    Args:
        univariate: The map :math:`u`.
        input_dim: Size of the event if it is a vector.
        context_dim: Width of the context, 0 for none.
        event_shape: Shape of the event, instead of ``input_dim``.
        hidden_dims: Widths of the hidden layers of the conditioner.
        activation: Makes its activation.
        swap: Whether the last coordinates, not the first, pass through; with a mask, whether what
            it leaves out does.
        axis: The axis of the event that is split; the last one if None.
        mask: Which entries pass through, True or False, of a shape that broadcasts to that of the
            event; instead of ``axis``.
        conditioner: Makes another network than the perceptron of ``hidden_dims``
            (:data:`pyro_nf.nn.conditioner.Conditioner`), such as :class:`pyro_nf.nn.ConvNet`.

    Raises:
        ValueError: If a dimension makes no sense, the axis is not there, the mask does not fit, or
            the network of the conditioner does not run or makes another shape.
        TypeError: If the mask is no tensor of True and False, or the conditioner makes no Module.

    Example:
        >>> import torch
        >>> from pyro_nf.nn.conv import ConvNet
        >>> from pyro_nf.univariate.affine import Affine
        >>> Coupling(Affine(), 5, hidden_dims=(8,))(torch.arange(5.0)).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
        >>> by_channels = Coupling(Affine(), event_shape=(4, 8, 8), axis=0, conditioner=ConvNet)
        >>> by_channels(torch.zeros(7, 4, 8, 8)).shape
        torch.Size([7, 4, 8, 8])
    """

    event_shape: Size
    mask: Tensor | None

    def __init__(
        self,
        univariate: UnivariateMap,
        input_dim: int | None = None,
        context_dim: int = 0,
        *,
        event_shape: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        swap: bool = False,
        axis: int | None = None,
        mask: Tensor | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        shape = event_shape_of("Coupling", input_dim, event_shape)
        super().__init__(context_dim=context_dim, event_shape=shape)
        check_kind("Coupling", "univariate", univariate, UnivariateMap, HINT)
        check_flag("Coupling", "swap", swap)
        univariate.refuse_hidden_weights("Coupling")
        self.univariate = univariate
        self.inverse_kind = "exact" if univariate.exact_inverse else "numeric"
        self.domain = over_events(univariate.domain, len(shape))
        self.swap = swap
        if mask is not None:
            if axis is not None:
                raise ValueError("Coupling: got both axis and mask; give one of them.")
            mask = _checked_mask(mask, shape, univariate)
            mask = ~mask if swap else mask
            self.codomain = self.domain
            seen, mapped = shape, shape
        else:
            self.axis = _checked_axis(axis, shape)
            size = shape[self.axis]
            passing = size // 2
            self.sizes = (size - passing, passing) if swap else (passing, size - passing)
            self.codomain = self._codomain()
            seen, mapped = (
                Size((*shape[: self.axis], part, *shape[len(shape) + self.axis + 1 :]))
                for part in (passing, size - passing)
            )
        self.register_buffer("mask", mask)
        self.is_masked = mask is not None  # to ask a Module for a buffer takes a microsecond
        self.is_given, count = conditioner is not None, univariate.num_params
        self.net: nn.Module
        if not count or seen.numel() + context_dim == 0:  # nothing to set, or nothing to see
            self.is_given = False
            self.net = Constant(1, count, hidden_dims=hidden_dims, activation=activation)
        elif conditioner is None:
            self.net = MLP(
                seen, mapped, count, context_dim, hidden_dims=hidden_dims, activation=activation
            )
        else:
            self.net = network_of("Coupling", conditioner, seen, mapped, count, context_dim)

    def _codomain(self) -> constraints.Constraint:
        """The part that passes through stays where it was."""
        passes, mapped = self.univariate.domain, self.univariate.codomain
        if passes is mapped:
            return self.domain
        parts = (mapped, passes) if self.swap else (passes, mapped)
        joined = constraints.cat(parts, dim=self.axis, lengths=self.sizes)
        return over_events(joined, len(self.event_shape))

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(self.univariate.forward_and_ladj, x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(self.univariate.inverse_and_ladj, y, context)

    def _map(
        self,
        direction: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        value: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        event_dim = len(self.event_shape)
        if self.is_masked:
            mask = cast(Tensor, self.mask)
            seen = torch.where(mask, value, 0.0)
            image, ladj = direction(value, self._params(seen, context, value))
            ladj = torch.where(mask, 0.0, ladj)
            return torch.where(mask, value, image), sum_event(ladj, event_dim)
        is_vector = event_dim == 1
        value = in_columns(value) if is_vector else value  # as the parameters lie in memory
        first, last = value.split(self.sizes, self.axis)
        a, b = (last, first) if self.swap else (first, last)
        b, ladj = direction(b, self._params(a, context, b))
        parts = (b, a) if self.swap else (a, b)
        if not is_vector:
            return torch.cat(parts, self.axis), sum_event(ladj, event_dim)
        joint = torch.cat([features_first(part) for part in parts]).T
        return joint.reshape(value.shape) if value.dim() != 2 else joint, ladj.sum(-1)

    def _params(self, seen: Tensor, context: Tensor | None, mapped: Tensor) -> Tensor:
        """The parameters of what is mapped, ``(..., P)``."""
        if self.is_given:
            return in_one_batch(self.net, seen, len(self.event_shape), context)
        params: Tensor = self.net(seen, context)
        if params.shape[:-1] != mapped.shape:  # the conditioner saw less than the whole batch
            params = params.expand(*mapped.shape, params.shape[-1])
        return params


def _checked_axis(axis: int | None, event_shape: Size) -> int:
    """The axis as counted from the end; raises unless the event has it."""
    event_dim = len(event_shape)
    axis = -1 if axis is None else axis
    if not is_count(axis) or not -event_dim <= axis < event_dim:
        raise ValueError(
            f"Coupling: axis must be an integer from {-event_dim} to {event_dim - 1}, one of the "
            f"event's, of event_shape = {tuple(event_shape)}, got {shown(axis)}."
        )
    return axis if axis < 0 else axis - event_dim


def _checked_mask(mask: Tensor, event_shape: Size, univariate: UnivariateMap) -> Tensor:
    """A copy of the mask, as large as the event; raises unless it can be one."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise TypeError(
            "Coupling: mask must be a tensor of True (passes through) and False, got "
            f"{shown(mask)}; call mask.bool() on one of 1 and 0."
        )
    try:
        whole = mask.expand(event_shape).clone()
    except RuntimeError:
        raise ValueError(
            f"Coupling: mask has shape {tuple(mask.shape)}, which does not broadcast to "
            f"event_shape = {tuple(event_shape)}."
        ) from None
    if bool(whole.all()) or not bool(whole.any()):
        raise ValueError(
            f"Coupling: mask must have entries that pass and entries that do not, got "
            f"{int(whole.sum())} of {whole.numel()} that pass."
        )
    if univariate.domain is not univariate.codomain:
        raise ValueError(
            f"Coupling: with a mask, univariate must map a space onto itself, but "
            f"{type(univariate).__name__} maps {describe(univariate.domain)} onto "
            f"{describe(univariate.codomain)}. Split along an axis instead."
        )
    return whole


def _pair(
    univariate: UnivariateMap, input_dim: int, context_dim: int, hidden_dims: Sequence[int]
) -> Chain:
    """A coupling and its swap, so that one call of a factory leaves no coordinate untouched."""
    return Chain(
        Coupling(univariate, input_dim, context_dim, hidden_dims=hidden_dims, swap=swap)
        for swap in (False, True)
    )


def additive_coupling(
    input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = (64, 64)
) -> Chain:
    """Two additive couplings, one for each half; both directions fast, exact inverse.

    *NICE: Non-linear Independent Components Estimation* (Dinh, Krueger, Bengio, 2014).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers of each conditioner.

    Example:
        >>> import torch
        >>> additive_coupling(3)(torch.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """
    return _pair(Additive(), input_dim, context_dim, hidden_dims)


def affine_coupling(
    input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = (64, 64)
) -> Chain:
    """Two affine couplings, one for each half; both directions fast, exact inverse.

    *Density estimation using Real NVP* (Dinh, Sohl-Dickstein, Bengio, 2017).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers of each conditioner.

    Example:
        >>> from pyro.distributions.transforms import iterated
        >>> len(iterated(3, affine_coupling, 6))
        3
    """
    return _pair(Affine(), input_dim, context_dim, hidden_dims)


def spline_coupling(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    hidden_dims: Sequence[int] = (64, 64),
) -> Chain:
    """Two rational-quadratic spline couplings, one a half; both directions fast, exact inverse.

    *Neural Spline Flows* (Durkan, Bekasov, Murray, Papamakarios, 2019).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_bins: Bins of each spline.
        bound: Half-width of the interval; the tails outside are the identity.
        hidden_dims: Widths of the hidden layers of each conditioner.

    Example:
        >>> import torch
        >>> spline_coupling(2)(torch.tensor([0.5, -7.0])).tolist()
        [0.5, -7.0]
    """
    return _pair(RationalQuadratic(count_bins, bound), input_dim, context_dim, hidden_dims)
