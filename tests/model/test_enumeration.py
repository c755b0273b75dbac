"""Discrete latents are summed out exactly, in one run of the model for all particles."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_nf import fit_svi
from pyro_nf.model.joint import LogJoint

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


Y = t(-1.0, 0.5, 3.0, 2.5)
P, Q = t(0.3, 0.7), t(0.6, 0.4)


def at(m: Tensor, c: Tensor, plain: bool) -> Tensor:
    return m[c] if plain else Vindex(m)[..., c]


def means() -> Tensor:
    return pyro.sample("m", dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1))


def mixture(plain: bool) -> None:
    m = means()
    with pyro.plate("data", 4):
        c = pyro.sample("c", dist.Categorical(P))
        pyro.sample("y", dist.Normal(at(m, c, plain), 1.0), obs=Y)


def of_mixture(m: Tensor) -> Tensor:
    each = dist.Normal(m, 1.0).log_prob(Y.unsqueeze(-1)) + P.log()
    return each.logsumexp(-1).sum()


def outside(plain: bool) -> None:
    m = means()
    c = pyro.sample("c", dist.Categorical(P))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(at(m, c, plain), 1.0), obs=Y)


def of_outside(m: Tensor) -> Tensor:
    return (dist.Normal(m, 1.0).log_prob(Y.unsqueeze(-1)).sum(0) + P.log()).logsumexp(-1)


def both(plain: bool) -> None:
    m = means()
    a = pyro.sample("a", dist.Bernoulli(t(0.3)))
    with pyro.plate("data", 4):
        c = pyro.sample("c", dist.Categorical(P))
        pyro.sample("y", dist.Normal(at(m, c, plain) + a, 1.0), obs=Y)


def of_both(m: Tensor) -> Tensor:
    each = [of_mixture(m + a) + p.log() for a, p in ((0, t(0.7)), (1, t(0.3)))]
    return torch.stack(each).logsumexp(0)


TRANSITION = t(0.9, 0.1, 0.0, 1.0).reshape(2, 2)  # a step that is impossible


def chain(plain: bool) -> None:
    m = means()
    x: Tensor = torch.tensor(0)
    for i in pyro.markov(range(4)):
        x = pyro.sample(f"x{i}", dist.Categorical(TRANSITION[x]))
        pyro.sample(f"y{i}", dist.Normal(at(m, x, plain), 1.0), obs=Y[i])


def of_chain(m: Tensor) -> Tensor:
    state = t(1.0, 0.0)
    for y in Y:
        state = (state @ TRANSITION) * dist.Normal(m, 1.0).log_prob(y).exp()
    return state.sum().log()


def two(plain: bool) -> None:
    """Two discrete sites that meet in the data, with latents of their own in nested plates."""
    m = means()
    with pyro.plate("columns", 2, dim=-1):
        b = pyro.sample("b", dist.Categorical(Q))
        with pyro.plate("rows", 2, dim=-2):
            c = pyro.sample("c", dist.Categorical(P))
            loc = at(m, c, plain) + b
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y.reshape(2, 2))


def of_two(m: Tensor) -> Tensor:
    columns = []
    for y in Y.reshape(2, 2).T:
        each = []
        for b in range(2):
            rows = dist.Normal(m + b, 1.0).log_prob(y.unsqueeze(-1)) + P.log()
            each.append(rows.logsumexp(-1).sum() + Q[b].log())
        columns.append(torch.stack(each).logsumexp(0))
    return torch.stack(columns).sum()


MODELS: dict[str, tuple[Callable[[bool], None], Callable[[Tensor], Tensor]]] = {
    "mixture": (mixture, of_mixture),
    "outside": (outside, of_outside),
    "both": (both, of_both),
    "chain": (chain, of_chain),
    "two": (two, of_two),
}


@pytest.mark.parametrize("plain", [True, False], ids=["m[c]", "Vindex"])
@pytest.mark.parametrize("name", MODELS)
def test_7_one_run_for_all_particles(name: str, plain: bool) -> None:
    model, exact = MODELS[name]
    runs = 0

    def counted() -> None:
        nonlocal runs
        runs += 1
        model(plain)

    joint = LogJoint(counted)  # without a warning
    assert joint.kind == ("vmap" if plain else "batched")
    z = torch.randn(9, 2, dtype=F64).requires_grad_()
    runs = 0
    log_prob = joint.log_prob(z)
    assert runs == 1
    prior = dist.Normal(t(0.0), 2.0).log_prob(z).sum(-1)
    wanted = prior + torch.stack([exact(m) for m in z])
    torch.testing.assert_close(log_prob, wanted)
    (got_grad,) = torch.autograd.grad(log_prob.sum(), z)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), z)
    torch.testing.assert_close(got_grad, wanted_grad)
    joint.trace(9, max_seconds=600.0)
    value, grad = joint.value_and_grad(z)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad, wanted_grad)


def test_7_what_is_impossible_is_no_nan() -> None:
    def model() -> None:
        m = means()
        c = pyro.sample("c", dist.Categorical(t(1.0, 0.0)))
        d = pyro.sample("d", dist.Categorical(torch.eye(2, dtype=F64)[c]))
        pyro.sample("y", dist.Normal(Vindex(m)[..., d], 1.0), obs=t(1.0))

    joint = LogJoint(model)
    z = torch.randn(5, 2, dtype=F64)
    value, grad = joint.value_and_grad(z)
    wanted = dist.Normal(t(0.0), 2.0).log_prob(z).sum(-1) + dist.Normal(z[:, 0], 1.0).log_prob(
        t(1.0)
    )
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad[:, 1], -z[:, 1] / 4)


def test_7_a_fit_finds_the_evidence() -> None:
    posterior = fit_svi(outside, args=(True,), max_steps=150, progress=False).posterior(2000)
    grid = torch.linspace(-12, 12, 4001, dtype=F64)
    lik = dist.Normal(grid.unsqueeze(-1), 1.0).log_prob(Y).sum(-1)
    wanted = (lik + dist.Normal(t(0.0), 2.0).log_prob(grid)).logsumexp(0) + (
        grid[1] - grid[0]
    ).log()
    assert abs(posterior.log_evidence - float(wanted)) < 0.05
