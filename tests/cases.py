"""THE table: every exported map, transform and recipe has a row, and every law runs over it.

A row makes a fresh object. ``context_dim`` 0 and 2 are both tried where a row takes a context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf import flows, transforms, univariate
from pyro_nf.flows.flow import Flow
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.univariate.base import UnivariateMap

HIDDEN = (16, 16)
CONTEXT_DIM = 2


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
        "Permutation": lambda: t.Permutation([2, 0, 1]),
        "Permutation-random": lambda: t.Permutation.random(5, seed=3),
        "Sigmoid": t.Sigmoid,
        "Softplus": t.Softplus,
        "Softsign": t.Softsign,
        "Tanh": t.Tanh,
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
        "Chain-mixed": lambda c: t.Chain(
            [t.affine_coupling(3, c, hidden_dims=HIDDEN), t.LULinear(3), t.Planar(3, c)]
        ),
        "Coupling-additive": lambda c: t.Coupling(u.Additive(), 3, c, hidden_dims=HIDDEN),
        "Coupling-affine": lambda c: t.Coupling(u.Affine(), 5, c, hidden_dims=HIDDEN, swap=True),
        "Coupling-one": lambda c: t.Coupling(u.Affine(), 1, c, hidden_dims=HIDDEN),
        "Coupling-sinh": lambda c: t.Coupling(u.SinhArcsinh(), 4, c, hidden_dims=HIDDEN),
        "Coupling-spline": lambda c: t.Coupling(rq, 4, c, hidden_dims=HIDDEN),
        "Elementwise-affine": lambda c: t.Elementwise(u.Affine(), 3, c, hidden_dims=HIDDEN),
        "Elementwise-interval": lambda c: t.Elementwise(unit, 3, c, hidden_dims=HIDDEN),
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
FLOW_ROWS = [
    Row(f"{name}-{d}{'-conditional' if c else ''}", lambda make=make, d=d, c=c: make(d, c))
    for name, make in RECIPES.items()
    for d, c in ((1, 0), (2, CONTEXT_DIM), (5, 0))
]
# What is exported but is no row of its own: the contracts themselves.
ABSTRACT = {"FlowTransform", "Fixed", "UnivariateMap"}


def as_older(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as it was when LowerAffine had the triangle of L itself."""
    older = dict(tensors)
    for name in tensors:
        if name.endswith("unit_triangle"):
            stem = name.removesuffix("unit_triangle")
            scale = tensors[f"{stem}log_diagonal"].exp().unsqueeze(-1)
            older[f"{stem}triangle"] = scale * older.pop(name)
    return older
