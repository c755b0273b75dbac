"""Fits that two processes do together; `test_world.py` runs them under torchrun.

Each case returns what is compared: with the other process, and with one process alone.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.recipes import nsf
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.train.batches import Minibatches
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.start import AsGiven, Whitened
from pyro_nf.train.loop import train
from pyro_nf.train.stages import History, Stage, adam
from pyro_nf.train.world import World
from pyro_nf.transforms.affine import LowerAffine
from pyro_nf.vi.fit import fit_svi

Result = dict[str, Any]


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def rows(count: int = 130) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return 5 + x @ torch.tensor([[2.0, 1.5], [0.0, 0.5]], dtype=torch.float64)


def flow(context_dim: int = 0) -> Flow:
    torch.manual_seed(rank())  # processes begin at different weights
    return nsf(2, context_dim, count_layers=2, hidden_dims=(8,), count_bins=4).double()


class Line(nn.Module):
    """A line through the rows of a batch, with noise and a layer that counts for itself."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(rank())
        self.layer, self.norm = nn.Linear(2, 1), nn.BatchNorm1d(2)
        self.double()
        self.noise, self.calls = noise, 0
        self.drawn: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        (y,) = batch
        drawn = torch.randn(len(y), 1, dtype=y.dtype)
        self.drawn.append(float(drawn[0]))
        self.norm(y)  # its running means differ between the processes
        return (self.layer(y) - 3 + self.noise * drawn).square().mean()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def told(history: History) -> Result:
    names = ("losses", "learning_rates", "checked_values", "skipped", "best_step", "stopped")
    return {name: getattr(history, name) for name in names}


def fit_line(module: Line, loss: Callable[[Any], Tensor] | None = None, **options: Any) -> Result:
    if loss is None:
        loss = module.loss
    usual: dict[str, Any] = {"max_steps": 40, "check_every": 10, "progress": False}
    usual["batches"] = Minibatches((rows(),), 25)
    history = train(module, Stage(loss, adam(module.parameters(), 0.05)), **usual | options)
    return told(history) | {"state": state(module)}


def fit_rows(x: Any, context_dim: int = 0, **options: Any) -> Result:
    usual: dict[str, Any] = {"max_steps": 40, "check_every": 10, "progress": False}
    fit = fit_density(flow(context_dim), x, **usual | options)
    return told(fit.history) | {
        "state": state(fit.flow),
        "validation": fit.validation,
        "starts": fit.starts,
        "baselines": fit.baselines,
    }


# ---- what one process does alone as well, on the same batches


def table(folder: Path) -> Result:
    x = rows()
    x[::2] += 20  # clusters, so that the flow gets another base
    return fit_rows(x, batch_size=25)


def tensors_with_contexts(folder: Path) -> Result:
    x = rows()
    return fit_rows(x[:, :2], 2, context=x.flip(1) ** 2, batch_size=25, starts=(AsGiven(),))


def shuffled_loader(folder: Path) -> Result:
    x = (rows() / 3).exp()  # far from a Gaussian, so that there is something to learn
    return fit_rows(DataLoader(TensorDataset(x), batch_size=41, shuffle=True), baselines=False)


def line(folder: Path) -> Result:
    module = Line()
    module.norm = nn.BatchNorm1d(2, track_running_stats=False).double()
    return fit_line(module)


def fewer_rows_than_processes(folder: Path) -> Result:
    module = Line()
    module.norm = nn.Identity()
    return fit_line(module, batches=[(rows()[:1],), (rows()[1:4],)])


ALSO_ALONE = (table, tensors_with_contexts, shuffled_loader, line, fewer_rows_than_processes)


# ---- what only several processes do


def noise_and_buffers(folder: Path) -> Result:
    module = Line(noise=0.1)
    result = fit_line(module, average=0.9)
    return result | {"own": {"drawn": module.drawn}}


def resumed(folder: Path) -> Result:
    options: Result = {"checkpoint_every": 10, "average": 0.9}
    whole = fit_line(Line(noise=0.1), **options)
    broken = Line(noise=0.1)

    def loss(batch: Any) -> Tensor:
        if broken.calls == 27 and rank() == 1:
            raise KeyboardInterrupt
        return broken.loss(batch)

    options["checkpoint"] = folder / "line"
    first = fit_line(broken, loss, **options)
    again = fit_line(Line(noise=0.1), **options)
    same = all(torch.equal(whole["state"][name], t) for name, t in again["state"].items())
    return {"first": first, "same": same, "whole": whole["losses"], "again": again["losses"]}


def own_rows(folder: Path) -> Result:
    """Each process is given other rows, which it takes whole."""
    sampled: list[Tensor] = []
    module = Line()
    data = TensorDataset(rows(24))
    sampler = DistributedSampler(data, shuffle=True, seed=3)
    batches = DataLoader(data, batch_size=4, sampler=sampler)

    def loss(batch: Any) -> Tensor:
        sampled.append(batch[0])
        return module.loss(batch)

    result = fit_line(module, loss, batches=batches, max_steps=6)
    return result | {"own": {"sampled": torch.cat(sampled)}}


def not_finite_in_one(folder: Path) -> Result:
    module = Line()

    def loss(batch: Any) -> Tensor:
        value = module.loss(batch)
        return value * math.nan if module.calls in (13, 14) and rank() == 1 else value

    return fit_line(module, loss)


