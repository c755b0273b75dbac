"""The contract of a transform, and the three ways to make one out of others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Literal, cast

import torch
from pyro.distributions import TransformModule, constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions.constraints import independent

from pyro_nf._checks import (
    check_context,
    check_count,
    check_dims,
    check_dtype,
    check_event,
    check_flag,
    check_floating,
    check_kind,
    check_listed,
    check_tensor,
    floating_dtype,
    joint_batch_shape,
)
from pyro_nf.ops.gradients import gradients, unwatched
from pyro_nf.ops.spaces import describe, is_within

# Above this many dimensions a slow but exact inverse costs less than a Jacobian.
_MAX_JACOBIAN_DIM = 32

Fast = Literal["forward", "inverse", "both", "neither"]
InverseKind = Literal["exact", "numeric"]


def _without_needless_graph(value: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
    """Both without a graph where nobody wants one: a slope by autograd makes one all the same."""
    if (value.requires_grad or ladj.requires_grad) and not torch.is_grad_enabled():
        return value.detach(), ladj.detach()
    return value, ladj


def over_vectors(space: constraints.Constraint) -> constraints.Constraint:
    """The space of vectors whose every coordinate is in ``space``."""
    return constraints.real_vector if space is constraints.real else independent(space, 1)


class FlowTransform(TransformModule, ConditionalTransform):
    r"""An invertible map with a cheap Jacobian determinant, :math:`y = T(x; c)`.

    ``x`` is on the side of the base, ``y`` on the side of the data, ``c`` is the context. A
    subclass writes two methods, each one pass:

    - ``_forward_and_ladj(x, context)`` returns ``y`` and :math:`\log|\det \partial y/\partial x|`;
    - ``_inverse_and_ladj(y, context)`` returns ``x`` and :math:`\log|\det \partial x/\partial y|`.

    It gets ``x`` with the whole batch shape, ``context`` (or None) such that it broadcasts against
    it, and returns a ladj that is summed over the event. This class makes the rest: checks,
    broadcasting, the call, ``.inv``, ``.condition(context)``, ``log_abs_det_jacobian``.

    It is a :class:`torch.distributions.Transform`, a :class:`torch.nn.Module` and a Pyro
    ``ConditionalTransform`` at once. Nothing is cached: every call computes with the parameters as
    they are. One class serves with context (``context_dim > 0``) and without.

    Args:
        input_dim: Size of the event, or None if any size will do.
        context_dim: Width of the context, 0 for none.

    Attributes:
        fast: The direction that costs one pass ("forward", "inverse", "both", or "neither").
        inverse_kind: Whether the inverse is "exact" or "numeric" (solved to a tolerance).

    Raises:
        ValueError: If a dimension makes no sense.
    """

    bijective = True
    fast: Fast = "both"
    inverse_kind: InverseKind = "exact"
    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(self, input_dim: int | None, context_dim: int = 0) -> None:
        super().__init__()
        check_dims(type(self).__name__, input_dim, context_dim)
        self.input_dim = input_dim
        self.context_dim = context_dim

    @abstractmethod
    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ``y`` and the forward ladj."""

    @abstractmethod
    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and the ladj of the inverse."""

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Maps base to data in one pass.

        Args:
            x: Points on the base side, shape ``(..., D)``.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``x``.

        Returns:
            ``y`` of shape ``(..., D)``, and :math:`\log|\det \partial y/\partial x|` without the
            last dimension.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.
        """
        x = self._expand("x", x, context, self.domain)
        y, ladj = _without_needless_graph(*self._forward_and_ladj(x, context))
        return y.contiguous(), ladj  # draws are for the user, who may call y.view

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Maps data to base in one pass.

        Args:
            y: Points on the data side, shape ``(..., D)``.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``y``.

        Returns:
            ``x`` of shape ``(..., D)``, and :math:`\log|\det \partial x/\partial y|` without the
            last dimension.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If an argument is not a floating tensor of the dtype of the parameters.
        """
        y = self._expand("y", y, context, self.codomain)
        return _without_needless_graph(*self._inverse_and_ladj(y, context))

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps base to data, and carries the slopes of a log density along.

        .. math:: \nabla_y \log q(y) = J^{-\top} (\nabla_x \log p(x) - \nabla_x \log|\det J|)

        Args:
            x: Points on the base side, shape ``(..., D)``.
            score: :math:`\nabla_x \log p(x)`, of that shape.
            context: Shape ``(..., context_dim)``; its batch broadcasts against that of ``x``.

        Returns:
            ``y`` and the ladj as of :meth:`forward_and_ladj`, and :math:`\nabla_y \log q(y)` of
            shape ``(..., D)``, without a graph.

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
        x = self._expand("x", x, context, self.domain)
        x = x if recorded else x.detach()
        check_floating(type(self).__name__, "score", score)
        score = self._expand("score", score.detach(), context, self.domain)
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
        cheap = self.fast in ("inverse", "both") or x.shape[-1] > _MAX_JACOBIAN_DIM
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
            rows = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
            each = rows.reshape(-1, *(1,) * (y.dim() - 1), y.shape[-1]).expand(-1, *y.shape)
            with unwatched():
                (J_T,) = torch.autograd.grad(y, x, each, retain_graph=True, is_grads_batched=True)
            (slope,) = gradients(ladj, x)
        J_T = J_T.movedim(0, -1)
        pushed, failed = torch.linalg.solve_ex(J_T, (score - slope).unsqueeze(-1))
        return y, ladj, torch.where(failed.unsqueeze(-1) != 0, torch.nan, pushed.squeeze(-1))

    def _expand(
        self, name: str, value: Tensor, context: Tensor | None, space: constraints.Constraint
    ) -> Tensor:
        owner = type(self).__name__
        check_event(owner, name, value, self.input_dim, space.event_dim)
        check_context(owner, context, self.context_dim)
        dtype = floating_dtype(self)
        check_dtype(owner, name, value, dtype)
        if context is not None:
            check_dtype(owner, "context", context, dtype)
        batch_shape = joint_batch_shape(owner, name, value, context, space.event_dim)
        return value.expand(batch_shape + value.shape[value.dim() - space.event_dim :])

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        """Sets what can be set from data, and returns the data as the base side then sees them.

        Args:
            y: Data, shape ``(N, D)``.
            context: Their contexts, shape ``(N, context_dim)``.
            whiten: Whether linear maps remove correlations too, not only means and scales.

        Returns:
            ``x`` of shape ``(N, D)``.
        """
        self._check_rows(y, context, whiten)
        with torch.no_grad():
            return self.inverse_and_ladj(y, context)[0]

    def _check_rows(self, y: Tensor, context: Tensor | None, whiten: bool) -> None:
        """Raises unless ``start_from_data`` can take its arguments."""
        owner = type(self).__name__
        check_tensor(owner, "y", y, (None, self.input_dim))
        if not len(y):
            raise ValueError(f"{owner}: y must have at least one row, got {tuple(y.shape)}.")
        check_context(owner, context, self.context_dim)
        if context is not None:
            check_tensor(owner, "context", context, (len(y), self.context_dim))
        check_flag(owner, "whiten", whiten)

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
        shown += [f"context_dim={self.context_dim}"] if self.context_dim else []
        shown += [f"fast={self.fast!r}"] if self.fast != "both" else []
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
            x: Points on the base side, shape ``(..., D)``.
            y: Their images, shape ``(..., D)``.
        """
        check_event(type(self).__name__, "x", x, self.input_dim, self.domain.event_dim)
        check_event(type(self).__name__, "y", y, self.input_dim, self.codomain.event_dim)
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
        super().__init__(transform.input_dim, transform.context_dim)
        swapped: dict[Fast, Fast] = {"forward": "inverse", "inverse": "forward"}
        self.transform = transform
        self.fast = swapped.get(transform.fast, transform.fast)
        self.inverse_kind = transform.inverse_kind
        self.domain, self.codomain = transform.codomain, transform.domain

    def _described(self) -> list[str]:
        return [repr(self.transform)]

    @property
    def inv(self) -> FlowTransform:
        return self.transform

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
        super().__init__(transform.input_dim)
        check_count("Conditioned", "transform.context_dim", transform.context_dim)
        check_context(type(transform).__name__, context, transform.context_dim)
        check_dtype(type(transform).__name__, "context", context, floating_dtype(transform))
        self.transform = transform
        self.fast, self.inverse_kind = transform.fast, transform.inverse_kind
        self.domain, self.codomain = transform.domain, transform.codomain
        self.register_buffer("context", context, persistent=False)

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


