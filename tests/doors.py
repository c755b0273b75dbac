"""Every public function with arguments that it takes, and what each parameter takes besides.

A parameter has a *kind*, which says which of the wrong values are right for it after all.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

import pyro_nf as nf
from pyro_nf import flows, infer, plots, testing, train, transforms, univariate
from pyro_nf import nn as conditioners
from pyro_nf.vi.fit import SVIFit
from tests.stochastic_layers import Augment, Noise

FACES = (nf, univariate, conditioners, transforms, flows, train, testing, plots, infer)

# What nobody calls with arguments of their own.
RECORDS = {"DensityFit", "History", "Posterior", "SVIFit", "Weights", "GaussianStart"}
CONTRACTS = {"Base", "Fixed", "FlowTransform", "UnivariateMap"}
LAWS = {
    law.__name__ for law in (*testing.TRANSFORM_LAWS, *testing.STOCHASTIC_LAWS, *testing.FLOW_LAWS)
}
# The library's own parts call these in every step, with what they made themselves.
INNER = {
    "ELBO.__call__",
    "ForwardKL.__call__",
    "ImportanceWeightedELBO.__call__",
    "Reparameterised.paths",
    "Reparameterised.surrogate",
    "StickTheLanding.paths",
    "StickTheLanding.surrogate",
    "TemperedELBO.__call__",
    "Start.__call__",
    *(
        f"univariate.{name}.{method}"
        for name in univariate.__all__
        for method in ("forward_and_ladj", "inverse_and_ladj", "slopes")
    ),
    # between the files of the library
    "AutoFlow.expect_layers",
    "Flow.base_of_kind",
    "Flow.renewed",
    "PosteriorRecipe.rate",
    "Flow.transform_in_units",
    "UnivariateMap.refuse_hidden_weights",
    "univariate.UnivariateMap.refuse_hidden_weights",
    "ends_are_safe",
    "StochasticFlowDistribution.score_parts",
    *LAWS,
}


def surface() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, class and method that has a parameter, by name, once."""
    seen: set[int] = set()
    for face in FACES:
        for name in getattr(face, "__all__", vars(face)):
            value = getattr(face, name)
            home = str(getattr(value, "__module__", ""))
            mine = home.startswith("pyro_nf") if hasattr(face, "__all__") else home == face.__name__
            if name.startswith("_") or not callable(value) or not mine or id(value) in seen:
                continue
            seen.add(id(value))
            room = face.__name__.split(".")[-1]
            shown = f"{room}.{name}" if face is univariate else name
            if isinstance(value, type):
                if shown not in RECORDS | CONTRACTS and not inspect.isabstract(value):
                    yield shown, value
                for key, member in vars(value).items():
                    bound = getattr(value, key)
                    is_public = key == "__call__" or not key.startswith("_")
                    if is_public and callable(bound) and not isinstance(member, type):
                        yield f"{shown}.{key}", bound
            elif isinstance(value, types.FunctionType):
                yield shown, value


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters that may be wrong: not those handed on to a model or to torch."""
    return [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in ("self", "_instance")
    ]


# Wrong values.


def no_arity(a: object, b: object, c: object, d: object, e: object, f: object, g: object) -> None:
    """A function that nobody here can call."""


NAN, INF = math.nan, math.inf
WRONG: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "text": lambda: "3",
    "no text": lambda: "",
    "bytes": lambda: b"3",
    "half": lambda: 1.5,
    "negative": lambda: -1,
    "zero": lambda: 0,
    "nan": lambda: NAN,
    "inf": lambda: INF,
    "true": lambda: True,
    "complex": lambda: 1j,
    "no list": list,
    "no tuple": tuple,
    "no dictionary": dict,
    "list of texts": lambda: ["a", "b"],
    "list of halves": lambda: [0.5, 1.5],
    "list of negatives": lambda: [-1, -2],
    "nested list": lambda: [[1.0, 2.0], [3.0, 4.0]],
    "range of one": lambda: range(1),
    "dictionary": lambda: {"a": 1},
    "object": object,
    "class": lambda: nn.Linear,
    "module": lambda: nn.Linear(1, 1),
    "function": lambda: no_arity,
    "array": lambda: np.ones((3, 2)),
    "integers": lambda: torch.ones(3, 2, dtype=torch.long),
    "bools": lambda: torch.ones(3, 2, dtype=torch.bool),
    "complex tensor": lambda: torch.ones(3, 2, dtype=torch.complex64),
    "scalar": lambda: torch.tensor(1.0),
    "vector": lambda: torch.ones(7),
    "deep": lambda: torch.ones(1, 1, 1, 1, 1, 7),
    "no entries": lambda: torch.ones(0),
    "no columns": lambda: torch.ones(3, 0),
    "nan tensor": lambda: torch.full((3, 2), NAN),
    "inf tensor": lambda: torch.full((3, 2), INF),
}


@dataclass(frozen=True)
class Kind:
    """What a parameter takes of the wrong values, and more that it must not take.

    Attributes:
        takes: Names of values that are right.
        may: Names of values that are right or wrong by the rules of somebody else.
        also: More wrong values.
    """

    takes: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    also: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    def __or__(self, other: Kind) -> Kind:
        return Kind(self.takes | other.takes, self.may | other.may, {**self.also, **other.also})


def takes(*names: str, **also: Callable[[], object]) -> Kind:
    return Kind(frozenset(names), also=also)


def may(*names: str) -> Kind:
    return Kind(may=frozenset(names))


OPTIONAL = takes("none")
COUNT = takes()
COUNT_0 = takes("zero")
POSITIVE = takes("half")
NUMBER = takes("half", "negative", "zero")
SHARE = takes(two=lambda: 2.0)  # above 0 and below 1
FLAG = takes("true")
SEED = takes("zero", huge=lambda: 2**70)
WIDTHS = takes()
WIDTHS_OR_NONE = takes("no list", "no tuple")
SHAPE = takes("no list", "no tuple", "range of one")
PATH = takes("text")
FUNCTION = takes()
ANYTHING = may(*WRONG)
ACTIVATION = takes(
    acts=lambda: torch.relu, makes_none=lambda: lambda: None, linear=lambda: lambda: torch.zeros
)
OBJECT = takes()
TEXT = takes("text", "no text")
# Points that flow through: NaN in, NaN out, and any batch shape.
POINTS = takes("nan tensor", "inf tensor")
DATA = takes()
ARGS = takes()
MODEL = may("module")  # a Module may be a model
INIT = may("module")
STARTS = OPTIONAL
KWARGS = takes("none", "no dictionary")


# What the fits share.
FIT: dict[str, Kind] = {
    "max_steps": COUNT,
    "max_seconds": OPTIONAL | POSITIVE,
    "check_every": COUNT,
    "patience": OPTIONAL,
    "seed": SEED | OPTIONAL,
    "progress": FLAG,
    "checkpoint": OPTIONAL | PATH,
    "checkpoint_every": COUNT,
    "clock": OBJECT,
}


@dataclass(frozen=True)
class Door:
    """A function with good arguments, and the kind of each parameter.

    Attributes:
        call: The function.
        good: Makes arguments that it takes, by name.
        kinds: The kind of each parameter.
        runs: Whether what is taken is also run; a fit takes too long.
        says: What a message may call a parameter, besides its own name.
    """

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    kinds: dict[str, Kind]
    runs: bool = True
    says: Mapping[str, str] = field(default_factory=dict)


# What several doors need.


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def hierarchy() -> None:
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
    pyro.sample("theta", dist.Normal(0.0, log_tau.exp()))


Y = torch.tensor([0.5, 1.0, 2.0])


@cache
def joint() -> infer.LogJoint:
    return infer.LogJoint(model, (Y,))


@cache
def hierarchical_joint() -> infer.LogJoint:
    return infer.LogJoint(hierarchy)


@cache
def guide() -> nf.AutoFlow:
    return nf.AutoFlow(model, lambda d: transforms.LowerAffine(d)).setup(Y)


@cache
def posterior() -> nf.Posterior:
    history = train.History(losses=[2.0, 1.0])
    return nf.Posterior.from_guide(guide(), args=(Y,), num_draws=60, history=history)


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


@cache
def flow(context_dim: int = 0) -> flows.Flow:
    return flows.realnvp(2, context_dim, count_layers=1, hidden_dims=(4,))


@cache
def saved() -> Path:
    path = folder() / "flow.safetensors"
    flow().save(path)
    return path


@cache
def coupling() -> transforms.Chain:
    return transforms.affine_coupling(2, 1, hidden_dims=(4,))


class StochasticLayer(Noise):
    """A layer whose messages begin with the library's own name."""