def gradient_not_finite_in_one(folder: Path) -> Result:
    module = Line()

    def loss(batch: Any) -> Tensor:
        value = module.loss(batch)
        if module.calls == 13 and rank() == 1:
            value = value + (0 * module.layer.weight.sum()).sqrt()  # 0 with gradient nan
        return value

    return fit_line(module, loss)


def never_finite_in_one(folder: Path) -> Result:
    module = Line()

    def loss(batch: Any) -> Tensor:
        value = module.loss(batch)
        return value * math.nan if module.calls > 13 and rank() == 1 else value

    failed = message(lambda: fit_line(module, loss))
    return {"own": failed, "state": state(module)}


def error_in_one(folder: Path) -> Result:
    module = Line()

    def loss(batch: Any) -> Tensor:
        if module.calls == 13 and rank() == 1:
            raise KeyError("no such column")
        return module.loss(batch)

    failed = message(lambda: fit_line(module, loss))
    return {"own": failed, "state": state(module)}


def error_in_the_search(folder: Path) -> Result:
    class Failing(Whitened):
        def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
            raise LookupError("no start")

    return message(lambda: fit_rows(rows(), starts=(Failing(),)))


def bad_row_in_one(folder: Path) -> Result:
    x = rows()
    if rank() == 1:
        x[7, 1] = math.nan
    return {"own": message(lambda: fit_rows(x))}


def message(work: Callable[[], object]) -> Result:
    try:
        work()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


def ctrl_c_in_one(folder: Path) -> Result:
    """A signal, twice, as a launcher hands on the one that the terminal sent."""
    module, before = Line(), signal.getsignal(signal.SIGINT)

    def loss(batch: Any) -> Tensor:
        if module.calls == 13 and rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return module.loss(batch)

    result = fit_line(module, loss)
    return result | {"is_put_back": signal.getsignal(signal.SIGINT) is before}


def ctrl_c_while_another_searches(folder: Path) -> Result:
    class Slow(Whitened):
        def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
            assert rank() == 0
            while not (folder / "interrupted").exists():
                time.sleep(0.01)
            super().__call__(flow, y, context)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        (folder / "interrupted").touch()

    if rank() == 1:
        threading.Timer(0.1, interrupt).start()
    return fit_rows(rows(), starts=(Slow(),), max_steps=10**6)


def ctrl_c_in_the_first(folder: Path) -> Result:
    class Interrupted(Whitened):
        name = "interrupted"

        def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
            raise KeyboardInterrupt

    return fit_rows(rows(), starts=(Whitened(), Interrupted()), max_steps=100)


def seconds(folder: Path) -> Result:
    """The clocks disagree, and one process is slow."""
    module = Line()
    began = time.monotonic()

    def loss(batch: Any) -> Tensor:
        time.sleep(0.02 * rank())
        return module.loss(batch)

    def clock() -> float:
        return time.monotonic() + 1000 * rank()

    result = fit_line(module, loss, max_steps=None, max_seconds=0.5, clock=clock)
    return result | {"own": {"seconds": time.monotonic() - began, "steps": module.calls}}


def patience(folder: Path) -> Result:
    values = iter([1.0, 0.5, 0.4, *[0.6 + rank()] * 10])
    return fit_line(Line(), validate=lambda: next(values), patience=20, max_steps=100)


def no_answer(folder: Path) -> Result:
    def vote() -> None:
        with World.joined(seconds=0.5) as world:
            time.sleep(1.5 * rank())
            world.mean(1.0)

    return {"own": message(vote)}


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)


def posterior(folder: Path) -> Result:
    y = rows(20)
    fit = fit_svi(model, args=(y,), max_steps=150, num_particles=8, progress=False)
    draws = fit.posterior(2000).samples["loc"]
    return told(fit.history) | {
        "state": state(fit.guide),
        "mean": draws.mean(0),
        "sd": draws.std(0),
    }


def posterior_in_seconds(folder: Path) -> Result:
    y = rows(20)
    fit = fit_svi(model, args=(y,), max_seconds=1.5, progress=False)
    return {"state": state(fit.guide), "stopped": fit.history.stopped}


def posterior_interrupted(folder: Path) -> Result:
    y = rows(20)
    calls = 0

    def layers(dim: int) -> LowerAffine:
        nonlocal calls
        calls += 1
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return LowerAffine(dim)

    guide = AutoFlow(model, layers)
    fit = fit_svi(model, guide, args=(y,), max_steps=10**6, num_particles=8, progress=False)
    return {"stopped": fit.history.stopped, "state": state(guide), "calls": calls}


TOGETHER = (
    *ALSO_ALONE,
    noise_and_buffers,
    resumed,
    own_rows,
    not_finite_in_one,
    gradient_not_finite_in_one,
    never_finite_in_one,
    error_in_one,
    error_in_the_search,
    bad_row_in_one,
    ctrl_c_in_one,
    ctrl_c_while_another_searches,
    ctrl_c_in_the_first,
    seconds,
    patience,
    no_answer,
    posterior,
    posterior_in_seconds,
    posterior_interrupted,
)


# ---- a process is lost, after which there are no two any more


def killed(folder: Path) -> Result:
    module = Line()
    module.norm = nn.Identity()

    def loss(batch: Any) -> Tensor:
        if module.calls == 27 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return module.loss(batch)

    return fit_line(module, loss, checkpoint=folder / "line")


def main(names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases = {case.__name__: case for case in (*TOGETHER, killed)}
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        torch.distributed.barrier()
        pyro.clear_param_store()
        began = time.monotonic()
        result = cases[name](folder / name)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        torch.save(result, folder / f"{name}.{rank()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2:], Path(sys.argv[1]))
