"""Autoregressive flows against their peers: sampling, density, training step, gradient, memory.

    python -m benchmarks.autoregressive [--smoke] [--json results.json]

Every flow has 5 layers of two hidden layers of max(64, 2 D) units, at most 1024, and is timed on
batches of 1000 after some training steps. Peers that are not installed are left out. Where flowjax
is installed it is the only peer: run it in the venv of the torch peers, then in that of the JAX
peers with the same file, to have all figures in one. To sample, every peer runs its network D
times; where that would pass a minute it is extrapolated as D times its density pass, marked ``~``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    Figure,
    Timing,
    add_to,
    conditions,
    interleave,
    one_thread,
    ratio,
    table,
)
from pyro_nf import flows
from pyro_nf.flows.flow import Flow
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.chain import Chain
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.spline import RationalQuadratic

BATCH = 1000
LAYERS = 5
BINS = 8
LONGEST_CALL = 60.0
TRAINING_STEPS = 30


@dataclass
class Model:
    """One library's flow: its parameters, and its density and draws as calls."""

    log_prob: Callable[[Tensor], object]
    sample: Callable[[int], object]
    module: nn.Module | None = None
    """None if it is not torch's, and so cannot be trained here."""


def width(dim: int) -> int:
    return min(1024, max(64, 2 * dim))


def our_maf(dim: int, hidden: int) -> Model:
    flow = flows.maf(dim, count_layers=LAYERS, hidden_dims=(hidden, hidden))
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def our_spline(dim: int, hidden: int) -> Model:
    parts = [
        Autoregressive(
            RationalQuadratic(BINS), dim, hidden_dims=(hidden, hidden), reverse=bool(i % 2)
        )
        for i in range(LAYERS)
    ]
    flow = Flow(Chain(parts))
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def zuko_maf(dim: int, hidden: int) -> Model:
    import zuko

    flow = zuko.flows.MAF(dim, transforms=LAYERS, hidden_features=(hidden, hidden))
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def zuko_spline(dim: int, hidden: int) -> Model:
    import zuko

    flow = zuko.flows.NSF(dim, bins=BINS, transforms=LAYERS, hidden_features=(hidden, hidden))
    return Model(lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), flow)


def _nflows(dim: int, layer: Callable[[], nn.Module]) -> Model:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow
    from nflows.transforms import CompositeTransform, ReversePermutation

    layers = [part for _ in range(LAYERS) for part in (ReversePermutation(dim), layer())]
    flow = NFlow(CompositeTransform(layers), StandardNormal([dim]))
    return Model(flow.log_prob, flow.sample, flow)


def nflows_maf(dim: int, hidden: int) -> Model:
    from nflows.transforms import MaskedAffineAutoregressiveTransform as Layer

    # A first layer and one block make two hidden layers.
    return _nflows(dim, lambda: Layer(dim, hidden, num_blocks=1, use_residual_blocks=False))


def nflows_spline(dim: int, hidden: int) -> Model:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Layer

    def layer() -> nn.Module:
        return Layer(
            dim,
            hidden,
            num_bins=BINS,
            tails="linear",
            tail_bound=5.0,
            num_blocks=1,
            use_residual_blocks=False,
        )

    return _nflows(dim, layer)


def _normflows(dim: int, layer: Callable[[], nn.Module]) -> Model:
    import normflows

    layers = []
    for _ in range(LAYERS):
        layers += [layer(), normflows.flows.Permute(dim, mode="swap")]
    base = normflows.distributions.DiagGaussian(dim, trainable=False)
    flow = normflows.NormalizingFlow(base, layers)
    return Model(flow.log_prob, lambda n: flow.sample(n)[0], flow)


def normflows_maf(dim: int, hidden: int) -> Model:
    from normflows.flows import MaskedAffineAutoregressive, Reverse

    # Reversed, so that the density is the one pass, as in the other flows.
    return _normflows(
        dim,
        lambda: Reverse(
            MaskedAffineAutoregressive(dim, hidden, num_blocks=1, use_residual_blocks=False)
        ),
    )