@cache
def noise() -> StochasticLayer:
    return StochasticLayer(2, 1)


@cache
def noisy() -> flows.StochasticFlowDistribution:
    return flows.Flow(StochasticLayer(2))()


def rows(count: int = 3, width: int = 2) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def start() -> infer.GaussianStart:
    return infer.GaussianStart(torch.zeros(1), torch.ones(1), -1.0)


SHAPE_OF_EVENT = takes("no list", "no tuple")
SIZES: dict[str, Kind] = {"input_dim": COUNT, "context_dim": COUNT_0, "hidden_dims": WIDTHS}
SPLINE: dict[str, Kind] = {"count_bins": COUNT | takes(one=lambda: 1), "bound": POSITIVE}
CONTEXT = takes("nan tensor", "inf tensor")  # of width 2, as contexts here are


def sizes() -> dict[str, Any]:
    return {"input_dim": 3, "context_dim": 0, "hidden_dims": (4,)}


def _univariate() -> dict[str, Door]:
    u = univariate
    return {
        "univariate.Affine": Door(
            u.Affine, lambda: {"max_log_scale": 5.0}, {"max_log_scale": POSITIVE}
        ),
        "univariate.LeakyReLU": Door(u.LeakyReLU, lambda: {"slope": 0.1}, {"slope": POSITIVE}),
        "univariate.SinhArcsinh": Door(
            u.SinhArcsinh,
            lambda: {"max_skew": 2.0, "max_log_tail": 1.0},
            {"max_skew": POSITIVE, "max_log_tail": POSITIVE},
        ),
        "univariate.SmoothAffine": Door(
            u.SmoothAffine,
            lambda: {
                "max_shift": 10.0,
                "max_log_scale": 3.0,
                "shift_gain": 1.0,
                "scale_gain": 1.0,
            },
            {
                "max_shift": POSITIVE,
                "max_log_scale": POSITIVE,
                "shift_gain": POSITIVE,
                "scale_gain": POSITIVE,
            },
        ),
        "univariate.RationalQuadratic": Door(
            u.RationalQuadratic,
            lambda: {"count_bins": 4, "bound": 1.0, "interval": (0.0, 1.0)},
            SPLINE
            | {
                "interval": OPTIONAL
                | takes(
                    "list of halves",
                    turned=lambda: (1.0, 0.0),
                    nan=lambda: (0.0, NAN),
                    inf=lambda: (0.0, INF),
                    texts=lambda: ("0", "1"),
                    three=lambda: (0.0, 0.5, 1.0),
                )
            },
        ),
    }


def _conditioners() -> dict[str, Door]:
    n = conditioners
    net = {"activation": ACTIVATION, "residual": FLAG}
    return {
        "MLP": Door(
            n.MLP,
            lambda: {
                "input_dim": 3,
                "output_dim": 2,
                "num_params": 2,
                "context_dim": 1,
                "hidden_dims": (4,),
                "activation": nn.ReLU,
                "residual": False,
            },
            SIZES
            | net
            | {
                "input_dim": SHAPE_OF_EVENT | takes("zero", "range of one"),
                "output_dim": SHAPE_OF_EVENT,
                "num_params": COUNT,
            },
        ),
        "MLP.forward": Door(
            lambda **given: n.MLP(2, 2, 2, 1, hidden_dims=(4,))(**given),
            lambda: {"x": rows(), "context": rows(3, 1)},
            {"x": POINTS, "context": DATA},
        ),
        "Constant": Door(
            n.Constant,
            lambda: {
                "output_dim": 2,
                "num_params": 2,
                "context_dim": 1,
                "hidden_dims": (4,),
                "activation": nn.ReLU,
            },
            SIZES | net | {"output_dim": SHAPE_OF_EVENT, "num_params": COUNT_0},
        ),
        "Constant.forward": Door(
            lambda **given: n.Constant(2, 2, 1, hidden_dims=(4,))(**given),
            lambda: {"x": None, "context": rows(3, 1)},
            {"x": ANYTHING, "context": DATA},
        ),
        "ConvNet": Door(
            n.ConvNet,
            lambda: {
                "in_shape": (2, 4, 4),
                "out_shape": (1, 4, 4),
                "num_params": 2,
                "context_dim": 1,
                "hidden_channels": 4,
                "count_blocks": 1,
                "kernel_size": 3,
                "activation": nn.ReLU,
            },
            {
                "in_shape": takes(other=lambda: (2, 4, 5), flat=lambda: (2,)),
                "out_shape": takes(other=lambda: (2, 4, 5), flat=lambda: (2,)),
                "num_params": COUNT,
                "context_dim": COUNT_0,
                "hidden_channels": COUNT,
                "count_blocks": COUNT_0,
                "kernel_size": COUNT | takes(even=lambda: 2),
                "activation": ACTIVATION,
            },
        ),
        "ConvNet.forward": Door(
            lambda **given: n.ConvNet((1, 3, 2), (1, 3, 2), 2, 1, hidden_channels=4)(**given),
            lambda: {"x": torch.zeros(3, 1, 3, 2), "context": rows(3, 1)},
            {"x": DATA, "context": DATA},
        ),
    }


