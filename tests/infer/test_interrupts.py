"""A fit keeps within its seconds, and what is there when it is interrupted is kept."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nf import AutoFlow, fit_svi, flows
from pyro_nf.infer.fit import SVIFit
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.metered import Metered, Rows
from pyro_nf.infer.recipe import choose_particles
from pyro_nf.infer.start import Start, laplace_start
from pyro_nf.infer.tempering import separated_mixture, tempered_cloud
from pyro_nf.train.budget import Budget, OutOfTime

pytestmark = pytest.mark.filterwarnings("ignore:the model does not run on a batch")


class SlowModel:
    """A model each of whose runs takes so many seconds of its own clock, or raises at one run."""

    def __init__(self, kind: str, cost: float = 1.0, raise_at: float = math.inf) -> None:
        self.kind, self.cost, self.raise_at = kind, cost, raise_at
        self.runs, self.now = 0, 0.0

    def clock(self) -> float:
        return self.now

    def __call__(self) -> None:
        self.runs += 1
        self.now += self.cost
        if self.runs == self.raise_at:
            raise KeyboardInterrupt
        getattr(self, self.kind)()

    def batched(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([1.0, -1.0]))

    def vmap(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(x[0] + x[1], 1.0), obs=torch.tensor(1.0))

    def loop(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 2.0))
        sign = 1.0 if x.item() > 0 else -1.0
        pyro.sample("y", dist.Normal(x + 0.0 * sign, 1.0), obs=torch.tensor(1.0))

    def hierarchical(self) -> None:
        log_tau = pyro.sample("log_tau", dist.Normal(torch.tensor(0.0), 1.0))
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), log_tau.exp()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.0))

    def pieces(self) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 4.0).to_event(1))
        far = torch.tensor([3.0, 3.0])
        modes = [-0.5 * ((x - m) / 0.3).square().sum(-1) for m in (far, -far)]
        pyro.factor("modes", torch.logaddexp(*modes))


KINDS = ("batched", "vmap", "loop", "hierarchical", "pieces")


def small(dim: int) -> flows.Flow:
    return flows.iaf(dim, count_layers=1, hidden_dims=(4,))


def check_usable(fit: SVIFit) -> None:
    """Its guide draws finite latents, and weighs them."""
    posterior = fit.posterior(20)
    assert posterior.z.isfinite().all()
    assert posterior.log_weights.isfinite().any()


# ---- seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cost", "max_seconds"), [(0.002, 1.0), (0.05, 8.0), (0.2, 8.0), (1, 12)])
@pytest.mark.parametrize("own_guide", [False, True])
def test_8_a_fit_keeps_within_its_seconds(kind, cost, max_seconds, own_guide) -> None:
    model = SlowModel(kind, cost)
    fit = fit_svi(
        model,
        AutoFlow(model, small) if own_guide else None,
        max_seconds=max_seconds,
        max_steps=40,
        progress=False,
        clock=model.clock,
    )
    assert model.now <= 1.1 * max_seconds + 0.5 + cost
    assert fit.history.stopped in ("max_seconds", "max_steps")
    check_usable(fit)
