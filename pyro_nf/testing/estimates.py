"""The laws of log-determinants and log densities that are estimates or bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nf._checks import check_callable, check_context, check_count, check_event_rows, check_kind
from pyro_nf.flows.flow import Flow
from pyro_nf.testing.cases import EXACT, LADJ, SINGLE, close, context_of, points, points_of, seeded
from pyro_nf.transforms.base import FlowTransform

# Draws behind the mean of an estimate: so many groups of so many.
COUNT_GROUPS, COUNT_DRAWS = 20, 100


def _slogdet(transform: FlowTransform, x: Tensor, context: Tensor | None) -> Tensor:
    """log|det J| at one point, with a graph."""
    jacobian = torch.autograd.functional.jacobian(
        lambda v: transform.forward_and_ladj(v, context)[0], x, create_graph=True
    )
    return cast(Tensor, jacobian.slogdet().logabsdet)


def ladj_is_unbiased(transform: FlowTransform) -> None:
    """Means of the estimated ladj, and of its gradients, are those of autograd's slogdet."""
    point, context = points_of(transform), context_of(transform)
    x = point.clone().requires_grad_()
    y = transform.forward_and_ladj(point, context)[0].detach()
    true, leaves = _slogdet(transform, x, context), [x, *transform.parameters()]
    slopes = torch.autograd.grad(true, leaves, allow_unused=True, materialize_grads=True)
    directions = [points(constraints.real, tuple(leaf.shape), seed=5) for leaf in leaves]
    wanted = sum((s * r).sum() for s, r in zip(slopes, directions, strict=True))
    with seeded(0):
        values, gradients = [], []
        for _ in range(COUNT_GROUPS):
            many = x.expand(COUNT_DRAWS, -1)
            ladj = transform.forward_and_ladj(many, context)[1]
            inverse_ladj = transform.inverse_and_ladj(y.expand(COUNT_DRAWS, -1), context)[1]
            values.append(torch.stack([ladj.detach(), -inverse_ladj.detach()], -1))
            grads = torch.autograd.grad(
                ladj.mean(), leaves, allow_unused=True, materialize_grads=True
            )
            gradients.append(sum((g * r).sum() for g, r in zip(grads, directions, strict=True)))
    each = torch.cat(values)
    _mean_is("mean ladj against slogdet", each, true.detach().expand(2), LADJ)
    of_gradients = torch.stack(cast("list[Tensor]", gradients))
    _mean_is("mean gradient of the ladj", of_gradients, cast(Tensor, wanted), LADJ)


def scores_are_unbiased(transform: FlowTransform) -> None:
    """The score of an estimated log-determinant is right on average."""
    point, context = points_of(transform), context_of(transform)
    x = point.clone().requires_grad_()
    score_x = points(constraints.real, tuple(x.shape), seed=4)
    (slope,) = torch.autograd.grad(_slogdet(transform, x, context), x, allow_unused=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: transform.forward_and_ladj(v, context)[0], point
    )
    wanted = torch.linalg.solve(jacobian.T, score_x - (0.0 if slope is None else slope))
    many = (v.expand(COUNT_GROUPS * COUNT_DRAWS, -1) for v in (point, score_x))
    with seeded(0), torch.no_grad():
        y, _, score_y = transform.push_score(next(many), next(many), context)
    close("y of push_score", y[0], transform.forward_and_ladj(point, context)[0], EXACT)
    _mean_is("mean score of push_score", score_y, wanted, LADJ)


def _mean_is(
    what: str, each: Tensor, wanted: Tensor | None, tolerance: float, *, below: bool = False
) -> None:
    """The mean over the first dimension is what is wanted, 0 by default, within its error."""
    error = each.mean(0) - (0.0 if wanted is None else wanted)
    allowed = 5 * each.std(0) / len(each) ** 0.5 + tolerance
    assert bool(each.isfinite().all()), f"{what}: not finite"
    off = error if below else error.abs()
    assert bool((off <= allowed).all()), (
        f"{what}: off by {error.tolist()}, with five standard errors of {allowed.tolist()}"
    )


def check_log_prob(
    flow: Flow,
    truth: Callable[[Tensor], Tensor],
    y: Tensor,
    context: Tensor | None = None,
    *,
    num_samples: int = 4_000,
) -> None:
    r"""Holds the log density of a flow against the true one: it must be what it says it is.

    - exact: :math:`\log q(y) = \log p(y)`, of draws too;
    - estimate: :math:`E \log q(y) = \log p(y)`;
    - bound: :math:`E \log q(y) \le \log p(y)` and :math:`E q(y) = p(y)`; and with the weight w of
      the path of a draw :math:`E \log w \ge E \log p(y)` and :math:`E [p(y) / w] = 1`.

    Args:
        flow: The flow; it is used as it is.
        truth: The true log density, ``(..., D) -> (...)``, by enumeration or quadrature.
        y: Points to compare at, ``(N, D)``.
        context: The context of all of them, ``(context_dim,)``.
        num_samples: Draws behind a mean. It may be off by five standard errors.

    Raises:
        AssertionError: If the log density is not what ``flow.log_prob_kind`` says.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import realnvp
        >>> normal = torch.distributions.Normal(0.0, 1.0)
        >>> check_log_prob(realnvp(2), lambda y: normal.log_prob(y).sum(-1), torch.randn(5, 2))
    """
    check_kind("check_log_prob", "flow", flow, Flow)
    check_callable("check_log_prob", "truth", truth, "a function of points", count=1)
    check_event_rows("check_log_prob", "y", y, flow.event_shape)
    check_context("check_log_prob", context, flow.context_dim)
    check_count("check_log_prob", "num_samples", num_samples, at_least=2)
    d = flow() if context is None else flow(context)
    with torch.no_grad(), seeded(0):
        tolerance = LADJ if y.dtype == torch.float64 else SINGLE
        wanted = truth(y)
        drawn, path = d.rsample_and_log_prob((num_samples,))
        true = truth(drawn)
        if d.log_prob_kind == "exact":
            close("log_prob", d.log_prob(y), wanted, tolerance)
            close("log_prob of draws", path, true, tolerance)
            return
        each = d.log_prob(y.expand(num_samples, *y.shape).clone())
        if d.log_prob_kind == "estimate":
            _mean_is("mean log_prob", each, wanted, tolerance)
            _mean_is("mean log_prob of draws less the truth", path - true, None, tolerance)
            return
        _mean_is("mean density over the true one", (each - wanted).exp() - 1, None, tolerance)
        _mean_is("mean log_prob, a lower bound,", each, wanted, tolerance, below=True)
        _mean_is("mean true density over the paths'", (true - path).exp() - 1, None, tolerance)
        _mean_is("mean true log density of draws", true - path, None, tolerance, below=True)
