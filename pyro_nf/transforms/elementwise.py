"""Every coordinate by itself: with parameters, and fixed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Size, Tensor, nn

from pyro_nf._checks import check_count, check_kind, event_shape_of
from pyro_nf.nn.conditioner import Conditioner, in_one_batch, network_of
from pyro_nf.nn.mlp import Constant
from pyro_nf.ops.gradients import gradients
from pyro_nf.ops.layout import sum_event
from pyro_nf.ops.spaces import over_events
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.univariate import fixed
from pyro_nf.univariate.base import HINT, UnivariateMap
from pyro_nf.univariate.spline import RationalQuadratic


class Elementwise(FlowTransform):
    r"""A univariate map on each coordinate, :math:`y_i = u(x_i; \theta_i(c))`.

    Both directions are fast if the map has an exact inverse. Parameters are free numbers, plus a
    perceptron of the context if there is one; at zero the transform is the identity.

    Args:
        univariate: The map :math:`u`.
        input_dim: Size of the event if it is a vector.
        context_dim: Width of the context, 0 for none.
        event_shape: Shape of the event, instead of ``input_dim``.
        hidden_dims: Widths of the hidden layers of the perceptron.
        activation: Makes its activation.
        conditioner: Makes another network of the context
            (:data:`pyro_nf.nn.conditioner.Conditioner`). It sees no ``x``: ``in_shape`` is (0,).

    Raises:
        ValueError: If a dimension makes no sense, or the network of the conditioner does not run or
            makes another shape.
        TypeError: If the conditioner makes no Module.

    Example:
        >>> import torch
        >>> from pyro_nf.univariate.affine import Affine
        >>> Elementwise(Affine(), 3)(torch.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """

    event_shape: Size

    def __init__(
        self,
        univariate: UnivariateMap,
        input_dim: int | None = None,
        context_dim: int = 0,
        *,
        event_shape: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        conditioner: Conditioner | None = None,
    ) -> None:
        shape = event_shape_of("Elementwise", input_dim, event_shape)
        super().__init__(context_dim=context_dim, event_shape=shape)
        check_kind("Elementwise", "univariate", univariate, UnivariateMap, HINT)
        univariate.refuse_hidden_weights("Elementwise")
        self.univariate = univariate
        self.inverse_kind = "exact" if univariate.exact_inverse else "numeric"
        self.domain = over_events(univariate.domain, len(shape))
        self.codomain = over_events(univariate.codomain, len(shape))
        self.is_given = conditioner is not None
        self.net: nn.Module
        if conditioner is None:
            self.net = Constant(
                shape,
                univariate.num_params,
                context_dim,
                hidden_dims=hidden_dims,
                activation=activation,
            )
        else:
            self.net = network_of(
                "Elementwise", conditioner, Size((0,)), shape, univariate.num_params, context_dim
            )

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.univariate.forward_and_ladj(x, self._params(x, context))
        return y, sum_event(ladj, len(self.event_shape))

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = self.univariate.inverse_and_ladj(y, self._params(y, context))
        return x, sum_event(ladj, len(self.event_shape))

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, ladj = self.univariate.forward_and_ladj(x, self._params(x, context))
            (slope,) = gradients(ladj, x)
        score = (score - slope) * (-ladj.detach()).exp()
        return y, sum_event(ladj, len(self.event_shape)), score

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.is_given:
            nothing = x.new_empty(*x.shape[: x.dim() - len(self.event_shape)], 0)
            return in_one_batch(self.net, nothing, 1, context)
        params: Tensor = self.net(None, context)
        return params.expand(*x.shape, params.shape[-1])


class Fixed(FlowTransform):
    """A univariate map without parameters on each coordinate of an event of any size.

    Args:
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.
    """

    def __init__(self, *, event_dim: int = 1) -> None:
        super().__init__()
        check_count(type(self).__name__, "event_dim", event_dim, at_least=0)
        self.domain = over_events(self.univariate.domain, event_dim)
        self.codomain = over_events(self.univariate.codomain, event_dim)

    @property
    @abstractmethod
    def univariate(self) -> UnivariateMap:
        """The map."""

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.univariate.forward_and_ladj(x, x.new_empty(*x.shape, 0))
        return y, sum_event(ladj, self.event_dim)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = self.univariate.inverse_and_ladj(y, y.new_empty(*y.shape, 0))
        return x, sum_event(ladj, self.event_dim)


class Softsign(Fixed):
    """:class:`pyro_nf.univariate.Softsign` on each coordinate: reals onto (-1, 1), exact inverse.

    Args:
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.

    Example:
        >>> import torch
        >>> Softsign()(torch.tensor([1.0, -3.0])).tolist()
        [0.5, -0.75]
    """

    univariate = fixed.Softsign()


class Tanh(Fixed):
    """:class:`pyro_nf.univariate.Tanh` on each coordinate: reals onto (-1, 1), exact inverse.

    Args:
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.

    Example:
        >>> import torch
        >>> Tanh()(torch.zeros(2)).tolist()
        [0.0, 0.0]
    """

    univariate = fixed.Tanh()


class Sigmoid(Fixed):
    """:class:`pyro_nf.univariate.Sigmoid` on each coordinate: reals onto (0, 1), exact inverse.

    Args:
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.

    Example:
        >>> import torch
        >>> Sigmoid()(torch.zeros(2)).tolist()
        [0.5, 0.5]
    """

    univariate = fixed.Sigmoid()


class Exp(Fixed):
    """:class:`pyro_nf.univariate.Exp` on each coordinate: reals onto positives, exact inverse.

    Args:
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.

    Example:
        >>> import torch
        >>> Exp()(torch.zeros(2)).tolist()
        [1.0, 1.0]
    """

    univariate = fixed.Exp()


class Softplus(Fixed):
    """:class:`pyro_nf.univariate.Softplus` on each coordinate: reals onto positives, exact inverse.

    Args:
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.

    Example:
        >>> import torch
        >>> Softplus().inv(torch.tensor([0.6931472])).abs() < 1e-6
        tensor([True])
    """

    univariate = fixed.Softplus()


class LeakyReLU(Fixed):
    """:class:`pyro_nf.univariate.LeakyReLU` on each coordinate, exact inverse.

    Args:
        slope: The slope of the negative half.
        event_dim: How many dimensions an event has: 1 for vectors, 3 for images.

    Raises:
        ValueError: If ``slope`` is not positive.

    Example:
        >>> import torch
        >>> LeakyReLU(0.5)(torch.tensor([-2.0, 2.0])).tolist()
        [-1.0, 2.0]
    """

    univariate = fixed.LeakyReLU()

    def __init__(self, slope: float = 0.01, *, event_dim: int = 1) -> None:
        super().__init__(event_dim=event_dim)
        self.univariate = fixed.LeakyReLU(slope)


def spline(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    hidden_dims: Sequence[int] = (64, 64),
) -> Elementwise:
    """An elementwise rational-quadratic spline; both directions fast, exact inverse.

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_bins: Bins of each spline.
        bound: Half-width of the interval; the tails outside are the identity.
        hidden_dims: Widths of the hidden layers that see the context.

    Example:
        >>> import torch
        >>> spline(2)(torch.tensor([0.5, -7.0])).tolist()
        [0.5, -7.0]
    """
    univariate = RationalQuadratic(count_bins, bound)
    return Elementwise(univariate, input_dim, context_dim, hidden_dims=hidden_dims)
