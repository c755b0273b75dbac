"""The laws of flows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import cast

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pyro_nf._checks import check_kind
from pyro_nf.flows.flow import Flow
from pyro_nf.testing.cases import EXACT, close, context_of, points, randomize, seeded
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.stochastic import StochasticTransform


def _condition(flow: Flow, *batch: int) -> tuple[Tensor, ...]:
    context = context_of(flow, *batch)
    return () if context is None else (context,)


def density_of_draws(flow: Flow) -> None:
    """Draws come with their log density, the same that ``log_prob`` computes afresh.

    Where it is another number at each call, a bound of the last draws is that of their own paths.
    """
    d = flow(*_condition(flow))
    with seeded(0):
        y, log_prob = d.rsample_and_log_prob((20,))
    assert y.shape == (20, *flow.event_shape), f"draws have shape {tuple(y.shape)}"
    with seeded(0):
        again = d.rsample((20,))
    if flow.log_prob_kind == "exact":
        close("log_prob of draws", flow(*_condition(flow)).log_prob(y.clone()), log_prob, 1e-7)
        close("log_prob of the last draws", d.log_prob(again), d.log_prob(again.clone()), 1e-7)
    elif flow.log_prob_kind == "bound":
        close("log_prob of the last draws", d.log_prob(again), log_prob, EXACT)
    assert y.dtype == log_prob.dtype == torch.float64


def batches_of_contexts(flow: Flow) -> None:
    """A batch of contexts makes a batch of distributions with noise of their own."""
    batch = (4,) if flow.context_dim else ()
    d = flow(*_condition(flow, *batch)).expand((4,))
    y = d.sample((6,))
    assert y.shape == (6, 4, *flow.event_shape), f"draws have shape {tuple(y.shape)}"
    assert d.batch_shape == (4,)
    assert d.event_shape == flow.event_shape
    x, _ = d.transform.inverse_and_ladj(y)
    spread = x.std(1, correction=0).min().item()
    assert spread > 0, "the noise is shared between contexts"
    if flow.log_prob_kind == "exact":
        close("log_prob", d.log_prob(y)[2], d.log_prob(y[2]), EXACT)
    wide = d.expand((3, 4))
    assert wide.sample().shape == (3, 4, *flow.event_shape)
    assert wide.to_event(1).log_prob(wide.sample()).shape == (3,)
    assert wide.mask(False).log_prob(wide.sample()).abs().sum().item() == 0


def gradient_of_a_draw(flow: Flow) -> None:
    """The gradient of a loss of a draw and its log density is finite for every parameter."""
    d = flow(*_condition(flow))
    if not d.has_rsample:
        return
    y = d.rsample((8,))
    (d.log_prob(y).sum() + y.square().sum()).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, f"{name} gets no gradient"
        assert bool(p.grad.isfinite().all()), f"{name} gets a gradient that is not finite"
    flow.zero_grad()


class _LogProb(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, y: Tensor, *args: Tensor) -> Tensor:
        log_prob: Tensor = self.flow(*args).log_prob(y)
        return log_prob


def flow_copies_agree(flow: Flow) -> None:
    """deepcopy, pickle and functional_call give the same density."""
    args = _condition(flow)
    with seeded(0):
        y = flow(*args).sample((4,))
    wanted = _log_prob(flow, y, *args)
    copied = (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)))
    for other in copied:
        close("copy", _log_prob(other, y, *args), wanted, 0.0)
    density = _LogProb(flow)
    state = {k: v + 0.05 for k, v in density.named_parameters()}
    with seeded(0):
        moved = functional_call(density, state, (y, *args))
    assert not torch.equal(moved, wanted), "the parameters make no difference"
    close("after functional_call", _log_prob(flow, y, *args), wanted, 0.0)


def _log_prob(flow: Flow, y: Tensor, *args: Tensor) -> Tensor:
    """The log density with one seed, if it is another number at each call."""
    with seeded(0):
        return cast(Tensor, flow(*args).log_prob(y))


def scores_agree(flow: Flow) -> None:
    """vmap and jacrev of the log density give the gradient that autograd gives."""
    transform = flow.transform
    if isinstance(transform, StochasticTransform) or flow.log_prob_kind != "exact":
        return
    if "inverse" not in _ways(transform) or transform.inverse_kind != "exact":
        return
    args = _condition(flow)
    y = points(constraints.real, (4, *flow.event_shape)).requires_grad_()
    (wanted,) = torch.autograd.grad(flow(*args).log_prob(y).sum(), y)
    got = vmap(jacrev(lambda v: flow(*args).log_prob(v)))(y)
    close("score by vmap(jacrev)", got, wanted, 1e-7)


def _ways(transform: FlowTransform) -> tuple[str, ...]:
    fast = transform.fast
    return ("forward", "inverse") if fast == "both" else (fast,)


FLOW_LAWS: tuple[Callable[[Flow], None], ...] = (
    density_of_draws,
    batches_of_contexts,
    gradient_of_a_draw,
    flow_copies_agree,
    scores_agree,
)


def check_flow(flow: Flow) -> None:
    """Runs every law of a flow over the whole real space, with random weights, in float64.

    Args:
        flow: The flow; it is copied first.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> from pyro_nf.flows.recipes import realnvp
        >>> check_flow(realnvp(2))
    """
    check_kind("check_flow", "flow", flow, Flow)
    flow = randomize(copy.deepcopy(flow)).double()
    for law in FLOW_LAWS:
        law(flow)