def _transforms() -> dict[str, Door]:
    t, u = transforms, univariate
    layer = SIZES | {"activation": ACTIVATION}
    scheme = layer | {
        "univariate": OBJECT,
        "event_shape": OPTIONAL,
        "conditioner": OPTIONAL
        | takes(
            one=lambda: lambda *sizes: nn.Linear(1, 1),
            none_made=lambda: lambda *sizes: None,
            other=lambda: lambda *sizes: conditioners.MLP(3, 2, 7),
        ),
    }

    def with_map(**more: object) -> Callable[[], dict[str, Any]]:
        return lambda: (
            sizes()
            | {"univariate": u.Affine(), "activation": nn.ReLU}
            | {"event_shape": None, "conditioner": None}
            | more
        )

    def of_points(call: Callable[..., Any], name: str, takes_context: bool = True) -> Door:
        good = {name: rows()} | ({"context": rows(3, 1)} if takes_context else {})
        return Door(call, lambda: dict(good), {name: POINTS, "context": DATA})

    def start_from_data(transform: Callable[[], t.FlowTransform], context: int = 0) -> Door:
        return Door(
            lambda **given: transform().start_from_data(**given),
            lambda: {
                "y": rows(9),
                "context": rows(9, context) if context else None,
                "whiten": True,
            },
            {"y": DATA, "context": DATA if context else OPTIONAL, "whiten": FLAG},
        )

    def shapes_of(transform: t.FlowTransform) -> dict[str, Door]:
        return {
            f"{type(transform).__name__}.{way}_shape": Door(
                getattr(transform, f"{way}_shape"),
                lambda: {"shape": (3, 2)},
                {"shape": takes(other=lambda: (3, 4))},
            )
            for way in ("forward", "inverse")
        }

    one = {"input_dim": COUNT}
    doors = {
        "ActNorm": Door(t.ActNorm, lambda: {"input_dim": 3}, one),
        "LULinear": Door(t.LULinear, lambda: {"input_dim": 3}, one),
        "LowerAffine": Door(t.LowerAffine, lambda: {"input_dim": 3}, one),
        "LowRankAffine": Door(
            t.LowRankAffine,
            lambda: {"input_dim": 3, "rank": 2, "seed": 0},
            one | {"rank": COUNT, "seed": SEED},
        ),
        "FixedAffine": Door(
            t.FixedAffine,
            lambda: {"loc": torch.zeros(2), "scale": torch.ones(2)},
            {
                "loc": takes(
                    nan=lambda: torch.tensor([0.0, NAN]), square=lambda: torch.zeros(2, 2)
                ),
                "scale": takes(
                    nan=lambda: torch.tensor([1.0, NAN]),
                    negative=lambda: torch.tensor([1.0, -1.0]),
                    zero=lambda: torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
                    upper=lambda: torch.tensor([[1.0, 5.0], [0.0, 1.0]]),
                ),
            },
        ),
        "Permutation": Door(
            t.Permutation,
            lambda: {"permutation": [2, 0, 1]},
            {
                "permutation": takes(
                    "range of one", twice=lambda: [0, 0, 1], halves=lambda: torch.tensor([0.0, 1.0])
                )
            },
        ),
        "Permutation.random": Door(
            t.Permutation.random, lambda: {"input_dim": 3, "seed": 0}, one | {"seed": SEED}
        ),
        "Permutation.reverse": Door(t.Permutation.reverse, lambda: {"input_dim": 3}, one),
        "Coupling": Door(
            t.Coupling,
            with_map(swap=False, axis=None, mask=None),
            scheme
            | {
                "swap": FLAG,
                "axis": OPTIONAL | takes("zero", "negative", far=lambda: 1),
                "mask": OPTIONAL
                | takes(
                    all=lambda: torch.ones(3, dtype=torch.bool),
                    nothing=lambda: torch.zeros(3, dtype=torch.bool),
                ),
            },
        ),
        "Elementwise": Door(t.Elementwise, with_map(), scheme),
        "Autoregressive": Door(
            t.Autoregressive,
            with_map(residual=False, order=[2, 0, 1], reverse=False, fast="inverse"),
            scheme
            | {
                "hidden_dims": WIDTHS_OR_NONE,
                "residual": FLAG,
                "order": OPTIONAL | takes(two=lambda: [1, 0], twice=lambda: [0, 0, 1]),
                "reverse": FLAG,
                "fast": OBJECT | takes(both=lambda: "both"),
            },
        ),
        "Planar": Door(t.Planar, lambda: sizes() | {"activation": nn.ReLU}, layer),
        "Radial": Door(t.Radial, lambda: sizes() | {"activation": nn.ReLU}, layer),
        "Chain": Door(
            t.Chain,
            lambda: {"parts": [t.ActNorm(2), t.LULinear(2)]},
            {"parts": takes(other=lambda: [t.ActNorm(2), t.ActNorm(3)])},
        ),
        "Inverse": Door(t.Inverse, lambda: {"transform": t.ActNorm(2)}, {"transform": OBJECT}),
        "Conditioned": Door(
            t.Conditioned,
            lambda: {"transform": coupling(), "context": rows(3, 1)},
            {"transform": OBJECT | takes(unconditional=lambda: t.ActNorm(2)), "context": DATA},
        ),
        "StochasticChain": Door(
            t.StochasticChain,
            lambda: {"parts": [t.ActNorm(2), noise()]},
            {"parts": takes(other=lambda: [t.ActNorm(3), noise()])},
            says={"parts": "part"},
        ),
        "StochasticChain.start_from_data": start_from_data(
            lambda: t.StochasticChain([t.LULinear(2), Noise(2)])
        ),
        "StochasticLayer.contribution": Door(
            noise().contribution,
            lambda: {"x": rows(), "y": rows(), "context": rows(3, 1)},
            {"x": POINTS, "y": POINTS, "context": DATA},
        ),
        "StochasticTransform.condition": Door(
            noise().condition, lambda: {"context": rows(3, 1)}, {"context": DATA}
        ),
        "StochasticTransform.forward_and_ladj": of_points(noise().forward_and_ladj, "x"),
        "StochasticTransform.forward_shape": Door(
            noise().forward_shape,
            lambda: {"shape": (3, 2)},
            {"shape": takes(other=lambda: (2, 3))},
        ),
        "StochasticTransform.inverse_and_ladj": of_points(noise().inverse_and_ladj, "y"),
        "StochasticTransform.inverse_shape": Door(
            noise().inverse_shape,
            lambda: {"shape": (3, 2)},
            {"shape": takes(other=lambda: (2, 3))},
        ),
        "StochasticTransform.push_score": Door(
            t.StochasticChain([Augment(2, 1, 1)]).push_score,
            lambda: {"x": rows(), "score": rows(), "context": rows(3, 1)},
            {"x": POINTS, "score": POINTS, "context": DATA},
        ),
        "StochasticTransform.start_from_data": start_from_data(noise, 1),
        "LeakyReLU": Door(
            t.LeakyReLU,
            lambda: {"slope": 0.1, "event_dim": 1},
            {"slope": POSITIVE, "event_dim": COUNT_0},
        ),
        **{
            name: Door(getattr(t, name), lambda: {"event_dim": 1}, {"event_dim": COUNT_0})
            for name in ("Exp", "Sigmoid", "Softplus", "Softsign", "Tanh")
        },
        **shapes_of(t.Chain([t.ActNorm(2)])),
        **shapes_of(t.Inverse(t.ActNorm(2))),
        **shapes_of(coupling().parts[0].condition(rows(3, 1))),
        **{
            f"FlowTransform.{name.split('.')[1]}": door
            for name, door in shapes_of(t.ActNorm(2)).items()
        },
        "FlowTransform.forward_and_ladj": of_points(coupling().forward_and_ladj, "x"),
        "FlowTransform.inverse_and_ladj": of_points(coupling().inverse_and_ladj, "y"),
        "FlowTransform.push_score": Door(
            coupling().push_score,
            lambda: {"x": rows(), "score": rows(), "context": rows(3, 1)},
            {"x": POINTS, "score": POINTS, "context": DATA},
        ),
        "FlowTransform.start_from_data": start_from_data(lambda: t.Planar(2, 1), 1),
        "ActNorm.start_from_data": start_from_data(lambda: t.ActNorm(2)),
        "LULinear.start_from_data": start_from_data(lambda: t.LULinear(2)),
        "Chain.start_from_data": start_from_data(
            lambda: t.Chain([t.LULinear(2), t.affine_coupling(2, 1)]), 1
        ),
        "FlowTransform.condition": Door(
            coupling().condition, lambda: {"context": rows(3, 1)}, {"context": DATA}
        ),
        "FlowTransform.log_abs_det_jacobian": Door(
            t.ActNorm(2).log_abs_det_jacobian,
            lambda: {"x": rows(), "y": rows()},
            {"x": POINTS, "y": POINTS},
        ),
        "FlowTransform.with_cache": Door(
            t.ActNorm(2).with_cache, lambda: {"cache_size": 0}, {"cache_size": COUNT_0}
        ),
    }
    for name in ("additive_coupling", "affine_autoregressive", "affine_coupling"):
        kinds = SIZES
        if name == "affine_autoregressive":
            kinds = SIZES | {"hidden_dims": WIDTHS_OR_NONE}
        doors[name] = Door(getattr(t, name), sizes, kinds)
    for name in ("spline", "spline_autoregressive", "spline_coupling"):
        kinds = SIZES | SPLINE
        if name == "spline_autoregressive":
            kinds = kinds | {"hidden_dims": WIDTHS_OR_NONE}
        doors[name] = Door(
            getattr(t, name), lambda: sizes() | {"count_bins": 4, "bound": 2.0}, kinds
        )
    return doors


