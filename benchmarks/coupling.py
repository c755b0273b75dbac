"""Coupling flows against their peers: density, training step and sampling.

    python -m benchmarks.coupling [--smoke] [--json results.json]

Every flow has 5 coupling layers whose networks have two hidden layers of 64 units, 8 bins where
there are splines, and is timed on batches of 1000 after some training steps. The halves take turns
and nothing stands between the layers but what a peer needs for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from benchmarks.autoregressive import (
    BATCH,
    BINS,
    LAYERS,
    Model,
    built,
    compare,
    data,
    step,
    versus_torch_and_jax,
)
from benchmarks.timing import Figure, add_to, conditions, interleave, one_thread, table
from pyro_nf.flows.flow import Flow
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.coupling import Coupling
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.base import UnivariateMap
from pyro_nf.univariate.spline import RationalQuadratic

HIDDEN = 64


def _ours(univariate: UnivariateMap, dim: int, hidden: int) -> Model:
    parts = [
        Coupling(univariate, dim, hidden_dims=(hidden, hidden), swap=bool(i % 2))
        for i in range(LAYERS)
    ]
    flow = Flow(Chain(parts))
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def our_nsf(dim: int, hidden: int) -> Model:
    return _ours(RationalQuadratic(BINS), dim, hidden)


def our_realnvp(dim: int, hidden: int) -> Model:
    return _ours(Affine(), dim, hidden)


def zuko_nsf(dim: int, hidden: int) -> Model:
    import zuko

    # two passes make the masked network a coupling
    flow = zuko.flows.NSF(
        dim, bins=BINS, transforms=LAYERS, hidden_features=(hidden, hidden), passes=2
    )
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def zuko_realnvp(dim: int, hidden: int) -> Model:
    import zuko

    flow = zuko.flows.RealNVP(dim, transforms=LAYERS, hidden_features=(hidden, hidden))
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def _nflows(dim: int, layer: Callable[[torch.Tensor], nn.Module]) -> Model:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow
    from nflows.transforms import CompositeTransform

    mask = torch.ones(dim)
    mask[::2] = -1
    layers = [layer(mask if i % 2 else -mask) for i in range(LAYERS)]
    flow = NFlow(CompositeTransform(layers), StandardNormal([dim]))
    return Model(flow.log_prob, flow.sample, flow)


def _nflows_net(hidden: int) -> Callable[[int, int], nn.Module]:
    from nflows.nn.nets import MLP

    return lambda ins, outs: MLP([ins], [outs], [hidden, hidden])


def nflows_nsf(dim: int, hidden: int) -> Model:
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Layer

    net = _nflows_net(hidden)
    return _nflows(
        dim, lambda mask: Layer(mask, _Bare(net), num_bins=BINS, tails="linear", tail_bound=5.0)
    )


def nflows_realnvp(dim: int, hidden: int) -> Model:
    from nflows.transforms import AffineCouplingTransform as Layer

    net = _nflows_net(hidden)
    return _nflows(dim, lambda mask: Layer(mask, _Bare(net)))


class _Bare:
    """nflows gives the conditioner a context that its perceptron does not take."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        self.make = make

    def __call__(self, ins: int, outs: int) -> nn.Module:
        return _WithoutContext(self.make(ins, outs))


