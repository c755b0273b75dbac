"""The sibling of a FlowTransform: layers that draw random numbers, or lose information."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn

from pyro_nf._checks import (
    check_context,
    check_count,
    check_dtype,
    check_kind,
    event_shape_of,
    floating_dtype,
    input_dim_of,
    shape_of,
    size_of,
)
from pyro_nf.ops.spaces import over_events
from pyro_nf.transforms.base import check_start, with_whole_batch
from pyro_nf.transforms.kinds import LogProbKind

Random = Literal["forward", "inverse", "both", "neither"]

_OTHER_WAY: dict[Random, Random] = {"forward": "inverse", "inverse": "forward"}


class StochasticTransform(nn.Module, ABC):
    r"""Two conditional laws, one for each direction, between base and data.

    .. math:: y \sim p(y \mid x; c), \qquad x \sim q(x \mid y; c)

    ``x`` is on the side of the base, ``y`` on the side of the data, ``c`` is the context. It is
    what a :class:`~pyro_nf.transforms.base.FlowTransform` is, without the promise that one
    direction undoes the other: a direction may draw random numbers (a stochastic layer), or drop a
    part of what it gets (a surjection). It has the same methods, and where a FlowTransform returns
    a log-determinant it returns a *contribution*,

    .. math:: V(x, y) = \log q(x \mid y; c) - \log p(y \mid x; c)

    forward, and :math:`-V` in the inverse direction. Where a direction draws nothing, its law is
    the limit of narrow ones. So with a base :math:`p_0`

    .. math:: \log p(y) \ge E_{x \sim q} \left[ \log p_0(x) - V(x, y) \right], \qquad
              p(y) = E_{x \sim q} \left[ p_0(x) \, e^{-V(x, y)} \right].

    The left one is a bound, which is tight if q is the posterior of ``x``. If the inverse draws
    nothing, both sides are equal, and the contribution is exact.

    Most layers are a :class:`StochasticLayer`; :class:`StochasticChain` puts them in a row, with
    transforms among them. Values are floating point numbers, also where they are whole: on a side
    whose space is discrete, as ``constraints.integer_interval``, integer tensors are taken too.

    *SurVAE Flows: Surjections to Bridge the Gap between VAEs and Flows* (Nielsen, Jaini, Hoogeboom,
    Winther, Welling, 2020); *Stochastic Normalizing Flows* (Wu, Köhler, Noé, 2020).

    Args:
        input_dim: Size of ``x`` if it is a vector. If ``event_shape`` is None too, any size will
            do.
        context_dim: Width of the context, 0 for none.
        event_shape: Shape of ``x``, instead of ``input_dim``.
        output_shape: Shape of ``y``, an integer for a vector; that of ``x`` by default.

    Attributes:
        random: Which directions draw random numbers: "forward", "inverse", "both" or "neither".
        has_rsample: Whether the draws carry the gradient of their law: they are smooth in what the
            law depends on, or the law depends on nothing that learns.

    Raises:
        ValueError: If a size makes no sense.
    """

    random: Random = "both"
    has_rsample: bool = True
    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(
        self,
        input_dim: int | None = None,
        context_dim: int = 0,
        *,
        event_shape: Sequence[int] | None = None,
        output_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_count(owner, "context_dim", context_dim, at_least=0)
        self.context_dim = context_dim
        self.event_shape: Size | None = None
        if input_dim is not None or event_shape is not None:
            self.event_shape = event_shape_of(owner, input_dim, event_shape)
        self.input_dim = input_dim_of(self.event_shape)
        self.output_shape = self.event_shape
        if output_shape is not None:
            self.output_shape = shape_of(owner, "output_shape", output_shape)
        # all real events of the shape, unless a subclass says otherwise
        if self.domain is constraints.real_vector and self.event_shape is not None:
            self.domain = over_events(constraints.real, len(self.event_shape))
        if self.codomain is constraints.real_vector and self.output_shape is not None:
            self.codomain = over_events(constraints.real, len(self.output_shape))

    @property
    def ladj_kind(self) -> LogProbKind:
        """What a log density made with this layer is: a bound if the inverse draws ``x``."""
        return "bound" if self.random in ("inverse", "both") else "exact"

    @abstractmethod
    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ``y`` and the contribution V."""

    @abstractmethod
    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and the contribution of the inverse, -V."""

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Goes from base to data.

        Args:
            x: Points on the base side, shape ``(..., *event_shape)``.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``x``.

        Returns:
            ``y`` of shape ``(..., *output_shape)``, and the contribution V, ``(...)``.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.
        """
        y, ladj = self._forward_and_ladj(self._expand("x", x, context), context)
        return y.contiguous(), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Goes from data to base.

        Args:
            y: Points on the data side, shape ``(..., *output_shape)``.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``y``.

        Returns:
            ``x`` of shape ``(..., *event_shape)``, and the contribution -V, ``(...)``.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.
        """
        return self._inverse_and_ladj(self._expand("y", y, context), context)

    def _expand(self, name: str, value: Tensor, context: Tensor | None) -> Tensor:
        """The points with the whole batch shape, checked; whole numbers as floating ones."""
        space = self.codomain if name == "y" else self.domain
        shape = self.output_shape if name == "y" else self.event_shape
        if space.is_discrete and isinstance(value, Tensor) and _is_integral(value):
            value = value.to(floating_dtype(self) or torch.get_default_dtype())
        return with_whole_batch(self, name, value, context, shape, space)

    def forward_shape(self, shape: Sequence[int]) -> Size:
        """The shape of ``y`` for an ``x`` of this shape, batch and event.

        Args:
            shape: A shape that ends in ``event_shape``.

        Raises:
            ValueError: If it does not.
        """
        return self._exchanged(shape, self.event_shape, self.output_shape)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        """The shape of ``x`` for a ``y`` of this shape, batch and event.

        Args:
            shape: A shape that ends in ``output_shape``.

        Raises:
            ValueError: If it does not.
        """
        return self._exchanged(shape, self.output_shape, self.event_shape)

    def _exchanged(self, shape: Sequence[int], old: Size | None, new: Size | None) -> Size:
        owner = type(self).__name__
        shape = size_of(owner, "shape", shape)
        if old is None or new is None:
            return shape
        batch = len(shape) - len(old)
        if batch < 0 or shape[batch:] != old:
            raise ValueError(f"{owner}: shape must end in {tuple(old)}, got {tuple(shape)}.")
        return shape[:batch] + new

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Goes from base to data, and carries the slopes of a log density along.

        .. math:: \nabla_y \log p(y) = \nabla_y \left(x(y)^\top \nabla_x \log p_0(x) - V\right)

        at fixed :math:`\nabla_x \log p_0(x)`, where the inverse draws nothing.

        Args:
            x: Points on the base side, shape ``(..., *event_shape)``.
            score: :math:`\nabla_x \log p_0(x)`, of that shape.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``x``.

        Returns:
            ``y`` and the contribution as of :meth:`forward_and_ladj`, and
            :math:`\nabla_y \log p(y)` of the shape of ``y``, without a graph.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If the inverse draws: the density is not known then, and neither is its
                slope.
        """
        if self.ladj_kind == "bound":
            raise TypeError(
                f"{type(self).__name__}: push_score, and the path gradient that needs it, wants a "
                "log density, but a layer that draws in the inverse direction gives a bound. Take "
                "the plain gradient, as ELBO(Reparameterised())."
            )
        y, ladj = self.forward_and_ladj(x, context)
        score = self._expand("score", score, context).detach()
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            back, inverse_ladj = self.inverse_and_ladj(leaf, context)
            total = (back * score).sum() + inverse_ladj.sum()
            return y, ladj, torch.autograd.grad(total, leaf)[0]

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        """Sets what can be set from data, and returns the data as the base side then sees them.

        Args:
            y: Data, shape ``(N, *output_shape)``.
            context: Their contexts, shape ``(N, context_dim)``.
            whiten: Whether linear maps remove correlations too, not only means and scales.

        Returns:
            ``x`` of shape ``(N, *event_shape)``.
        """
        check_start(self, y, context, whiten)
        with torch.no_grad():
            return self.inverse_and_ladj(y, context)[0]

    def condition(self, context: Tensor) -> StochasticTransform:
        """This layer with the context filled in; itself if it takes no context.

        Args:
            context: Shape ``(..., context_dim)``.
        """
        if self.context_dim:
            return _Conditioned(self, context)
        check_kind(type(self).__name__, "context", context, Tensor)
        return self

    @property
    def inv(self) -> StochasticTransform:
        """The same two laws with the directions exchanged, as a Module with the same parameters."""
        return _Inverse(self)

    def extra_repr(self) -> str:
        """What is shown in the parentheses."""
        return f"random={self.random!r}, ladj_kind={self.ladj_kind!r}"