def _flows() -> dict[str, Door]:
    f = flows
    layers = SIZES | {"count_layers": COUNT}
    doors = {
        name: Door(getattr(f, name), lambda: sizes() | {"count_layers": 2}, layers)
        for name in ("nice", "planar")
    }
    for name in ("glow", "iaf", "maf", "realnvp"):
        widths = WIDTHS_OR_NONE if name in ("iaf", "maf") else WIDTHS
        doors[name] = Door(
            getattr(f, name),
            lambda: sizes() | {"count_layers": 2, "max_log_scale": 3.0},
            layers | {"hidden_dims": widths, "max_log_scale": POSITIVE},
        )

    def batch_of(base: Callable[[], f.Base]) -> Door:
        return Door(
            lambda **given: base()(**given), lambda: {"batch_shape": (3,)}, {"batch_shape": SHAPE}
        )

    def draws_of(name: str, d: Any = None) -> Door:
        call = getattr(flow()() if d is None else d, name)
        return Door(call, lambda: {"sample_shape": (3,)}, {"sample_shape": SHAPE})

    def score_of(base: Callable[[], f.Base]) -> Door:
        return Door(
            lambda **given: base().log_prob_and_score(**given),
            lambda: {"x": rows()},
            {"x": POINTS},
        )

    return doors | {
        "gaussian": Door(f.gaussian, sizes, SIZES),
        "nsf": Door(
            f.nsf,
            lambda: (
                sizes()
                | {"count_layers": 2, "count_bins": 4, "bound": 2.0, "autoregressive": False}
            ),
            layers | SPLINE | {"autoregressive": FLAG},
        ),
        "Flow": Door(
            f.Flow,
            lambda: {
                "transform": transforms.ActNorm(2),
                "base": f.DiagonalNormal(2),
                "embed": None,
            },
            {
                "embed": OPTIONAL,
                "transform": OBJECT | takes(other=lambda: transforms.ActNorm(3)),
                "base": OPTIONAL | takes(other=lambda: f.DiagonalNormal(3)),
            },
        ),
        "Flow.forward": Door(flow(1), lambda: {"context": rows(3, 1)}, {"context": DATA}),
        "Flow.log_prob": Door(
            flow(1).log_prob,
            lambda: {"x": rows(), "context": rows(3, 1)},
            {"x": POINTS, "context": DATA},
        ),
        "Flow.sample": Door(
            flow(1).sample,
            lambda: {"sample_shape": 3, "context": rows(3, 1)},
            {"sample_shape": SHAPE | takes("zero"), "context": DATA},
        ),
        "Flow.save": Door(
            flow().save,
            lambda: {"path": folder() / "saved.safetensors"},
            {"path": PATH | takes(directory=folder, nowhere=lambda: folder() / "a" / "b")},
            runs=False,
            says={"path": "write"},
        ),
        "Flow.load": Door(
            f.Flow.load,
            lambda: {"path": saved(), "into": None},
            {
                "path": takes(directory=folder, nowhere=lambda: folder() / "a"),
                "into": OPTIONAL | takes(other=lambda: f.realnvp(3)),
            },
            says={"into": "architecture"},
        ),
        "DiagonalNormal": Door(
            f.DiagonalNormal,
            lambda: {"event_shape": 2, "loc": 0.0, "scale": 1.0, "input_dim": None},
            {
                "event_shape": SHAPE_OF_EVENT,
                "input_dim": OPTIONAL,
                "loc": NUMBER | takes("scalar", two=lambda: torch.zeros(3)),
                "scale": POSITIVE
                | takes(
                    "scalar", nan=lambda: torch.tensor([1.0, NAN]), zero=lambda: torch.zeros(2)
                ),
            },
        ),
        "GaussianMixture": Door(
            f.GaussianMixture,
            lambda: {"input_dim": 2, "count_components": 3},
            {"input_dim": COUNT, "count_components": COUNT},
        ),
        "GaussianMixture.from_moments": Door(
            f.GaussianMixture.from_moments,
            lambda: {
                "log_weights": torch.zeros(3),
                "means": torch.zeros(3, 2),
                "factors": torch.eye(2).expand(3, 2, 2),
            },
            {
                "log_weights": takes(nan=lambda: torch.full((3,), NAN), two=lambda: torch.zeros(2)),
                "means": takes(other=lambda: torch.zeros(3, 4)),
                "factors": takes(negative=lambda: -torch.eye(2).expand(3, 2, 2)),
            },
            says={"means": "factors"},
        ),
        "StudentT": Door(
            f.StudentT,
            lambda: {"event_shape": 2, "df": 3.0, "input_dim": None},
            {"event_shape": SHAPE_OF_EVENT, "df": POSITIVE, "input_dim": OPTIONAL},
        ),
        "DiagonalNormal.forward": batch_of(lambda: f.DiagonalNormal(2)),
        "GaussianMixture.forward": batch_of(lambda: f.GaussianMixture(2, 2)),
        "StudentT.forward": batch_of(lambda: f.StudentT(2)),
        "Base.forward": batch_of(lambda: f.DiagonalNormal(2)),
        "Base.log_prob_and_score": score_of(lambda: f.StudentT(2)),
        "DiagonalNormal.log_prob_and_score": score_of(lambda: f.DiagonalNormal(2)),
        "FlowDistribution": Door(
            f.FlowDistribution,
            lambda: {
                "base_dist": f.DiagonalNormal(2)(),
                "transform": transforms.ActNorm(2),
                "owner": None,
                "validate_args": None,
            },
            {
                "base_dist": OBJECT | takes(other=lambda: f.DiagonalNormal(3)()),
                "transform": OBJECT | takes(other=lambda: transforms.ActNorm(3)),
                "owner": OPTIONAL | takes("module"),
                "validate_args": OPTIONAL | FLAG,
            },
        ),
        "FlowDistribution.expand": Door(
            flow()().expand, lambda: {"batch_shape": (3,)}, {"batch_shape": SHAPE}
        ),
        "FlowDistribution.rsample": draws_of("rsample"),
        "FlowDistribution.rsample_and_log_prob": draws_of("rsample_and_log_prob"),
        "FlowDistribution.sample": draws_of("sample"),
        "FlowDistribution.push": Door(flow()().push, lambda: {"x": rows()}, {"x": POINTS}),
        "FlowDistribution.push_score": Door(
            flow()().push_score, lambda: {"x": rows()}, {"x": POINTS}
        ),
        "StochasticFlowDistribution": Door(
            f.StochasticFlowDistribution,
            lambda: {
                "base_dist": f.DiagonalNormal(2)(),
                "transform": Noise(2),
                "owner": None,
                "validate_args": None,
            },
            {
                "base_dist": OBJECT | takes(other=lambda: f.DiagonalNormal(3)()),
                "transform": OBJECT | takes(other=lambda: Noise(3)),
                "owner": OPTIONAL | takes("module"),
                "validate_args": OPTIONAL | FLAG,
            },
        ),
        "StochasticFlowDistribution.expand": Door(
            noisy().expand, lambda: {"batch_shape": (3,)}, {"batch_shape": SHAPE}
        ),
        "StochasticFlowDistribution.importance_weighted_log_prob": Door(
            noisy().importance_weighted_log_prob,
            lambda: {"value": rows(), "num_samples": 3},
            {"value": POINTS, "num_samples": COUNT},
            says={"value": "y"},
        ),
        "StochasticFlowDistribution.log_prob": Door(
            noisy().log_prob, lambda: {"value": rows()}, {"value": POINTS}, says={"value": "y"}
        ),
        "StochasticFlowDistribution.push": Door(noisy().push, lambda: {"x": rows()}, {"x": POINTS}),
        "StochasticFlowDistribution.push_score": Door(
            flows.Flow(transforms.StochasticChain([transforms.LULinear(2)]))().push_score,
            lambda: {"x": rows()},
            {"x": POINTS},
        ),
        "StochasticFlowDistribution.rsample": draws_of("rsample", noisy()),
        "StochasticFlowDistribution.rsample_and_log_prob": draws_of(
            "rsample_and_log_prob", noisy()
        ),
        "StochasticFlowDistribution.sample": draws_of("sample", noisy()),
        "FlowDistribution.log_prob": Door(
            flow()().log_prob, lambda: {"value": rows()}, {"value": POINTS}, says={"value": "y"}
        ),
    }


