"""THE table: every exported map, transform and recipe has a row, and every law runs over it.

A row makes a fresh object. ``context_dim`` 0 and 2 are both tried where a row takes a context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf import flows, transforms, univariate
from pyro_nf.flows.flow import Flow
from pyro_nf.nn.conv import ConvNet
from pyro_nf.nn.masked import MaskedNet
from pyro_nf.nn.mlp import MLP
from pyro_nf.ops.roots import solve_increasing
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.stochastic import StochasticTransform
from pyro_nf.univariate.base import UnivariateMap
from tests import stochastic_layers as layers

HIDDEN = (16, 16)
CONTEXT_DIM = 2
IMAGE = (2, 4, 4)
BOARD = (torch.arange(4).unsqueeze(-1) + torch.arange(4)) % 2 == 0


class Squeeze(FlowTransform):
    """Space to depth, ``(C, 2 H, 2 W)`` to ``(4 C, H, W)``, of images of any even size."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = self.codomain = torch.distributions.constraints.independent(
            torch.distributions.constraints.real, 3
        )

    def forward_shape(self, shape):
        *batch, c, h, w = shape
        return torch.Size((*batch, 4 * c, h // 2, w // 2))

    def inverse_shape(self, shape):
        *batch, c, h, w = shape
        return torch.Size((*batch, c // 4, 2 * h, 2 * w))

    def _forward_and_ladj(self, x, context):
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        pixels = x.unflatten(-1, (w, 2)).unflatten(-3, (h, 2))  # (C, h, 2, w, 2)
        y = pixels.movedim((-3, -1), (-4, -3)).flatten(-5, -3)
        return y, x.new_zeros(x.shape[:-3])

    def _inverse_and_ladj(self, y, context):
        x = y.unflatten(-3, (y.shape[-3] // 4, 2, 2)).movedim((-4, -3), (-3, -1))
        return x.flatten(-2).flatten(-3, -2), y.new_zeros(y.shape[:-3])


class Flatten(FlowTransform):
    """Images as vectors, twice as far from 0: the event has another number of dimensions."""

    def __init__(self, event_shape) -> None:
        super().__init__(event_shape=event_shape)
        self.event = torch.Size(event_shape)

    def forward_shape(self, shape):
        return [*shape[: len(shape) - len(self.event)], self.event.numel()]

    def inverse_shape(self, shape):
        return (*shape[:-1], *self.event)

    def _ladj(self, x, batch):
        return x.new_tensor(2.0).log().mul(self.event.numel()).expand(batch)

    def _forward_and_ladj(self, x, context):
        y = 2 * x.reshape(self.forward_shape(x.shape))
        return y, self._ladj(x, y.shape[:-1])

    def _inverse_and_ladj(self, y, context):
        return y.reshape(self.inverse_shape(y.shape)) / 2, -self._ladj(y, y.shape[:-1])


class Bent(UnivariateMap):
    """y = t + x + tanh(a)^2 tanh(x): slope by autograd, numeric inverse."""

    num_params = 2
    exact_inverse = False

    def _y_and_slope(self, x, params):
        t, a = params.unbind(-1)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y = t + x + a.tanh().square() * x.tanh()
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, slope

    def forward_and_ladj(self, x, params):
        y, slope = self._y_and_slope(x, params)
        return y, slope.log()

    def inverse_and_ladj(self, y, params):
        bound = 1 + params[..., 0].abs()
        x = solve_increasing(
            lambda x: self._y_and_slope(x, params), y, y - bound, y + bound, "Bent"
        )
        return x, -self._y_and_slope(x, params)[1].log()


class Raster(nn.Module):
    """A masked network of images, as a user may write one: it knows one batch dimension."""

    def __init__(self, in_shape, out_shape, num_params, context_dim) -> None:
        super().__init__()
        self.net = MaskedNet(in_shape.numel(), num_params, context_dim, hidden_dims=(9,))
        self.shape = (*out_shape, num_params)

    def forward(self, x, context):
        return self.net(x.flatten(1), context).unflatten(1, self.shape[:-1])


def small_conv(*sizes) -> ConvNet:
    return ConvNet(*sizes, hidden_channels=4, count_blocks=1)


def perceptron(*sizes) -> MLP:
    return MLP(*sizes, hidden_dims=HIDDEN)


@dataclass(frozen=True)
class Row:
    """A name and how to make it."""

    name: str
    make: Callable[[], object]

    def __str__(self) -> str:
        return self.name


def _univariate() -> dict[str, Callable[[], UnivariateMap]]:
    return {
        "Additive": univariate.Additive,
        "Affine": univariate.Affine,
        "Exp": univariate.Exp,
        "LeakyReLU": lambda: univariate.LeakyReLU(0.3),
        "RationalQuadratic": lambda: univariate.RationalQuadratic(5, 1.5),
        "RationalQuadratic-interval": lambda: univariate.RationalQuadratic(5, interval=(-1.0, 2.0)),
        "Sigmoid": univariate.Sigmoid,
        "SinhArcsinh": univariate.SinhArcsinh,
        "SmoothAffine": lambda: univariate.SmoothAffine(2.0, 1.5, shift_gain=0.7, scale_gain=1.3),
        "Softplus": univariate.Softplus,
        "Softsign": univariate.Softsign,
        "Tanh": univariate.Tanh,
    }


# Transforms that take no context.
def _plain() -> dict[str, Callable[[], FlowTransform]]:
    t = transforms
    return {
        "ActNorm": lambda: t.ActNorm(3),
        "Chain": lambda: t.Chain([t.LULinear(3), t.Permutation.reverse(3), t.Softsign()]),
        "Exp": t.Exp,
        "FixedAffine": lambda: t.FixedAffine(
            torch.tensor([1.0, -2.0, 0.5]),
            torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.3, -1.0, 1.5]]),
        ),
        "FixedAffine-diagonal": lambda: t.FixedAffine(torch.zeros(2), torch.tensor([2.0, 0.5])),
        "LowRankAffine": lambda: t.LowRankAffine(5, 2),
        "LowerAffine": lambda: t.LowerAffine(4),
        "LULinear": lambda: t.LULinear(4),
        "LULinear-one": lambda: t.LULinear(1),
        "LeakyReLU": lambda: t.LeakyReLU(0.3),
        "FixedAffine-image": lambda: t.FixedAffine(
            torch.linspace(-1, 1, 8).reshape(2, 2, 2), torch.linspace(1, 2, 8).reshape(2, 2, 2)
        ),
        "Flatten": lambda: Flatten((1, 2, 3)),
        "Permutation": lambda: t.Permutation([2, 0, 1]),
        "Permutation-random": lambda: t.Permutation.random(5, seed=3),
        "Sigmoid": t.Sigmoid,
        "Sigmoid-image": lambda: t.Sigmoid(event_dim=3),
        "Softplus": t.Softplus,
        "Softsign": t.Softsign,
        "Squeeze": Squeeze,
        "Tanh": t.Tanh,
        "Tanh-number": lambda: t.Tanh(event_dim=0),
    }


# Transforms with and without a context, as functions of context_dim.
def _with_context() -> dict[str, Callable[[int], FlowTransform]]:
    t, u = transforms, univariate
    rq = u.RationalQuadratic(5, 1.5)
    unit = u.RationalQuadratic(4, interval=(-1.0, 1.0))
    return {
        "Autoregressive-affine": lambda c: t.Autoregressive(u.Affine(), 4, c, hidden_dims=HIDDEN),
        "Autoregressive-spline": lambda c: t.Autoregressive(rq, 3, c, hidden_dims=HIDDEN),
        "Autoregressive-forward": lambda c: t.Autoregressive(
            u.Affine(), 4, c, hidden_dims=HIDDEN, reverse=True, fast="forward"
        ),
        "Autoregressive-interval": lambda c: t.Autoregressive(unit, 3, c, hidden_dims=HIDDEN),
        "Autoregressive-one": lambda c: t.Autoregressive(rq, 1, c, hidden_dims=HIDDEN),
        "Chain-estimate": lambda c: t.Chain(
            [t.affine_coupling(3, c, hidden_dims=HIDDEN), layers.TracedLinear(3, c), t.LULinear(3)]
        ),
        "Chain-mixed": lambda c: t.Chain(
            [t.affine_coupling(3, c, hidden_dims=HIDDEN), t.LULinear(3), t.Planar(3, c)]
        ),
        "Coupling-additive": lambda c: t.Coupling(u.Additive(), 3, c, hidden_dims=HIDDEN),
        "Coupling-affine": lambda c: t.Coupling(u.Affine(), 5, c, hidden_dims=HIDDEN, swap=True),
        "Coupling-one": lambda c: t.Coupling(u.Affine(), 1, c, hidden_dims=HIDDEN),
        "Coupling-sinh": lambda c: t.Coupling(u.SinhArcsinh(), 4, c, hidden_dims=HIDDEN),
        "Coupling-spline": lambda c: t.Coupling(rq, 4, c, hidden_dims=HIDDEN),
        "Autoregressive-bent": lambda c: t.Autoregressive(Bent(), 3, c, hidden_dims=HIDDEN),
        "Autoregressive-image": lambda c: t.Autoregressive(
            u.Affine(), None, c, event_shape=(1, 2, 3), hidden_dims=HIDDEN, fast="forward"
        ),
        "Autoregressive-given": lambda c: t.Autoregressive(
            u.Affine(), None, c, event_shape=(1, 2, 2), reverse=True, conditioner=Raster
        ),
        "Chain-image": lambda c: t.Chain(
            [
                t.Elementwise(u.Affine(), None, c, event_shape=(1, 4, 4), hidden_dims=HIDDEN),
                Squeeze(),
                t.Coupling(
                    u.Affine(), None, c, event_shape=(4, 2, 2), axis=0, conditioner=small_conv
                ),
                Squeeze().inv,
                Flatten((1, 4, 4)),
                t.LULinear(16),
            ]
        ),
        "Coupling-bent": lambda c: t.Coupling(Bent(), 3, c, hidden_dims=HIDDEN),
        "Coupling-board": lambda c: t.Coupling(
            u.Affine(), None, c, event_shape=IMAGE, mask=BOARD, conditioner=small_conv
        ),
        "Coupling-channels": lambda c: t.Coupling(
            u.Affine(), None, c, event_shape=IMAGE, axis=-3, conditioner=small_conv
        ),
        "Coupling-columns": lambda c: t.Coupling(
            u.Affine(), None, c, event_shape=(2, 5), axis=-1, swap=True, hidden_dims=HIDDEN
        ),
        "Coupling-given": lambda c: t.Coupling(u.Affine(), 4, c, swap=True, conditioner=perceptron),
        "Coupling-mask": lambda c: t.Coupling(
            u.Affine(), 4, c, mask=torch.tensor([True, False, False, True]), hidden_dims=HIDDEN
        ),
        "Elementwise-affine": lambda c: t.Elementwise(u.Affine(), 3, c, hidden_dims=HIDDEN),
        "Elementwise-interval": lambda c: t.Elementwise(unit, 3, c, hidden_dims=HIDDEN),
        "Elementwise-bent": lambda c: t.Elementwise(Bent(), 3, c, hidden_dims=HIDDEN),
        "Inverse": lambda c: t.Inverse(t.Coupling(u.Affine(), 4, c, hidden_dims=HIDDEN)),
        "Planar": lambda c: t.Planar(3, c, hidden_dims=HIDDEN),
        "Planar-one": lambda c: t.Planar(1, c, hidden_dims=HIDDEN),
        "Radial": lambda c: t.Radial(3, c, hidden_dims=HIDDEN),
        "additive_coupling": lambda c: t.additive_coupling(4, c, hidden_dims=HIDDEN),
        "affine_autoregressive": lambda c: t.affine_autoregressive(4, c, hidden_dims=HIDDEN),
        "affine_coupling": lambda c: t.affine_coupling(4, c, hidden_dims=HIDDEN),
        "spline": lambda c: t.spline(3, c, hidden_dims=HIDDEN),
        "spline_autoregressive": lambda c: t.spline_autoregressive(3, c, hidden_dims=HIDDEN),
        "spline_coupling": lambda c: t.spline_coupling(4, c, hidden_dims=HIDDEN),
    }


# Layers that draw or lose something, as functions of context_dim.
def _stochastic() -> dict[str, Callable[[int], StochasticTransform]]:
    t = transforms
    return {
        "StochasticChain": lambda c: t.StochasticChain(
            [
                t.affine_coupling(2, c, hidden_dims=HIDDEN),
                layers.Augment(2, 1, c),
                t.LULinear(3),
                layers.Noise(3, c),
                layers.Largest(3, output_shape=1),
            ]
        ),
        "StochasticChain-exact": lambda c: t.StochasticChain(
            [layers.Augment(2, 1, c), t.spline_coupling(3, c, hidden_dims=HIDDEN)]
        ),
        "StochasticChain-inverse": lambda c: (
            t.StochasticChain([layers.Noise(2, c), layers.Abs(2)]).inv
        ),
        "StochasticChain-one": lambda c: t.StochasticChain([t.Planar(3, c)]),
        "StochasticLayer-noise": lambda c: layers.Noise(2, c),
        "StochasticLayer-augment": lambda c: layers.Augment(2, 3, c),
    }


def _stochastic_plain() -> dict[str, Callable[[], StochasticTransform]]:
    t = transforms
    return {
        "StochasticChain-argmax": lambda: t.StochasticChain([t.LULinear(3), layers.Argmax(3)]),
        "StochasticChain-rounded": lambda: t.StochasticChain([t.LowerAffine(2), layers.Rounded(2)]),
        "StochasticLayer-abs": lambda: layers.Abs(2),
        "StochasticLayer-any-size": layers.Abs,
        "StochasticLayer-largest": lambda: layers.Largest(3, output_shape=1),
        "StochasticLayer-image": lambda: layers.Slice(
            event_shape=(2, 3, 2), output_shape=(1, 3, 2)
        ),
        "StochasticLayer-metropolis": lambda: layers.Metropolis(
            torch.tensor([0.0, -1.0, 0.5, -2.0])
        ),
        "StochasticLayer-inverse": lambda: layers.Abs(2).inv,
        "StochasticLayer-rounded-inverse": lambda: layers.Rounded(2).inv,
        "StochasticLayer-conditioned": lambda: layers.Noise(2, 1).condition(torch.tensor([0.3])),
    }


# Recipes, as functions of input_dim and context_dim.
RECIPES: dict[str, Callable[[int, int], Flow]] = {
    "gaussian": lambda d, c: flows.gaussian(d, c, hidden_dims=HIDDEN),
    "glow": lambda d, c: flows.glow(d, c, count_layers=3, hidden_dims=HIDDEN),
    "iaf": lambda d, c: flows.iaf(d, c, count_layers=2, hidden_dims=HIDDEN),
    "maf": lambda d, c: flows.maf(d, c, count_layers=2, hidden_dims=HIDDEN),
    "nice": lambda d, c: flows.nice(d, c, count_layers=3, hidden_dims=HIDDEN),
    "nsf": lambda d, c: flows.nsf(d, c, count_layers=2, hidden_dims=HIDDEN),
    "nsf-autoregressive": lambda d, c: flows.nsf(
        d, c, count_layers=2, hidden_dims=HIDDEN, autoregressive=True
    ),
    "planar": lambda d, c: flows.planar(d, c, count_layers=3, hidden_dims=HIDDEN),
    "realnvp": lambda d, c: flows.realnvp(d, c, count_layers=4, hidden_dims=HIDDEN),
}

UNIVARIATE_ROWS = [Row(name, make) for name, make in _univariate().items()]
TRANSFORM_ROWS = [
    *(Row(name, make) for name, make in _plain().items()),
    *(
        Row(name + suffix, lambda make=make, c=c: make(c))
        for name, make in _with_context().items()
        for suffix, c in (("", 0), ("-conditional", CONTEXT_DIM))
    ),
    Row(
        "Conditioned",
        lambda: transforms.affine_coupling(4, 2, hidden_dims=HIDDEN).condition(
            torch.tensor([0.3, -1.0])
        ),
    ),
]
STOCHASTIC_ROWS = [
    *(Row(name, make) for name, make in _stochastic_plain().items()),
    *(
        Row(name + suffix, lambda make=make, c=c: make(c))
        for name, make in _stochastic().items()
        for suffix, c in (("", 0), ("-conditional", CONTEXT_DIM))
    ),
]
FLOW_ROWS = [
    Row(f"{name}-{d}{'-conditional' if c else ''}", lambda make=make, d=d, c=c: make(d, c))
    for name, make in RECIPES.items()
    for d, c in ((1, 0), (2, CONTEXT_DIM), (5, 0))
]
# What is exported but is no row of its own: the contracts themselves.
ABSTRACT = {"FlowTransform", "Fixed", "StochasticLayer", "StochasticTransform", "UnivariateMap"}


def as_older(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as it was when LowerAffine had the triangle of L itself."""
    older = dict(tensors)
    for name in tensors:
        if name.endswith("unit_triangle"):
            stem = name.removesuffix("unit_triangle")
            scale = tensors[f"{stem}log_diagonal"].exp().unsqueeze(-1)
            older[f"{stem}triangle"] = scale * older.pop(name)
    return older


def numbered(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What belongs to a guide's flow, by the numbers that its parts had in version 0.1."""
    older = {}
    for name, tensor in tensors.items():
        for number, part in enumerate(("flow", "affine", "coordinates", "recentring")):
            start = f"{prefix}transform.{part}."
            if name.startswith(start):
                name = f"{prefix}transform.parts.{number}.{name.removeprefix(start)}"
                break
        older[name] = tensor
    return older
