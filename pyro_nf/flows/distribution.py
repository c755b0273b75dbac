"""The distribution that a flow makes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_nf._checks import (
    check_dtype,
    check_event_shape,
    check_flag,
    check_kind,
    floating_dtype,
    size_of,
)
from pyro_nf.flows.base import log_prob_and_score
from pyro_nf.ops.layout import flat_event
from pyro_nf.ops.spaces import is_all_real
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.kinds import LogProbKind

MOST_NUMBERS, FEWEST_ROWS = 1_000_000, 16
"""A draw is remembered if the flow has at most so many numbers, or the draw at least so many rows.

To remember is to copy and to compare every parameter, 2 to 15 ns a number; a density is a pass,
about 0.5 ns a number and row. Below a million numbers both cost mostly the calls, and a pass has
more of them.
"""


class FlowDistribution(dist.TransformedDistribution):
    r"""The law of :math:`y = T(x)` with :math:`x` drawn from the base.

    .. math:: \log q(y) = \log p_0(T^{-1}(y)) + \log|\det \partial T^{-1} / \partial y|

    A density costs one pass in the inverse direction. The density of the last ``rsample`` costs
    nothing where sampling is fast: it was computed in the same pass, and waits here until it is
    asked for once. It is handed out only for the very same tensor, unchanged, in the same grad
    mode, with all parameters as they were; backward empties it, and it is never copied or pickled.

    Args:
        base_dist: The base, with the event of the transform's domain and the whole batch shape.
        transform: The map from base to data, with its context filled in.
        owner: The Module whose parameters the density depends on; the transform by default.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import realnvp
        >>> d = realnvp(2)()
        >>> y, log_prob = d.rsample_and_log_prob((5,))
        >>> torch.allclose(d.log_prob(y), log_prob, atol=1e-5)
        True
    """

    def __init__(
        self,
        base_dist: dist.TorchDistribution,
        transform: FlowTransform,
        owner: nn.Module | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_kind("FlowDistribution", "base_dist", base_dist, torch.distributions.Distribution)
        check_kind("FlowDistribution", "transform", transform, FlowTransform)
        check_kind("FlowDistribution", "owner", owner, nn.Module, optional=True)
        if validate_args is not None:
            check_flag("FlowDistribution", "validate_args", validate_args)
        event_shape = _event_shape(base_dist.event_shape, transform)
        # TransformedDistribution would look for shapes that do not fit yet, which takes as long as
        # a tenth of a small layer; here the base has the batch shape of the whole.
        self.base_dist, self.transforms, self.transform = base_dist, [transform], transform
        super(torch.distributions.TransformedDistribution, self).__init__(  # type: ignore[misc]
            base_dist.batch_shape,
            event_shape,
            validate_args=validate_args,
        )
        self._owner = transform if owner is None else owner
        self._last: LastSample | None = None

    @property
    def log_prob_kind(self) -> LogProbKind:
        """What ``log_prob`` returns: "exact", or an "estimate" that is right on average."""
        return self.transform.ladj_kind

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """This distribution with another batch shape, and independent noise for each element."""
        return FlowDistribution(
            self.base_dist.expand(size_of("FlowDistribution", "batch_shape", batch_shape)),
            self.transform,
            self._owner,
            self._validate_args,
        )

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draws with their log density, in one pass.

        Args:
            sample_shape: Shape of the independent draws.

        Returns:
            Draws ``sample_shape + batch_shape + event_shape`` and log densities without the event.
        """
        # A mixture has no path for gradients; without gradients it needs none.
        has_path = self.base_dist.has_rsample or torch.is_grad_enabled()
        draw = self.base_dist.rsample if has_path else self.base_dist.sample
        return self.push(draw(size_of("FlowDistribution", "sample_shape", sample_shape)))

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Maps draws of the base to draws of this law, with their log density.

        Args:
            x: Draws of ``base_dist``, shape ``(..., *event_shape)``.

        Returns:
            :math:`y = T(x)`, and :math:`\log q(y) = \log p_0(x) - \log|\det J|` without the
            event.
        """
        y, ladj = self.transform.forward_and_ladj(x)
        return y, self.base_dist.log_prob(x) - ladj

    def push_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps draws of the base to draws of this law, with their log density and its slope.

        .. math:: \nabla_y \log q(y) = J^{-\top} \nabla_x (\log p_0(x) - \log|\det J|)

        No inverse is needed for it.

        Args:
            x: Draws of ``base_dist``, shape ``(..., *event_shape)``.

        Returns:
            :math:`y = T(x)` with a graph to all parameters; and, without a graph,
            :math:`\log q(y)` and :math:`\nabla_y \log q(y)`.
        """
        event_shape = self.base_dist.event_shape
        check_event_shape("FlowDistribution", "x", x, event_shape, len(event_shape))
        log_p0, score = log_prob_and_score(self.base_dist, x)
        y, ladj, score = self.transform.push_score(x, score)
        return y, log_p0 - ladj.detach(), score

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with gradients to all parameters; their density may then be free once."""
        y, log_prob = self.rsample_and_log_prob(sample_shape)
        if not (torch.compiler.is_compiling() or is_inside_transform(y)):
            self._remember(y, log_prob)
        return y

    def _remember(self, y: Tensor, log_prob: Tensor) -> None:
        """Keeps the density if to keep it costs less than the pass that it saves."""
        self._last = None
        if self.transform.fast == "inverse":
            return  # the density is the fast direction
        tensors = self._tensors()
        count = sum(t.numel() for t in tensors)
        if count <= MOST_NUMBERS or log_prob.numel() >= FEWEST_ROWS:
            self._last = LastSample(y, log_prob, joined(tensors))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradients."""
        shape = size_of("FlowDistribution", "sample_shape", sample_shape)
        with torch.no_grad():
            return self.transform.forward_and_ladj(self.base_dist.sample(shape))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``value (..., *event_shape)``.

        Raises:
            ValueError: If the event has another shape, or (with validation) outside the support.
            TypeError: If ``value`` is no floating tensor of the dtype of the flow.
        """
        last, self._last = self._last, None
        if (
            last is not None
            and last.is_of(value)
            and torch.equal(last.state, joined(self._tensors()))
        ):
            return last.log_prob
        if self._validate_args and not is_all_real(self.transform.codomain):
            self._validate_sample(value)
        log_prob = self._log_prob(value)
        # a transform without parameters takes any dtype, its base does not
        check_dtype("log_prob", "value", value, floating_dtype(self._owner))
        return self._zero_if_too_far(log_prob, value)

    def _log_prob(self, value: Tensor) -> Tensor:
        x, ladj = self.transform.inverse_and_ladj(value)
        return self.base_dist.log_prob(x) + ladj

    def _zero_if_too_far(self, log_prob: Tensor, value: Tensor) -> Tensor:
        """The log density, with -inf where numbers overflow on the way, which makes NaN of them.

        NaN stays where ``value`` has it, and where parameters or a context make it.
        """
        is_seen = not (torch.compiler.is_compiling() or is_inside_transform(log_prob))
        if is_seen and value.device.type == "cpu" and math.isfinite(log_prob.detach().sum()):
            return log_prob  # as is the rule; the sum shows it at the least cost
        event_dim = len(self.event_shape)
        has_nan = flat_event(value.isnan(), event_dim).any(-1)
        lost = (log_prob.isnan() | log_prob.isneginf()) & ~has_nan
        if is_seen:  # a point nearby, lest the gradients of the others become NaN
            of_event = lost.reshape(lost.shape + (1,) * event_dim)
            log_prob = self._log_prob(torch.where(of_event, 0.0, value))
            lost = lost & ~log_prob.isnan()
        return torch.where(lost, -torch.inf, log_prob)

    def _tensors(self) -> list[Tensor]:
        """All that the density depends on."""
        modules = (self.transform, self._owner)
        return list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _event_shape(event_shape: Size, transform: FlowTransform) -> Size:
    """What the transform makes of the base's event shape; raises if it does not take that."""
    if event_shape == transform.event_shape:
        return cast(Size, transform.output_shape)
    if transform.event_shape is None and len(event_shape) == transform.domain.event_dim:
        return Size(transform.forward_shape(event_shape))
    wanted = (
        f"events of {transform.domain.event_dim} dimension(s)"
        if transform.event_shape is None
        else f"events of shape {tuple(transform.event_shape)}"
    )
    raise ValueError(
        f"FlowDistribution: base_dist has event_shape {tuple(event_shape)}, but the transform "
        f"{type(transform).__name__} takes {wanted}. Take another base, or call "
        "base_dist.to_event(n) for dimensions of its batch that belong to the event."
    )