def _training() -> dict[str, Door]:
    t = train
    line = nn.Linear(1, 1)
    FINITE = DATA | takes(nan=lambda: torch.tensor([[0.0, 1.0], [NAN, 2.0], [1.0, 3.0]]))

    def stage() -> t.Stage:
        return t.Stage(lambda _: line.weight.square().sum(), t.adam(line.parameters()))

    def start(kind: Callable[[], t.Start]) -> Door:
        return Door(
            lambda **given: kind()(**given),
            lambda: {"flow": flows.nsf(2, count_layers=1), "y": rows(90), "context": None},
            {"flow": OBJECT, "y": FINITE, "context": OPTIONAL},
        )

    doors = {
        "adam": Door(
            t.adam,
            lambda: {
                "parameters": line.parameters(),
                "learning_rate": 1e-3,
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
            },
            {
                "parameters": OBJECT,
                "learning_rate": POSITIVE | takes("zero"),
                "betas": takes(one=lambda: (0.9, 1.0), three=lambda: (0.9, 0.9, 0.9)),
                "weight_decay": POSITIVE | takes("zero"),
            },
        ),
        "warm_cosine": Door(
            t.warm_cosine,
            lambda: {"warmup_steps": 20, "last": 0.1},
            {"warmup_steps": COUNT_0, "last": takes("zero", two=lambda: 2.0)},
        ),
        "Stage": Door(
            t.Stage,
            lambda: {
                "loss": lambda _: torch.zeros(()),
                "optimizer": t.adam(line.parameters()),
                "schedule": t.warm_cosine(),
                "share": 1.0,
                "memory": {},
            },
            {
                "loss": takes("module"),
                "optimizer": OBJECT,
                "schedule": takes("class"),
                "share": POSITIVE,
                "memory": takes("no dictionary", "dictionary"),
            },
        ),
        "Minibatches": Door(
            t.Minibatches,
            lambda: {"tensors": (rows(), None), "batch_size": 2, "seed": 0},
            {
                "tensors": takes(uneven=lambda: (rows(3), rows(4)), none=lambda: (None,)),
                "batch_size": COUNT,
                "seed": SEED,
            },
        ),
        "train": Door(
            t.train,
            lambda: {
                "module": line,
                "stages": stage(),
                "batches": (None,),
                "validate": lambda: 0.0,
                "max_steps": 1,
                "max_seconds": None,
                "check_every": 1,
                "patience": None,
                "max_grad_norm": 10.0,
                "average": None,
                "raise_decay": False,
                "draws": True,
                "seed": 0,
                "progress": False,
                "metric": "loss",
                "checkpoint": None,
                "checkpoint_every": 500,
                "settings": None,
                "explain": None,
                "seconds_before": 0.0,
                "clock": time.monotonic,
            },
            FIT
            | {
                "module": takes("module"),
                "stages": OBJECT,
                "batches": may(*WRONG),
                "validate": OPTIONAL,
                "max_grad_norm": OPTIONAL | POSITIVE,
                "average": OPTIONAL | takes("zero", one=lambda: 1.0),
                "raise_decay": FLAG,
                "draws": FLAG,
                "metric": TEXT,
                "settings": OPTIONAL | takes("no dictionary", "dictionary"),
                "explain": OPTIONAL | takes("module"),
                "seconds_before": POSITIVE | takes("zero"),
            },
            runs=False,
            says={"max_steps": "budget"},
        ),
        "fit_density": Door(
            nf.fit_density,
            lambda: {
                "flow": flow(),
                "x": rows(50),
                "context": None,
                "validation": 0.1,
                "max_steps": 1,
                "max_seconds": None,
                "batch_size": None,
                "learning_rate": 1e-3,
                "weight_decay": None,
                "starts": (t.AsGiven(),),
                "baselines": False,
                "patience": 0.5,
                "check_every": 1,
                "seed": 0,
                "progress": False,
                "checkpoint": None,
                "checkpoint_every": 500,
                "compile": False,
                "recipe": None,
                "clock": time.monotonic,
            },
            FIT
            | {
                "max_steps": OPTIONAL | COUNT,
                "recipe": OPTIONAL,
                "flow": OBJECT,
                "x": FINITE | takes(one=lambda: rows(1), constant=lambda: torch.ones(50, 2)),
                "context": OPTIONAL,
                "validation": takes(one=lambda: 1.0, pair=lambda: (rows(), rows(3, 1))),
                "batch_size": OPTIONAL | COUNT,
                "learning_rate": POSITIVE,
                "weight_decay": OPTIONAL | POSITIVE | takes("zero"),
                "starts": STARTS,
                "baselines": FLAG,
                "compile": FLAG,
            },
            runs=False,
            says={"validation": "context"},
        ),
        "DensityRecipe": Door(
            t.DensityRecipe,
            lambda: dataclasses.asdict(t.DensityRecipe()),
            {
                name: COUNT
                if isinstance(value, int)
                else takes("zero")
                if name.endswith("_share")
                else takes("zero", "half")
                for name, value in dataclasses.asdict(t.DensityRecipe()).items()
            }
            | {
                "average": takes("zero", one=lambda: 1.0),
                "decay_rows": POSITIVE,
            },
        ),
        "DensityRecipe.batch_size": Door(
            t.DensityRecipe().batch_size, lambda: {"count_rows": 9}, {"count_rows": COUNT}
        ),
        "DensityRecipe.weight_decay": Door(
            t.DensityRecipe().weight_decay,
            lambda: {"count_rows": 9, "count_columns": 2},
            {"count_rows": COUNT, "count_columns": COUNT},
        ),
        "fit_gaussian_mixture": Door(
            t.fit_gaussian_mixture,
            lambda: {
                "x": rows(90),
                "validation": rows(9),
                "budget": None,
                "most_work": 1e6,
                "generator": None,
            },
            {
                "x": FINITE,
                "validation": FINITE,
                "budget": OPTIONAL,
                "most_work": POSITIVE | takes("inf"),
                "generator": OPTIONAL,
            },
        ),
        "GaussianCopula": Door(t.GaussianCopula, lambda: {"y": rows(90)}, {"y": FINITE}),
        "GaussianCopula.log_prob": Door(
            lambda **given: t.GaussianCopula(rows(90)).log_prob(**given),
            lambda: {"y": rows(), "budget": None},
            {"y": POINTS, "budget": OPTIONAL},
        ),
        "StudentTails": Door(t.StudentTails, lambda: {"start": t.Whitened()}, {"start": OBJECT}),
        "MixtureBase": Door(
            t.MixtureBase,
            lambda: {"held_out": None, "budget": None, "most_work": 1e6, "seed": 0},
            {
                "held_out": OPTIONAL,
                "budget": OPTIONAL,
                "most_work": POSITIVE | takes("inf"),
                "seed": SEED | OPTIONAL,
            },
        ),
        "StudentTails.__call__": start(lambda: t.StudentTails(t.AsGiven())),
        "MixtureBase.__call__": start(t.MixtureBase),
    }
    for name in ("AsGiven", "Standardised", "Whitened"):
        doors[f"{name}.__call__"] = start(getattr(t, name))
    return doors