def normflows_spline(dim: int, hidden: int) -> Model:
    from normflows.flows import AutoregressiveRationalQuadraticSpline

    return _normflows(
        dim, lambda: AutoregressiveRationalQuadraticSpline(dim, 1, hidden, num_bins=BINS)
    )


def pyro_maf(dim: int, hidden: int) -> Model:
    from pyro.distributions import Normal, TransformedDistribution
    from pyro.distributions.transforms import affine_autoregressive, permute

    turn = torch.arange(dim - 1, -1, -1)
    layers = [affine_autoregressive(dim, [hidden, hidden]) for _ in range(LAYERS)]
    parts = [part for layer in layers for part in (layer.inv, permute(dim, turn))]

    def distribution() -> TransformedDistribution:
        for layer in layers:
            layer.clear_cache()  # or it would answer for the network
        return TransformedDistribution(Normal(torch.zeros(dim), 1.0).to_event(1), parts)

    return Model(
        lambda x: distribution().log_prob(x),
        lambda n: distribution().sample((n,)),
        nn.ModuleList(layers),
    )


def flowjax_maf(dim: int, hidden: int) -> Model:
    import equinox
    import jax
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    flow = masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jax.numpy.zeros(dim)),
        flow_layers=LAYERS,
        nn_width=hidden,
        nn_depth=2,
    )
    log_prob = equinox.filter_jit(lambda flow, x: flow.log_prob(x))
    sample = equinox.filter_jit(lambda flow, key, n: flow.sample(key, (n,)))
    rows: dict[int, jax.Array] = {}

    def density(x: Tensor) -> object:
        key = id(x)
        if key not in rows:
            rows[key] = jax.numpy.asarray(x.numpy())
        return log_prob(flow, rows[key]).block_until_ready()

    return Model(density, lambda n: sample(flow, jax.random.key(1), n).block_until_ready())


MAFS = {
    "zuko": zuko_maf,
    "nflows": nflows_maf,
    "normflows": normflows_maf,
    "pyro": pyro_maf,
}
SPLINES = {"zuko": zuko_spline, "nflows": nflows_spline, "normflows": normflows_spline}


def data(dim: int, count: int = BATCH) -> Tensor:
    """Correlated and curved, so that training has something to learn."""
    x = torch.randn(count, dim)
    x[:, 1:] += 0.5 * x[:, :-1]
    x[:, 1:] += 0.3 * x[:, :-1].square()
    return (x - x.mean(0)) / x.std(0)


def step(model: Model, x: Tensor) -> Callable[[], None]:
    """One training step by the fused Adam, the same for all."""
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()

    return run


def built(
    ours: Callable[[int, int], Model],
    peers: dict[str, Callable[[int, int], Model]],
    dim: int,
    hidden: int,
) -> tuple[Model, dict[str, Model]]:
    """Builds and trains a little."""
    makers = {"ours": ours} | {name: peer for name, peer in peers.items() if find_spec(name)}
    models = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        models[name] = make(dim, hidden)
        if models[name].module is not None:
            train = step(models[name], data(dim))
            for _ in range(TRAINING_STEPS if dim < 500 else 3):
                train()
            models[name].module.eval()
    return models.pop("ours"), models


