"""The contract of a transform, and the three ways to make one out of others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pyro.distributions import TransformModule, constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Size, Tensor

from pyro_nf._checks import (
    check_context,
    check_count,
    check_dtype,
    check_event_shape,
    check_flag,
    check_floating,
    check_kind,
    check_tensor,
    event_shape_of,
    floating_dtype,
    input_dim_of,
    joint_batch_shape,
    size_of,
)
from pyro_nf.ops.gradients import gradients, unwatched
from pyro_nf.ops.layout import flat_event
from pyro_nf.ops.spaces import over_events
from pyro_nf.transforms.kinds import LadjKind

# Above this many numbers in an event a slow but exact inverse costs less than a Jacobian.
_MAX_JACOBIAN_DIM = 32

Fast = Literal["forward", "inverse", "both", "neither"]
InverseKind = Literal["exact", "numeric"]


def _without_needless_graph(value: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
    """Both without a graph where nobody wants one: a slope by autograd makes one all the same."""
    if (value.requires_grad or ladj.requires_grad) and not torch.is_grad_enabled():
        return value.detach(), ladj.detach()
    return value, ladj


class FlowTransform(TransformModule, ConditionalTransform):
    r"""An invertible map with a cheap Jacobian determinant, :math:`y = T(x; c)`.

    ``x`` is on the side of the base, ``y`` on the side of the data, ``c`` is the context. A
    subclass writes two methods, each one pass:

    - ``_forward_and_ladj(x, context)`` returns ``y`` and :math:`\log|\det \partial y/\partial x|`;
    - ``_inverse_and_ladj(y, context)`` returns ``x`` and :math:`\log|\det \partial x/\partial y|`.

    It gets ``x`` with the whole batch shape, ``context`` (or None) such that it broadcasts against
    it, and returns a ladj that is summed over the event. This class makes the rest: checks,
    broadcasting, the call, ``.inv``, ``.condition(context)``, ``log_abs_det_jacobian``.

    An event is a vector of ``input_dim`` numbers, or has any ``event_shape``, an image
    ``(C, H, W)`` for example. Where ``y`` has another shape than ``x``, a subclass overrides
    ``forward_shape`` and ``inverse_shape``.

    It is a :class:`torch.distributions.Transform`, a :class:`torch.nn.Module` and a Pyro
    ``ConditionalTransform`` at once. Nothing is cached: every call computes with the parameters as
    they are. One class serves with context (``context_dim > 0``) and without.

    Args:
        input_dim: Size of the event if it is a vector. If ``event_shape`` is None too, any size
            will do.
        context_dim: Width of the context, 0 for none.
        event_shape: Shape of the event ``x``, instead of ``input_dim``.

    Attributes:
        fast: The direction that costs one pass ("forward", "inverse", "both", or "neither").
        inverse_kind: Whether the inverse is "exact" or "numeric" (solved to a tolerance).
        ladj_kind: Whether the ladj is "exact" or an "estimate": a random number, another one at
            each call, whose mean is the ladj and whose gradient has its gradient as mean.
        event_shape: Shape of the event ``x``; None if any will do.
        input_dim: Its size if it is a vector, else None.

    Raises:
        ValueError: If a dimension makes no sense.
    """

    bijective = True
    fast: Fast = "both"
    inverse_kind: InverseKind = "exact"
    ladj_kind: LadjKind = "exact"
    # What follows from the shape of x until somebody asks, or a subclass says otherwise.
    _output_shape: Size | None = None
    _space_of_x: constraints.Constraint | None = None
    _space_of_y: constraints.Constraint | None = None

    def __init__(
        self,
        input_dim: int | None = None,
        context_dim: int = 0,
        *,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_count(owner, "context_dim", context_dim, at_least=0)
        self.event_shape: Size | None = None
        if input_dim is not None or event_shape is not None:
            self.event_shape = event_shape_of(owner, input_dim, event_shape)
        self.input_dim = input_dim_of(self.event_shape)
        self.context_dim = context_dim

    @property
    def output_shape(self) -> Size | None:
        """Shape of the event ``y``; None if any will do."""
        if self._output_shape is None and self.event_shape is not None:
            self._output_shape = Size(self.forward_shape(self.event_shape))
        return self._output_shape

    @property
    def domain(self) -> constraints.Constraint:
        """The space of ``x``: all real events of its shape, unless a subclass says otherwise."""
        if self._space_of_x is None:
            self._space_of_x = _all_real(self.event_shape)
        return self._space_of_x

    @domain.setter
    def domain(self, space: constraints.Constraint) -> None:
        self._space_of_x = space

    @property
    def codomain(self) -> constraints.Constraint:
        """The space of ``y``: all real events of its shape, unless a subclass says otherwise."""
        if self._space_of_y is None:
            self._space_of_y = _all_real(self.output_shape)
        return self._space_of_y

    @codomain.setter
    def codomain(self, space: constraints.Constraint) -> None:
        self._space_of_y = space

    def forward_shape(self, shape: Sequence[int]) -> Size:
        """The shape of ``y`` for an ``x`` of this shape, batch and event.

        Args:
            shape: A shape that ends in ``event_shape``.

        Raises:
            ValueError: If it does not.
        """
        return self._kept(shape, self.event_shape, self.domain)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        """The shape of ``x`` for a ``y`` of this shape, batch and event.

        Args:
            shape: A shape that ends in the shape of the event ``y``.

        Raises:
            ValueError: If it does not.
        """
        return self._kept(shape, self.event_shape, self.codomain)

    def _kept(
        self, shape: Sequence[int], event_shape: Size | None, space: constraints.Constraint
    ) -> Size:
        """The shape itself; raises unless an event of the space can have it."""
        owner = type(self).__name__
        shape = size_of(owner, "shape", shape)
        if event_shape is None:
            if len(shape) < space.event_dim:
                raise ValueError(
                    f"{owner}: shape must have at least {space.event_dim} dimension(s), those of "
                    f"an event, got {tuple(shape)}."
                )
        elif shape[max(len(shape) - len(event_shape), 0) :] != event_shape:
            raise ValueError(
                f"{owner}: shape must end in event_shape = {tuple(event_shape)}, got "
                f"{tuple(shape)}."
            )
        return shape

    @abstractmethod
    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ``y`` and the forward ladj."""

    @abstractmethod
    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and the ladj of the inverse."""

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Maps base to data in one pass.

        Args:
            x: Points on the base side, shape ``(..., *event_shape)``.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``x``.

        Returns:
            ``y`` of shape ``(..., *output_shape)``, and
            :math:`\log|\det \partial y/\partial x|`, of shape ``(...)``.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.
        """
        x = self._expand("x", x, context, self.event_shape, self.domain)
        y, ladj = _without_needless_graph(*self._forward_and_ladj(x, context))
        return y.contiguous(), ladj  # draws are for the user, who may call y.view

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Maps data to base in one pass.

        Args:
            y: Points on the data side, shape ``(..., *output_shape)``.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``y``.

        Returns:
            ``x`` of shape ``(..., *event_shape)``, and
            :math:`\log|\det \partial x/\partial y|`, of shape ``(...)``.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.
        """
        y = self._expand("y", y, context, self.output_shape, self.codomain)
        return _without_needless_graph(*self._inverse_and_ladj(y, context))

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps base to data, and carries the slopes of a log density along.

        .. math:: \nabla_y \log q(y) = J^{-\top} (\nabla_x \log p(x) - \nabla_x \log|\det J|)

        Args:
            x: Points on the base side, shape ``(..., *event_shape)``.
            score: :math:`\nabla_x \log p(x)`, of that shape.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``x``.

        Returns:
            ``y`` and the ladj as of :meth:`forward_and_ladj`, and :math:`\nabla_y \log q(y)` of
            the shape of ``y``, without a graph.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.

        Example:
            >>> import torch
            >>> from pyro_nf.transforms.affine import FixedAffine
            >>> double = FixedAffine(torch.zeros(2), torch.full((2,), 2.0))
            >>> y, _, score = double.push_score(torch.ones(2), -torch.ones(2))
            >>> y.tolist(), score.tolist()
            ([2.0, 2.0], [-0.5, -0.5])
        """
        if torch.is_inference_mode_enabled():  # where nothing can be differentiated
            with torch.inference_mode(False), torch.no_grad():
                context = None if context is None else context.clone()
                return self.push_score(x.clone(), score.clone(), context)
        recorded = torch.is_grad_enabled()
        x = self._expand("x", x, context, self.event_shape, self.domain)
        x = x if recorded else x.detach()
        check_floating(type(self).__name__, "score", score)
        score = self._expand("score", score.detach(), context, self.event_shape, self.domain)
        y, ladj, score = self._push_score(x, score, context)
        if not recorded:
            y, ladj = y.detach(), ladj.detach()
        return y.contiguous(), ladj, score

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By autograd: through the inverse if that is the cheaper way, else by the Jacobian.

        Whatever the grad mode, ``y`` and the ladj may have a graph.
        """
        event_dim, out_dim = self.domain.event_dim, self.codomain.event_dim
        count = x.shape[x.dim() - event_dim :].numel()
        cheap = self.fast in ("inverse", "both") or count > _MAX_JACOBIAN_DIM
        if cheap and self.inverse_kind == "exact":
            y, ladj = self._forward_and_ladj(x, context)
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                back, inverse_ladj = self._inverse_and_ladj(leaf, context)
                total = (back * score).sum() + inverse_ladj.sum()
                return y, ladj, torch.autograd.grad(total, leaf)[0]
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, ladj = self._forward_and_ladj(x, context)
            event = y.shape[y.dim() - out_dim :]
            rows = torch.eye(count, dtype=y.dtype, device=y.device)
            each = rows.reshape(-1, *(1,) * (y.dim() - out_dim), *event).expand(-1, *y.shape)
            with unwatched():
                (J_T,) = torch.autograd.grad(y, x, each, retain_graph=True, is_grads_batched=True)
            (slope,) = gradients(ladj, x)
        J_T = flat_event(J_T, event_dim).movedim(0, -1)
        rest = flat_event(score - slope, event_dim).unsqueeze(-1)
        pushed, failed = torch.linalg.solve_ex(J_T, rest)
        pushed = torch.where(failed.unsqueeze(-1) != 0, torch.nan, pushed.squeeze(-1))
        return y, ladj, pushed.reshape(y.shape)

    def _expand(
        self,
        name: str,
        value: Tensor,
        context: Tensor | None,
        event_shape: Size | None,
        space: constraints.Constraint,
    ) -> Tensor:
        return with_whole_batch(self, name, value, context, event_shape, space)

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

    def condition(self, context: Tensor) -> FlowTransform:
        """This transform with the context filled in; itself if it takes no context."""
        if self.context_dim:
            return Conditioned(self, context)
        check_kind(type(self).__name__, "context", context, Tensor)
        return self  # Pyro's composition conditions all its parts, those too that take no context

    @property
    def inv(self) -> FlowTransform:
        """The inverse as a Module with the same parameters."""
        return Inverse(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._described())})"

    def _described(self) -> list[str]:
        """What is shown in the parentheses."""
        shown = [] if self.input_dim is None else [f"input_dim={self.input_dim}"]
        if self.input_dim is None and self.event_shape is not None:
            shown = [f"event_shape={tuple(self.event_shape)}"]
        shown += [f"context_dim={self.context_dim}"] if self.context_dim else []
        shown += [f"fast={self.fast!r}"] if self.fast != "both" else []
        shown += [f"ladj_kind={self.ladj_kind!r}"] if self.ladj_kind != "exact" else []
        univariate = getattr(self, "univariate", None)
        return shown if univariate is None else [type(univariate).__name__, *shown]

    # What torch.distributions.Transform asks for.

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Returns :math:`\log|\det \partial y/\partial x|`, by the direction that is fast.

        Args:
            x: Points on the base side, shape ``(..., *event_shape)``.
            y: Their images, shape ``(..., *output_shape)``.
        """
        owner = type(self).__name__
        check_event_shape(owner, "x", x, self.event_shape, self.domain.event_dim)
        check_event_shape(owner, "y", y, self.output_shape, self.codomain.event_dim)
        if self.fast == "inverse":
            return -self.inverse_and_ladj(y)[1]
        return self.forward_and_ladj(x)[1]

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Returns itself: nothing is ever cached in a transform."""
        check_count(type(self).__name__, "cache_size", cache_size, at_least=0)
        return self

    def clear_cache(self) -> None:
        """Does nothing: nothing is ever cached in a transform."""


class Inverse(FlowTransform):
    """The inverse of a transform, with the same parameters and the directions exchanged.

    Args:
        transform: What to invert.

    Example:
        >>> import torch
        >>> from pyro_nf.transforms.permutation import Permutation
        >>> Inverse(Permutation([2, 0, 1]))(torch.tensor([5.0, 6.0, 7.0])).tolist()
        [6.0, 7.0, 5.0]
    """

    def __init__(self, transform: FlowTransform) -> None:
        check_kind("Inverse", "transform", transform, FlowTransform)
        super().__init__(context_dim=transform.context_dim, event_shape=transform.output_shape)
        swapped: dict[Fast, Fast] = {"forward": "inverse", "inverse": "forward"}
        self.transform = transform
        self.fast = swapped.get(transform.fast, transform.fast)
        self.inverse_kind, self.ladj_kind = transform.inverse_kind, transform.ladj_kind
        self.domain, self.codomain = transform.codomain, transform.domain

    def _described(self) -> list[str]:
        return [repr(self.transform)]

    @property
    def inv(self) -> FlowTransform:
        return self.transform

    def forward_shape(self, shape: Sequence[int]) -> Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        return self.transform.forward_shape(shape)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._inverse_and_ladj(x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._forward_and_ladj(y, context)


class Conditioned(FlowTransform):
    """A transform with its context filled in; it takes none itself.

    Args:
        transform: A transform with ``context_dim > 0``.
        context: Shape ``(..., context_dim)``.

    Raises:
        ValueError: If the context does not fit.

    Example:
        >>> import torch
        >>> from pyro_nf.transforms.coupling import affine_coupling
        >>> affine_coupling(4, context_dim=2).condition(torch.zeros(5, 2))(torch.zeros(4)).shape
        torch.Size([5, 4])
    """

    context: Tensor

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        check_kind("Conditioned", "transform", transform, FlowTransform)
        super().__init__(event_shape=transform.event_shape)
        check_count("Conditioned", "transform.context_dim", transform.context_dim)
        check_context(type(transform).__name__, context, transform.context_dim)
        check_dtype(type(transform).__name__, "context", context, floating_dtype(transform))
        self.transform = transform
        self.fast, self.inverse_kind = transform.fast, transform.inverse_kind
        self.ladj_kind = transform.ladj_kind
        self._space_of_x, self._space_of_y = transform.domain, transform.codomain
        self.register_buffer("context", context, persistent=False)

    @property
    def output_shape(self) -> Size | None:
        return self.transform.output_shape

    def forward_shape(self, shape: Sequence[int]) -> Size:
        return self.transform.forward_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        return self.transform.inverse_shape(shape)

    def _described(self) -> list[str]:
        return [repr(self.transform), f"context of shape {tuple(self.context.shape)}"]

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(x, self.context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.push_score(x, score, self.context)


def indented(text: str) -> str:
    """A text whose lines after the first are moved to the right."""
    return text.replace("\n", "\n  ")


def _all_real(event_shape: Size | None) -> constraints.Constraint:
    """All events of a shape; all vectors if it is not known."""
    return over_events(constraints.real, 1 if event_shape is None else len(event_shape))


def check_start(module: Any, y: Tensor, context: Tensor | None, whiten: bool) -> None:
    """Raises unless the ``start_from_data`` of a transform can take its arguments.

    Args:
        module: The transform.
        y: Data.
        context: Their contexts, or None.
        whiten: Whether correlations are removed too.
    """
    owner = type(module).__name__
    shape = module.output_shape or (None,) * module.codomain.event_dim
    check_tensor(owner, "y", y, (None, *shape))
    if not len(y):
        raise ValueError(f"{owner}: y must have at least one row, got {tuple(y.shape)}.")
    check_context(owner, context, module.context_dim)
    if context is not None:
        check_tensor(owner, "context", context, (len(y), module.context_dim))
    check_flag(owner, "whiten", whiten)


def with_whole_batch(
    module: Any,
    name: str,
    value: Tensor,
    context: Tensor | None,
    event_shape: Size | None,
    space: constraints.Constraint,
) -> Tensor:
    """Points that a transform takes, with the batch shape that they share with the context.

    Args:
        module: The transform, with its ``context_dim``.
        name: What the points are called in messages.
        value: The points.
        context: Their contexts, or None.
        event_shape: Shape of an event, None for any.
        space: The space of the points.

    Raises:
        ValueError: If a shape is wrong, or the context is missing or superfluous.
        TypeError: If an argument is not a floating tensor of the dtype of the parameters.
    """
    owner, event_dim = type(module).__name__, space.event_dim
    check_event_shape(owner, name, value, event_shape, event_dim)
    check_context(owner, context, module.context_dim)
    dtype = floating_dtype(module)
    check_dtype(owner, name, value, dtype)
    if context is not None:
        check_dtype(owner, "context", context, dtype)
    batch_shape = joint_batch_shape(owner, name, value, context, event_dim)
    return value.expand(batch_shape + value.shape[value.dim() - event_dim :])