class StochasticLayer(StochasticTransform):
    r"""One layer, by three short methods.

    - ``_forward(x, context)`` draws or computes ``y``;
    - ``_inverse(y, context)`` draws or computes ``x``;
    - ``_contribution(x, y, context)`` is :math:`V = \log q(x|y) - \log p(y|x)`, summed over the
      event. A direction that draws nothing adds nothing to it, but the log-determinant of what it
      maps, if it maps anything. The inverse must reach every ``x`` that ``y`` may come from.

    A subclass says in ``random`` which directions draw, and in ``domain`` and ``codomain`` where
    ``x`` and ``y`` lie. Noise comes from torch's global generators, as everywhere in Pyro. If
    value and contribution are to be had in one pass, as where a flow draws the noise, a subclass
    may write ``_forward_and_ladj`` or ``_inverse_and_ladj`` too; the contribution of a given pair
    must agree with them.

    Args:
        input_dim: Size of ``x`` if it is a vector. If ``event_shape`` is None too, any size will
            do.
        context_dim: Width of the context, 0 for none.
        event_shape: Shape of ``x``, instead of ``input_dim``.
        output_shape: Shape of ``y``, an integer for a vector; that of ``x`` by default.

    Example:
        >>> import math, torch
        >>> from pyro.distributions import constraints
        >>> class Abs(StochasticLayer):
        ...     "y = |x|; the inverse throws a coin for the sign."
        ...     random, codomain = "inverse", constraints.independent(constraints.nonnegative, 1)
        ...     def _forward(self, x, context):
        ...         return x.abs()
        ...     def _inverse(self, y, context):
        ...         return y * (2 * torch.randint_like(y, 2) - 1)
        ...     def _contribution(self, x, y, context):
        ...         return -math.log(2) * x.shape[-1] * torch.ones_like(x[..., 0])
        >>> from pyro_nf.flows.flow import Flow
        >>> d = Flow(Abs(1))()
        >>> d.log_prob_kind, round(d.log_prob(torch.tensor([1.0])).exp().item(), 4)
        ('bound', 0.4839)
    """

    @abstractmethod
    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Draws ``y`` given ``x``."""

    @abstractmethod
    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Draws ``x`` given ``y``."""

    @abstractmethod
    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        """Returns V of a pair, without the event's dimensions."""

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self._forward(x, context)
        return y, self._contribution(x, y, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._inverse(y, context)
        return x, -self._contribution(x, y, context)

    def contribution(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The contribution V of a given pair: nothing is drawn.

        Args:
            x: Points on the base side, shape ``(..., *event_shape)``.
            y: Points on the data side, shape ``(..., *output_shape)``, of the same batch shape.
            context: Shape ``(..., context_dim)``; its batch broadcasts against theirs.

        Returns:
            Shape ``(...)``.
        """
        x, y = self._expand("x", x, context), self._expand("y", y, context)
        return self._contribution(x, y, context)


class _Inverse(StochasticTransform):
    """The same laws, with the directions exchanged."""

    def __init__(self, transform: StochasticTransform) -> None:
        x_shape, y_shape = transform.output_shape, transform.event_shape
        super().__init__(None, transform.context_dim, event_shape=x_shape, output_shape=y_shape)
        self.transform = transform
        self.random = _OTHER_WAY.get(transform.random, transform.random)
        self.has_rsample = transform.has_rsample
        self.domain, self.codomain = transform.codomain, transform.domain

    @property
    def inv(self) -> StochasticTransform:
        return self.transform

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._inverse_and_ladj(x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._forward_and_ladj(y, context)


class _Conditioned(StochasticTransform):
    """A stochastic transform with its context filled in."""

    context: Tensor

    def __init__(self, transform: StochasticTransform, context: Tensor) -> None:
        x_shape, y_shape = transform.event_shape, transform.output_shape
        super().__init__(event_shape=x_shape, output_shape=y_shape)
        check_context(type(transform).__name__, context, transform.context_dim)
        check_dtype(type(transform).__name__, "context", context, floating_dtype(transform))
        self.transform = transform
        self.random, self.has_rsample = transform.random, transform.has_rsample
        self.domain, self.codomain = transform.domain, transform.codomain
        self.register_buffer("context", context, persistent=False)

    @property
    def ladj_kind(self) -> LogProbKind:
        return self.transform.ladj_kind

    @property
    def inv(self) -> StochasticTransform:
        return _Conditioned(self.transform.inv, self.context)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(x, self.context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)


def _is_integral(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