class Chain(FlowTransform):
    r"""One transform after the other, :math:`y = T_K(\dots T_2(T_1(x)))`; ladjs add up.

    The context goes to the parts that take one. A direction is fast if it is fast in every part;
    the inverse is exact if every part's is.

    Args:
        parts: Transforms in forward order, at least one.

    Raises:
        ValueError: If there is no part, or if neighbours do not fit: their sizes differ, or what
            the one makes lies outside of what the next one takes.
        TypeError: If a part is not a FlowTransform.

    Example:
        >>> import torch
        >>> from pyro_nf.transforms.permutation import Permutation
        >>> chain = Chain([Permutation([1, 2, 0]), Permutation([1, 2, 0])])
        >>> chain(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [3.0, 1.0, 2.0]
    """

    def __init__(self, parts: Iterable[FlowTransform]) -> None:
        check_listed("Chain", "parts", parts, "a list of transforms")
        parts = list(parts)
        for part in parts:
            check_kind("Chain", "every entry of parts", part, FlowTransform)
        if not parts:
            raise ValueError("Chain: parts must have at least one transform, got none.")
        for i, (part, following) in enumerate(pairwise(parts)):
            if not is_within(part.codomain, following.domain):
                raise ValueError(
                    f"Chain: part {i}, {type(part).__name__}, makes {_points(part.codomain)}, but "
                    f"part {i + 1}, {type(following).__name__}, takes {_points(following.domain)}. "
                    "Put a map from the one onto the other between them, or change their order."
                )
        input_dim = _common_dim("input_dim", [p.input_dim for p in parts if p.input_dim])
        context_dim = _common_dim("context_dim", [p.context_dim for p in parts if p.context_dim])
        super().__init__(input_dim, context_dim or 0)
        self.parts = nn.ModuleList(parts)
        self.fast = _common_way([part.fast for part in parts])
        self.inverse_kind = (
            "exact" if all(part.inverse_kind == "exact" for part in parts) else "numeric"
        )
        self.domain, self.codomain = parts[0].domain, parts[-1].codomain

    def __repr__(self) -> str:
        parts = self._parts()
        lines = [f"({i}): {indented(repr(part))}" for i, part in enumerate(parts)]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES - 2 : -1] = [f"... {len(lines) - _MOST_LINES + 1} more ..."]
        return "\n  ".join([f"Chain of {len(parts)}, fast={self.fast!r}", *lines])

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        ladjs = []
        for part in self._parts():
            x, ladj = part._forward_and_ladj(x, context if part.context_dim else None)
            ladjs.append(ladj)
        return x, reduce(add, ladjs)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        ladjs = []
        for part in reversed(self._parts()):
            y, ladj = part._inverse_and_ladj(y, context if part.context_dim else None)
            ladjs.append(ladj)
        return y, reduce(add, ladjs)

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ladjs = []
        for part in self._parts():
            x, ladj, score = part._push_score(x, score, context if part.context_dim else None)
            ladjs.append(ladj)
        return x, reduce(add, ladjs), score

    def _parts(self) -> list[FlowTransform]:
        return cast("list[FlowTransform]", list(self.parts))

    def start_from_data(
        self, y: Tensor, context: Tensor | None = None, *, whiten: bool = True
    ) -> Tensor:
        self._check_rows(y, context, whiten)
        for part in reversed(self._parts()):
            y = part.start_from_data(y, context if part.context_dim else None, whiten=whiten)
        return y


def _points(space: constraints.Constraint) -> str:
    """A space in words, with the number of dimensions of its events."""
    kind = {0: "single numbers", 1: "vectors"}.get(space.event_dim, f"{space.event_dim}-D events")
    return f"{kind} in {describe(space)}"


_MOST_LINES = 12  # of a chain that is printed


def indented(text: str) -> str:
    """A text whose lines after the first are moved to the right."""
    return text.replace("\n", "\n  ")


def _common_dim(name: str, dims: list[int]) -> int | None:
    if len(set(dims)) > 1:
        raise ValueError(f"Chain: all parts must share one {name}, got {dims}.")
    return dims[0] if dims else None


def _common_way(ways: list[Fast]) -> Fast:
    forward = all(way in ("forward", "both") for way in ways)
    inverse = all(way in ("inverse", "both") for way in ways)
    if forward:
        return "both" if inverse else "forward"
    return "inverse" if inverse else "neither"
