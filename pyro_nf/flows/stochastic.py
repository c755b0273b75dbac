"""The distribution that a flow with stochastic layers makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nf._checks import check_count, check_event_shape, check_flag, check_kind, size_of
from pyro_nf.flows.base import log_prob_and_score
from pyro_nf.flows.distribution import LastSample, is_inside_transform, joined
from pyro_nf.ops.spaces import is_all_real
from pyro_nf.transforms.kinds import LogProbKind
from pyro_nf.transforms.stochastic import StochasticTransform


class StochasticFlowDistribution(dist.TorchDistribution):
    r"""The law of ``y`` at the end of a path through layers that draw or lose something.

    .. math:: x \sim p_0, \; y \sim p(y \mid x), \qquad
              \log p(y) \ge E_{x \sim q(x \mid y)} \left[\log p_0(x) - V(x, y)\right]

    with the contribution :math:`V = \log q(x|y) - \log p(y|x)` of the layers. What ``log_prob``
    returns is said by ``log_prob_kind``:

    - "exact" if no layer draws in the inverse direction;
    - "bound" if one does: a draw of what stands in the brackets. On average it is below the log
      density, its exponential is the density on average
      (:meth:`importance_weighted_log_prob` makes use of that), and it is another number at each
      call;
    - "estimate" if only log-determinants are estimated: on average it is the log density.

    Draws come with the contributions of their own path, :math:`\log p_0(x) - V(x, y)`. For a bound
    that number is on average *above* the log density, so that an ELBO with it is a lower bound of
    the log evidence still; with a fresh ``log_prob`` it would be none. So ``log_prob`` returns it
    for the tensor that ``rsample`` returned last, as long as neither the tensor nor a parameter
    changes, and such a distribution can stand in a Pyro guide.

    *SurVAE Flows* (Nielsen et al., 2020); *Stochastic Normalizing Flows* (Wu et al., 2020).

    Args:
        base_dist: The base, with the whole batch shape.
        transform: From base to data, with its context filled in.
        owner: The Module whose parameters the density depends on; the transform by default.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from pyro_nf.flows.base import DiagonalNormal
        >>> from pyro_nf.transforms.stochastic import StochasticLayer
        >>> class Noise(StochasticLayer):
        ...     "y = x + e; the inverse is drawn from the posterior of x under a normal base."
        ...     def _forward(self, x, context):
        ...         return x + torch.randn_like(x)
        ...     def _inverse(self, y, context):
        ...         return y / 2 + torch.randn_like(y) / 2**0.5
        ...     def _contribution(self, x, y, context):
        ...         log_q = Normal(y / 2, 0.5**0.5).log_prob(x)
        ...         return (log_q - Normal(x, 1.0).log_prob(y)).sum(-1)
        >>> d = StochasticFlowDistribution(DiagonalNormal(1)(), Noise(1))
        >>> y = torch.tensor([0.7])  # tight, since the inverse is the posterior: N(0, 2)
        >>> torch.allclose(d.log_prob(y), Normal(0.0, 2**0.5).log_prob(y))
        True
    """

    arg_constraints: ClassVar[dict[str, dist.constraints.Constraint]] = {}

    def __init__(
        self,
        base_dist: dist.TorchDistribution,
        transform: StochasticTransform,
        owner: nn.Module | None = None,
        validate_args: bool | None = None,
    ) -> None:
        me = "StochasticFlowDistribution"
        check_kind(me, "base_dist", base_dist, torch.distributions.Distribution)
        check_kind(me, "transform", transform, StochasticTransform)
        check_kind(me, "owner", owner, nn.Module, optional=True)
        if validate_args is not None:
            check_flag(me, "validate_args", validate_args)
        if transform.event_shape not in (None, base_dist.event_shape):
            raise ValueError(
                f"{me}: base_dist has event_shape {tuple(base_dist.event_shape)}, but the "
                f"transform has event_shape {tuple(transform.event_shape or ())}."
            )
        self.base_dist, self.transform = base_dist, transform
        super().__init__(
            base_dist.batch_shape,
            transform.forward_shape(base_dist.event_shape),
            validate_args=validate_args,
        )
        self._owner = transform if owner is None else owner
        self._last: LastSample | None = None

    @property
    def support(self) -> dist.constraints.Constraint:
        """The space on the data side."""
        return self.transform.codomain

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: those of the base do, and those of all layers."""
        return bool(self.base_dist.has_rsample and self.transform.has_rsample)

    @property
    def log_prob_kind(self) -> LogProbKind:
        """What ``log_prob`` returns: "exact", an "estimate" or a "bound" of the log density."""
        return self.transform.ladj_kind

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> StochasticFlowDistribution:
        """This distribution with another batch shape, and independent noise for each element."""
        return StochasticFlowDistribution(
            self.base_dist.expand(
                size_of("StochasticFlowDistribution", "batch_shape", batch_shape)
            ),
            self.transform,
            self._owner,
            self._validate_args,
        )

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        r"""Draws with the log weight of their paths, :math:`\log p_0(x) - V(x, y)`.

        Args:
            sample_shape: Shape of the independent draws.

        Returns:
            Draws ``sample_shape + batch_shape + event_shape``, and the log weights without the
            event's shape: the log density if it is exact, above it on average if it is a bound.

        Raises:
            NotImplementedError: If gradients are on and the draws carry none.
        """
        has_path = torch.is_grad_enabled()
        self._check_path(self.has_rsample)
        draw = self.base_dist.rsample if has_path else self.base_dist.sample
        return self.push(draw(size_of("StochasticFlowDistribution", "sample_shape", sample_shape)))

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Maps draws of the base to draws of this law, with the log weight of their paths.

        Args:
            x: Draws of ``base_dist``.

        Returns:
            ``y``, and :math:`\log p_0(x) - V(x, y)` without the event's shape.

        Raises:
            NotImplementedError: If gradients are on and the draws of a layer carry none.
        """
        self._check_path(self.transform.has_rsample)
        y, ladj = self.transform.forward_and_ladj(x)
        return y, self.base_dist.log_prob(x) - ladj

    def push_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps draws of the base to draws of this law, with their log density and its slope.

        Args:
            x: Draws of ``base_dist``.

        Returns:
            ``y`` with a graph to all parameters; and, without a graph, :math:`\log p(y)` and
            :math:`\nabla_y \log p(y)`.

        Raises:
            TypeError: If there is a bound of the log density only.
        """
        event_shape = self.base_dist.event_shape
        check_event_shape("StochasticFlowDistribution", "x", x, event_shape, len(event_shape))
        log_p0, score = log_prob_and_score(self.base_dist, x)
        y, ladj, score = self.transform.push_score(x, score)
        return y, log_p0 - ladj.detach(), score

    def _check_path(self, has_path: bool) -> None:
        """Raises if a gradient is wanted and there is none."""
        if torch.is_grad_enabled() and not has_path:
            raise NotImplementedError(
                "StochasticFlowDistribution: rsample wants draws that carry gradients, but those "
                "of the base or of a layer carry none (has_rsample = False). Draw by sample, or "
                "under torch.no_grad(); train by the density of data."
            )

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with gradients; ``log_prob`` of this very tensor is the log weight of its path."""
        y, log_prob = self.rsample_and_log_prob(sample_shape)
        if not (torch.compiler.is_compiling() or is_inside_transform(y)):
            self._last = LastSample(y, log_prob, joined(self._tensors()))
        return y

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of ``value (..., *event_shape)``, of the kind ``log_prob_kind``.

        Raises:
            ValueError: If the shape is wrong, or (with validation) it is outside the support.
            TypeError: If ``value`` is no tensor of the dtype of the flow.
        """
        last = self._last
        is_last = last is not None and last.is_drawn(value)
        if last is not None and is_last and torch.equal(last.state, joined(self._tensors())):
            return last.log_prob if torch.is_grad_enabled() else last.log_prob.detach()
        if self._validate_args and not is_all_real(self.transform.codomain):
            check_kind("StochasticFlowDistribution", "value", value, Tensor)
            self._validate_sample(value)
        x, ladj = self.transform.inverse_and_ladj(value)
        return self.base_dist.log_prob(x) + ladj

    def importance_weighted_log_prob(self, value: Tensor, num_samples: int) -> Tensor:
        r"""A tighter bound, :math:`\log \frac1K \sum_k p_0(x_k) e^{-V(x_k, y)}`.

        It grows to the log density with K, on average.

        *Importance Weighted Autoencoders* (Burda, Grosse, Salakhutdinov, 2016).

        Args:
            value: Shape ``(..., *event_shape)``.
            num_samples: K, the paths drawn for each value.

        Returns:
            Shape ``(...)``.

        Raises:
            TypeError: If log-determinants are estimated: their exponentials are no densities.
        """
        me = "StochasticFlowDistribution"
        check_count(me, "num_samples", num_samples)
        check_kind(me, "value", value, Tensor)
        if self.log_prob_kind == "estimate":
            raise TypeError(
                f"{me}: value has an estimated log density, and the mean of exponentials wants "
                "an exact one or a bound; average log_prob itself."
            )
        lead = value.shape[: value.dim() - len(self.event_shape)]
        batch_shape = torch.broadcast_shapes(lead, self.batch_shape)
        value = value.expand(batch_shape + value.shape[len(lead) :])
        each = self.log_prob(value.expand(num_samples, *value.shape).clone())
        return each.logsumexp(0) - math.log(num_samples)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What Pyro's ELBOs ask for; a score of paths that carry no gradient there is not."""
        if not self.has_rsample:
            raise NotImplementedError(
                "StochasticFlowDistribution: in a guide x must carry gradients, but the draws of "
                "the base or of a layer carry none (has_rsample = False); what log_prob returns is "
                "no density that a score could be taken of. Take layers that carry gradients."
            )
        return super().score_parts(x, *args, **kwargs)

    def _tensors(self) -> list[Tensor]:
        """All that the density depends on."""
        modules = (self.transform, self._owner)
        return list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}
