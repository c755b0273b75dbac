"""Coupling: half of the coordinates set the map of the other half."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf._checks import check_count, check_flag, check_kind
from pyro_nf.nn.mlp import MLP, Constant
from pyro_nf.ops.layout import features_first, in_columns
from pyro_nf.transforms.base import Chain, FlowTransform, over_vectors
from pyro_nf.univariate.affine import Additive, Affine
from pyro_nf.univariate.base import HINT, UnivariateMap
from pyro_nf.univariate.spline import RationalQuadratic


class Coupling(FlowTransform):
    r"""One half passes through and sets the map of the other half.

    .. math:: y_A = x_A, \qquad y_B = u(x_B; \theta(x_A, c))

    Both directions cost one pass of the conditioner, and the inverse is exact if the map's is.
    ``A`` has :math:`\lfloor D/2 \rfloor` coordinates and comes first; with ``swap`` it comes
    last. A layer and a swapped layer together touch every coordinate.

    *NICE: Non-linear Independent Components Estimation* (Dinh, Krueger, Bengio, 2014) and *Density
    estimation using Real NVP* (Dinh, Sohl-Dickstein, Bengio, 2017).

    Args:
        univariate: The map :math:`u`.
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers of the conditioner.
        activation: Makes its activation.
        swap: Whether the last coordinates, not the first, pass through.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> import torch
        >>> from pyro_nf.univariate.affine import Affine
        >>> Coupling(Affine(), 5, hidden_dims=(8,))(torch.arange(5.0)).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    def __init__(
        self,
        univariate: UnivariateMap,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        swap: bool = False,
    ) -> None:
        check_count("Coupling", "input_dim", input_dim)
        super().__init__(input_dim, context_dim)
        check_kind("Coupling", "univariate", univariate, UnivariateMap, HINT)
        check_flag("Coupling", "swap", swap)
        univariate.refuse_hidden_weights("Coupling")
        self.univariate = univariate
        self.inverse_kind = "exact" if univariate.exact_inverse else "numeric"
        self.domain = over_vectors(univariate.domain)
        self.swap = swap
        passing = input_dim // 2
        self.sizes = (input_dim - passing, passing) if swap else (passing, input_dim - passing)
        self.codomain = self._codomain()
        self.net: nn.Module
        if univariate.num_params and passing + context_dim:
            self.net = MLP(
                passing,
                input_dim - passing,
                univariate.num_params,
                context_dim,
                hidden_dims=hidden_dims,
                activation=activation,
            )
        else:  # nothing to set, or nothing to see
            self.net = Constant(
                1, univariate.num_params, hidden_dims=hidden_dims, activation=activation
            )

    def _codomain(self) -> constraints.Constraint:
        """The half that passes through stays where it was."""
        passes, mapped = self.univariate.domain, self.univariate.codomain
        if passes is mapped:
            return self.domain
        halves = (mapped, passes) if self.swap else (passes, mapped)
        return over_vectors(constraints.cat(halves, dim=-1, lengths=self.sizes))

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
        value = in_columns(value)  # as the parameters lie in memory
        first, last = value.split(self.sizes, -1)
        a, b = (last, first) if self.swap else (first, last)
        params = self.net(a, context)
        if params.shape[:-1] != b.shape:  # the conditioner saw less than the whole batch
            params = params.expand(*b.shape, params.shape[-1])
        b, ladj = direction(b, params)
        halves = (b, a) if self.swap else (a, b)
        joint = torch.cat([features_first(half) for half in halves]).T
        return joint.reshape(value.shape) if value.dim() != 2 else joint, ladj.sum(-1)


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
