"""Autoregressive: each coordinate's map is set by the coordinates before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Size, Tensor, nn

from pyro_nf._checks import check_choice, check_flag, check_kind, event_shape_of, order_of
from pyro_nf.nn.conditioner import Conditioner, check_autoregressive, in_one_batch, network_of
from pyro_nf.nn.masked import MaskedNet
from pyro_nf.nn.triangular import Map, solve, solve_by_coordinates, solve_transposed
from pyro_nf.ops.gradients import apart
from pyro_nf.ops.layout import flat_event, in_columns
from pyro_nf.ops.spaces import over_events
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.compiled_leaf import compiled_leaf
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.base import HINT, UnivariateMap
from pyro_nf.univariate.spline import RationalQuadratic


class Autoregressive(FlowTransform):
    r"""A univariate map on each coordinate, set by the coordinates before it and the context.

    .. math::
        y_i = u(x_i; \theta_i(y_{<i}, c)) \quad \text{if fast = "inverse" (MAF)}, \qquad
        y_i = u(x_i; \theta_i(x_{<i}, c)) \quad \text{if fast = "forward" (IAF)}

    One direction is one pass of the masked network. The other substitutes coordinate after
    coordinate (:mod:`pyro_nf.nn.triangular`) for about the price of a pass, and is as exact as the
    map's own inverse. That direction is differentiable once, and :func:`torch.func.vmap` may map
    it over inputs and contexts but not over weights. The network of a given ``conditioner`` is run
    once for each coordinate instead.

    *Masked Autoregressive Flow for Density Estimation* (Papamakarios, Pavlakou, Murray, 2017) and
    *Improved Variational Inference with Inverse Autoregressive Flow* (Kingma, Salimans,
    Jozefowicz, Chen, Sutskever, Welling, 2016).

    Args:
        univariate: The map :math:`u`.
        input_dim: Size of the event if it is a vector.
        context_dim: Width of the context, 0 for none.
        event_shape: Shape of the event, instead of ``input_dim``. Its coordinates are those of the
            flattened event: the last index runs first.
        hidden_dims: Widths of the hidden layers of the masked network.
        activation: Makes its activation, which must act on each number alone.
        residual: Whether its hidden layers of equal width are joined by a skip.
        order: The coordinates from first to last; their own order if None.
        reverse: Whether to turn the order round.
        fast: The direction that is one pass, "inverse" (densities) or "forward" (sampling).
        conditioner: Makes another network (:data:`pyro_nf.nn.conditioner.Conditioner`), which must
            be autoregressive in the coordinates. It sees the event in its shape, in that order.

    Raises:
        ValueError: If a dimension makes no sense, ``order`` is no permutation, ``fast`` is not
            one of the two, or the network of the conditioner does not run, makes another shape or
            is not autoregressive.
        TypeError: If the conditioner makes no Module.

    Example:
        >>> import torch
        >>> from pyro_nf.univariate.affine import Affine
        >>> maf = Autoregressive(Affine(), 5, hidden_dims=(8,), order=[4, 2, 0, 1, 3])
        >>> maf(torch.arange(5.0)).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    event_shape: Size
    order: Tensor | None
    rank: Tensor | None

    def __init__(
        self,
        univariate: UnivariateMap,
        input_dim: int | None = None,
        context_dim: int = 0,
        *,
        event_shape: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        residual: bool = False,
        order: Sequence[int] | Tensor | None = None,
        reverse: bool = False,
        fast: Literal["inverse", "forward"] = "inverse",
        conditioner: Conditioner | None = None,
    ) -> None:
        shape = event_shape_of("Autoregressive", input_dim, event_shape)
        super().__init__(context_dim=context_dim, event_shape=shape)
        check_kind("Autoregressive", "univariate", univariate, UnivariateMap, HINT)
        check_choice("Autoregressive", "fast", fast, ("inverse", "forward"))
        check_flag("Autoregressive", "reverse", reverse)
        univariate.refuse_hidden_weights("Autoregressive")
        self.univariate = univariate
        self.fast = fast
        self.inverse_kind = "exact" if univariate.exact_inverse else "numeric"
        self.domain = over_events(univariate.domain, len(shape))
        self.codomain = over_events(univariate.codomain, len(shape))
        self.reverse = reverse
        if order is not None:
            order = order_of("Autoregressive", "order", order, shape.numel())
        self.register_buffer("order", order)
        self.register_buffer("rank", None if order is None else order.argsort())
        self.is_given = conditioner is not None
        self.net: nn.Module
        if conditioner is None:
            self.net = MaskedNet(
                shape.numel(),
                univariate.num_params,
                context_dim,
                hidden_dims=hidden_dims,
                activation=activation,
                residual=residual,
            )
        else:
            self.net = network_of(
                "Autoregressive", conditioner, shape, shape, univariate.num_params, context_dim
            )
            check_autoregressive("Autoregressive", self.net, shape, context_dim)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        one_pass = self.fast == "forward"
        return self._map(self.univariate.forward_and_ladj, one_pass, x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        one_pass = self.fast == "inverse"
        return self._map(self.univariate.inverse_and_ladj, one_pass, y, context)

    def _map(
        self, direction: Map, one_pass: bool, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        v = self._sorted(value)
        if one_pass:
            v = in_columns(v)  # as the parameters lie in memory
            z, ladj = direction(apart(v), self._params(v, context))
            ladj = ladj.sum(-1)
        elif isinstance(self.net, MaskedNet):
            leaf = compiled_leaf(self.univariate, self.fast == "forward", self.net, v)
            z, ladj = solve(self.net, direction, v, context, leaf)
        else:
            z, ladj = solve_by_coordinates(self._params, direction, v, context)
        return self._unsorted(z), ladj

    def _params(self, v: Tensor, context: Tensor | None) -> Tensor:
        """The parameters ``(..., D, P)`` of all coordinates ``(..., D)``."""
        if not self.is_given:
            return cast(Tensor, self.net(v, context))
        event = v.reshape(v.shape[:-1] + self.event_shape)
        params = in_one_batch(self.net, event, len(self.event_shape), context)
        return params.reshape(*v.shape, self.univariate.num_params)

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""In the fast direction by one triangular solve.

        With :math:`a = \partial u/\partial x`, :math:`U = \partial u/\partial\theta` and
        :math:`N = \partial\theta/\partial x`, :math:`J = a + U N` is triangular, and the score
        :math:`r` of ``y`` is what remains when the network has taken its part,

        .. math::
            a r = \nabla_x \log p(x) - \partial\ell/\partial x - \mu, \qquad
            \mu = N^\top (U^\top r + \partial\ell/\partial\theta),

        where :math:`\ell` is the ladj of :math:`u`.
        """
        if self.fast == "inverse" or not isinstance(self.net, MaskedNet):
            return super()._push_score(x, score, context)
        v = in_columns(self._sorted(x))
        sums = self.net.sums(v, context)
        params = sums[-1].T.reshape(*v.shape, self.univariate.num_params)
        y, ladj = self.univariate.forward_and_ladj(apart(v), params)
        with torch.no_grad():
            x_y, x_params, ladj_x, ladj_params = self.univariate.slopes(v, params)
            rest = in_columns(self._sorted(score)) - ladj_x
            tau = torch.addcmul(ladj_params, x_params, rest.unsqueeze(-1), value=-1)
            r = (rest - solve_transposed(self.net, sums, x_params, tau)) * x_y
        return self._unsorted(y), ladj.sum(-1), self._unsorted(r)

    def _sorted(self, value: Tensor) -> Tensor:
        """The coordinates ``(..., D)`` in their order."""
        v = flat_event(value, len(self.event_shape))
        v = v if self.order is None else v.index_select(-1, self.order)
        return v.flip(-1) if self.reverse else v

    def _unsorted(self, z: Tensor) -> Tensor:
        """The event of coordinates that are in their order."""
        z = z.flip(-1) if self.reverse else z
        z = z if self.rank is None else z.index_select(-1, self.rank)
        return z if len(self.event_shape) == 1 else z.reshape(z.shape[:-1] + self.event_shape)


def affine_autoregressive(
    input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = (64, 64)
) -> Autoregressive:
    """Shift and scale by the coordinates before: a density is one pass, both directions are exact.

    *Masked Autoregressive Flow for Density Estimation* (Papamakarios, Pavlakou, Murray, 2017).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers of the masked network.

    Example:
        >>> from pyro.distributions.transforms import iterated
        >>> len(iterated(3, affine_autoregressive, 4))
        3
    """
    return Autoregressive(Affine(), input_dim, context_dim, hidden_dims=hidden_dims)


def spline_autoregressive(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    hidden_dims: Sequence[int] = (64, 64),
) -> Autoregressive:
    """Rational-quadratic splines set by the coordinates before: a density is one pass, both exact.

    *Neural Spline Flows* (Durkan, Bekasov, Murray, Papamakarios, 2019).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_bins: Bins of each spline.
        bound: Half-width of the interval of the splines; the tails outside are the identity.
        hidden_dims: Widths of the hidden layers of the masked network.

    Example:
        >>> import torch
        >>> spline_autoregressive(3)(torch.zeros(7, 3)).shape
        torch.Size([7, 3])
    """
    univariate = RationalQuadratic(count_bins, bound)
    return Autoregressive(univariate, input_dim, context_dim, hidden_dims=hidden_dims)
