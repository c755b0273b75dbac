"""Density estimation in equal CPU seconds: ours, zuko, nflows and scikit-learn on five tables.

    python benchmarks/density.py [--smoke] [--seconds 20] [--seeds 3] [--json FILE]
        [--markdown docs/benchmarks_density.md]

Every method gets the same rows, the same share held out for validation and the same process CPU
seconds on one thread; the figure is the mean negative log density of the test rows, in nats. The
gradient methods keep the parameters that were best on validation, at two learning rates of which
the better counts; scikit-learn's sizes are chosen on validation. A method whose package is missing
is left out, and so is a table whose file is missing (``PYRO_NF_DATA`` names the folder). With
``--json`` figures are added to what the file holds, so that methods can run in different venvs;
``--seeds 0`` runs nothing and only writes the page.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(os.environ.get("PYRO_NF_DATA", Path(__file__).parents[2] / "shared" / "data"))
PACKAGES = ("pyro-nf", "torch", "zuko", "nflows", "scikit-learn")
TABLES = ("moons", "protein", "elevators", "concrete", "digits")
LEARNING_RATES = (1e-3, 3e-3)
BATCH = 256
FEWEST_VALUES = 20  # a column with fewer distinct values is no continuous column

LEAST_GAP = 1e-6  # smaller ones, in ranges of a column, are errors of arithmetic

Split = tuple[Tensor, Tensor, Tensor]


def dequantised(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Uniform noise of the size of the rounding of each column: its smallest gap between values."""
    noisy = x.copy()
    for column in noisy.T:
        gaps = np.diff(np.unique(column))
        gaps = gaps[gaps > LEAST_GAP * np.ptp(column)]
        column += gaps.min() * (random.random(len(column)) - 0.5)
    return noisy


def load(name: str, seed: int) -> Split | None:
    """Training, validation and test rows: 80/10/10, standardised with the training rows.

    Of the two moons 10,000 points are for training and validation, and 10,000 fresh ones for the
    test; they are not standardised, so that the true density's figure, 0.290, is theirs.
    """
    random = np.random.default_rng(seed)
    if name == "moons":
        from sklearn.datasets import make_moons

        x, test = (
            torch.tensor(make_moons(10_000, noise=0.05, random_state=i)[0], dtype=torch.float32)
            for i in (seed, seed + 1)
        )
        return x[:9_000], x[9_000:], test
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels = load_digits().data
        x = (pixels + random.random(pixels.shape)) / 17
    else:
        file = DATA / "tables" / f"{name}.npz"
        if not file.exists():
            return None
        x = np.load(file)["x"].astype(np.float64)
        if name == "protein":  # its count column is not continuous
            x = np.delete(x, 7, 1)
        x = x[:, [len(np.unique(column)) >= FEWEST_VALUES for column in x.T]]
        x = dequantised(x, random)
    x = x[random.permutation(len(x))]
    train, validation, test = np.split(x, [int(0.8 * len(x)), int(0.9 * len(x))])
    mean, sd = train.mean(0), train.std(0)
    train, validation, test = (
        torch.tensor((part - mean) / sd, dtype=torch.float32) for part in (train, validation, test)
    )
    return train, validation, test


def ours(split: Split, seconds: float, seed: int) -> tuple[float, str]:
    """The figure, and the start from which the flow was trained."""
    from pyro_nf.flows.recipes import nsf
    from pyro_nf.train.density import fit_density

    train, validation, test = split
    torch.manual_seed(seed)
    fit = fit_density(
        nsf(train.shape[1]),
        train,
        validation=validation,
        max_seconds=seconds,
        seed=seed,
        progress=False,
        clock=time.process_time,
    )
    print(f"    {fit.start} of {fit.starts}; {fit.history.steps} steps; {fit.history.stopped}")
    print("    " + str(fit).replace("\n", "\n    "))
    with torch.no_grad():
        return -fit.flow().log_prob(test).mean().item(), fit.start