def joined(tensors: list[Tensor]) -> Tensor:
    """Every number of them: version counters miss what fused optimisers change."""
    return torch.cat([t.detach().reshape(-1) for t in tensors] or [torch.empty(0)])


def is_inside_transform(tensor: Tensor) -> bool:
    """Whether torch.func is transforming what is computed: then values cannot be compared."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class LastSample:
    """A sample's log density, tied to that sample and to the state it was computed in."""

    def __init__(self, y: Tensor, log_prob: Tensor, state: Tensor) -> None:
        self.log_prob, self.state = log_prob, state
        self._spent = False
        self._y, self._version, self._grad = weakref.ref(y), y._version, torch.is_grad_enabled()
        if y.requires_grad:
            # backward frees the graph of the density: from then on it must be computed afresh
            mine = weakref.ref(self)
            y.register_hook(lambda _: _empty(mine()))

    def is_of(self, value: Tensor) -> bool:
        """Whether the density is that of this tensor, with a graph that can be gone through."""
        return not self._spent and self.is_drawn(value) and self._grad == torch.is_grad_enabled()

    def is_drawn(self, value: Tensor) -> bool:
        """Whether it is the very tensor that was drawn, unchanged."""
        return self._y() is value and self._version == value._version


def _empty(last: LastSample | None) -> None:
    if last is not None:
        last._spent = True