def compare(
    ours: Model, peers: dict[str, Model], dim: int, batch: int
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Density and sampling times by name, all interleaved."""
    x, models = data(dim), {"ours": ours, **peers}
    with torch.no_grad():
        density = interleave({name: lambda m=m: m.log_prob(x) for name, m in models.items()})
        affordable = {
            name: m
            for name, m in models.items()
            if name == "ours" or dim * density[name].shortest < LONGEST_CALL
        }
        sampling = interleave({name: lambda m=m: m.sample(batch) for name, m in affordable.items()})
    for name in models:
        if name not in affordable:
            sampling[name] = density[name].scaled(dim)
    return density, sampling


def versus_torch_and_jax(
    name: str,
    times: dict[str, Timing],
    bounds: tuple[float, float] | None,
    jax_bounds: tuple[float, float] | None = None,
) -> list[Figure]:
    """The ratios to the best torch peer and to flowjax, where they are there and have bounds."""
    ours, found = times["ours"], []
    peers = {peer: t for peer, t in times.items() if peer not in ("ours", "flowjax")}
    if peers and bounds:
        found.append(ratio(f"{name}, best torch peer", ours, peers, *bounds))
    if "flowjax" in times and jax_bounds:
        flowjax = {"flowjax": times["flowjax"]}
        found.append(ratio(f"{name}, flowjax under jit", ours, flowjax, *jax_bounds))
    return found


SAMPLE = {8: (1 / 4, 1 / 8), 64: (1 / 20, 1 / 60), 256: (1 / 80, 1 / 200), 784: (1 / 400, 1 / 1000)}
SAMPLE_JAX = {8: (1 / 2, 1 / 4), 64: (1 / 15, 1 / 50)}
OWN = {64: (3.5, 1.0), 256: (1.6, 0.8), 784: (1.2, 0.7)}
DENSITY = {8: (0.9, 0.75), 64: (0.9, 0.75), 256: (0.85, 0.65), 784: (0.85, 0.65)}


def maf(dims: list[int]) -> list[Figure]:
    found = []
    for dim in dims:
        ours, peers = built(our_maf, MAFS, dim, width(dim))
        density, sampling = compare(ours, peers, dim, BATCH)
        found += versus_torch_and_jax(f"MAF sample, D={dim}", sampling, SAMPLE[dim])
        if dim in OWN:
            own = {"log_prob": density["ours"]}
            name = f"MAF sample, D={dim}, own log_prob"
            found.append(ratio(name, sampling["ours"], own, *OWN[dim]))
        found += versus_torch_and_jax(f"MAF log_prob, D={dim}", density, DENSITY[dim])
        models = {"ours": ours, **peers}
        if dim == 64:
            with torch.no_grad():
                one = interleave({name: lambda m=m: m.sample(1) for name, m in models.items()})
            found += versus_torch_and_jax("MAF sample, D=64, B=1", one, (1 / 8, 1 / 100))
            found += round_trip(ours)
        if dim <= 64:
            x = data(dim)
            steps = interleave({name: step(model, x) for name, model in models.items()})
            found += versus_torch_and_jax(f"MAF training step, D={dim}", steps, (1.0, 0.85))
    return found


def maf_against_jax(dims: list[int]) -> list[Figure]:
    found = []
    for dim in dims:
        ours, peers = built(our_maf, {"flowjax": flowjax_maf}, dim, width(dim))
        _, sampling = compare(ours, peers, dim, BATCH)
        found += versus_torch_and_jax(f"MAF sample, D={dim}", sampling, None, SAMPLE_JAX[dim])
    return found


def spline(dims: list[int]) -> list[Figure]:
    bounds = {8: (1 / 3, 1 / 6), 64: (1 / 10, 1 / 30)}
    found = []
    for dim in dims:
        ours, peers = built(our_spline, SPLINES, dim, width(dim))
        _, sampling = compare(ours, peers, dim, BATCH)
        found += versus_torch_and_jax(f"NSF autoregressive sample, D={dim}", sampling, bounds[dim])
    return found


def round_trip(ours: Model) -> list[Figure]:
    """Largest error of sampling and inverting again, after training."""
    flow, found = ours.module, []
    for dtype, must, name in ((torch.float, 5e-5, "float32"), (torch.double, 1e-12, "float64")):
        copied = copy.deepcopy(flow).to(dtype)
        with torch.no_grad():
            x = torch.randn(BATCH, flow.input_dim, dtype=dtype)
            y, _ = copied.transform.forward_and_ladj(x)
            error = (copied.transform.inverse_and_ladj(y)[0] - x).abs().max().item()
        found.append(Figure(f"round trip, D={flow.input_dim}, {name}", error, must))
    return found


def inverse_gradient(dim: int) -> list[Figure]:
    """Forward and backward through one solve, against the same through one pass."""
    layer = Autoregressive(Affine(), dim, hidden_dims=(width(dim), width(dim)))
    train = step(Model(lambda y: _log_prob(layer, y), lambda n: None, layer), data(dim))
    for _ in range(TRAINING_STEPS):
        train()
    x = torch.randn(BATCH, dim, requires_grad=True)

    def run(direction: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        z, ladj = direction(x)
        (z.square().sum() + ladj.sum()).backward()

    times = interleave(
        {
            "inverse": lambda: run(layer.forward_and_ladj),
            "pass": lambda: run(layer.inverse_and_ladj),
        }
    )
    name = f"gradient through the inverse, D={dim}, one forward + backward"
    return [ratio(name, times["inverse"], {"one pass": times["pass"]}, 4.0, 3.0)]


def _log_prob(layer: Autoregressive, y: Tensor) -> Tensor:
    x, ladj = layer.inverse_and_ladj(y)
    return ladj - x.square().sum(-1) / 2


def growth(small: int, large: int, hidden: int) -> list[Figure]:
    """Slope of the time of a density pass in the dimension, hidden sizes fixed."""
    calls = {}
    for dim in (small, large):
        flow, x = our_maf(dim, hidden), data(dim)
        calls[str(dim)] = lambda flow=flow, x=x: flow.log_prob(x)
    with torch.no_grad():
        times = interleave(calls)
    slope, by_median = (
        math.log(getattr(times[str(large)], which) / getattr(times[str(small)], which))
        / math.log(large / small)
        for which in ("shortest", "median")
    )
    name = f"slope of log_prob from D={small} to D={large}, hidden {hidden}"
    return [Figure(name, slope, 1.1, by_median=by_median)]


def memory(dims: list[int]) -> list[Figure]:
    """Parameters, optimizer state and the peak of what a training step allocates."""
    found = []
    for dim in dims:
        ours, peers = built(our_maf, MAFS, dim, width(dim))
        sizes = {
            name: peak_bytes(model, data(dim)) for name, model in {"ours": ours, **peers}.items()
        }
        own = sizes.pop("ours")
        if sizes:
            leanest = min(sizes.values())
            detail = ", ".join(
                f"{n} {s / 2**20:.3g} MiB" for n, s in {"ours": own, **sizes}.items()
            )
            name = f"peak memory of a training step, D={dim}, leanest torch peer"
            found.append(Figure(name, own / leanest, 1.0, 0.7, detail=detail))
    return found


def peak_bytes(model: Model, x: Tensor) -> int:
    """What torch's allocator has out at the peak of a training step, beyond the data."""
    from torch.profiler import ProfilerActivity, profile

    run = step(model, x)
    run()
    model.module.zero_grad(set_to_none=True)
    # Parameters and buffers, and the two moments of each parameter.
    kept = [*model.module.parameters()] * 3 + [*model.module.buffers()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    out = peak = 0
    for _, change in changes:
        out += change
        peak = max(peak, out)
    return peak + sum(t.numel() * t.element_size() for t in kept)


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
    section = "autoregressive"
    if options.smoke:
        figures = [*inverse_gradient(4), *growth(4, 8, 16), *round_trip(our_maf(4, 16))]
    elif find_spec("flowjax"):
        section = "autoregressive, JAX"
        figures = maf_against_jax([8, 64])
    else:
        figures = [*maf([8, 64, 256, 784]), *spline([8, 64])]
        figures += [*inverse_gradient(64), *growth(64, 512, 128), *memory([8, 64, 256])]
    command = "python -m benchmarks.autoregressive"
    if options.json:
        add_to(options.json, section, figures, command)
    text = f"{table(figures)}\n\n{conditions(command)}"
    print(text)
    return text


if __name__ == "__main__":
    main()