def gradient_method(
    make: Callable[[int], tuple[nn.Module, Callable[[Tensor], Tensor]]],
) -> Callable[[Split, float, int], float]:
    """A peer's flow, trained in the plain way at two learning rates; the better counts."""

    def run(split: Split, seconds: float, seed: int) -> float:
        return min(_train_peer(make, split, seconds, seed, rate) for rate in LEARNING_RATES)

    return run


def _train_peer(
    make: Callable[[int], tuple[nn.Module, Callable[[Tensor], Tensor]]],
    split: Split,
    seconds: float,
    seed: int,
    rate: float,
) -> float:
    train, validation, test = split
    torch.manual_seed(seed)
    module, log_prob = make(train.shape[1])
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    best, state = math.inf, copy.deepcopy(module.state_dict())
    start, next_check = time.process_time(), 0.0
    order = iter(())
    while (spent := time.process_time() - start) < seconds:
        if spent >= next_check:
            with torch.no_grad():
                value = -log_prob(validation[:2000]).mean().item()
            if value < best:
                best, state = value, copy.deepcopy(module.state_dict())
            next_check = spent + seconds / 40
        rows = next(order, None)
        if rows is None:
            order = iter(torch.randperm(len(train)).split(BATCH))
            rows = next(order)
        loss = -log_prob(train[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()
    module.load_state_dict(state)
    with torch.no_grad():
        return -torch.cat([log_prob(part) for part in test.split(1000)]).mean().item()


def zuko_nsf(dim: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import zuko

    flow = zuko.flows.NSF(dim, transforms=5, hidden_features=(128, 128))
    return flow, lambda x: flow().log_prob(x)


def zuko_maf(dim: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import zuko

    flow = zuko.flows.MAF(dim, transforms=5, hidden_features=(128, 128))
    return flow, lambda x: flow().log_prob(x)


def nflows_nsf(dim: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import (
        CompositeTransform,
        LULinear,
        PiecewiseRationalQuadraticCouplingTransform,
    )

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=128, num_blocks=2)

    layers = []
    for i in range(5):
        mask = torch.arange(dim) % 2 == i % 2
        layers += [
            PiecewiseRationalQuadraticCouplingTransform(
                mask, net, num_bins=8, tails="linear", tail_bound=5.0
            ),
            LULinear(dim, identity_init=True),
        ]
    flow = Flow(CompositeTransform(layers), StandardNormal((dim,)))
    return flow, flow.log_prob


def gaussian_mixture(split: Split, seconds: float, seed: int) -> float:
    from sklearn.mixture import GaussianMixture

    train, validation, test = (part.double().numpy() for part in split)
    start, best, figure = time.process_time(), math.inf, math.nan
    for size in (1, 2, 5, 10, 20, 50, 100, 200):
        if size > len(train) // 2 or time.process_time() - start > seconds:
            break
        try:
            mixture = GaussianMixture(size, random_state=seed).fit(train)
        except ValueError:  # a component collapsed
            continue
        value = -mixture.score(validation)
        if value < best:
            best, figure = value, -mixture.score(test)
    return figure


def kernel_density(split: Split, seconds: float, seed: int) -> float:
    from sklearn.neighbors import KernelDensity

    train, validation, test = (part.double().numpy() for part in split)
    start, best, chosen = time.process_time(), math.inf, None
    for width in (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0):
        if time.process_time() - start > seconds:
            break
        density = KernelDensity(bandwidth=width).fit(train)
        value = -density.score(validation[:500]) / len(validation[:500])
        if value < best:
            best, chosen = value, density
    return math.nan if chosen is None else -chosen.score(test[:2000]) / len(test[:2000])


METHODS: dict[str, tuple[str, Callable[[Split, float, int], float | tuple[float, str]]]] = {
    "pyro_nf": ("pyro", ours),
    "zuko NSF": ("zuko", gradient_method(zuko_nsf)),
    "zuko MAF": ("zuko", gradient_method(zuko_maf)),
    "nflows NSF": ("nflows", gradient_method(nflows_nsf)),
    "sklearn mixture": ("sklearn", gaussian_mixture),
    "sklearn kernel density": ("sklearn", kernel_density),
}


HEAD = """# Density in equal seconds

What `fit_density` finds with every default, beside other libraries' flows and plain densities: the
mean negative log density of the test rows in nats, so lower is better. Each method had {seconds:g}
process CPU seconds on one thread, on the same rows. The peers' flows were trained at two learning
rates, of which the one that is better on the test rows counts; the sizes of the mixture and of the
kernels were chosen on validation. A figure is of one seed, or the mean over the seeds that stand
beside it with their range.

"""

TAIL = """
- **moons**: scikit-learn's two moons with noise 0.05, 10,000 points and 10,000 fresh ones for the
  test; the true density has 0.290.
- **protein**, **elevators**, **concrete**: the columns with at least {fewest} distinct values of
  these UCI tables, with uniform noise of the size of the rounding of each column (its smallest gap
  between two values), then standardised; 80 % for training, 10 % for validation, 10 % for the test.
- **digits**: scikit-learn's 8 x 8 digits with uniform noise of the size of a grey level.

Columns that are rounded have no density: the likelihood would grow without bound as narrower
peaks are put on their values. The noise bounds it. What is left of repeated values is wide: three
columns of concrete are zero in 37 to 55 % of the rows, which is a peak as wide as the rounding.

{date}, `{command}`; Python {python}, {versions}; {system}.
"""


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Mean, range and number of the test figures as markdown; lower is better."""
    names = [name for name in TABLES if name in figures]
    methods = [method for method in METHODS if any(method in figures[name] for name in names)]
    lines = ["| test NLL, nats | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in methods:
        cells = [_cell(figures[name].get(method, [])) for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "not run"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"


def page(content: dict[str, Any]) -> str:
    """The page of the docs."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    tail = TAIL.format(
        fewest=FEWEST_VALUES,
        date=time.strftime("%Y-%m-%d"),
        command="python benchmarks/density.py",
        python=platform.python_version(),
        versions=versions,
        system=f"{platform.system()} {platform.machine()}",
    )
    starts = "".join(
        f"- {name}: {', '.join(names)}\n" for name, names in content.get("start", {}).items()
    )
    text = HEAD.format(seconds=content["seconds"]) + table(content["figures"]) + "\n"
    return text + STARTS + starts + tail


STARTS = """
The start from which the flow of `fit_density` was trained, as validation chose it, seed by seed:

"""


def installed() -> dict[str, str]:
    """The versions of what is compared, as far as this venv has it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a fraction of a second each")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path, help="figures are added to this file")
    parser.add_argument("--markdown", type=Path, help="the page of the docs to write")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seconds, options.seeds, options.tables = 0.5, 1, "moons"
    torch.set_num_threads(1)

    content: dict[str, Any] = {"figures": {}, "versions": {}}
    if options.json and options.json.exists():
        content = json.loads(options.json.read_text())
    content["seconds"] = options.seconds
    content["versions"] |= installed()
    figures = content["figures"]
    for name in options.tables.split(","):
        for seed in range(options.seeds):
            split = load(name, seed=0)
            if split is None:
                print(f"{name}: no file in {DATA / 'tables'}; set PYRO_NF_DATA. Left out.")
                break
            for method in options.methods.split(","):
                package, run = METHODS[method]
                if find_spec(package) is None:
                    print(f"{method}: {package} is not installed. Left out.")
                    continue
                got = run(split, options.seconds, seed)
                value, start = got if isinstance(got, tuple) else (got, "")
                if start:
                    started = content.setdefault("start", {}).setdefault(name, [])
                    if len(started) >= options.seeds:
                        started.clear()
                    started.append(start)
                values = figures.setdefault(name, {}).setdefault(method, [])
                if len(values) >= options.seeds:
                    values.clear()
                values.append(value)
                print(f"{name}, {method}, seed {seed}: {value:.3f}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(content, indent=1))
    if options.json:
        options.json.write_text(json.dumps(content, indent=1))
    markdown = table(figures)
    print(markdown)
    if options.markdown:
        options.markdown.write_text(page(content))
    return markdown


if __name__ == "__main__":
    sys.exit(main() is None)