def _pictures() -> dict[str, Door]:
    p = plots

    def draws() -> dict[str, Tensor]:
        return {"mu": torch.randn(30), "theta": torch.randn(30, 2)}

    DRAWS = takes(
        nan=lambda: {"mu": torch.tensor([0.0, NAN])},
        texts=lambda: {"mu": "text"},
        numbers=lambda: {1: torch.zeros(3)},
        array=lambda: {"mu": np.zeros(3)},
        scalar=lambda: {"mu": torch.tensor(1.0)},
        empty=lambda: {"mu": torch.zeros(0)},
    )

    def weights(raw: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(raw=raw, smoothed=raw, khat=0.1, ess=3.0)

    return {
        "plot_density": Door(
            p.plot_density,
            lambda: {
                "flow": flow(),
                "data": rows(9),
                "context": None,
                "bounds": [(-1.0, 1.0), (-1.0, 1.0)],
                "num_samples": 9,
                "resolution": 9,
                "seed": 0,
            },
            {
                "flow": OBJECT | takes(three=lambda: flows.gaussian(3)),
                "data": OPTIONAL | takes(nan=lambda: torch.full((9, 2), NAN)),
                "context": OPTIONAL,
                "bounds": OPTIONAL
                | takes(
                    "nested list", one=lambda: [(0.0, 1.0)], turned=lambda: [(1.0, 0.0), (0.0, 1.0)]
                ),
                "num_samples": COUNT,
                "resolution": COUNT | takes(one=lambda: 1),
                "seed": SEED,
            },
            says={"flow": "input_dim"},
        ),
        "pair_plot": Door(
            p.pair_plot,
            lambda: {"samples": draws(), "other": draws(), "label": "other"},
            {
                "samples": DRAWS,
                "other": OPTIONAL | DRAWS | takes(other=lambda: {"nu": torch.zeros(9)}),
                "label": TEXT,
            },
        ),
        "loss_curve": Door(
            p.loss_curve,
            lambda: {"history": train.History(losses=[2.0, NAN, 1.0]), "ylabel": "loss"},
            {
                "history": OBJECT
                | takes(nan=lambda: train.History(losses=[NAN]), empty=train.History),
                "ylabel": TEXT,
            },
        ),
        "weights_plot": Door(
            p.weights_plot,
            lambda: {"weights": weights(torch.randn(30))},
            {"weights": OBJECT | takes(nan=lambda: weights(torch.tensor([0.0, NAN])))},
        ),
    }


def _laws() -> dict[str, Door]:
    t = testing
    return {
        "randomize": Door(
            t.randomize,
            lambda: {"module": nn.Linear(1, 1), "scale": 0.1, "seed": 0},
            {"module": takes("module"), "scale": POSITIVE | takes("zero"), "seed": SEED},
        ),
        "points": Door(
            t.points,
            lambda: {
                "space": constraints.real,
                "shape": (3,),
                "dtype": torch.float64,
                "seed": 0,
            },
            {
                "space": OBJECT,
                "shape": SHAPE,
                "dtype": OBJECT,
                "seed": SEED,
            },
        ),
        "check_univariate": Door(
            t.check_univariate,
            lambda: {"univariate": univariate.Additive()},
            {"univariate": OBJECT},
        ),
        "check_transform": Door(
            t.check_transform,
            lambda: {"transform": transforms.Permutation([0])},
            {"transform": OBJECT},
        ),
        "check_stochastic": Door(
            t.check_stochastic, lambda: {"transform": noise()}, {"transform": OBJECT}
        ),
        "check_log_prob": Door(
            t.check_log_prob,
            lambda: {
                "flow": flows.realnvp(2),
                "truth": lambda y: dist.Normal(0.0, 1.0).log_prob(y).sum(-1),
                "y": rows(),
                "context": None,
                "num_samples": 10,
            },
            {
                "flow": OBJECT,
                "truth": FUNCTION | takes("module"),
                "y": DATA,
                "context": OPTIONAL,
                "num_samples": COUNT | takes(one=lambda: 1),
            },
            runs=False,
        ),
        "check_flow": Door(t.check_flow, lambda: {"flow": flows.gaussian(1)}, {"flow": OBJECT}),
        "check_guide": Door(
            t.check_guide,
            lambda: {
                "make_guide": lambda: nf.AutoFlow(model, transforms.LowerAffine),
                "model": model,
                "args": (Y,),
                "draws": 1,
            },
            {"make_guide": OBJECT, "model": MODEL, "args": ARGS, "draws": COUNT},
            runs=False,
        ),
    }


def _inference() -> dict[str, Door]:
    i = infer
    LOG_WEIGHTS = takes("vector", nan=lambda: torch.tensor([0.0, NAN]))
    Z = takes("nan tensor", "inf tensor")
    one = torch.zeros(1)

    def of_joint(name: str, z: Tensor) -> Door:
        return Door(getattr(joint(), name), lambda: {"z": z}, {"z": takes()})

    return {
        "ELBO": Door(
            i.ELBO,
            lambda: {"gradient": i.StickTheLanding(), "temperature": 1.0},
            {"gradient": OBJECT, "temperature": POSITIVE},
        ),
        "TemperedELBO": Door(
            i.TemperedELBO,
            lambda: {"count_steps": 9, "start": 0.1, "gradient": i.Reparameterised()},
            {
                "count_steps": COUNT,
                "start": takes(two=lambda: 2.0),
                "gradient": OBJECT,
            },
        ),
        "ImportanceWeightedELBO": Door(
            i.ImportanceWeightedELBO,
            lambda: {"count_inner": 8, "gradient": i.StickTheLanding()},
            {"count_inner": COUNT, "gradient": OBJECT},
        ),
        "ForwardKL": Door(
            i.ForwardKL,
            lambda: {"draws": rows(7), "log_weights": torch.zeros(7)},
            {"draws": DATA, "log_weights": OPTIONAL | LOG_WEIGHTS},
            says={"draws": "log_weights"},
        ),
        "smooth": Door(
            i.smooth,
            lambda: {"log_weights": torch.randn(60)},
            {"log_weights": LOG_WEIGHTS},
            says={"log_weights": "log weights"},
        ),
        "affine_base": Door(
            i.affine_base, lambda: {"start": start(), "rank": 2}, {"start": OBJECT, "rank": COUNT}
        ),
        "GaussianStart.sample": Door(start().sample, lambda: {"eps": rows(3, 1)}, {"eps": DATA}),
        "laplace_start": Door(
            i.laplace_start,
            lambda: {
                "joint": joint(),
                "init": one,
                "count_starts": 4,
                "count_climbers": 2,
                "count_modes": 1,
                "count_draws": 8,
                "count_refine": 0,
                "max_steps": 2,
                "max_seconds": 2.0,
                "seed": 0,
                "clock": time.perf_counter,
            },
            {
                "joint": OBJECT,
                "init": OPTIONAL | DATA,
                "count_starts": COUNT,
                "count_climbers": COUNT,
                "count_modes": COUNT,
                "count_draws": COUNT,
                "count_refine": COUNT_0,
                "max_steps": COUNT,
                "max_seconds": POSITIVE | may("none"),
                "seed": SEED,
                "clock": OBJECT | may("function"),
            },
            runs=False,
        ),
        "Recentre": Door(
            i.Recentre,
            lambda: {"joint": hierarchical_joint(), "precision": None, "shift": None},
            {"joint": OBJECT, "precision": OPTIONAL, "shift": OPTIONAL},
        ),
        "Recentre.at": Door(
            i.Recentre.at,
            lambda: {"joint": hierarchical_joint(), "z": torch.zeros(2)},
            {"joint": OBJECT, "z": DATA},
        ),
        "SVIFit.posterior": Door(
            lambda **given: SVIFit(guide(), train.History(), joint(), None, "").posterior(**given),
            lambda: {"num_draws": 30, "seed": 0},
            {"num_draws": COUNT, "seed": SEED | OPTIONAL},
        ),
        "LogJoint": Door(
            i.LogJoint,
            lambda: {
                "model": model,
                "args": (Y,),
                "kwargs": None,
                "init_loc_fn": init_to_median,
                "prototype": None,
                "seed": 0,
                "budget": None,
            },
            {
                "model": MODEL,
                "args": ARGS,
                "kwargs": KWARGS,
                "init_loc_fn": INIT,
                "prototype": OPTIONAL,
                "seed": SEED,
                "budget": OPTIONAL,
            },
        ),
        "LogJoint.log_prob": of_joint("log_prob", rows(3, 1)),
        "LogJoint.__call__": of_joint("__call__", rows(3, 1)),
        "LogJoint.value_and_grad": of_joint("value_and_grad", rows(3, 1)),
        "LogJoint.hessian": of_joint("hessian", rows(3, 1)),
        "LogJoint.unpack": of_joint("unpack", rows(3, 1)),
        "LogJoint.failing_sites": of_joint("failing_sites", one),
        "LogJoint.init": Door(
            joint().init,
            lambda: {"init_loc_fn": init_to_median, "seed": 0},
            {"init_loc_fn": INIT, "seed": SEED},
        ),
        "LogJoint.prior_draw": Door(joint().prior_draw, lambda: {"seed": 0}, {"seed": SEED}),
        "LogJoint.pack": Door(
            joint().pack,
            lambda: {"values": {"mu": torch.zeros(3)}},
            {"values": takes(text=lambda: {"mu": "text"}, array=lambda: {"mu": np.zeros(3)})},
            says={"values": "missing"},
        ),
        "LogJoint.move": Door(
            hierarchical_joint().move,
            lambda: {
                "z": rows(),
                "precision": torch.zeros(2),
                "shift": torch.zeros(2),
                "inverse": False,
            },
            {"z": Z, "precision": DATA, "shift": DATA, "inverse": FLAG},
        ),
        "LogJoint.recentred": Door(
            hierarchical_joint().recentred,
            lambda: {"precision": torch.zeros(2), "shift": torch.zeros(2)},
            {"precision": DATA, "shift": DATA},
        ),
        **{
            f"LogJoint.{name}": Door(
                getattr(joint(), name),
                lambda: {
                    "batch_size": 2,
                    "max_seconds": 1.0,
                    "clock": time.perf_counter,
                    "compile": False,
                    "if_faster": True,
                },
                {
                    "batch_size": COUNT,
                    "max_seconds": OPTIONAL | POSITIVE | may("zero", "negative"),
                    "clock": OBJECT,
                    "compile": FLAG,
                    "if_faster": FLAG,
                },
                runs=False,
            )
            for name in ("record", "trace")
        },
        "LogJoint.prior_scales": Door(
            hierarchical_joint().prior_scales, lambda: {"z": torch.zeros(2)}, {"z": DATA}
        ),
    }


def _guides() -> dict[str, Door]:
    def fresh() -> nf.AutoFlow:
        return nf.AutoFlow(model, transforms.LowerAffine).setup(Y)

    return {
        "AutoFlow": Door(
            nf.AutoFlow,
            lambda: {
                "model": model,
                "flow": "auto",
                "init_loc_fn": init_to_median,
                "init_scale": 0.5,
                "count_components": 1,
            },
            {
                "model": MODEL | takes("function"),
                "flow": may("class"),
                "init_loc_fn": INIT,
                "init_scale": POSITIVE,
                "count_components": COUNT,
            },
        ),
        "AutoFlow.log_prob": Door(
            guide().log_prob,
            lambda: {"values": {"mu": torch.zeros(3)}},
            {"values": takes(text=lambda: {"mu": "text"}, array=lambda: {"mu": np.zeros(3)})},
        ),
        "AutoFlow.quantiles": Door(
            guide().quantiles,
            lambda: {"quantiles": [0.1, 0.9]},
            {
                "quantiles": takes(
                    "vector", two=lambda: [0.5, 2.0], tensor=lambda: torch.tensor([0.5, NAN])
                )
                | takes("scalar", "zero", "range of one")
            },
        ),
        "AutoFlow.recentre": Door(
            lambda **given: fresh().recentre(**given),
            lambda: {"recentring": None},
            {"recentring": OPTIONAL},
        ),
        "AutoFlow.start_at": Door(
            lambda **given: fresh().start_at(**given),
            lambda: {"start": start(), "recentring": None},
            {
                "start": OBJECT
                | takes(other=lambda: infer.GaussianStart(rows(1)[0], torch.ones(2), 0.0)),
                "recentring": OPTIONAL,
            },
        ),
        "AutoFlow.load_state_dict": Door(
            lambda **given: fresh().load_state_dict(**given),
            lambda: {"state_dict": guide().state_dict()},
            {"state_dict": OBJECT | may("no dictionary", "dictionary")},
        ),
        "PosteriorRecipe": Door(
            infer.PosteriorRecipe,
            lambda: dataclasses.asdict(infer.PosteriorRecipe()),
            {
                "num_particles": OPTIONAL | COUNT,
                "betas": takes(one=lambda: (0.9,), large=lambda: (0.9, 1.0)),
                "affine_rates": takes(rising=lambda: (1e-3, 1e-2), zero_rate=lambda: (1e-3, 0.0)),
                "flow_rates": takes("list of halves", falling=lambda: (1e-2, 1e-3)),
                "affine_share": SHARE,
                "average": takes("zero", one=lambda: 1.0),
                "warmup_steps": COUNT_0,
                "few_particles": COUNT | takes(most=lambda: 10**6),
                "least_particles": COUNT | takes(most=lambda: 10**6),
            }
            | dict.fromkeys(("nearly_free", "grace"), takes("half", below=lambda: 0.9))
            | dict.fromkeys(("even", "far"), takes("half", "zero"))
            | dict.fromkeys(("rate_times_steps", "shape_share", "recording_cost"), POSITIVE)
            | dict.fromkeys(
                (
                    "check_share",
                    "far_share",
                    "recording_share",
                    "start_share",
                    "pieces_share",
                    "timing_share",
                ),
                takes("zero", two=lambda: 2.0),
            )
            | dict.fromkeys(
                (
                    "max_steps",
                    "many_particles",
                    "enough_steps",
                    "few_steps",
                    "num_check_particles",
                    "least_check_particles",
                    "least_rows",
                ),
                COUNT,
            ),
        ),
        "fit_svi": Door(
            nf.fit_svi,
            lambda: {
                "model": model,
                "guide": fresh(),
                "args": (Y,),
                "kwargs": None,
                "max_steps": 1,
                "max_seconds": None,
                "num_particles": 4,
                "objective": None,
                "patience": None,
                "seed": 0,
                "progress": False,
                "checkpoint": None,
                "checkpoint_every": 500,
                "compile": False,
                "clock": time.monotonic,
                "recipe": None,
            },
            FIT
            | {
                "recipe": OPTIONAL,
                "max_steps": OPTIONAL | COUNT,
                "model": MODEL,
                "guide": OPTIONAL,
                "args": ARGS,
                "kwargs": KWARGS,
                "num_particles": OPTIONAL,
                "objective": OPTIONAL,
                "compile": FLAG,
            },
            runs=False,
        ),
    }


def _posteriors() -> dict[str, Door]:
    def method(name: str) -> Callable[..., Any]:
        return lambda **given: getattr(posterior(), name)(**given)

    return {
        "Posterior.from_guide": Door(
            nf.Posterior.from_guide,
            lambda: {
                "guide": guide(),
                "model": None,
                "args": (Y,),
                "kwargs": None,
                "num_draws": 30,
                "seed": 0,
                "joint": None,
                "history": None,
            },
            {
                "guide": OBJECT,
                "model": OPTIONAL | MODEL,
                "args": ARGS,
                "kwargs": KWARGS,
                "num_draws": COUNT,
                "seed": SEED | OPTIONAL,
                "joint": OPTIONAL,
                "history": OPTIONAL,
            },
        ),
        "Posterior.from_distribution": Door(
            nf.Posterior.from_distribution,
            lambda: {
                "q": dist.Normal(torch.zeros(1), 1.0).to_event(1),
                "joint": joint(),
                "num_draws": 30,
                "seed": 0,
                "history": None,
            },
            {
                "q": OBJECT
                | takes(
                    scalar_law=lambda: dist.Normal(0.0, 1.0),
                    wide=lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
                    batch=lambda: dist.Normal(torch.zeros(3, 1), 1.0).to_event(1),
                ),
                "joint": OBJECT,
                "num_draws": COUNT,
                "seed": SEED | OPTIONAL,
                "history": OPTIONAL,
            },
        ),
        "Posterior.resample": Door(
            method("resample"),
            lambda: {"num_draws": 9, "seed": 0},
            {"num_draws": OPTIONAL, "seed": SEED | OPTIONAL},
        ),
        "Posterior.diagnose": Door(
            method("diagnose"),
            lambda: {"others": (), "max_seconds": 0.1, "seed": 1},
            {
                "others": takes("no list", "no tuple"),
                "max_seconds": POSITIVE | may("none"),
                "seed": SEED | OPTIONAL,
            },
            runs=False,
        ),
        "Posterior.refine": Door(
            method("refine"),
            lambda: {
                "method": "psis",
                "num_chains": 1,
                "num_draws": 2,
                "warmup": 1,
                "seed": 0,
                "progress": False,
            },
            {
                "method": OBJECT,
                "num_chains": COUNT,
                "num_draws": COUNT,
                "warmup": COUNT_0,
                "seed": SEED | OPTIONAL,
                "progress": FLAG,
            },
        ),
        "Posterior.summary": Door(
            method("summary"), lambda: {"weighted": False}, {"weighted": FLAG}
        ),
        "Posterior.predictive": Door(
            method("predictive"),
            lambda: {"num_draws": 9, "sites": (), "seed": 0},
            {
                "num_draws": OPTIONAL | takes(many=lambda: 61),
                "sites": takes("no list", "no tuple"),
                "seed": SEED | OPTIONAL,
            },
            says={"sites": "site"},
        ),
        "Posterior.to_arviz": Door(
            method("to_arviz"),
            lambda: {"coords": None, "dims": None, "log_likelihood": False},
            {
                "coords": KWARGS | may("dictionary"),
                "dims": KWARGS | may("dictionary"),
                "log_likelihood": FLAG,
            },
        ),
        "Posterior.plot": Door(
            method("plot"),
            lambda: {"what": "pairs", "sites": None},
            {"what": OBJECT, "sites": OPTIONAL},
            says={"sites": "samples"},
        ),
    }


def table() -> dict[str, Door]:
    """All doors by name."""
    return (
        _univariate()
        | _conditioners()
        | _transforms()
        | _flows()
        | _training()
        | _pictures()
        | _laws()
        | _inference()
        | _guides()
        | _posteriors()
    )
