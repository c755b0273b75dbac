"""A step on models with discrete sites: the log joint and its gradient over Pyro's TraceEnum_ELBO.

    python -m benchmarks.enumeration

Process CPU time, 64 particles, both interleaved, the median of the pairs' ratios. A step of Pyro's
is one of `SVI` with `TraceEnum_ELBO(vectorize_particles=True)` and AutoNormal; where its vectorised
particles cannot index (`m[c]`), the model for it is written with `Vindex`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_nf.model.joint import LogJoint

_PARTICLES, _PAIRS = 64, 15


def _at(means: Tensor, c: Tensor, is_plain: bool) -> Tensor:
    return means[c] if is_plain else Vindex(means)[..., c]


def mixture(y: Tensor, is_plain: bool) -> None:
    """Two components, rows in a plate."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(_at(means, c, is_plain), 1.0), obs=y)


def hidden_markov(y: Tensor, is_plain: bool) -> None:
    """Two states over twenty steps."""
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 3.0).to_event(1))
    x: int | Tensor = 0
    for t in pyro.markov(range(20)):
        p = rows[x] if is_plain else Vindex(rows)[..., torch.as_tensor(x), :]
        x = pyro.sample(f"x_{t}", dist.Categorical(p))
        pyro.sample(f"y_{t}", dist.Normal(_at(means, x, is_plain), 1.0), obs=y[t])


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(model: Callable[[Tensor, bool], None], is_plain: bool, recorded: bool) -> float:
    """Our step over Pyro's."""
    torch.manual_seed(0)
    y = torch.cat([torch.randn(30) - 2, torch.randn(30) + 2])
    names = ["c"] + [f"x_{t}" for t in range(20)]
    joint = LogJoint(model, (y, is_plain))
    if recorded:
        joint.record(_PARTICLES, max_seconds=60.0)
    z = joint.init_loc + 0.1 * torch.randn(_PARTICLES, joint.latent_dim)

    def discrete(site: dict[str, object]) -> dict[str, object]:
        return {"enumerate": "parallel"} if site["name"] in names else {}

    theirs = poutine.infer_config(model, discrete)
    nesting = 1 if model is mixture else 0
    elbo = TraceEnum_ELBO(_PARTICLES, vectorize_particles=True, max_plate_nesting=nesting)
    guide = AutoNormal(poutine.block(model, hide=names))
    svi = SVI(theirs, guide, pyro.optim.Adam({"lr": 0.01}), elbo)

    def ours() -> object:
        return joint.value_and_grad(z)

    def pyros() -> object:
        return svi.step(y, False)

    for run in (ours, pyros):
        run()
    return statistics.median(_seconds(ours) / _seconds(pyros) for _ in range(_PAIRS))


def main() -> None:
    """Prints the ratios."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for model in (mixture, hidden_markov):
        for is_plain in (True, False):
            for recorded in (False, True):
                index = "m[c]" if is_plain else "Vindex(m)[..., c]"
                way = "recorded" if recorded else "as it is"
                pyro.clear_param_store()
                value = ratio(model, is_plain, recorded)
                print(f"{model.__name__:<14} {index:<18} {way:<9} {value:.2f}")


if __name__ == "__main__":
    main()
