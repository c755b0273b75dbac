"""The classic flows, each one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pyro_nf._checks import check_count, check_counts, check_dims, check_flag, check_positive
from pyro_nf.flows.flow import Flow, recipe
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.coupling import Coupling
from pyro_nf.transforms.elementwise import Elementwise
from pyro_nf.transforms.linear import ActNorm, LULinear
from pyro_nf.transforms.planar import Planar
from pyro_nf.univariate.affine import Additive, Affine
from pyro_nf.univariate.spline import RationalQuadratic

# The layers of a stack scale by at most e^6 together. That is ample, since what stands beside them
# (linear maps, ActNorm) is free; where each layer has as much, their products overflow.
MAX_LOG_SCALE = 6.0


def _stack(
    name: str,
    count_layers: int,
    layer: Callable[[bool], Sequence[FlowTransform]],
    *last: FlowTransform,
) -> Flow:
    """Layers from base to data, the odd ones in the other order, then what meets the data."""
    check_count(name, "count_layers", count_layers)
    layers = [part for i in range(count_layers) for part in layer(i % 2 == 1)]
    return Flow(Chain([*layers, *last]))


@recipe
def gaussian(
    input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = (64, 64)
) -> Flow:
    r"""A full-rank Gaussian, :math:`y = b + L U (t + e^{s} x)`: the baseline.

    With a context, the inner shift and scale depend on it. Both directions fast, exact inverse.

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        hidden_dims: Widths of the hidden layers that see the context.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> gaussian(3)().sample((2,)).shape
        torch.Size([2, 3])
    """
    check_dims("gaussian", input_dim, context_dim)
    check_counts("gaussian", "hidden_dims", hidden_dims)
    linear = LULinear(input_dim)
    if not context_dim:
        return Flow(linear)
    return Flow(
        Chain([Elementwise(Affine(), input_dim, context_dim, hidden_dims=hidden_dims), linear])
    )


@recipe
def nice(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
) -> Flow:
    """NICE: additive couplings that take turns, then a scale. Both directions fast, exact inverse.

    *NICE: Non-linear Independent Components Estimation* (Dinh, Krueger, Bengio, 2014).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many couplings.
        hidden_dims: Widths of the hidden layers of each conditioner.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> nice(3)().sample((2,)).shape
        torch.Size([2, 3])
    """

    def layer(swap: bool) -> list[FlowTransform]:
        return [Coupling(Additive(), input_dim, context_dim, hidden_dims=hidden_dims, swap=swap)]

    return _stack("nice", count_layers, layer, ActNorm(input_dim))


@recipe
def realnvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = MAX_LOG_SCALE,
) -> Flow:
    """RealNVP: affine couplings that take turns. Both directions fast, exact inverse.

    *Density estimation using Real NVP* (Dinh, Sohl-Dickstein, Bengio, 2017).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many couplings.
        hidden_dims: Widths of the hidden layers of each conditioner.
        max_log_scale: The bound on the absolute log-scales of all layers together.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> realnvp(3)().sample((2,)).shape
        torch.Size([2, 3])
    """
    check_positive("realnvp", "max_log_scale", max_log_scale)
    check_count("realnvp", "count_layers", count_layers)
    check_count("realnvp", "count_layers", count_layers)
    univariate = Affine(max_log_scale / count_layers)

    def layer(swap: bool) -> list[FlowTransform]:
        return [Coupling(univariate, input_dim, context_dim, hidden_dims=hidden_dims, swap=swap)]

    return _stack("realnvp", count_layers, layer, ActNorm(input_dim))


@recipe
def glow(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = MAX_LOG_SCALE,
) -> Flow:
    """Glow for vectors: affine coupling, LU linear, ActNorm. Both directions fast, exact inverse.

    *Glow: Generative Flow with Invertible 1x1 Convolutions* (Kingma, Dhariwal, 2018).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many steps of the three.
        hidden_dims: Widths of the hidden layers of each conditioner.
        max_log_scale: The bound on the absolute log-scales of all layers together.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> glow(3)().sample((2,)).shape
        torch.Size([2, 3])
    """
    check_positive("glow", "max_log_scale", max_log_scale)
    check_count("glow", "count_layers", count_layers)
    check_count("glow", "count_layers", count_layers)
    univariate = Affine(max_log_scale / count_layers)

    def layer(swap: bool) -> list[FlowTransform]:
        return [
            Coupling(univariate, input_dim, context_dim, hidden_dims=hidden_dims, swap=swap),
            LULinear(input_dim),
            ActNorm(input_dim),
        ]

    return _stack("glow", count_layers, layer)


@recipe
def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = MAX_LOG_SCALE,
) -> Flow:
    """Masked autoregressive flow: the order turns round from layer to layer.

    A density is one pass; sampling is the blocked inverse, exact, at about the same cost.

    *Masked Autoregressive Flow for Density Estimation* (Papamakarios, Pavlakou, Murray, 2017).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many autoregressive layers.
        hidden_dims: Widths of the hidden layers of each masked network.
        max_log_scale: The bound on the absolute log-scales of all layers together.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> maf(3)().sample((2,)).shape
        torch.Size([2, 3])
    """
    check_positive("maf", "max_log_scale", max_log_scale)
    check_count("maf", "count_layers", count_layers)
    check_count("maf", "count_layers", count_layers)
    univariate = Affine(max_log_scale / count_layers)

    def layer(reverse: bool) -> list[FlowTransform]:
        return [
            Autoregressive(
                univariate, input_dim, context_dim, hidden_dims=hidden_dims, reverse=reverse
            )
        ]

    return _stack("maf", count_layers, layer, ActNorm(input_dim))


@recipe
def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 3,
    hidden_dims: Sequence[int] = (64,),
    max_log_scale: float = MAX_LOG_SCALE,
) -> Flow:
    """Inverse autoregressive flow: the order turns round from layer to layer.

    Sampling is one pass, with the density of what was sampled, so it suits a guide; the density of
    other points needs the blocked inverse, exact, at about the same cost.

    *Improved Variational Inference with Inverse Autoregressive Flow* (Kingma, Salimans,
    Jozefowicz, Chen, Sutskever, Welling, 2016).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many autoregressive layers.
        hidden_dims: Widths of the hidden layers of each masked network.
        max_log_scale: The bound on the absolute log-scales of all layers together.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> iaf(3)().sample((2,)).shape
        torch.Size([2, 3])
    """
    check_positive("iaf", "max_log_scale", max_log_scale)
    check_count("iaf", "count_layers", count_layers)
    check_count("iaf", "count_layers", count_layers)
    univariate = Affine(max_log_scale / count_layers)

    def layer(reverse: bool) -> list[FlowTransform]:
        return [
            Autoregressive(
                univariate,
                input_dim,
                context_dim,
                hidden_dims=hidden_dims,
                activation=nn.SiLU,  # a posterior is smooth, and so should its flow be
                reverse=reverse,
                fast="forward",
            )
        ]

    return _stack("iaf", count_layers, layer, ActNorm(input_dim))


@recipe
def nsf(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 5,
    count_bins: int = 8,
    bound: float = 5.0,
    hidden_dims: Sequence[int] = (128, 128),
    autoregressive: bool = False,
) -> Flow:
    """Neural spline flow: rational-quadratic splines between LU linear maps.

    With couplings both directions are fast. With ``autoregressive=True`` a density is one pass and
    sampling is the blocked inverse. Either inverse is exact.

    *Neural Spline Flows* (Durkan, Bekasov, Murray, Papamakarios, 2019).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many spline layers.
        count_bins: Bins of each spline.
        bound: Half-width of the interval of the splines; the tails outside are linear.
        hidden_dims: Widths of the hidden layers of each conditioner.
        autoregressive: Whether the layers are autoregressive instead of couplings.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> nsf(3)().sample((2,)).shape
        torch.Size([2, 3])
    """
    check_flag("nsf", "autoregressive", autoregressive)
    univariate = RationalQuadratic(count_bins, bound)

    def layer(turn: bool) -> list[FlowTransform]:
        spline: FlowTransform
        if autoregressive:
            spline = Autoregressive(
                univariate, input_dim, context_dim, hidden_dims=hidden_dims, reverse=turn
            )
        else:
            spline = Coupling(
                univariate, input_dim, context_dim, hidden_dims=hidden_dims, swap=turn
            )
        return [spline, LULinear(input_dim)]

    return _stack("nsf", count_layers, layer)


@recipe
def planar(
    input_dim: int,
    context_dim: int = 0,
    *,
    count_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
) -> Flow:
    """Planar flow: ridges in learnt directions. Sampling is fast; the inverse is numeric.

    *Variational Inference with Normalizing Flows* (Rezende, Mohamed, 2015).

    Args:
        input_dim: Size of the event.
        context_dim: Width of the context, 0 for none.
        count_layers: How many ridges.
        hidden_dims: Widths of the hidden layers that see the context.

    Raises:
        ValueError: If a dimension makes no sense.
        RuntimeError: From a density, if the numeric inverse does not converge.

    Example:
        >>> planar(3)().sample((2,)).shape
        torch.Size([2, 3])
    """

    def layer(_: bool) -> list[FlowTransform]:
        return [Planar(input_dim, context_dim, hidden_dims=hidden_dims)]

    return _stack("planar", count_layers, layer, ActNorm(input_dim))