class _WithoutContext(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        return self.net(x)


def normflows_nsf(dim: int, hidden: int) -> Model:
    import normflows

    layers = [
        normflows.flows.CoupledRationalQuadraticSpline(
            dim, 1, hidden, num_bins=BINS, tail_bound=5, reverse_mask=bool(i % 2)
        )
        for i in range(LAYERS)
    ]
    return _normflows(dim, layers)


def normflows_realnvp(dim: int, hidden: int) -> Model:
    import normflows

    layers = []
    for _ in range(LAYERS):
        net = normflows.nets.MLP([dim // 2, hidden, hidden, dim], init_zeros=True)
        layers += [normflows.flows.AffineCouplingBlock(net)]
        layers += [normflows.flows.Permute(dim, mode="swap")]
    return _normflows(dim, layers)


def _normflows(dim: int, layers: list[nn.Module]) -> Model:
    import normflows

    base = normflows.distributions.DiagGaussian(dim, trainable=False)
    flow = normflows.NormalizingFlow(base, layers)
    return Model(flow.log_prob, lambda n: flow.sample(n)[0], flow)


def flowjax_nsf(dim: int, hidden: int) -> Model:
    import equinox
    import jax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    flow = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jax.numpy.zeros(dim)),
        transformer=RationalQuadraticSpline(knots=BINS, interval=5),
        flow_layers=LAYERS,
        nn_width=hidden,
        nn_depth=2,
    )
    log_prob = equinox.filter_jit(lambda flow, x: flow.log_prob(x))
    sample = equinox.filter_jit(lambda flow, key, n: flow.sample(key, (n,)))
    rows: dict[int, jax.Array] = {}

    def density(x: torch.Tensor) -> object:
        rows.setdefault(id(x), jax.numpy.asarray(x.numpy()))
        return log_prob(flow, rows[id(x)]).block_until_ready()

    return Model(density, lambda n: sample(flow, jax.random.key(1), n).block_until_ready())


NSFS = {
    "zuko": zuko_nsf,
    "nflows": nflows_nsf,
    "normflows": normflows_nsf,
    "flowjax": flowjax_nsf,
}
REALNVPS = {"zuko": zuko_realnvp, "nflows": nflows_realnvp, "normflows": normflows_realnvp}


def figures_of(
    name: str,
    ours: Callable[[int, int], Model],
    peers: dict[str, Callable[[int, int], Model]],
    dim: int,
    hidden: int,
    bounds: dict[str, tuple[float, float]],
) -> list[Figure]:
    """Density, draws and a training step of one kind of flow."""
    mine, others = built(ours, peers, dim, hidden)
    density, sampling = compare(mine, others, dim, BATCH)
    found = versus_torch_and_jax(
        f"{name} log_prob, D={dim}", density, bounds.get("log_prob"), bounds.get("log_prob jit")
    )
    if "sample" in bounds:
        found += versus_torch_and_jax(f"{name} sample, D={dim}", sampling, bounds["sample"])
    if "step" in bounds:
        x = data(dim)
        models = {"ours": mine, **others}
        steps = {k: step(m, x) for k, m in models.items() if m.module is not None}
        found += versus_torch_and_jax(
            f"{name} training step, D={dim}", interleave(steps), bounds["step"]
        )
    return found


def main(arguments: list[str] | None = None) -> str:
    """Runs all, prints and returns the table.

    Args:
        arguments: As on the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="file to add the figures to")
    options = parser.parse_args(arguments)
    one_thread()
    nsf = {"log_prob": (0.75, 0.4), "step": (0.8, 0.5), "sample": (0.75, 0.4)}
    realnvp = {"log_prob": (0.9, 0.7), "step": (0.9, 0.7)}
    if options.smoke:
        figures = figures_of("RealNVP", our_realnvp, REALNVPS, 4, 8, realnvp)
    else:
        figures = figures_of("NSF coupling", our_nsf, NSFS, 8, HIDDEN, nsf)
        figures += figures_of(
            "NSF coupling", our_nsf, NSFS, 64, HIDDEN, {"log_prob jit": (1.0, 0.7)}
        )
        figures += figures_of("RealNVP", our_realnvp, REALNVPS, 8, HIDDEN, realnvp)
    command = "python -m benchmarks.coupling"
    if options.json:
        section = "coupling, JAX" if find_spec("flowjax") else "coupling"
        add_to(options.json, section, figures, command)
    text = f"{table(figures)}\n\n{conditions(command)}"
    print(text)
    return text


if __name__ == "__main__":
    main()
